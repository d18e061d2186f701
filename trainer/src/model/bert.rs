//! Encoders with norms after each block and a table of positions: BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019) and
//! XLM-RoBERTa (Conneau et al. 2019), MPNet (Song et al. 2020), DistilBERT (Sanh et al. 2019). Wiring only; what a family has
//! of its own is in [`Shape`] and in its `Names`.

mod shape;

use candle_core::Tensor;
use kernels::activation;
use kernels::attention::{self, Attention};
use kernels::{embedding, norm};

use self::shape::Names;
pub use self::shape::{Family, Shape};
use super::linear::{self, Linear};
use super::norms::LayerNorm;
use super::params::{Gradients, Parameter, Visit};
use super::pass::{Keep, Pass, SITES};
use super::relative::Relative;
use super::weights::{Init, Weights};
use crate::{Error, Result};

/// The encoder.
#[derive(Debug)]
pub struct Bert {
    shape: Shape,
    word: Parameter,         // (V, D)
    position: Parameter,     // (P, D)
    kind: Option<Parameter>, // (kinds, D)
    norm: LayerNorm,
    layers: Vec<Layer>,
    relative: Option<Relative>,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
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

impl Bert {
    /// Names of which every file has one, with or without a prefix.
    pub const ANCHORS: &[&str] = &["embeddings.word_embeddings.weight"];
    /// Tensors that transformers expects beside the encoder's own.
    pub const PASSTHROUGH: &str = "pooler.";

    /// Takes the weights.
    pub fn new(shape: Shape, weights: &Weights) -> Result<Self> {
        let (d, f, names) = (shape.width, shape.inner, shape.names);
        let norm = |name: &str| LayerNorm::new(weights, name, d, shape.epsilon, true);
        let linear = |name: String, o: usize, i: usize, site: u32| {
            let bias = weights.tensor(&format!("{name}.bias"), &[o], Init::Zeros)?;
            Ok::<_, Error>(Linear::new(weights.matrix(&format!("{name}.weight"), o, i)?, Some(bias), site))
        };
        let layer = |l: usize| {
            let (name, site) = (format!("{}.{l}", names.layers), l as u32 * SITES);
            let [query, key, value, output, up, down] = names.linears;
            let [attention_norm, last_norm] = names.norms;
            Ok::<_, Error>(Layer {
                query: linear(format!("{name}.{query}"), d, d, site)?,
                key: linear(format!("{name}.{key}"), d, d, site + 1)?,
                value: linear(format!("{name}.{value}"), d, d, site + 2)?,
                output: linear(format!("{name}.{output}"), d, d, site + 3)?,
                attention_norm: norm(&format!("{name}.{attention_norm}"))?,
                up: linear(format!("{name}.{up}"), f, d, site + 4)?,
                down: linear(format!("{name}.{down}"), d, f, site + 5)?,
                norm: norm(&format!("{name}.{last_norm}"))?,
                site,
            })
        };
        let table =
            |name: &str, rows: usize| Ok::<_, Error>(Parameter::frozen(weights.matrix(name, rows, d)?));
        let relative = |name: &str| Relative::new(weights, name, shape.heads);
        Ok(Self {
            word: table(Names::WORD, shape.vocabulary)?,
            position: table(Names::POSITION, shape.offset + shape.positions)?,
            kind: shape.kinds.map(|kinds| table(Names::KIND, kinds)).transpose()?,
            norm: norm(Names::NORM)?,
            layers: (0..shape.layers).map(layer).collect::<Result<_>>()?,
            relative: names.relative.map(relative).transpose()?,
            shape,
        })
    }

    /// ids (T) → hidden states (T, D), and the tape if any of it is to be kept.
    pub fn forward(&self, ids: &Tensor, pass: &Pass, keep: Keep) -> Result<(Tensor, Option<Tape>)> {
        let tables = embedding::Tables {
            word: self.word.value(),
            position: Some(self.position.value()),
            position_offset: self.shape.offset,
            kind: self.kind.as_ref().map(Parameter::value),
        };
        let sum = pass.round(embedding::forward(ids, pass.packing, &tables)?)?;
        let (x, embedding) = self.norm.forward(&sum, None, pass)?;
        let mut x = pass.drop(x, self.shape.dropout.hidden, self.dropout_site())?;
        let bias = self.bias(pass)?;
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (y, tape) = layer.forward(x, bias.as_ref(), pass, &self.shape, keep)?;
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
        let tables = [Some(&self.word), Some(&self.position), self.kind.as_ref()];
        let below = tables.iter().flatten().any(|p| p.slot().is_some()) || self.norm.trained();
        let bias = self.bias(pass)?;
        let mut dx = Some(dy);
        for (l, layer) in self.layers.iter().enumerate().rev() {
            let (Some(dy), Some(own)) = (dx.take(), tape.layers.pop()) else { break };
            let x = match tape.layers.last() {
                Some(tape) => self.layers[l - 1].norm.again(&tape.norm, pass)?,
                None => {
                    let x = self.norm.again(&tape.embedding, pass)?;
                    pass.drop(x, self.shape.dropout.hidden, self.dropout_site())?
                }
            };
            let (d, dbias) = gradients.beside(|| {
                layer.backward(&x, own, dy, bias.as_ref(), l > 0 || below, pass, gradients, &self.shape)
            })?;
            dx = d;
            if let (Some(relative), Some(dbias)) = (&self.relative, dbias) {
                relative.backward(&dbias, gradients)?;
            }
        }
        if let (true, Some(dx)) = (below, dx) {
            let dx = pass.drop(dx, self.shape.dropout.hidden, self.dropout_site())?;
            let dx = self.norm.backward(&tape.embedding, &dx, None, pass, gradients)?;
            let [word, position, kind] =
                tables.map(|table| table.map(|parameter| gradients.of(parameter)).transpose());
            let (word, position, kind) = (word?.flatten(), position?.flatten(), kind?.flatten());
            let offset = self.shape.offset;
            let (word, position, kind) = (word.as_ref(), position.as_ref(), kind.as_ref());
            embedding::backward(&dx, ids, pass.packing, offset, word, position, kind)?;
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
        let names = self.shape.names;
        visit.parameter(Names::WORD, &mut self.word)?;
        visit.parameter(Names::POSITION, &mut self.position)?;
        if let Some(kind) = &mut self.kind {
            visit.parameter(Names::KIND, kind)?;
        }
        self.norm.visit(Names::NORM, visit)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let name = format!("{}.{l}", names.layers);
            for (part, linear) in names.linears.iter().zip(layer.linears()) {
                linear.visit(&format!("{name}.{part}"), visit)?;
            }
            let [attention_norm, last_norm] = names.norms;
            layer.attention_norm.visit(&format!("{name}.{attention_norm}"), visit)?;
            layer.norm.visit(&format!("{name}.{last_norm}"), visit)?;
        }
        match (&mut self.relative, names.relative) {
            (Some(relative), Some(name)) => relative.visit(name, visit),
            _ => Ok(()),
        }
    }

    /// Every linear layer with its name: what LoRA attaches to.
    pub fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let names = self.shape.names;
        let layers = self.layers.iter_mut().enumerate();
        layers
            .flat_map(|(l, layer)| {
                let parts = names.linears.iter().zip(layer.linears());
                parts.map(move |(part, linear)| (format!("{}.{l}.{part}", names.layers), linear))
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

    fn bias(&self, pass: &Pass) -> Result<Option<Tensor>> {
        self.relative.as_ref().map(|relative| relative.bias(pass)).transpose()
    }

    fn dropout_site(&self) -> u32 {
        self.layers.len() as u32 * SITES
    }
}

impl Layer {
    fn forward(
        &self,
        x: Tensor,
        bias: Option<&Tensor>,
        pass: &Pass,
        shape: &Shape,
        keep: Keep,
    ) -> Result<(Tensor, Option<LayerTape>)> {
        let (inside, z) = self.inside(&x, bias, pass, shape)?;
        let h = pass.round(activation::forward(&inside.u, shape.activation)?)?;
        let inside = (keep == Keep::Whole).then_some(inside);
        let (d, down) = self.down.forward(&h, pass)?; // (T, D)
        let d = pass.drop(d, shape.dropout.hidden, self.site + 8)?;
        let (y, norm) = self.norm.forward(&d, Some(&z), pass)?;
        Ok((y, (keep > Keep::Nothing).then_some(LayerTape { inside, norm, down })))
    }

    /// All but the last product, and z (T, D), the feed-forward layer's input.
    fn inside(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        pass: &Pass,
        shape: &Shape,
    ) -> Result<(Inside, Tensor)> {
        let (q, (k, v)) = rayon::join(
            || self.query.forward(x, pass),
            || rayon::join(|| self.key.forward(x, pass), || self.value.forward(x, pass)),
        );
        let ((q, q_tape), (k, k_tape), (v, v_tape)) = (q?, k?, v?); // (T, D)
        let attention = self.attention(pass, shape);
        let (o, log_sum) = match bias {
            None => attention::forward(&q, &k, &v, pass.packing, &attention)?,
            Some(bias) => attention::forward_biased(&q, &k, &v, bias, pass.packing, &attention)?,
        };
        let o = pass.round(o)?;
        let (a, o_tape) = self.output.forward(&o, pass)?;
        let a = pass.drop(a, shape.dropout.attention_output, self.site + 7)?;
        let (z, attention_norm) = self.attention_norm.forward(&a, Some(x), pass)?;
        let (u, u_tape) = self.up.forward(&z, pass)?; // (T, F)
        let adapters = [q_tape, k_tape, v_tape, o_tape, u_tape];
        Ok((Inside { q, k, v, o, log_sum, attention_norm, u, adapters }, z))
    }

    /// dx (T, D) unless nothing below is trained, and the gradient of the bias by distance where there is one.
    fn backward(
        &self,
        x: &Tensor,
        tape: LayerTape,
        dy: Tensor,
        bias: Option<&Tensor>,
        below: bool,
        pass: &Pass,
        gradients: &Gradients,
        shape: &Shape,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (inside, z) = match tape.inside {
            Some(inside) => {
                let z = self.attention_norm.again(&inside.attention_norm, pass)?;
                (inside, z)
            }
            None => self.inside(x, bias, pass, shape)?,
        };
        let Inside { q, k, v, o, log_sum, attention_norm, u, adapters } = inside;
        let [q_tape, k_tape, v_tape, o_tape, u_tape] = &adapters;
        let dz = self.norm.backward(&tape.norm, &dy, None, pass, gradients)?; // of the residual, and of what was added to it
        let dd = pass.drop(dz.clone(), shape.dropout.hidden, self.site + 8)?;
        let h = pass.round(activation::forward(&u, shape.activation)?)?;
        let dh = self.down.backward(&h, &tape.down, &dd, None, pass, gradients)?;
        let du = pass.round(activation::backward(&u, &dh, shape.activation)?)?;
        // A copy: without dropout `dd` is the same memory.
        let dz = self.up.backward(&z, u_tape, &du, Some(dz.copy()?), pass, gradients)?;

        let dx = self.attention_norm.backward(&attention_norm, &dz, None, pass, gradients)?;
        let da = pass.drop(dx.clone(), shape.dropout.attention_output, self.site + 7)?;
        let d_o = self.output.backward(&o, o_tape, &da, None, pass, gradients)?;
        let (q, k, v, o, log_sum) = (&q, &k, &v, &o, &log_sum);
        let (packing, attention) = (pass.packing, self.attention(pass, shape));
        let ((dq, dk, dv), dbias) = match bias {
            None => (attention::backward(q, k, v, o, log_sum, &d_o, packing, &attention)?, None),
            Some(bias) => {
                let (dq, dk, dv, dbias) =
                    attention::backward_biased(q, k, v, bias, o, log_sum, &d_o, packing, &attention)?;
                ((dq, dk, dv), Some(dbias))
            }
        };
        let (dq, dk, dv) = (pass.round(dq)?, pass.round(dk)?, pass.round(dv)?);
        let inputs = [(&self.query, q_tape, dq), (&self.key, k_tape, dk), (&self.value, v_tape, dv)];
        if !below {
            for (linear, tape_of, d) in inputs {
                linear.backward_parameters(x, tape_of, &d, None, pass, gradients)?;
            }
            return Ok((None, dbias));
        }
        let mut dx = dx.copy()?; // `da` is the same memory
        for (linear, tape_of, d) in inputs {
            dx = linear.backward(x, tape_of, &d, Some(dx), pass, gradients)?;
        }
        Ok((Some(dx), dbias))
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
            dropout: pass.dropout(shape.dropout.probabilities, self.site + 6),
        }
    }

    /// In the order of [`Names::linears`].
    fn linears(&mut self) -> [&mut Linear; 6] {
        [&mut self.query, &mut self.key, &mut self.value, &mut self.output, &mut self.up, &mut self.down]
    }
}
