//! Decoders as encoders: Mistral (Jiang et al. 2023), Llama (Touvron et al. 2023), Qwen2 and Qwen3 (Qwen Team
//! 2024, 2025), Gemma 3 (Gemma Team 2025). RMS norms before each block, RoPE, grouped-query attention, a
//! gated feed-forward layer.
//!
//! This file wires the layers. How the families differ is in [`Config`]. Fields and tensors bear the names of
//! transformers' `MistralModel`.

mod config;

use candle_core::Tensor;
use kernels::activation;
use kernels::attention::{self, Attention};
use kernels::{embedding, norm, rope};

use self::config::AttentionWindow;
pub use self::config::{Config, Family, MODEL_TYPES};
use super::encoder::{self, Encoder, EncoderConfig, SavedFloats, Sizes};
use super::linear::{self, Linear};
use super::norms::RmsNorm;
use super::params::{Gradients, Parameter, ParameterKind, ParameterVisitor};
use super::pass::{DROPOUT_SITES, Pass, Saved};
use super::weights::Weights;
use crate::config::Pooling;
use crate::{Error, Result};

const EMBED_TOKENS: &str = "embed_tokens.weight";

/// Encoder of a decoder family.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    embed_tokens: Parameter, // (V, D)
    layers: Vec<Layer>,
    norm: RmsNorm,
    ropes: Vec<rope::Table>,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    /// Norms of each head's queries and keys, `q_norm` and `k_norm`.
    qk_norm: Option<[RmsNorm; 2]>,
    o_proj: Linear,
    /// Norm before the feed-forward layer: `pre_feedforward_layernorm` of Gemma, `post_attention_layernorm`
    /// of the others.
    mlp_norm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    /// Norms after attention and after the feed-forward layer, which Gemma has.
    post_norms: Option<[RmsNorm; 2]>,
    window: AttentionWindow,
    first_site: u32,
}

/// Activations that the backward pass needs.
#[derive(Debug)]
struct Tape {
    layers: Vec<LayerTape>,
    norm: norm::Tape,
}

/// Saved activations of one layer.
#[derive(Debug)]
struct LayerTape {
    input_layernorm: norm::Tape,
    /// `None` if only the inputs of layers are saved.
    activations: Option<Activations>,
    down_proj: linear::Tape,
    post_mlp_norm: Option<norm::Tape>,
}

/// Activations of one layer, up to the input of its last matrix product.
#[derive(Debug)]
struct Activations {
    qk: QueriesAndKeys,
    v: Tensor,       // (T, G·K)
    o: Tensor,       // (T, H·K)
    log_sum: Tensor, // (H, T)
    post_attention_norm: Option<norm::Tape>,
    mlp_norm: norm::Tape,
    gate: Tensor, // (T, F)
    up: Tensor,   // (T, F)
    /// Tapes of query, key, value, output, gate and up projection.
    adapters: [linear::Tape; 6],
}

/// Saved queries (T, H·K) and keys (T, G·K).
#[derive(Debug)]
enum QueriesAndKeys {
    /// Queries and keys after RoPE.
    Rotated([Tensor; 2]),
    /// Tapes of the norms of queries and keys, which RoPE follows.
    Normed([norm::Tape; 2]),
}

/// Residual stream between two layers, as two addends. The next norm adds them while it reads them, which
/// saves a pass over memory.
struct ResidualStream {
    residual: Option<Tensor>, // (T, D)
    block_output: Tensor,     // (T, D)
}

impl EncoderConfig for Config {
    fn sizes(&self) -> Sizes {
        Sizes {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers: self.windows.len(),
            max_positions: self.max_positions,
        }
    }

    fn anchor(&self) -> &'static str {
        EMBED_TOKENS
    }

    fn default_pooling(&self) -> Pooling {
        Pooling::LastToken
    }

    fn saved_floats(&self) -> SavedFloats {
        let &Self { hidden_size, intermediate_size, heads, kv_heads, head_dim, qk_norm, gemma, .. } = self;
        let layers = self.windows.len();
        // sum and deviation of a norm after a block
        let post_norm = if gemma { hidden_size + 1 } else { 0 };
        // q and o; k and v; log_sum; deviations of the norms of heads
        let attention = 2 * heads * head_dim + 2 * kv_heads * head_dim + heads;
        let head_norms = if qk_norm { heads + kv_heads } else { 0 };
        SavedFloats {
            // sum and deviation of a norm
            layer_inputs: (layers + 1) * (hidden_size + 1) + layers * post_norm,
            // attention; sum and deviation of the other norms; gate and up
            inside_layers: layers
                * (attention + head_norms + hidden_size + 1 + post_norm + 2 * intermediate_size),
        }
    }

    fn build(self: Box<Self>, weights: &Weights, max_length: usize) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(Decoder::new(*self, weights, max_length)?))
    }
}

impl Decoder {
    /// Builds the layers from `weights`. RoPE tables have `max_length` rows, because one for all 131,072
    /// positions of Mistral would take 67 MB.
    fn new(config: Config, weights: &Weights, max_length: usize) -> Result<Self> {
        let (d, f, k) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (queries, keys) = (config.heads * k, config.kv_heads * k);
        let biases = config.biases;
        // `post_attention_layernorm` is Gemma's norm after attention, and the norm before the feed-forward
        // layer of the others.
        let (mlp_norm, post_norms) = if config.gemma {
            ("pre_feedforward_layernorm", Some(["post_attention_layernorm", "post_feedforward_layernorm"]))
        } else {
            ("post_attention_layernorm", None)
        };
        let layer = |(l, &window): (usize, &AttentionWindow)| {
            let (name, site) = (format!("layers.{l}"), l as u32 * DROPOUT_SITES);
            let norm = |part: &str, width: usize| {
                RmsNorm::new(weights, &format!("{name}.{part}"), width, config.epsilon, config.gemma)
            };
            let pair = |[a, b]: [&str; 2], width: usize| Ok::<_, Error>([norm(a, width)?, norm(b, width)?]);
            let linear = |part: &str, shape: (usize, usize), biased: bool, site: u32| {
                Linear::new(weights, &format!("{name}.{part}"), shape, biased, site)
            };
            Ok::<_, Error>(Layer {
                input_layernorm: norm("input_layernorm", d)?,
                q_proj: linear("self_attn.q_proj", (queries, d), biases.qkv, site)?,
                k_proj: linear("self_attn.k_proj", (keys, d), biases.qkv, site + 1)?,
                v_proj: linear("self_attn.v_proj", (keys, d), biases.qkv, site + 2)?,
                qk_norm: config
                    .qk_norm
                    .then(|| pair(["self_attn.q_norm", "self_attn.k_norm"], k))
                    .transpose()?,
                o_proj: linear("self_attn.o_proj", (d, queries), biases.output, site + 3)?,
                mlp_norm: norm(mlp_norm, d)?,
                gate_proj: linear("mlp.gate_proj", (f, d), biases.mlp, site + 4)?,
                up_proj: linear("mlp.up_proj", (f, d), biases.mlp, site + 5)?,
                down_proj: linear("mlp.down_proj", (d, f), biases.mlp, site + 6)?,
                post_norms: post_norms.map(|names| pair(names, d)).transpose()?,
                window,
                first_site: site,
            })
        };
        let positions = max_length.min(config.max_positions);
        let embed_tokens = weights.matrix(EMBED_TOKENS, config.vocab_size, d)?;
        Ok(Self {
            embed_tokens: Parameter::new(embed_tokens, ParameterKind::Embedding),
            layers: config.windows.iter().enumerate().map(layer).collect::<Result<_>>()?,
            norm: RmsNorm::new(weights, "norm", d, config.epsilon, config.gemma)?,
            ropes: config.rope_parameters.iter().map(|rope| rope.table(positions, k)).collect(),
            config,
        })
    }

    fn forward_layer(
        &self,
        layer: &Layer,
        stream: ResidualStream,
        pass: &Pass,
        save: Saved,
    ) -> Result<(ResidualStream, Option<LayerTape>)> {
        let (y, input_layernorm) =
            layer.input_layernorm.forward(&stream.block_output, stream.residual.as_ref(), pass)?;
        let activations = self.activations(layer, &y, &input_layernorm.sum, pass)?;
        let h = pass.round(activation::gated(&activations.gate, &activations.up, self.config.activation)?)?;
        let residual = Some(activations.mlp_norm.sum.clone());
        let activations = (save == Saved::All).then_some(activations);
        let (d, down_proj) = layer.down_proj.forward(&h, pass)?; // (T, D)
        let [_, post_mlp_norm] = layer.post_norms();
        let (d, post_mlp_norm) = apply_post_norm(d, post_mlp_norm, pass)?;
        let tape = LayerTape { input_layernorm, activations, down_proj, post_mlp_norm };
        Ok((ResidualStream { residual, block_output: d }, (save > Saved::None).then_some(tape)))
    }

    /// Computes the activations up to the input of the last matrix product. `y` (T, D) is the output of the
    /// first norm, `residual` (T, D) its input.
    fn activations(&self, layer: &Layer, y: &Tensor, residual: &Tensor, pass: &Pass) -> Result<Activations> {
        let (q, q_tape) = layer.q_proj.forward(y, pass)?; // (T, H·K)
        let (k, k_tape) = layer.k_proj.forward(y, pass)?; // (T, G·K)
        let (v, v_tape) = layer.v_proj.forward(y, pass)?; // (T, G·K)
        let ([q, k], qk) = self.apply_qk_norm_and_rope(layer, [q, k], pass)?;
        let (o, log_sum) = attention::forward(&q, &k, &v, pass.packing, &self.attention(layer, pass))?;
        let o = pass.round(o)?;
        let (a, o_tape) = layer.o_proj.forward(&o, pass)?; // (T, D)
        let [post_attention_norm, _] = layer.post_norms();
        let (a, post_attention_norm) = apply_post_norm(a, post_attention_norm, pass)?;

        let (z, mlp_norm) = layer.mlp_norm.forward(&a, Some(residual), pass)?;
        let (gate, gate_tape) = layer.gate_proj.forward(&z, pass)?; // (T, F)
        let (up, up_tape) = layer.up_proj.forward(&z, pass)?; // (T, F)
        let adapters = [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape];
        Ok(Activations { qk, v, o, log_sum, post_attention_norm, mlp_norm, gate, up, adapters })
    }

    /// Maps `ds` (T, D), the gradient of the residual stream after this layer, to the gradient of the stream
    /// before it. The result may be `None` if `needs_dx` is false.
    fn backward_layer(
        &self,
        layer: &Layer,
        tape: LayerTape,
        ds: Tensor,
        needs_dx: bool,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Option<Tensor>> {
        let y = layer.input_layernorm.recompute(&tape.input_layernorm, pass)?;
        let activations = match tape.activations {
            Some(activations) => activations,
            None => self.activations(layer, &y, &tape.input_layernorm.sum, pass)?,
        };
        let Activations { qk, v, o, log_sum, post_attention_norm, mlp_norm, gate, up, adapters } =
            activations;
        let [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape] = &adapters;
        let [norm_of_attention, norm_of_mlp] = layer.post_norms();
        let dd = backward_post_norm(&ds, norm_of_mlp, tape.post_mlp_norm.as_ref(), pass, gradients)?;
        let h = pass.round(activation::gated(&gate, &up, self.config.activation)?)?;
        let dh = layer.down_proj.backward(&h, &tape.down_proj, &dd, None, pass, gradients)?;
        let (dgate, dup) = activation::gated_backward(&gate, &up, &dh, self.config.activation)?;
        let (dgate, dup) = (pass.round(dgate)?, pass.round(dup)?);
        let z = layer.mlp_norm.recompute(&mlp_norm, pass)?;
        let dz = layer.gate_proj.backward(&z, gate_tape, &dgate, None, pass, gradients)?;
        let dz = layer.up_proj.backward(&z, up_tape, &dup, Some(dz), pass, gradients)?;
        let ds = layer.mlp_norm.backward(&mlp_norm, &dz, Some(&ds), pass, gradients)?;

        let da = backward_post_norm(&ds, norm_of_attention, post_attention_norm.as_ref(), pass, gradients)?;
        let d_o = layer.o_proj.backward(&o, o_tape, &da, None, pass, gradients)?;
        let attention = self.attention(layer, pass);
        let [q, k] = self.recompute_qk_norm_and_rope(layer, &qk, pass)?;
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &o, &log_sum, &d_o, pass.packing, &attention)?;
        let (dq, dk, dv) = (pass.round(dq)?, pass.round(dk)?, pass.round(dv)?);
        let [dq, dk] = self.backward_qk_norm_and_rope(layer, [dq, dk], &qk, pass, gradients)?;
        if !needs_dx && !layer.input_layernorm.is_trained() {
            for (linear, tape, d) in
                [(&layer.q_proj, q_tape, dq), (&layer.k_proj, k_tape, dk), (&layer.v_proj, v_tape, dv)]
            {
                linear.backward_parameters(&y, tape, &d, None, pass, gradients)?;
            }
            return Ok(None);
        }
        let dy = layer.q_proj.backward(&y, q_tape, &dq, None, pass, gradients)?;
        let dy = layer.k_proj.backward(&y, k_tape, &dk, Some(dy), pass, gradients)?;
        let dy = layer.v_proj.backward(&y, v_tape, &dv, Some(dy), pass, gradients)?;
        layer.input_layernorm.backward(&tape.input_layernorm, &dy, Some(&ds), pass, gradients).map(Some)
    }

    /// Returns queries and keys after their norms and RoPE, and what the backward pass needs of them.
    fn apply_qk_norm_and_rope(
        &self,
        layer: &Layer,
        [q, k]: [Tensor; 2],
        pass: &Pass,
    ) -> Result<([Tensor; 2], QueriesAndKeys)> {
        match &layer.qk_norm {
            Some([q_norm, k_norm]) => {
                let (q, q_tape) = q_norm.forward_heads(&q, pass)?;
                let (k, k_tape) = k_norm.forward_heads(&k, pass)?;
                Ok((self.apply_rope(layer, [q, k], pass)?, QueriesAndKeys::Normed([q_tape, k_tape])))
            }
            None => {
                let both = self.apply_rope(layer, [q, k], pass)?;
                Ok((both.clone(), QueriesAndKeys::Rotated(both)))
            }
        }
    }

    /// Recomputes the queries and keys of [`Self::apply_qk_norm_and_rope`].
    fn recompute_qk_norm_and_rope(
        &self,
        layer: &Layer,
        qk: &QueriesAndKeys,
        pass: &Pass,
    ) -> Result<[Tensor; 2]> {
        match (qk, &layer.qk_norm) {
            (QueriesAndKeys::Normed([q, k]), Some([q_norm, k_norm])) => {
                let both = [q_norm.recompute_heads(q, pass)?, k_norm.recompute_heads(k, pass)?];
                self.apply_rope(layer, both, pass)
            }
            (QueriesAndKeys::Rotated(both), _) => Ok(both.clone()),
            (QueriesAndKeys::Normed(_), None) => Err(Error::Bug("the tape is of another decoder".to_owned())),
        }
    }

    fn apply_rope(&self, layer: &Layer, [q, k]: [Tensor; 2], pass: &Pass) -> Result<[Tensor; 2]> {
        let (q, k) = rope::forward_both(&q, &k, pass.packing, &self.ropes[layer.window.rope])?;
        Ok([pass.round(q)?, pass.round(k)?])
    }

    /// Maps the gradients of queries and keys after norms and RoPE to those before.
    fn backward_qk_norm_and_rope(
        &self,
        layer: &Layer,
        [dq, dk]: [Tensor; 2],
        qk: &QueriesAndKeys,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<[Tensor; 2]> {
        let (dq, dk) = rope::backward_both(&dq, &dk, pass.packing, &self.ropes[layer.window.rope])?;
        let (dq, dk) = (pass.round(dq)?, pass.round(dk)?);
        match (qk, &layer.qk_norm) {
            (QueriesAndKeys::Normed([q, k]), Some([q_norm, k_norm])) => Ok([
                q_norm.backward_heads(q, &dq, pass, gradients)?,
                k_norm.backward_heads(k, &dk, pass, gradients)?,
            ]),
            _ => Ok([dq, dk]),
        }
    }

    /// Multiplies embeddings, or their gradient, by √D in Gemma.
    fn scale_embeddings(&self, x: Tensor) -> Result<Tensor> {
        if self.config.gemma { Ok((x * (self.config.hidden_size as f64).sqrt())?) } else { Ok(x) }
    }

    fn attention(&self, layer: &Layer, pass: &Pass) -> Attention {
        let config = &self.config;
        Attention {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_width: config.head_dim,
            scale: config.scale,
            left: layer.window.left,
            right: layer.window.right,
            dropout: pass.dropout_mask(config.dropout, layer.first_site + 7),
        }
    }
}

impl Encoder for Decoder {
    fn config(&self) -> &dyn EncoderConfig {
        &self.config
    }

    fn forward(&self, ids: &Tensor, pass: &Pass, save: Saved) -> Result<(Tensor, Option<encoder::Tape>)> {
        let word = self.embed_tokens.value();
        let tables = embedding::Tables {
            word_embeddings: word,
            position_embeddings: None,
            position_offset: 0,
            token_type_embeddings: None,
        };
        let x = self.scale_embeddings(embedding::forward(ids, pass.packing, &tables)?)?;
        let mut stream = ResidualStream { residual: None, block_output: pass.round(x)? };
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (next, tape) = self.forward_layer(layer, stream, pass, save)?;
            stream = next;
            layers.extend(tape);
        }
        let (y, norm) = self.norm.forward(&stream.block_output, stream.residual.as_ref(), pass)?;
        Ok((y, (save > Saved::None).then(|| encoder::Tape::new(Tape { layers, norm }))))
    }

    fn backward(
        &self,
        ids: &Tensor,
        tape: encoder::Tape,
        dy: Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()> {
        let tape: Tape = tape.into_inner()?;
        let embeddings_trained = self.embed_tokens.is_trained();
        let mut ds = Some(self.norm.backward(&tape.norm, &dy, None, pass, gradients)?);
        for (l, (layer, tape)) in self.layers.iter().zip(tape.layers).enumerate().rev() {
            let Some(d) = ds.take() else { break };
            let needs_dx = l > 0 || embeddings_trained;
            ds = gradients
                .run_with_deferred(|| self.backward_layer(layer, tape, d, needs_dx, pass, gradients))?;
        }
        if let (Some(dword), Some(dx)) = (gradients.grad_slot(&self.embed_tokens)?, ds) {
            let dx = self.scale_embeddings(dx)?;
            embedding::backward(&dx, ids, pass.packing, 0, Some(&dword), None, None)?;
        }
        Ok(())
    }

    fn visit(&mut self, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        visitor.parameter(EMBED_TOKENS, &mut self.embed_tokens)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let name = format!("layers.{l}");
            for (part, linear) in layer.linears() {
                linear.visit(&format!("{name}.{part}"), visitor)?;
            }
            if let Some([q_norm, k_norm]) = &mut layer.qk_norm {
                q_norm.visit(&format!("{name}.self_attn.q_norm"), visitor)?;
                k_norm.visit(&format!("{name}.self_attn.k_norm"), visitor)?;
            }
            layer.input_layernorm.visit(&format!("{name}.input_layernorm"), visitor)?;
            match &mut layer.post_norms {
                None => layer.mlp_norm.visit(&format!("{name}.post_attention_layernorm"), visitor)?,
                Some([post_attention, post_mlp]) => {
                    post_attention.visit(&format!("{name}.post_attention_layernorm"), visitor)?;
                    layer.mlp_norm.visit(&format!("{name}.pre_feedforward_layernorm"), visitor)?;
                    post_mlp.visit(&format!("{name}.post_feedforward_layernorm"), visitor)?;
                }
            }
        }
        self.norm.visit("norm", visitor)
    }

    fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let layers = self.layers.iter_mut().enumerate();
        layers
            .flat_map(|(l, layer)| {
                layer.linears().map(move |(part, linear)| (format!("layers.{l}.{part}"), linear))
            })
            .collect()
    }
}

/// Applies the norm after a block, in families that have one.
fn apply_post_norm(x: Tensor, norm: Option<&RmsNorm>, pass: &Pass) -> Result<(Tensor, Option<norm::Tape>)> {
    match norm {
        Some(norm) => norm.forward(&x, None, pass).map(|(y, tape)| (y, Some(tape))),
        None => Ok((x, None)),
    }
}

/// Maps the gradient of the residual stream to that of a block's output before [`apply_post_norm`].
fn backward_post_norm(
    ds: &Tensor,
    norm: Option<&RmsNorm>,
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
    /// Norms after attention and after the feed-forward layer.
    fn post_norms(&self) -> [Option<&RmsNorm>; 2] {
        self.post_norms.as_ref().map_or([None; 2], |[attention, mlp]| [Some(attention), Some(mlp)])
    }

    fn linears(&mut self) -> [(&'static str, &mut Linear); 7] {
        [
            ("self_attn.q_proj", &mut self.q_proj),
            ("self_attn.k_proj", &mut self.k_proj),
            ("self_attn.v_proj", &mut self.v_proj),
            ("self_attn.o_proj", &mut self.o_proj),
            ("mlp.gate_proj", &mut self.gate_proj),
            ("mlp.up_proj", &mut self.up_proj),
            ("mlp.down_proj", &mut self.down_proj),
        ]
    }
}
