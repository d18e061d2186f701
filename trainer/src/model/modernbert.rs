//! ModernBERT (Warner et al. 2024): norms before each block, RoPE with two bases, sliding windows in most
//! layers, GeGLU.
//!
//! Fields and tensors bear the names of transformers' `ModernBertModel`. Its checkpoints have one weight for
//! query, key and value, and one for gate and up projection; both are split by rows.

use candle_core::Tensor;
use kernels::activation::{self, Activation};
use kernels::attention::{self, Attention};
use kernels::{embedding, norm, rope};

use super::config_json::ConfigJson;
use super::encoder::{self, Encoder, EncoderConfig, SavedFloats, Sizes};
use super::linear::{self, Linear};
use super::norms::LayerNorm;
use super::params::{Gradients, Parameter, ParameterKind, ParameterVisitor};
use super::pass::{DROPOUT_SITES, Pass, Saved};
use super::rope::{RopeKeys, RopeParameters};
use super::weights::Weights;
use crate::{Error, Result};

/// Values of `model_type` that this stack reads.
pub const MODEL_TYPES: &[(&str, ())] = &[("modernbert", ())];

const TOK_EMBEDDINGS: &str = "embeddings.tok_embeddings.weight";

/// Checked config.json of ModernBERT.
#[derive(Clone, Debug)]
pub struct Config {
    vocab_size: usize,
    hidden_size: usize,
    heads: usize,
    intermediate_size: usize,
    max_positions: usize,
    epsilon: f64,
    activation: Activation,
    norm_bias: bool,
    attention_bias: bool,
    mlp_bias: bool,
    /// Of each layer, the number of tokens that it attends to on either side; `None` for full attention.
    windows: Vec<Option<usize>>,
    /// RoPE of the layers with full attention, and of those with a window.
    rope_parameters: [RopeParameters; 2],
    dropout: Dropout,
}

/// Dropout rates.
#[derive(Clone, Copy, Debug)]
struct Dropout {
    embedding: f32,
    attention: f32,
    mlp: f32,
}

/// ModernBERT encoder.
#[derive(Debug)]
pub struct ModernBert {
    config: Config,
    tok_embeddings: Parameter, // (V, D)
    embeddings_norm: LayerNorm,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    ropes: Vec<rope::Table>,
}

#[derive(Debug)]
struct Layer {
    /// `None` in the first layer, whose input is normalised already.
    attn_norm: Option<LayerNorm>,
    wqkv: Linear,
    wo: Linear,
    mlp_norm: LayerNorm,
    wi: Linear,
    mlp_wo: Linear,
    window: Option<usize>,
    first_site: u32,
}

/// Activations that the backward pass needs.
#[derive(Debug)]
struct Tape {
    embeddings_norm: norm::Tape,
    layers: Vec<LayerTape>,
    final_norm: norm::Tape,
}

/// Saved activations of one layer.
#[derive(Debug)]
struct LayerTape {
    input: LayerInput,
    /// `None` if only the inputs of layers are saved.
    activations: Option<Activations>,
    mlp_wo: linear::Tape,
}

/// Activations of one layer, up to the input of its last matrix product.
#[derive(Debug)]
struct Activations {
    q: Tensor,       // (T, D), after RoPE
    k: Tensor,       // (T, D), after RoPE
    v: Tensor,       // (T, D)
    o: Tensor,       // (T, D)
    log_sum: Tensor, // (H, T)
    mlp_norm: norm::Tape,
    gate: Tensor, // (T, F)
    up: Tensor,   // (T, F)
    /// Tapes of query, key, value, attention output, gate and up projection.
    adapters: [linear::Tape; 6],
}

/// Saved input of a layer.
#[derive(Debug)]
enum LayerInput {
    /// Input (T, D) of the first layer, which has no norm before attention.
    Plain(Tensor),
    /// Tape of the norm before attention, which holds the layer's input.
    Normed(norm::Tape),
}

impl LayerInput {
    /// Residual stream before the layer, (T, D).
    fn residual(&self) -> &Tensor {
        match self {
            Self::Plain(x) => x,
            Self::Normed(tape) => &tape.sum,
        }
    }
}

/// Residual stream between two layers, as two addends: the next norm adds them in the pass that it makes
/// anyway.
struct ResidualStream {
    residual: Option<Tensor>, // (T, D)
    block_output: Tensor,     // (T, D)
}

impl Config {
    /// Reads and checks config.json. A missing field has the default of transformers. `dropout` replaces the
    /// rates.
    pub fn read(json: &ConfigJson, dropout: Option<f32>) -> Result<Self> {
        json.expect("quantization_config", serde_json::Value::Null)?;
        let (hidden_size, heads) = (json.size("hidden_size")?, json.size("num_attention_heads")?);
        json.divides("num_attention_heads", 2 * heads, "hidden_size", hidden_size)?;
        let layers = json.size("num_hidden_layers")?;
        let every = json.size_or("global_attn_every_n_layers", 3)?;
        let window = json.size_or("local_attention", 128)?;
        let window_of = |l| Ok(json.windowed(l, layers, |l| !l.is_multiple_of(every))?.then_some(window / 2));
        let rope = |layer_type, base, default| {
            RopeParameters::read(json, RopeKeys { layer_type, base, default, scaled: true })
        };
        let rate = |name: &str| dropout.map_or_else(|| json.rate(name, 0.0), Ok);
        Ok(Self {
            vocab_size: json.size("vocab_size")?,
            hidden_size,
            heads,
            intermediate_size: json.size("intermediate_size")?,
            max_positions: json.size("max_position_embeddings")?,
            epsilon: json.number("norm_eps", 1e-5)?,
            activation: json.activation("hidden_activation", "gelu")?,
            norm_bias: json.flag("norm_bias", false)?,
            attention_bias: json.flag("attention_bias", false)?,
            mlp_bias: json.flag("mlp_bias", false)?,
            windows: (0..layers).map(window_of).collect::<Result<_>>()?,
            rope_parameters: [
                rope("full_attention", "global_rope_theta", 160_000.0)?,
                rope("sliding_attention", "local_rope_theta", 10_000.0)?,
            ],
            dropout: Dropout {
                embedding: rate("embedding_dropout")?,
                attention: rate("attention_dropout")?,
                mlp: rate("mlp_dropout")?,
            },
        })
    }
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
        TOK_EMBEDDINGS
    }

    fn saved_floats(&self) -> SavedFloats {
        let &Self { hidden_size, intermediate_size, heads, .. } = self;
        let layers = self.windows.len();
        SavedFloats {
            // sum, mean and deviation of a norm
            layer_inputs: (layers + 2) * (hidden_size + 2),
            // q, k, v, o; log_sum; sum, mean and deviation of the other norm; gate and up
            inside_layers: layers * (5 * hidden_size + heads + 2 + 2 * intermediate_size),
        }
    }

    fn build(self: Box<Self>, weights: &Weights, max_length: usize) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(ModernBert::new(*self, weights, max_length)?))
    }
}

impl ModernBert {
    fn new(config: Config, weights: &Weights, max_length: usize) -> Result<Self> {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let norm = |name: &str| LayerNorm::new(weights, name, d, config.epsilon, config.norm_bias);
        let layer = |(l, &window): (usize, &Option<usize>)| {
            let (name, site) = (format!("layers.{l}"), l as u32 * DROPOUT_SITES);
            let linear = |part: &str, shape: (usize, usize), biased: bool, site: u32| {
                Linear::new(weights, &format!("{name}.{part}"), shape, biased, site)
            };
            let &Config { attention_bias, mlp_bias, .. } = &config;
            Ok::<_, Error>(Layer {
                attn_norm: (l > 0).then(|| norm(&format!("{name}.attn_norm"))).transpose()?,
                wqkv: linear("attn.Wqkv", (3 * d, d), attention_bias, site)?,
                wo: linear("attn.Wo", (d, d), attention_bias, site + 1)?,
                mlp_norm: norm(&format!("{name}.mlp_norm"))?,
                wi: linear("mlp.Wi", (2 * f, d), mlp_bias, site + 2)?,
                mlp_wo: linear("mlp.Wo", (d, f), mlp_bias, site + 3)?,
                window,
                first_site: site,
            })
        };
        let positions = max_length.min(config.max_positions);
        let tok_embeddings = weights.matrix(TOK_EMBEDDINGS, config.vocab_size, d)?;
        Ok(Self {
            tok_embeddings: Parameter::new(tok_embeddings, ParameterKind::Embedding),
            embeddings_norm: norm("embeddings.norm")?,
            layers: config.windows.iter().enumerate().map(layer).collect::<Result<_>>()?,
            final_norm: norm("final_norm")?,
            ropes: config
                .rope_parameters
                .iter()
                .map(|rope| rope.table(positions, d / config.heads))
                .collect(),
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
        let config = &self.config;
        let (y, input) = match &layer.attn_norm {
            Some(norm) => {
                let (y, tape) = norm.forward(&stream.block_output, stream.residual.as_ref(), pass)?;
                (y, LayerInput::Normed(tape))
            }
            None => (stream.block_output.clone(), LayerInput::Plain(stream.block_output)),
        };
        let activations = self.activations(layer, &y, input.residual(), pass)?;
        let h = pass.round(activation::gated(&activations.gate, &activations.up, config.activation)?)?;
        let h = pass.apply_dropout(h, config.dropout.mlp, layer.first_site + 6)?;
        let residual = Some(activations.mlp_norm.sum.clone());
        let activations = (save == Saved::All).then_some(activations);
        let (d, mlp_wo) = layer.mlp_wo.forward(&h, pass)?; // (T, D)
        let tape = LayerTape { input, activations, mlp_wo };
        Ok((ResidualStream { residual, block_output: d }, (save > Saved::None).then_some(tape)))
    }

    /// Computes all activations but the last matrix product, from the input of attention y (T, D) and the
    /// residual stream (T, D).
    fn activations(&self, layer: &Layer, y: &Tensor, residual: &Tensor, pass: &Pass) -> Result<Activations> {
        let config = &self.config;
        let [query, key, value] = layer.attention_parts(config.hidden_size)?;
        let (q, (k, v)) = rayon::join(
            || query.forward(y, pass),
            || rayon::join(|| key.forward(y, pass), || value.forward(y, pass)),
        );
        let ((q, q_tape), (k, k_tape), (v, v_tape)) = (q?, k?, v?); // (T, D)
        let (q, k) = rope::forward_both(&q, &k, pass.packing, self.rope(layer))?;
        let (q, k) = (pass.round(q)?, pass.round(k)?);
        let (o, log_sum) = attention::forward(&q, &k, &v, pass.packing, &self.attention(layer, pass))?;
        let o = pass.round(o)?;
        let (a, o_tape) = layer.wo.forward(&o, pass)?; // (T, D)
        let a = pass.apply_dropout(a, config.dropout.attention, layer.first_site + 5)?;

        let (z, mlp_norm) = layer.mlp_norm.forward(&a, Some(residual), pass)?;
        let [gate, up] = layer.feed_forward_parts(config.intermediate_size)?;
        let (gate, up) = rayon::join(|| gate.forward(&z, pass), || up.forward(&z, pass));
        let ((gate, gate_tape), (up, up_tape)) = (gate?, up?); // (T, F)
        let adapters = [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape];
        Ok(Activations { q, k, v, o, log_sum, mlp_norm, gate, up, adapters })
    }

    /// Maps ds (T, D), the gradient of the residual stream after this layer, to that before it, which may be
    /// `None` unless `needs_dx`.
    fn backward_layer(
        &self,
        layer: &Layer,
        tape: LayerTape,
        ds: Tensor,
        needs_dx: bool,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Option<Tensor>> {
        let config = &self.config;
        let y = match (&tape.input, &layer.attn_norm) {
            (LayerInput::Normed(tape), Some(norm)) => norm.recompute(tape, pass)?,
            (LayerInput::Plain(x), _) => x.clone(),
            (LayerInput::Normed(_), None) => {
                return Err(Error::Bug("the tape is of another encoder".to_owned()));
            }
        };
        let activations = match tape.activations {
            Some(activations) => activations,
            None => self.activations(layer, &y, tape.input.residual(), pass)?,
        };
        let Activations { q, k, v, o, log_sum, mlp_norm, gate, up, adapters } = activations;
        let [q_tape, k_tape, v_tape, o_tape, gate_tape, up_tape] = &adapters;
        let h = pass.round(activation::gated(&gate, &up, config.activation)?)?;
        let h = pass.apply_dropout(h, config.dropout.mlp, layer.first_site + 6)?;
        let dh = layer.mlp_wo.backward(&h, &tape.mlp_wo, &ds, None, pass, gradients)?;
        let dh = pass.apply_dropout(dh, config.dropout.mlp, layer.first_site + 6)?;
        let (dgate, dup) = activation::gated_backward(&gate, &up, &dh, config.activation)?;
        let (dgate, dup) = (pass.round(dgate)?, pass.round(dup)?);
        let z = layer.mlp_norm.recompute(&mlp_norm, pass)?;
        let [gate, up] = layer.feed_forward_parts(config.intermediate_size)?;
        let dz = gate.backward(&z, gate_tape, &dgate, None, pass, gradients)?;
        let dz = up.backward(&z, up_tape, &dup, Some(dz), pass, gradients)?;
        let ds = layer.mlp_norm.backward(&mlp_norm, &dz, Some(&ds), pass, gradients)?;

        let da = pass.apply_dropout(ds.clone(), config.dropout.attention, layer.first_site + 5)?;
        let d_o = layer.wo.backward(&o, o_tape, &da, None, pass, gradients)?;
        let attention = self.attention(layer, pass);
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &o, &log_sum, &d_o, pass.packing, &attention)?;
        let (dq, dk, dv) = (pass.round(dq)?, pass.round(dk)?, pass.round(dv)?);
        let (dq, dk) = rope::backward_both(&dq, &dk, pass.packing, self.rope(layer))?;
        let (dq, dk) = (pass.round(dq)?, pass.round(dk)?);
        let [query, key, value] = layer.attention_parts(config.hidden_size)?;
        if !needs_dx && !layer.attn_norm.as_ref().is_some_and(LayerNorm::is_trained) {
            for (linear, tape, d) in [(query, q_tape, dq), (key, k_tape, dk), (value, v_tape, dv)] {
                linear.backward_parameters(&y, tape, &d, None, pass, gradients)?;
            }
            return Ok(None);
        }
        // Without a norm, the input of attention is the residual stream itself. A copy, because `da` may have
        // the memory of `ds`.
        let straight = layer.attn_norm.is_none().then(|| ds.copy()).transpose()?;
        let dy = query.backward(&y, q_tape, &dq, straight, pass, gradients)?;
        let dy = key.backward(&y, k_tape, &dk, Some(dy), pass, gradients)?;
        let dy = value.backward(&y, v_tape, &dv, Some(dy), pass, gradients)?;
        match (&tape.input, &layer.attn_norm) {
            (LayerInput::Normed(tape), Some(norm)) => {
                norm.backward(tape, &dy, Some(&ds), pass, gradients).map(Some)
            }
            _ => Ok(Some(dy)),
        }
    }

    fn attention(&self, layer: &Layer, pass: &Pass) -> Attention {
        let config = &self.config;
        let head_width = config.hidden_size / config.heads;
        Attention {
            heads: config.heads,
            kv_heads: config.heads,
            head_width,
            scale: (head_width as f32).sqrt().recip(),
            left: layer.window,
            right: layer.window,
            dropout: pass.dropout_mask(config.dropout.attention, layer.first_site + 4),
        }
    }

    fn rope(&self, layer: &Layer) -> &rope::Table {
        &self.ropes[usize::from(layer.window.is_some())]
    }

    fn drop_embeddings(&self, x: Tensor, pass: &Pass) -> Result<Tensor> {
        pass.apply_dropout(x, self.config.dropout.embedding, self.layers.len() as u32 * DROPOUT_SITES)
    }
}

impl Encoder for ModernBert {
    fn config(&self) -> &dyn EncoderConfig {
        &self.config
    }

    fn forward(&self, ids: &Tensor, pass: &Pass, save: Saved) -> Result<(Tensor, Option<encoder::Tape>)> {
        let word = self.tok_embeddings.value();
        let tables = embedding::Tables {
            word_embeddings: word,
            position_embeddings: None,
            position_offset: 0,
            token_type_embeddings: None,
        };
        let x = pass.round(embedding::forward(ids, pass.packing, &tables)?)?;
        let (x, embeddings_norm) = self.embeddings_norm.forward(&x, None, pass)?;
        let x = self.drop_embeddings(x, pass)?;
        let mut stream = ResidualStream { residual: None, block_output: x };
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (next, tape) = self.forward_layer(layer, stream, pass, save)?;
            stream = next;
            layers.extend(tape);
        }
        let (y, final_norm) =
            self.final_norm.forward(&stream.block_output, stream.residual.as_ref(), pass)?;
        let tape = Tape { embeddings_norm, layers, final_norm };
        Ok((y, (save > Saved::None).then(|| encoder::Tape::new(tape))))
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
        let embeddings_trained = self.tok_embeddings.is_trained() || self.embeddings_norm.is_trained();
        let mut ds = Some(self.final_norm.backward(&tape.final_norm, &dy, None, pass, gradients)?);
        for (l, (layer, tape)) in self.layers.iter().zip(tape.layers).enumerate().rev() {
            let Some(d) = ds.take() else { break };
            let needs_dx = l > 0 || embeddings_trained;
            ds = gradients
                .run_with_deferred(|| self.backward_layer(layer, tape, d, needs_dx, pass, gradients))?;
        }
        if let (true, Some(dx)) = (embeddings_trained, ds) {
            let dx = self.drop_embeddings(dx, pass)?;
            let dx = self.embeddings_norm.backward(&tape.embeddings_norm, &dx, None, pass, gradients)?;
            if let Some(dword) = gradients.grad_slot(&self.tok_embeddings)? {
                embedding::backward(&dx, ids, pass.packing, 0, Some(&dword), None, None)?;
            }
        }
        Ok(())
    }

    fn visit(&mut self, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        visitor.parameter(TOK_EMBEDDINGS, &mut self.tok_embeddings)?;
        self.embeddings_norm.visit("embeddings.norm", visitor)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let name = format!("layers.{l}");
            if let Some(norm) = &mut layer.attn_norm {
                norm.visit(&format!("{name}.attn_norm"), visitor)?;
            }
            for (part, linear) in layer.linears() {
                linear.visit(&format!("{name}.{part}"), visitor)?;
            }
            layer.mlp_norm.visit(&format!("{name}.mlp_norm"), visitor)?;
        }
        self.final_norm.visit("final_norm", visitor)
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

impl Layer {
    /// Query, key and value projection.
    fn attention_parts(&self, d: usize) -> Result<[Linear; 3]> {
        let all = &self.wqkv;
        Ok([all.rows(0..d)?, all.rows(d..2 * d)?, all.rows(2 * d..3 * d)?])
    }

    /// Gate and up projection.
    fn feed_forward_parts(&self, f: usize) -> Result<[Linear; 2]> {
        Ok([self.wi.rows(0..f)?, self.wi.rows(f..2 * f)?])
    }

    fn linears(&mut self) -> [(&'static str, &mut Linear); 4] {
        [
            ("attn.Wqkv", &mut self.wqkv),
            ("attn.Wo", &mut self.wo),
            ("mlp.Wi", &mut self.wi),
            ("mlp.Wo", &mut self.mlp_wo),
        ]
    }
}
