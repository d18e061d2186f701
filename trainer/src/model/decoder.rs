//! Mistral (Jiang et al. 2023) as an encoder: pre-norm, RoPE, grouped-query attention in a sliding window, SwiGLU. Wiring
//! only; names as in transformers' `MistralModel`.

use candle_core::Tensor;
use kernels::activation::{self, Activation};
use kernels::attention::{self, Attention};
use kernels::{embedding, norm, rope};

use super::linear::{self, Linear};
use super::params::{Gradients, Parameter, Visit};
use super::pass::{Keep, Pass, SITES};
use super::settings::Settings;
use super::weights::{Init, Weights};
use crate::Result;

/// What config.json says of a Mistral.
#[derive(Clone, Debug)]
pub struct Shape {
    vocabulary: usize,
    width: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_width: usize,
    inner: usize,
    positions: usize,
    epsilon: f64,
    activation: Activation,
    base: f64,
    window: Option<usize>,
    dropout: f32,
}

/// The encoder.
#[derive(Debug)]
pub struct Decoder {
    shape: Shape,
    word: Parameter, // (V, D)
    layers: Vec<Layer>,
    norm: Parameter, // (D)
    rope: rope::Table,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Parameter, // (D)
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    norm: Parameter, // (D)
    gate: Linear,
    up: Linear,
    down: Linear,
    site: u32,
}

/// What [`Decoder::backward`] needs of a forward pass.
#[derive(Debug)]
pub struct Tape {
    layers: Vec<LayerTape>,
    norm: norm::Tape,
}

/// Norms' outputs and the activation's are computed again from what is kept here, in one pass over memory each.
#[derive(Debug)]
struct LayerTape {
    attention_norm: norm::Tape,
    inside: Option<Inside>,
    down: linear::Tape,
}

/// What a layer adds to the stream is made of.
#[derive(Debug)]
struct Inside {
    q: Tensor,       // (T, H*K) rotated
    k: Tensor,       // (T, G*K) rotated
    v: Tensor,       // (T, G*K)
    o: Tensor,       // (T, H*K)
    log_sum: Tensor, // (H, T)
    norm: norm::Tape,
    gate: Tensor, // (T, F)
    up: Tensor,   // (T, F)
    adapters: [linear::Tape; 6],
}

/// The residual stream between two layers: a layer's output is added by the next norm, in the pass that it makes anyway.
struct Stream {
    residual: Option<Tensor>, // (T, D)
    addition: Tensor,         // (T, D)
}

impl Shape {
    /// Reads and checks config.json.
    pub fn read(settings: &Settings, dropout: Option<f32>) -> Result<Self> {
        settings.expect("attention_bias", false)?;
        settings.expect("mlp_bias", false)?;
        settings.expect("rope_scaling", serde_json::Value::Null)?;
        let (width, heads) = (settings.size("hidden_size")?, settings.size("num_attention_heads")?);
        let kv_heads = settings.size_or("num_key_value_heads", heads)?;
        settings.divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)?;
        let head_width = match settings.optional_size("head_dim")? {
            Some(width) => width,
            None => {
                settings.divides("num_attention_heads", heads, "hidden_size", width)?;
                width / heads
            }
        };
        Ok(Self {
            vocabulary: settings.size("vocab_size")?,
            width,
            layers: settings.size("num_hidden_layers")?,
            heads,
            kv_heads,
            head_width,
            inner: settings.size("intermediate_size")?,
            positions: settings.size("max_position_embeddings")?,
            epsilon: settings.number("rms_norm_eps", 1e-6)?,
            activation: settings.activation("hidden_act", "silu")?,
            base: rope_base(settings)?,
            window: settings.optional_size("sliding_window")?,
            dropout: dropout.map_or_else(|| settings.rate("attention_dropout", 0.0), Ok)?,
        })
    }
}

/// `rope_theta`, or transformers 5's `rope_parameters`.
fn rope_base(settings: &Settings) -> Result<f64> {
    let Some(parameters) = settings.get("rope_parameters") else {
        return settings.number("rope_theta", 10_000.0);
    };
    match parameters.get("rope_type").and_then(|kind| kind.as_str()) {
        None | Some("default") => {}
        Some(kind) => {
            return Err(
                settings.wrong(format!("`rope_parameters.rope_type` is `{kind}`, supported is default"))
            );
        }
    }
    parameters
        .get("rope_theta")
        .and_then(serde_json::Value::as_f64)
        .ok_or_else(|| settings.wrong("`rope_parameters` lacks `rope_theta`, a number"))
}

impl Decoder {
    /// Names of which every Mistral file has one, with or without a prefix.
    pub const ANCHORS: &[&str] = &["embed_tokens.weight"];

    /// Takes the weights. Angles are tabled for texts of up to `longest` tokens: Mistral's 131,072 positions would be 67 MB.
    pub fn new(shape: Shape, weights: &Weights, longest: usize) -> Result<Self> {
        let (d, f) = (shape.width, shape.inner);
        let (queries, keys) = (shape.heads * shape.head_width, shape.kv_heads * shape.head_width);
        let norm =
            |name: &str| Ok::<_, crate::Error>(Parameter::frozen(weights.tensor(name, &[d], Init::Ones)?));
        let linear = |name: String, o: usize, i: usize, site: u32| {
            Ok::<_, crate::Error>(Linear::new(weights.matrix(&format!("{name}.weight"), o, i)?, None, site))
        };
        let layer = |l: usize| {
            let (name, site) = (format!("layers.{l}"), l as u32 * SITES);
            Ok::<_, crate::Error>(Layer {
                attention_norm: norm(&format!("{name}.input_layernorm.weight"))?,
                query: linear(format!("{name}.self_attn.q_proj"), queries, d, site)?,
                key: linear(format!("{name}.self_attn.k_proj"), keys, d, site + 1)?,
                value: linear(format!("{name}.self_attn.v_proj"), keys, d, site + 2)?,
                output: linear(format!("{name}.self_attn.o_proj"), d, queries, site + 3)?,
                norm: norm(&format!("{name}.post_attention_layernorm.weight"))?,
                gate: linear(format!("{name}.mlp.gate_proj"), f, d, site + 4)?,
                up: linear(format!("{name}.mlp.up_proj"), f, d, site + 5)?,
                down: linear(format!("{name}.mlp.down_proj"), d, f, site + 6)?,
                site,
            })
        };
        Ok(Self {
            word: Parameter::frozen(weights.matrix("embed_tokens.weight", shape.vocabulary, d)?),
            layers: (0..shape.layers).map(layer).collect::<Result<_>>()?,
            norm: norm("norm.weight")?,
            rope: rope::Table::new(longest.min(shape.positions), shape.head_width, shape.base),
            shape,
        })
    }

    /// ids (T) → hidden states (T, D), and the tape if it is to be kept.
    pub fn forward(&self, ids: &Tensor, pass: &Pass, keep: Keep) -> Result<(Tensor, Option<Tape>)> {
        let tables =
            embedding::Tables { word: self.word.value(), position: None, position_offset: 0, kind: None };
        let mut stream = Stream { residual: None, addition: embedding::forward(ids, pass.packing, &tables)? };
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (next, tape) = self.forward_layer(layer, stream, pass, keep)?;
            stream = next;
            layers.extend(tape);
        }
        let (y, norm) = self.normalise(&self.norm, &stream)?;
        Ok((y, (keep > Keep::Nothing).then_some(Tape { layers, norm })))
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
        let below = self.word.slot().is_some();
        let mut ds = Some(self.backward_norm(&self.norm, &tape.norm, &dy, None, gradients)?);
        for (l, (layer, tape)) in self.layers.iter().zip(tape.layers).enumerate().rev() {
            let Some(d) = ds.take() else { break };
            ds = self.backward_layer(layer, tape, d, l > 0 || below, pass, gradients)?;
        }
        if let (Some(dword), Some(dx)) = (gradients.of(&self.word)?, ds) {
            embedding::backward(&dx, ids, pass.packing, 0, Some(&dword), None, None)?;
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
        let (y, attention_norm) = self.normalise(&layer.attention_norm, &stream)?;
        let inside = self.inside(layer, y, &attention_norm, pass)?;
        let h = activation::gated(&inside.gate, &inside.up, self.shape.activation)?;
        let residual = Some(inside.norm.sum.clone());
        let inside = (keep == Keep::Whole).then_some(inside);
        let (d, down) = layer.down.forward(&h, pass)?; // (T, D)
        let tape = LayerTape { attention_norm, inside, down };
        Ok((Stream { residual, addition: d }, (keep > Keep::Nothing).then_some(tape)))
    }

    /// All but the last product, from y (T, D), the output of the layer's first norm.
    fn inside(&self, layer: &Layer, y: Tensor, stream: &norm::Tape, pass: &Pass) -> Result<Inside> {
        let (q, q_tape) = layer.query.forward(&y, pass)?; // (T, H*K)
        let (k, k_tape) = layer.key.forward(&y, pass)?; // (T, G*K)
        let (v, v_tape) = layer.value.forward(&y, pass)?; // (T, G*K)
        let q = rope::forward(&q, pass.packing, &self.rope)?;
        let k = rope::forward(&k, pass.packing, &self.rope)?;
        let (o, log_sum) = attention::forward(&q, &k, &v, pass.packing, &self.attention(layer, pass))?;
        let (a, o_tape) = layer.output.forward(&o, pass)?; // (T, D)

        let stream = Stream { residual: Some(stream.sum.clone()), addition: a };
        let (z, norm) = self.normalise(&layer.norm, &stream)?;
        let (gate, gate_tape) = layer.gate.forward(&z, pass)?; // (T, F)
        let (up, up_tape) = layer.up.forward(&z, pass)?; // (T, F)
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
        let y = norm::rms_norm_again(&tape.attention_norm, layer.attention_norm.value())?;
        let inside = match tape.inside {
            Some(inside) => inside,
            None => self.inside(layer, y.clone(), &tape.attention_norm, pass)?,
        };
        let Inside { q, k, v, o, log_sum, norm, gate, up, adapters } = inside;
        let [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape] = &adapters;
        let h = activation::gated(&gate, &up, self.shape.activation)?;
        let dh = layer.down.backward(&h, &tape.down, &ds, None, pass, gradients)?;
        let (dgate, dup) = activation::gated_backward(&gate, &up, &dh, self.shape.activation)?;
        let z = norm::rms_norm_again(&norm, layer.norm.value())?;
        let dz = layer.gate.backward(&z, gate_tape, &dgate, None, pass, gradients)?;
        let dz = layer.up.backward(&z, up_tape, &dup, Some(dz), pass, gradients)?;
        let ds = self.backward_norm(&layer.norm, &norm, &dz, Some(&ds), gradients)?;

        let d_o = layer.output.backward(&o, o_tape, &ds, None, pass, gradients)?;
        let attention = self.attention(layer, pass);
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &o, &log_sum, &d_o, pass.packing, &attention)?;
        let dq = rope::backward(&dq, pass.packing, &self.rope)?;
        let dk = rope::backward(&dk, pass.packing, &self.rope)?;
        if !below && layer.attention_norm.slot().is_none() {
            for (linear, tape, d) in
                [(&layer.query, q_tape, dq), (&layer.key, k_tape, dk), (&layer.value, v_tape, dv)]
            {
                linear.backward_parameters(&y, tape, &d, None, pass, gradients)?;
            }
            return Ok(None);
        }
        let dy = layer.query.backward(&y, q_tape, &dq, None, pass, gradients)?;
        let dy = layer.key.backward(&y, k_tape, &dk, Some(dy), pass, gradients)?;
        let dy = layer.value.backward(&y, v_tape, &dv, Some(dy), pass, gradients)?;
        self.backward_norm(&layer.attention_norm, &tape.attention_norm, &dy, Some(&ds), gradients).map(Some)
    }

    fn normalise(&self, weight: &Parameter, stream: &Stream) -> Result<(Tensor, norm::Tape)> {
        Ok(norm::rms_norm(&stream.addition, stream.residual.as_ref(), weight.value(), self.shape.epsilon)?)
    }

    fn backward_norm(
        &self,
        weight: &Parameter,
        tape: &norm::Tape,
        dy: &Tensor,
        dsum: Option<&Tensor>,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        Ok(norm::rms_norm_backward(tape, weight.value(), dy, dsum, gradients.of(weight)?.as_ref())?)
    }

    fn attention(&self, layer: &Layer, pass: &Pass) -> Attention {
        let shape = &self.shape;
        Attention {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_width: shape.head_width,
            scale: (shape.head_width as f32).sqrt().recip(),
            // transformers counts the token itself into the window
            left: shape.window.map(|window| window - 1),
            right: Some(0),
            dropout: pass.dropout(shape.dropout, layer.site + 7),
        }
    }

    /// Bytes of tape that one token leaves.
    pub fn tape_bytes_per_token(&self, keep: Keep) -> usize {
        let Shape { layers, width, inner, heads, kv_heads, head_width, .. } = self.shape;
        // a norm's sum and deviation
        let inputs = (layers + 1) * (width + 1);
        // q and o; k and v; log-sum-exp; another norm; gate and up
        let inside = 2 * heads * head_width + 2 * kv_heads * head_width + heads + width + 1 + 2 * inner;
        4 * match keep {
            Keep::Nothing => 0,
            Keep::Inputs => inputs,
            Keep::Whole => inputs + layers * inside,
        }
    }

    /// Parameters, in the order of the checkpoint.
    pub fn visit(&mut self, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter("embed_tokens.weight", &mut self.word)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let name = format!("layers.{l}");
            for (part, linear) in layer.linears() {
                linear.visit(&format!("{name}.{part}"), visit)?;
            }
            visit.parameter(&format!("{name}.input_layernorm.weight"), &mut layer.attention_norm)?;
            visit.parameter(&format!("{name}.post_attention_layernorm.weight"), &mut layer.norm)?;
        }
        visit.parameter("norm.weight", &mut self.norm)
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
}

impl Layer {
    fn linears(&mut self) -> [(&'static str, &mut Linear); 7] {
        [
            ("self_attn.q_proj", &mut self.query),
            ("self_attn.k_proj", &mut self.key),
            ("self_attn.v_proj", &mut self.value),
            ("self_attn.o_proj", &mut self.output),
            ("mlp.gate_proj", &mut self.gate),
            ("mlp.up_proj", &mut self.up),
            ("mlp.down_proj", &mut self.down),
        ]
    }
}
