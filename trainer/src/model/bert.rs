//! BERT (Devlin et al. 2018): post-norm, absolute positions, GELU. Wiring only; names as in transformers' `BertModel`.

use candle_core::Tensor;
use kernels::activation::{self, Activation};
use kernels::attention::{self, Attention};
use kernels::{dropout, embedding, norm};

use super::linear::{self, Linear};
use super::params::{Gradients, Parameter, Visit};
use super::pass::{Keep, Pass, SITES};
use super::settings::Settings;
use super::weights::{Init, Weights};
use crate::Result;

/// What config.json says of a BERT.
#[derive(Clone, Debug)]
pub struct Shape {
    vocabulary: usize,
    width: usize,
    layers: usize,
    heads: usize,
    inner: usize,
    positions: usize,
    kinds: usize,
    epsilon: f64,
    activation: Activation,
    /// Of hidden states, and of attention probabilities.
    dropout: (f32, f32),
}

/// The encoder.
#[derive(Debug)]
pub struct Bert {
    shape: Shape,
    word: Parameter,     // (V, D)
    position: Parameter, // (P, D)
    kind: Parameter,     // (kinds, D)
    norm: Norm,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Norm {
    weight: Parameter, // (D)
    bias: Parameter,   // (D)
    epsilon: f64,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    norm: Norm,
    site: u32,
}

/// What [`Bert::backward`] needs of a forward pass.
#[derive(Debug)]
pub struct Tape {
    embedding: norm::Tape,
    layers: Vec<LayerTape>,
}

/// Norms' outputs and the activation's are computed again from what is kept here, in one pass over memory each; a layer's input
/// is the output of the norm below it.
#[derive(Debug)]
struct LayerTape {
    inside: Option<Inside>,
    norm: norm::Tape,
    down: linear::Tape,
}

/// What a layer's output is made of.
#[derive(Debug)]
struct Inside {
    q: Tensor,       // (T, D)
    k: Tensor,       // (T, D)
    v: Tensor,       // (T, D)
    o: Tensor,       // (T, D)
    log_sum: Tensor, // (H, T)
    attention_norm: norm::Tape,
    u: Tensor, // (T, F)
    adapters: [linear::Tape; 5],
}

impl Shape {
    /// Reads and checks config.json.
    pub fn read(settings: &Settings, dropout: Option<f32>) -> Result<Self> {
        settings.expect("position_embedding_type", "absolute")?;
        settings.expect("is_decoder", false)?;
        settings.expect("add_cross_attention", false)?;
        let (width, heads) = (settings.size("hidden_size")?, settings.size("num_attention_heads")?);
        settings.divides("num_attention_heads", heads, "hidden_size", width)?;
        Ok(Self {
            vocabulary: settings.size("vocab_size")?,
            width,
            layers: settings.size("num_hidden_layers")?,
            heads,
            inner: settings.size("intermediate_size")?,
            positions: settings.size("max_position_embeddings")?,
            kinds: settings.size("type_vocab_size")?,
            epsilon: settings.number("layer_norm_eps", 1e-12)?,
            activation: settings.activation("hidden_act", "gelu")?,
            dropout: (
                dropout.map_or_else(|| settings.rate("hidden_dropout_prob", 0.1), Ok)?,
                dropout.map_or_else(|| settings.rate("attention_probs_dropout_prob", 0.1), Ok)?,
            ),
        })
    }
}

impl Bert {
    /// Names of which every BERT file has one, with or without a prefix.
    pub const ANCHORS: &[&str] = &["embeddings.word_embeddings.weight"];
    /// Tensors that transformers expects beside the encoder's own.
    pub const CARRIED: &str = "pooler.";

    /// Takes the weights.
    pub fn new(shape: Shape, weights: &Weights) -> Result<Self> {
        let (d, epsilon) = (shape.width, shape.epsilon);
        let norm = |name: &str| {
            Ok::<_, crate::Error>(Norm {
                weight: Parameter::frozen(weights.tensor(&format!("{name}.weight"), &[d], Init::Ones)?),
                bias: Parameter::frozen(weights.tensor(&format!("{name}.bias"), &[d], Init::Zeros)?),
                epsilon,
            })
        };
        let linear = |name: &str, o: usize, i: usize, site: u32| {
            let bias = weights.tensor(&format!("{name}.bias"), &[o], Init::Zeros)?;
            Ok::<_, crate::Error>(Linear::new(
                weights.matrix(&format!("{name}.weight"), o, i)?,
                Some(bias),
                site,
            ))
        };
        let layer = |l: usize| {
            let (name, site, f) = (format!("encoder.layer.{l}"), l as u32 * SITES, shape.inner);
            Ok::<_, crate::Error>(Layer {
                query: linear(&format!("{name}.attention.self.query"), d, d, site)?,
                key: linear(&format!("{name}.attention.self.key"), d, d, site + 1)?,
                value: linear(&format!("{name}.attention.self.value"), d, d, site + 2)?,
                output: linear(&format!("{name}.attention.output.dense"), d, d, site + 3)?,
                attention_norm: norm(&format!("{name}.attention.output.LayerNorm"))?,
                up: linear(&format!("{name}.intermediate.dense"), f, d, site + 4)?,
                down: linear(&format!("{name}.output.dense"), d, f, site + 5)?,
                norm: norm(&format!("{name}.output.LayerNorm"))?,
                site,
            })
        };
        let table = |name: &str, rows: usize| {
            Ok::<_, crate::Error>(Parameter::frozen(weights.matrix(
                &format!("embeddings.{name}.weight"),
                rows,
                d,
            )?))
        };
        Ok(Self {
            word: table("word_embeddings", shape.vocabulary)?,
            position: table("position_embeddings", shape.positions)?,
            kind: table("token_type_embeddings", shape.kinds)?,
            norm: norm("embeddings.LayerNorm")?,
            layers: (0..shape.layers).map(layer).collect::<Result<_>>()?,
            shape,
        })
    }

    /// ids (T) → hidden states (T, D), and the tape if it is to be kept.
    pub fn forward(&self, ids: &Tensor, pass: &Pass, keep: Keep) -> Result<(Tensor, Option<Tape>)> {
        let tables = embedding::Tables {
            word: self.word.value(),
            position: Some(self.position.value()),
            position_offset: 0,
            kind: Some(self.kind.value()),
        };
        let sum = embedding::forward(ids, pass.packing, &tables)?;
        let (x, embedding) = self.norm.forward(&sum, None)?;
        let mut x = drop(x, pass, self.shape.dropout.0, self.dropout_site())?;
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (y, tape) = layer.forward(x, pass, &self.shape, keep)?;
            x = y;
            layers.extend(tape);
        }
        Ok((x, (keep > Keep::Nothing).then_some(Tape { embedding, layers })))
    }

    /// d(hidden states) (T, D) → the gradients of everything trained.
    pub fn backward(
        &self,
        ids: &Tensor,
        mut tape: Tape,
        dy: Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()> {
        let tables = [&self.word, &self.position, &self.kind];
        let below = tables.iter().any(|p| p.slot().is_some()) || self.norm.trained();
        let mut dx = Some(dy);
        for (l, layer) in self.layers.iter().enumerate().rev() {
            let (Some(dy), Some(own)) = (dx.take(), tape.layers.pop()) else { break };
            let x = match tape.layers.last() {
                Some(tape) => self.layers[l - 1].norm.again(&tape.norm)?,
                None => {
                    drop(self.norm.again(&tape.embedding)?, pass, self.shape.dropout.0, self.dropout_site())?
                }
            };
            dx = layer.backward(&x, own, dy, l > 0 || below, pass, gradients, &self.shape)?;
        }
        if let (true, Some(dx)) = (below, dx) {
            let dx = drop(dx, pass, self.shape.dropout.0, self.dropout_site())?;
            let dx = self.norm.backward(&tape.embedding, &dx, gradients)?;
            let [word, position, kind] = tables.map(|parameter| gradients.of(parameter));
            let (word, position, kind) = (word?, position?, kind?);
            embedding::backward(&dx, ids, pass.packing, 0, word.as_ref(), position.as_ref(), kind.as_ref())?;
        }
        Ok(())
    }

    /// Bytes of tape that one token leaves.
    pub fn tape_bytes_per_token(&self, keep: Keep) -> usize {
        let Shape { layers, width, inner, heads, .. } = self.shape;
        // a norm's sum, mean and deviation
        let inputs = (layers + 1) * (width + 2);
        // q, k, v, o, log-sum-exp; another norm; u
        let inside = layers * (5 * width + heads + 2 + inner);
        4 * match keep {
            Keep::Nothing => 0,
            Keep::Inputs => inputs,
            Keep::Whole => inputs + inside,
        }
    }

    /// Parameters, in the order of the checkpoint.
    pub fn visit(&mut self, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter("embeddings.word_embeddings.weight", &mut self.word)?;
        visit.parameter("embeddings.position_embeddings.weight", &mut self.position)?;
        visit.parameter("embeddings.token_type_embeddings.weight", &mut self.kind)?;
        self.norm.visit("embeddings.LayerNorm", visit)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let name = format!("encoder.layer.{l}");
            for (part, linear) in layer.linears() {
                linear.visit(&format!("{name}.{part}"), visit)?;
            }
            layer.attention_norm.visit(&format!("{name}.attention.output.LayerNorm"), visit)?;
            layer.norm.visit(&format!("{name}.output.LayerNorm"), visit)?;
        }
        Ok(())
    }

    /// Every linear layer with its name: what LoRA attaches to.
    pub fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let layers = self.layers.iter_mut().enumerate();
        layers
            .flat_map(|(l, layer)| {
                layer.linears().map(move |(part, linear)| (format!("encoder.layer.{l}.{part}"), linear))
            })
            .collect()
    }

    /// D.
    pub fn width(&self) -> usize {
        self.shape.width
    }

    /// The longest text that has positions.
    pub fn positions(&self) -> usize {
        self.shape.positions
    }

    /// V.
    pub fn vocabulary(&self) -> usize {
        self.shape.vocabulary
    }

    fn dropout_site(&self) -> u32 {
        self.layers.len() as u32 * SITES
    }
}

impl Layer {
    fn forward(
        &self,
        x: Tensor,
        pass: &Pass,
        shape: &Shape,
        keep: Keep,
    ) -> Result<(Tensor, Option<LayerTape>)> {
        let (inside, z) = self.inside(&x, pass, shape)?;
        let h = activation::forward(&inside.u, shape.activation)?;
        let inside = (keep == Keep::Whole).then_some(inside);
        let (d, down) = self.down.forward(&h, pass)?; // (T, D)
        let d = drop(d, pass, shape.dropout.0, self.site + 8)?;
        let (y, norm) = self.norm.forward(&d, Some(&z))?;
        Ok((y, (keep > Keep::Nothing).then_some(LayerTape { inside, norm, down })))
    }

    /// All but the last product, and z (T, D), the feed-forward layer's input.
    fn inside(&self, x: &Tensor, pass: &Pass, shape: &Shape) -> Result<(Inside, Tensor)> {
        let (q, (k, v)) = rayon::join(
            || self.query.forward(x, pass),
            || rayon::join(|| self.key.forward(x, pass), || self.value.forward(x, pass)),
        );
        let ((q, q_tape), (k, k_tape), (v, v_tape)) = (q?, k?, v?); // (T, D)
        let (o, log_sum) = attention::forward(&q, &k, &v, pass.packing, &self.attention(pass, shape))?;
        let (a, o_tape) = self.output.forward(&o, pass)?;
        let a = drop(a, pass, shape.dropout.0, self.site + 7)?;
        let (z, attention_norm) = self.attention_norm.forward(&a, Some(x))?;
        let (u, u_tape) = self.up.forward(&z, pass)?; // (T, F)
        let adapters = [q_tape, k_tape, v_tape, o_tape, u_tape];
        Ok((Inside { q, k, v, o, log_sum, attention_norm, u, adapters }, z))
    }

    fn backward(
        &self,
        x: &Tensor,
        tape: LayerTape,
        dy: Tensor,
        below: bool,
        pass: &Pass,
        gradients: &Gradients,
        shape: &Shape,
    ) -> Result<Option<Tensor>> {
        let (inside, z) = match tape.inside {
            Some(inside) => {
                let z = self.attention_norm.again(&inside.attention_norm)?;
                (inside, z)
            }
            None => self.inside(x, pass, shape)?,
        };
        let Inside { q, k, v, o, log_sum, attention_norm, u, adapters } = inside;
        let [q_tape, k_tape, v_tape, o_tape, u_tape] = &adapters;
        let dz = self.norm.backward(&tape.norm, &dy, gradients)?; // of the residual, and of what was added to it
        let dd = drop(dz.clone(), pass, shape.dropout.0, self.site + 8)?;
        let h = activation::forward(&u, shape.activation)?;
        let dh = self.down.backward(&h, &tape.down, &dd, None, pass, gradients)?;
        let du = activation::backward(&u, &dh, shape.activation)?;
        let dz = self.up.backward(&z, u_tape, &du, Some(dz), pass, gradients)?;

        let dx = self.attention_norm.backward(&attention_norm, &dz, gradients)?;
        let da = drop(dx.clone(), pass, shape.dropout.0, self.site + 7)?;
        let d_o = self.output.backward(&o, o_tape, &da, None, pass, gradients)?;
        let attention = self.attention(pass, shape);
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &o, &log_sum, &d_o, pass.packing, &attention)?;
        let inputs = [(&self.query, q_tape, dq), (&self.key, k_tape, dk), (&self.value, v_tape, dv)];
        if !below {
            for (linear, tape_of, d) in inputs {
                linear.backward_parameters(x, tape_of, &d, None, pass, gradients)?;
            }
            return Ok(None);
        }
        let mut dx = dx;
        for (linear, tape_of, d) in inputs {
            dx = linear.backward(x, tape_of, &d, Some(dx), pass, gradients)?;
        }
        Ok(Some(dx))
    }

    fn attention(&self, pass: &Pass, shape: &Shape) -> Attention {
        let head_width = shape.width / shape.heads;
        Attention {
            heads: shape.heads,
            kv_heads: shape.heads,
            head_width,
            scale: (head_width as f32).sqrt().recip(),
            left: None,
            right: None,
            dropout: pass.dropout(shape.dropout.1, self.site + 6),
        }
    }

    fn linears(&mut self) -> [(&'static str, &mut Linear); 6] {
        [
            ("attention.self.query", &mut self.query),
            ("attention.self.key", &mut self.key),
            ("attention.self.value", &mut self.value),
            ("attention.output.dense", &mut self.output),
            ("intermediate.dense", &mut self.up),
            ("output.dense", &mut self.down),
        ]
    }
}

impl Norm {
    fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<(Tensor, norm::Tape)> {
        Ok(norm::layer_norm(x, residual, self.weight.value(), Some(self.bias.value()), self.epsilon)?)
    }

    fn again(&self, tape: &norm::Tape) -> Result<Tensor> {
        Ok(norm::layer_norm_again(tape, self.weight.value(), Some(self.bias.value()))?)
    }

    fn backward(&self, tape: &norm::Tape, dy: &Tensor, gradients: &Gradients) -> Result<Tensor> {
        let (dw, db) = (gradients.of(&self.weight)?, gradients.of(&self.bias)?);
        Ok(norm::layer_norm_backward(tape, self.weight.value(), dy, None, dw.as_ref(), db.as_ref())?)
    }

    fn trained(&self) -> bool {
        self.weight.slot().is_some() || self.bias.slot().is_some()
    }

    fn visit(&mut self, name: &str, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter(&format!("{name}.weight"), &mut self.weight)?;
        visit.parameter(&format!("{name}.bias"), &mut self.bias)
    }
}

/// Dropout, forward on x and backward on dx: the same mask.
fn drop(x: Tensor, pass: &Pass, p: f32, site: u32) -> Result<Tensor> {
    match pass.dropout(p, site) {
        Some(mask) => Ok(dropout::apply(&x, pass.packing, &mask)?),
        None => Ok(x),
    }
}
