//! ModernBERT (Warner et al. 2024): pre-norm, RoPE with two bases, windows in most layers, GeGLU. Wiring only; names as in
//! transformers' `ModernBertModel`, whose checkpoints have one weight for query, key and value, and one for both halves of
//! the feed-forward layer: they are taken apart by rows.

use candle_core::Tensor;
use kernels::activation::{self, Activation};
use kernels::attention::{self, Attention};
use kernels::{embedding, norm, rope};

use super::linear::{self, Linear};
use super::norms::LayerNorm;
use super::params::{Gradients, Parameter, Visit};
use super::pass::{Keep, Pass, SITES};
use super::rotary::{Place, Rotary};
use super::settings::Settings;
use super::weights::{Init, Weights};
use crate::{Error, Result};

/// What config.json says of a ModernBERT.
#[derive(Clone, Debug)]
pub struct Shape {
    vocabulary: usize,
    width: usize,
    heads: usize,
    inner: usize,
    positions: usize,
    epsilon: f64,
    activation: Activation,
    /// Of norms, of attention and of the feed-forward layer.
    biased: [bool; 3],
    /// Of each layer, how far it sees to both sides; none is the whole text.
    reaches: Vec<Option<usize>>,
    /// Of the layers that see everything, and of those with a window.
    rotaries: [Rotary; 2],
    dropout: Dropout,
}

#[derive(Clone, Copy, Debug)]
struct Dropout {
    embedding: f32,
    attention: f32,
    inner: f32,
}

/// The encoder.
#[derive(Debug)]
pub struct ModernBert {
    shape: Shape,
    word: Parameter, // (V, D)
    norm: LayerNorm,
    layers: Vec<Layer>,
    last_norm: LayerNorm,
    ropes: Vec<rope::Table>,
}

#[derive(Debug)]
struct Layer {
    /// None in the first layer, whose input is normed already.
    attention_norm: Option<LayerNorm>,
    query_key_value: Linear,
    output: Linear,
    norm: LayerNorm,
    gate_up: Linear,
    down: Linear,
    reach: Option<usize>,
    site: u32,
}

/// What [`ModernBert::backward`] needs of a forward pass.
#[derive(Debug)]
pub struct Tape {
    embedding: norm::Tape,
    layers: Vec<LayerTape>,
    last_norm: norm::Tape,
}

/// Norms' outputs and the activation's are computed again from what is kept here, in one pass over memory each.
#[derive(Debug)]
struct LayerTape {
    input: Input,
    inside: Option<Inside>,
    down: linear::Tape,
}

/// What a layer adds to the stream is made of.
#[derive(Debug)]
struct Inside {
    q: Tensor,       // (T, D) rotated
    k: Tensor,       // (T, D) rotated
    v: Tensor,       // (T, D)
    o: Tensor,       // (T, D)
    log_sum: Tensor, // (H, T)
    norm: norm::Tape,
    gate: Tensor, // (T, F)
    up: Tensor,   // (T, F)
    adapters: [linear::Tape; 6],
}

/// What a layer's attention has looked at.
#[derive(Debug)]
enum Input {
    Plain(Tensor), // (T, D)
    Normed(norm::Tape),
}

impl Input {
    /// The residual stream that it was taken from, (T, D).
    fn stream(&self) -> &Tensor {
        match self {
            Self::Plain(x) => x,
            Self::Normed(tape) => &tape.sum,
        }
    }
}

/// The residual stream between two layers: a layer's output is added by the next norm, in the pass that it makes anyway.
struct Stream {
    residual: Option<Tensor>, // (T, D)
    addition: Tensor,         // (T, D)
}

impl Shape {
    /// Reads and checks config.json. A field that is absent has the value that transformers gives it.
    pub fn read(settings: &Settings, dropout: Option<f32>) -> Result<Self> {
        settings.expect("quantization_config", serde_json::Value::Null)?;
        let (width, heads) = (settings.size("hidden_size")?, settings.size("num_attention_heads")?);
        settings.divides("num_attention_heads", 2 * heads, "hidden_size", width)?;
        let layers = settings.size("num_hidden_layers")?;
        let every = settings.size_or("global_attn_every_n_layers", 3)?;
        let window = settings.size_or("local_attention", 128)?;
        let reach = |l| Ok(settings.windowed(l, layers, |l| !l.is_multiple_of(every))?.then_some(window / 2));
        let base = |kind, base, default| Rotary::read(settings, Place { kind, base, default, scaled: true });
        let rate = |name: &str| dropout.map_or_else(|| settings.rate(name, 0.0), Ok);
        Ok(Self {
            vocabulary: settings.size("vocab_size")?,
            width,
            heads,
            inner: settings.size("intermediate_size")?,
            positions: settings.size("max_position_embeddings")?,
            epsilon: settings.number("norm_eps", 1e-5)?,
            activation: settings.activation("hidden_activation", "gelu")?,
            biased: [
                settings.flag("norm_bias", false)?,
                settings.flag("attention_bias", false)?,
                settings.flag("mlp_bias", false)?,
            ],
            reaches: (0..layers).map(reach).collect::<Result<_>>()?,
            rotaries: [
                base("full_attention", "global_rope_theta", 160_000.0)?,
                base("sliding_attention", "local_rope_theta", 10_000.0)?,
            ],
            dropout: Dropout {
                embedding: rate("embedding_dropout")?,
                attention: rate("attention_dropout")?,
                inner: rate("mlp_dropout")?,
            },
        })
    }
}

impl ModernBert {
    /// Names of which every file has one, with or without a prefix.
    pub const ANCHORS: &[&str] = &["embeddings.tok_embeddings.weight"];

    /// Takes the weights. Angles are tabled for texts of up to `longest` tokens.
    pub fn new(shape: Shape, weights: &Weights, longest: usize) -> Result<Self> {
        let (d, f) = (shape.width, shape.inner);
        let [of_norms, of_attention, of_feed_forward] = shape.biased;
        let norm = |name: &str| LayerNorm::new(weights, name, d, shape.epsilon, of_norms);
        let linear = |name: String, o: usize, i: usize, biased: bool, site: u32| {
            let bias = |o: usize| weights.tensor(&format!("{name}.bias"), &[o], Init::Zeros);
            let bias = biased.then(|| bias(o)).transpose()?;
            Ok::<_, Error>(Linear::new(weights.matrix(&format!("{name}.weight"), o, i)?, bias, site))
        };
        let layer = |(l, &reach): (usize, &Option<usize>)| {
            let (name, site) = (format!("layers.{l}"), l as u32 * SITES);
            Ok::<_, Error>(Layer {
                attention_norm: (l > 0).then(|| norm(&format!("{name}.attn_norm"))).transpose()?,
                query_key_value: linear(format!("{name}.attn.Wqkv"), 3 * d, d, of_attention, site)?,
                output: linear(format!("{name}.attn.Wo"), d, d, of_attention, site + 1)?,
                norm: norm(&format!("{name}.mlp_norm"))?,
                gate_up: linear(format!("{name}.mlp.Wi"), 2 * f, d, of_feed_forward, site + 2)?,
                down: linear(format!("{name}.mlp.Wo"), d, f, of_feed_forward, site + 3)?,
                reach,
                site,
            })
        };
        let positions = longest.min(shape.positions);
        let word = weights.matrix("embeddings.tok_embeddings.weight", shape.vocabulary, d)?;
        Ok(Self {
            word: Parameter::frozen(word),
            norm: norm("embeddings.norm")?,
            layers: shape.reaches.iter().enumerate().map(layer).collect::<Result<_>>()?,
            last_norm: norm("final_norm")?,
            ropes: shape.rotaries.iter().map(|rotary| rotary.table(positions, d / shape.heads)).collect(),
            shape,
        })
    }

    /// ids (T) → hidden states (T, D), and the tape if any of it is to be kept.
    pub fn forward(&self, ids: &Tensor, pass: &Pass, keep: Keep) -> Result<(Tensor, Option<Tape>)> {
        let tables =
            embedding::Tables { word: self.word.value(), position: None, position_offset: 0, kind: None };
        let (x, embedding) =
            self.norm.forward(&pass.round(embedding::forward(ids, pass.packing, &tables)?)?, None, pass)?;
        let x = pass.drop(x, self.shape.dropout.embedding, self.dropout_site())?;
        let mut stream = Stream { residual: None, addition: x };
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (next, tape) = self.forward_layer(layer, stream, pass, keep)?;
            stream = next;
            layers.extend(tape);
        }
        let (y, last_norm) = self.last_norm.forward(&stream.addition, stream.residual.as_ref(), pass)?;
        Ok((y, (keep > Keep::Nothing).then_some(Tape { embedding, layers, last_norm })))
    }

    /// d(hidden states) (T, D) → the gradients of everything trained.
    pub fn backward(
        &self,
        ids: &Tensor,
        tape: Tape,
        dy: Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()> {
        let below = self.word.slot().is_some() || self.norm.trained();
        let mut ds = Some(self.last_norm.backward(&tape.last_norm, &dy, None, pass, gradients)?);
        for (l, (layer, tape)) in self.layers.iter().zip(tape.layers).enumerate().rev() {
            let Some(d) = ds.take() else { break };
            ds = gradients.beside(|| self.backward_layer(layer, tape, d, l > 0 || below, pass, gradients))?;
        }
        if let (true, Some(dx)) = (below, ds) {
            let dx = pass.drop(dx, self.shape.dropout.embedding, self.dropout_site())?;
            let dx = self.norm.backward(&tape.embedding, &dx, None, pass, gradients)?;
            if let Some(dword) = gradients.of(&self.word)? {
                embedding::backward(&dx, ids, pass.packing, 0, Some(&dword), None, None)?;
            }
        }
        Ok(())
    }

    fn forward_layer(
        &self,
        layer: &Layer,
        stream: Stream,
        pass: &Pass,
        keep: Keep,
    ) -> Result<(Stream, Option<LayerTape>)> {
        let shape = &self.shape;
        let (y, input) = match &layer.attention_norm {
            Some(norm) => {
                let (y, tape) = norm.forward(&stream.addition, stream.residual.as_ref(), pass)?;
                (y, Input::Normed(tape))
            }
            None => (stream.addition.clone(), Input::Plain(stream.addition)),
        };
        let inside = self.inside(layer, &y, input.stream(), pass)?;
        let h = pass.round(activation::gated(&inside.gate, &inside.up, shape.activation)?)?;
        let h = pass.drop(h, shape.dropout.inner, layer.site + 6)?;
        let residual = Some(inside.norm.sum.clone());
        let inside = (keep == Keep::Whole).then_some(inside);
        let (d, down) = layer.down.forward(&h, pass)?; // (T, D)
        let tape = LayerTape { input, inside, down };
        Ok((Stream { residual, addition: d }, (keep > Keep::Nothing).then_some(tape)))
    }

    /// All but the last product, from attention's input y (T, D) and the stream (T, D) that it comes from.
    fn inside(&self, layer: &Layer, y: &Tensor, stream: &Tensor, pass: &Pass) -> Result<Inside> {
        let shape = &self.shape;
        let [query, key, value] = layer.attention_parts(shape.width)?;
        let (q, (k, v)) = rayon::join(
            || query.forward(y, pass),
            || rayon::join(|| key.forward(y, pass), || value.forward(y, pass)),
        );
        let ((q, q_tape), (k, k_tape), (v, v_tape)) = (q?, k?, v?); // (T, D)
        let (q, k) = rope::forward_both(&q, &k, pass.packing, self.table(layer))?;
        let (q, k) = (pass.round(q)?, pass.round(k)?);
        let (o, log_sum) = attention::forward(&q, &k, &v, pass.packing, &self.attention(layer, pass))?;
        let o = pass.round(o)?;
        let (a, o_tape) = layer.output.forward(&o, pass)?; // (T, D)
        let a = pass.drop(a, shape.dropout.attention, layer.site + 5)?;

        let (z, norm) = layer.norm.forward(&a, Some(stream), pass)?;
        let [gate, up] = layer.feed_forward_parts(shape.inner)?;
        let (gate, up) = rayon::join(|| gate.forward(&z, pass), || up.forward(&z, pass));
        let ((gate, gate_tape), (up, up_tape)) = (gate?, up?); // (T, F)
        let adapters = [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape];
        Ok(Inside { q, k, v, o, log_sum, norm, gate, up, adapters })
    }

    /// `ds` is the gradient of the stream after this layer, which is that of the layer's addition too.
    fn backward_layer(
        &self,
        layer: &Layer,
        tape: LayerTape,
        ds: Tensor,
        below: bool,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Option<Tensor>> {
        let shape = &self.shape;
        let y = match (&tape.input, &layer.attention_norm) {
            (Input::Normed(tape), Some(norm)) => norm.again(tape, pass)?,
            (Input::Plain(x), _) => x.clone(),
            (Input::Normed(_), None) => return Err(Error::Bug("the tape is of another encoder".to_owned())),
        };
        let inside = match tape.inside {
            Some(inside) => inside,
            None => self.inside(layer, &y, tape.input.stream(), pass)?,
        };
        let Inside { q, k, v, o, log_sum, norm, gate, up, adapters } = inside;
        let [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape] = &adapters;
        let h = pass.round(activation::gated(&gate, &up, shape.activation)?)?;
        let h = pass.drop(h, shape.dropout.inner, layer.site + 6)?;
        let dh = layer.down.backward(&h, &tape.down, &ds, None, pass, gradients)?;
        let dh = pass.drop(dh, shape.dropout.inner, layer.site + 6)?;
        let (dgate, dup) = activation::gated_backward(&gate, &up, &dh, shape.activation)?;
        let (dgate, dup) = (pass.round(dgate)?, pass.round(dup)?);
        let z = layer.norm.again(&norm, pass)?;
        let [gate, up] = layer.feed_forward_parts(shape.inner)?;
        let dz = gate.backward(&z, gate_tape, &dgate, None, pass, gradients)?;
        let dz = up.backward(&z, up_tape, &dup, Some(dz), pass, gradients)?;
        let ds = layer.norm.backward(&norm, &dz, Some(&ds), pass, gradients)?;

        let da = pass.drop(ds.clone(), shape.dropout.attention, layer.site + 5)?;
        let d_o = layer.output.backward(&o, o_tape, &da, None, pass, gradients)?;
        let attention = self.attention(layer, pass);
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &o, &log_sum, &d_o, pass.packing, &attention)?;
        let (dq, dk, dv) = (pass.round(dq)?, pass.round(dk)?, pass.round(dv)?);
        let (dq, dk) = rope::backward_both(&dq, &dk, pass.packing, self.table(layer))?;
        let (dq, dk) = (pass.round(dq)?, pass.round(dk)?);
        let [query, key, value] = layer.attention_parts(shape.width)?;
        if !below && !layer.attention_norm.as_ref().is_some_and(LayerNorm::trained) {
            for (linear, tape, d) in [(query, q_tape, dq), (key, k_tape, dk), (value, v_tape, dv)] {
                linear.backward_parameters(&y, tape, &d, None, pass, gradients)?;
            }
            return Ok(None);
        }
        // Without a norm before it, attention's input is the stream itself.
        let straight = layer.attention_norm.is_none().then(|| ds.copy()).transpose()?; // `da` is the memory of ds
        let dy = query.backward(&y, q_tape, &dq, straight, pass, gradients)?;
        let dy = key.backward(&y, k_tape, &dk, Some(dy), pass, gradients)?;
        let dy = value.backward(&y, v_tape, &dv, Some(dy), pass, gradients)?;
        match (&tape.input, &layer.attention_norm) {
            (Input::Normed(tape), Some(norm)) => {
                norm.backward(tape, &dy, Some(&ds), pass, gradients).map(Some)
            }
            _ => Ok(Some(dy)),
        }
    }

    fn attention(&self, layer: &Layer, pass: &Pass) -> Attention {
        let shape = &self.shape;
        let head_width = shape.width / shape.heads;
        Attention {
            heads: shape.heads,
            kv_heads: shape.heads,
            head_width,
            scale: (head_width as f32).sqrt().recip(),
            left: layer.reach,
            right: layer.reach,
            dropout: pass.dropout(shape.dropout.attention, layer.site + 4),
        }
    }

    fn table(&self, layer: &Layer) -> &rope::Table {
        &self.ropes[usize::from(layer.reach.is_some())]
    }

    /// Bytes of tape that one token leaves.
    pub fn tape_bytes_per_token(&self, keep: Keep) -> usize {
        let Shape { width, inner, heads, ref reaches, .. } = self.shape;
        let layers = reaches.len();
        // a norm's sum, mean and deviation
        let inputs = (layers + 2) * (width + 2);
        // q, k, v, o, log-sum-exp; another norm; gate and up
        let inside = layers * (5 * width + heads + 2 + 2 * inner);
        4 * match keep {
            Keep::Nothing => 0,
            Keep::Inputs => inputs,
            Keep::Whole => inputs + inside,
        }
    }

    /// Parameters, in the order of the checkpoint.
    pub fn visit(&mut self, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter("embeddings.tok_embeddings.weight", &mut self.word)?;
        self.norm.visit("embeddings.norm", visit)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let name = format!("layers.{l}");
            if let Some(norm) = &mut layer.attention_norm {
                norm.visit(&format!("{name}.attn_norm"), visit)?;
            }
            for (part, linear) in layer.linears() {
                linear.visit(&format!("{name}.{part}"), visit)?;
            }
            layer.norm.visit(&format!("{name}.mlp_norm"), visit)?;
        }
        self.last_norm.visit("final_norm", visit)
    }

    /// Every linear layer with its name: what LoRA attaches to.
    pub fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let layers = self.layers.iter_mut().enumerate();
        layers
            .flat_map(|(l, layer)| {
                layer.linears().map(move |(part, linear)| (format!("layers.{l}.{part}"), linear))
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
    fn attention_parts(&self, d: usize) -> Result<[Linear; 3]> {
        let all = &self.query_key_value;
        Ok([all.rows(0..d)?, all.rows(d..2 * d)?, all.rows(2 * d..3 * d)?])
    }

    fn feed_forward_parts(&self, f: usize) -> Result<[Linear; 2]> {
        Ok([self.gate_up.rows(0..f)?, self.gate_up.rows(f..2 * f)?])
    }

    fn linears(&mut self) -> [(&'static str, &mut Linear); 4] {
        [
            ("attn.Wqkv", &mut self.query_key_value),
            ("attn.Wo", &mut self.output),
            ("mlp.Wi", &mut self.gate_up),
            ("mlp.Wo", &mut self.down),
        ]
    }
}
