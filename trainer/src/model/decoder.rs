//! Decoders as encoders: Mistral (Jiang et al. 2023), Llama (Touvron et al. 2023), Qwen2 and Qwen3 (Qwen Team 2024, 2025),
//! Gemma 3 (Gemma Team 2025). Pre-norm, RoPE, grouped-query attention, a gated feed-forward layer. Wiring only: what a family
//! has or lacks is in [`Shape`]. Names as in transformers' `MistralModel` and its likes.

mod shape;

use candle_core::Tensor;
use kernels::activation;
use kernels::attention::{self, Attention};
use kernels::{embedding, norm, rope};

use self::shape::Sight;
pub use self::shape::{Family, Shape};
use super::linear::{self, Linear};
use super::norms::Rms;
use super::params::{Gradients, Parameter, Visit};
use super::pass::{Keep, Pass, SITES};

use super::weights::{Init, Weights};
use crate::{Error, Result};

/// The encoder.
#[derive(Debug)]
pub struct Decoder {
    shape: Shape,
    word: Parameter, // (V, D)
    layers: Vec<Layer>,
    norm: Rms,
    ropes: Vec<rope::Table>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Rms,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Of each head's queries, and of its keys.
    head_norms: Option<[Rms; 2]>,
    output: Linear,
    norm: Rms,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// Of what attention adds to the stream, and of what the feed-forward layer adds.
    addition_norms: Option<[Rms; 2]>,
    sight: Sight,
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
    /// Of what the feed-forward layer adds.
    down_norm: Option<norm::Tape>,
}

/// What a layer adds to the stream is made of.
#[derive(Debug)]
struct Inside {
    heads: Heads,
    v: Tensor,       // (T, G*K)
    o: Tensor,       // (T, H*K)
    log_sum: Tensor, // (H, T)
    /// Of what attention adds.
    output_norm: Option<norm::Tape>,
    norm: norm::Tape,
    gate: Tensor, // (T, F)
    up: Tensor,   // (T, F)
    adapters: [linear::Tape; 6],
}

/// Queries (T, H*K) and keys (T, G*K).
#[derive(Debug)]
enum Heads {
    /// Turned by their positions.
    Turned([Tensor; 2]),
    /// Not yet normed and turned.
    Raw([norm::Tape; 2]),
}

/// The residual stream between two layers: a layer's output is added by the next norm, in the pass that it makes anyway.
struct Stream {
    residual: Option<Tensor>, // (T, D)
    addition: Tensor,         // (T, D)
}

impl Decoder {
    /// Names of which every file has one, with or without a prefix.
    pub const ANCHORS: &[&str] = &["embed_tokens.weight"];

    /// Takes the weights. Angles are tabled for texts of up to `longest` tokens: Mistral's 131,072 positions would be 67 MB.
    pub fn new(shape: Shape, weights: &Weights, longest: usize) -> Result<Self> {
        let (d, f, k) = (shape.width, shape.inner, shape.head_width);
        let (queries, keys) = (shape.heads * k, shape.kv_heads * k);
        let norm = |name: &str, width: usize| Rms::new(weights, name, width, shape.epsilon, shape.gemma);
        let linear = |name: String, o: usize, i: usize, biased: bool, site: u32| {
            let bias = |o: usize| weights.tensor(&format!("{name}.bias"), &[o], Init::Zeros);
            let bias = biased.then(|| bias(o)).transpose()?;
            Ok::<_, Error>(Linear::new(weights.matrix(&format!("{name}.weight"), o, i)?, bias, site))
        };
        // Gemma calls "post attention" what the others do not have.
        let (before, after) = if shape.gemma {
            ("pre_feedforward_layernorm", Some(["post_attention_layernorm", "post_feedforward_layernorm"]))
        } else {
            ("post_attention_layernorm", None)
        };
        let pair = |a: String, b: String, width: usize| Ok::<_, Error>([norm(&a, width)?, norm(&b, width)?]);
        let biases = shape.biases;
        let layer = |(l, &sight): (usize, &Sight)| {
            let (name, site) = (format!("layers.{l}"), l as u32 * SITES);
            let head_norms =
                || pair(format!("{name}.self_attn.q_norm"), format!("{name}.self_attn.k_norm"), k);
            let addition_norms = |[a, b]: [&str; 2]| pair(format!("{name}.{a}"), format!("{name}.{b}"), d);
            Ok::<_, Error>(Layer {
                attention_norm: norm(&format!("{name}.input_layernorm"), d)?,
                query: linear(format!("{name}.self_attn.q_proj"), queries, d, biases.inputs, site)?,
                key: linear(format!("{name}.self_attn.k_proj"), keys, d, biases.inputs, site + 1)?,
                value: linear(format!("{name}.self_attn.v_proj"), keys, d, biases.inputs, site + 2)?,
                head_norms: shape.head_norms.then(head_norms).transpose()?,
                output: linear(format!("{name}.self_attn.o_proj"), d, queries, biases.output, site + 3)?,
                norm: norm(&format!("{name}.{before}"), d)?,
                gate: linear(format!("{name}.mlp.gate_proj"), f, d, biases.mlp, site + 4)?,
                up: linear(format!("{name}.mlp.up_proj"), f, d, biases.mlp, site + 5)?,
                down: linear(format!("{name}.mlp.down_proj"), d, f, biases.mlp, site + 6)?,
                addition_norms: after.map(addition_norms).transpose()?,
                sight,
                site,
            })
        };
        let positions = longest.min(shape.positions);
        Ok(Self {
            word: Parameter::frozen(weights.matrix("embed_tokens.weight", shape.vocabulary, d)?),
            layers: shape.sights.iter().enumerate().map(layer).collect::<Result<_>>()?,
            norm: norm("norm", d)?,
            ropes: shape.rotaries.iter().map(|rotary| rotary.table(positions, k)).collect(),
            shape,
        })
    }

    /// ids (T) → hidden states (T, D), and the tape if any of it is to be kept.
    pub fn forward(&self, ids: &Tensor, pass: &Pass, keep: Keep) -> Result<(Tensor, Option<Tape>)> {
        let tables =
            embedding::Tables { word: self.word.value(), position: None, position_offset: 0, kind: None };
        let words = pass.round(self.scaled(embedding::forward(ids, pass.packing, &tables)?)?)?;
        let mut stream = Stream { residual: None, addition: words };
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (next, tape) = self.forward_layer(layer, stream, pass, keep)?;
            stream = next;
            layers.extend(tape);
        }
        let (y, norm) = self.norm.forward(&stream.addition, stream.residual.as_ref(), pass)?;
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
        let mut ds = Some(self.norm.backward(&tape.norm, &dy, None, pass, gradients)?);
        for (l, (layer, tape)) in self.layers.iter().zip(tape.layers).enumerate().rev() {
            let Some(d) = ds.take() else { break };
            ds = gradients.beside(|| self.backward_layer(layer, tape, d, l > 0 || below, pass, gradients))?;
        }
        if let (Some(dword), Some(dx)) = (gradients.of(&self.word)?, ds) {
            embedding::backward(&self.scaled(dx)?, ids, pass.packing, 0, Some(&dword), None, None)?;
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
        let (y, attention_norm) =
            layer.attention_norm.forward(&stream.addition, stream.residual.as_ref(), pass)?;
        let inside = self.inside(layer, &y, &attention_norm, pass)?;
        let h = pass.round(activation::gated(&inside.gate, &inside.up, self.shape.activation)?)?;
        let residual = Some(inside.norm.sum.clone());
        let inside = (keep == Keep::Whole).then_some(inside);
        let (d, down) = layer.down.forward(&h, pass)?; // (T, D)
        let [_, norm_of_down] = layer.norms_of_additions();
        let (d, down_norm) = normed(d, norm_of_down, pass)?;
        let tape = LayerTape { attention_norm, inside, down, down_norm };
        Ok((Stream { residual, addition: d }, (keep > Keep::Nothing).then_some(tape)))
    }

    /// All but the last product, from y (T, D), the output of the layer's first norm.
    fn inside(&self, layer: &Layer, y: &Tensor, stream: &norm::Tape, pass: &Pass) -> Result<Inside> {
        let (q, q_tape) = layer.query.forward(y, pass)?; // (T, H*K)
        let (k, k_tape) = layer.key.forward(y, pass)?; // (T, G*K)
        let (v, v_tape) = layer.value.forward(y, pass)?; // (T, G*K)
        let ([q, k], heads) = self.turn(layer, [q, k], pass)?;
        let (o, log_sum) = attention::forward(&q, &k, &v, pass.packing, &self.attention(layer, pass))?;
        let o = pass.round(o)?;
        let (a, o_tape) = layer.output.forward(&o, pass)?; // (T, D)
        let [norm_of_output, _] = layer.norms_of_additions();
        let (a, output_norm) = normed(a, norm_of_output, pass)?;

        let (z, norm) = layer.norm.forward(&a, Some(&stream.sum), pass)?;
        let (gate, gate_tape) = layer.gate.forward(&z, pass)?; // (T, F)
        let (up, up_tape) = layer.up.forward(&z, pass)?; // (T, F)
        let adapters = [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape];
        Ok(Inside { heads, v, o, log_sum, output_norm, norm, gate, up, adapters })
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
        let y = layer.attention_norm.again(&tape.attention_norm, pass)?;
        let inside = match tape.inside {
            Some(inside) => inside,
            None => self.inside(layer, &y, &tape.attention_norm, pass)?,
        };
        let Inside { heads, v, o, log_sum, output_norm, norm, gate, up, adapters } = inside;
        let [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape] = &adapters;
        let [norm_of_output, norm_of_down] = layer.norms_of_additions();
        let dd = normed_backward(&ds, norm_of_down, tape.down_norm.as_ref(), pass, gradients)?;
        let h = pass.round(activation::gated(&gate, &up, self.shape.activation)?)?;
        let dh = layer.down.backward(&h, &tape.down, &dd, None, pass, gradients)?;
        let (dgate, dup) = activation::gated_backward(&gate, &up, &dh, self.shape.activation)?;
        let (dgate, dup) = (pass.round(dgate)?, pass.round(dup)?);
        let z = layer.norm.again(&norm, pass)?;
        let dz = layer.gate.backward(&z, gate_tape, &dgate, None, pass, gradients)?;
        let dz = layer.up.backward(&z, up_tape, &dup, Some(dz), pass, gradients)?;
        let ds = layer.norm.backward(&norm, &dz, Some(&ds), pass, gradients)?;

        let da = normed_backward(&ds, norm_of_output, output_norm.as_ref(), pass, gradients)?;
        let d_o = layer.output.backward(&o, o_tape, &da, None, pass, gradients)?;
        let attention = self.attention(layer, pass);
        let [q, k] = self.turned(layer, &heads, pass)?;
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &o, &log_sum, &d_o, pass.packing, &attention)?;
        let (dq, dk, dv) = (pass.round(dq)?, pass.round(dk)?, pass.round(dv)?);
        let [dq, dk] = self.turn_back(layer, [dq, dk], &heads, pass, gradients)?;
        if !below && !layer.attention_norm.trained() {
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
        layer.attention_norm.backward(&tape.attention_norm, &dy, Some(&ds), pass, gradients).map(Some)
    }

    /// Queries and keys as attention takes them, and what is kept of them.
    fn turn(&self, layer: &Layer, [q, k]: [Tensor; 2], pass: &Pass) -> Result<([Tensor; 2], Heads)> {
        match &layer.head_norms {
            Some([of_q, of_k]) => {
                let (q, q_tape) = of_q.forward_heads(&q, pass)?;
                let (k, k_tape) = of_k.forward_heads(&k, pass)?;
                Ok((self.rotated(layer, [q, k], pass)?, Heads::Raw([q_tape, k_tape])))
            }
            None => {
                let both = self.rotated(layer, [q, k], pass)?;
                Ok((both.clone(), Heads::Turned(both)))
            }
        }
    }

    /// The first of what [`Self::turn`] returned, once more.
    fn turned(&self, layer: &Layer, heads: &Heads, pass: &Pass) -> Result<[Tensor; 2]> {
        match (heads, &layer.head_norms) {
            (Heads::Raw([q, k]), Some([of_q, of_k])) => {
                let both = [of_q.again_heads(q, pass)?, of_k.again_heads(k, pass)?];
                self.rotated(layer, both, pass)
            }
            (Heads::Turned(both), _) => Ok(both.clone()),
            (Heads::Raw(_), None) => Err(Error::Bug("the tape is of another decoder".to_owned())),
        }
    }

    fn rotated(&self, layer: &Layer, [q, k]: [Tensor; 2], pass: &Pass) -> Result<[Tensor; 2]> {
        let (q, k) = rope::forward_both(&q, &k, pass.packing, &self.ropes[layer.sight.rotary])?;
        Ok([pass.round(q)?, pass.round(k)?])
    }

    fn turn_back(
        &self,
        layer: &Layer,
        [dq, dk]: [Tensor; 2],
        heads: &Heads,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<[Tensor; 2]> {
        let (dq, dk) = rope::backward_both(&dq, &dk, pass.packing, &self.ropes[layer.sight.rotary])?;
        let (dq, dk) = (pass.round(dq)?, pass.round(dk)?);
        match (heads, &layer.head_norms) {
            (Heads::Raw([q, k]), Some([of_q, of_k])) => Ok([
                of_q.backward_heads(q, &dq, pass, gradients)?,
                of_k.backward_heads(k, &dk, pass, gradients)?,
            ]),
            _ => Ok([dq, dk]),
        }
    }

    /// Gemma's embeddings times √D, and as well their gradient.
    fn scaled(&self, x: Tensor) -> Result<Tensor> {
        if self.shape.gemma { Ok((x * (self.shape.width as f64).sqrt())?) } else { Ok(x) }
    }

    fn attention(&self, layer: &Layer, pass: &Pass) -> Attention {
        let shape = &self.shape;
        Attention {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_width: shape.head_width,
            scale: shape.scale,
            left: layer.sight.left,
            right: layer.sight.right,
            dropout: pass.dropout(shape.dropout, layer.site + 7),
        }
    }

    /// Bytes of tape that one token leaves.
    pub fn tape_bytes_per_token(&self, keep: Keep) -> usize {
        let Shape { width, inner, heads, kv_heads, head_width, head_norms, gemma, .. } = self.shape;
        let layers = self.shape.layers();
        // a norm's sum and deviation; Gemma has another one after each block
        let of_addition = if gemma { width + 1 } else { 0 };
        let inputs = (layers + 1) * (width + 1) + layers * of_addition;
        // q and o; k and v; log-sum-exp; deviations of heads; another norm; gate and up
        let of_heads = if head_norms { heads + kv_heads } else { 0 };
        let inside = 2 * heads * head_width + 2 * kv_heads * head_width + heads + of_heads;
        let inside = inside + width + 1 + of_addition + 2 * inner;
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
            if let Some([query, key]) = &mut layer.head_norms {
                query.visit(&format!("{name}.self_attn.q_norm"), visit)?;
                key.visit(&format!("{name}.self_attn.k_norm"), visit)?;
            }
            layer.attention_norm.visit(&format!("{name}.input_layernorm"), visit)?;
            match &mut layer.addition_norms {
                None => layer.norm.visit(&format!("{name}.post_attention_layernorm"), visit)?,
                Some([attention, feed_forward]) => {
                    attention.visit(&format!("{name}.post_attention_layernorm"), visit)?;
                    layer.norm.visit(&format!("{name}.pre_feedforward_layernorm"), visit)?;
                    feed_forward.visit(&format!("{name}.post_feedforward_layernorm"), visit)?;
                }
            }
        }
        self.norm.visit("norm", visit)
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

/// What a block adds to the stream, normed where the family norms it.
fn normed(x: Tensor, norm: Option<&Rms>, pass: &Pass) -> Result<(Tensor, Option<norm::Tape>)> {
    match norm {
        Some(norm) => norm.forward(&x, None, pass).map(|(y, tape)| (y, Some(tape))),
        None => Ok((x, None)),
    }
}

/// The gradient of [`normed`]'s x, from that of the stream.
fn normed_backward(
    ds: &Tensor,
    norm: Option<&Rms>,
    tape: Option<&norm::Tape>,
    pass: &Pass,
    gradients: &Gradients,
) -> Result<Tensor> {
    match norm.zip(tape) {
        Some((norm, tape)) => norm.backward(tape, ds, None, pass, gradients),
        None => Ok(ds.clone()),
    }
}

impl Layer {
    fn norms_of_additions(&self) -> [Option<&Rms>; 2] {
        self.addition_norms.as_ref().map_or([None; 2], |[attention, down]| [Some(attention), Some(down)])
    }

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
