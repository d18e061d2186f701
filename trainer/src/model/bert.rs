//! Encoder stack with norms after each block and a table of position embeddings: BERT (Devlin et al. 2018),
//! RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2019), MPNet (Song et al. 2020) and DistilBERT
//! (Sanh et al. 2019).
//!
//! This file wires the layers. How the families differ is in [`Config`]. Fields bear the names of BERT's
//! checkpoint.

mod config;

use candle_core::Tensor;
use kernels::activation;
use kernels::attention::{self, Attention};
use kernels::{embedding, norm};

use self::config::Names;
pub use self::config::{Config, Family, MODEL_TYPES};
use super::encoder::{self, Encoder, EncoderConfig, SavedFloats, Sizes};
use super::linear::{self, Linear};
use super::norms::LayerNorm;
use super::params::{Gradients, Parameter, ParameterKind, ParameterVisitor};
use super::pass::{DROPOUT_SITES, Pass, Saved};
use super::relative_bias::RelativeBias;
use super::weights::Weights;
use crate::{Error, Result};

/// Encoder of the BERT family.
#[derive(Debug)]
pub struct Bert {
    config: Config,
    word_embeddings: Parameter,               // (V, D)
    position_embeddings: Parameter,           // (P, D)
    token_type_embeddings: Option<Parameter>, // (token types, D)
    embeddings_layer_norm: LayerNorm,
    layers: Vec<Layer>,
    relative_attention_bias: Option<RelativeBias>,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output_dense: Linear,
    attention_output_layer_norm: LayerNorm,
    intermediate_dense: Linear,
    output_dense: Linear,
    output_layer_norm: LayerNorm,
    first_site: u32,
}

/// Activations that the backward pass needs.
#[derive(Debug)]
struct Tape {
    embeddings_layer_norm: norm::Tape,
    layers: Vec<LayerTape>,
}

/// Saved activations of one layer. The layer's input is recomputed from the tape of the norm below it.
#[derive(Debug)]
struct LayerTape {
    /// `None` if only the inputs of layers are saved.
    activations: Option<Activations>,
    output_layer_norm: norm::Tape,
    output_dense: linear::Tape,
}

/// Activations of one layer, up to the input of its last matrix product.
#[derive(Debug)]
struct Activations {
    q: Tensor,       // (T, D)
    k: Tensor,       // (T, D)
    v: Tensor,       // (T, D)
    o: Tensor,       // (T, D)
    log_sum: Tensor, // (H, T)
    attention_output_layer_norm: norm::Tape,
    u: Tensor, // (T, F), the input of the activation function
    /// Tapes of query, key, value, attention output and intermediate layer.
    adapters: [linear::Tape; 5],
}

impl EncoderConfig for Config {
    fn sizes(&self) -> Sizes {
        Sizes {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers: self.layers,
            max_positions: self.max_positions,
        }
    }

    fn anchor(&self) -> &'static str {
        Names::WORD_EMBEDDINGS
    }

    fn passthrough(&self) -> Option<&'static str> {
        Some("pooler.")
    }

    fn saved_floats(&self) -> SavedFloats {
        let &Self { layers, hidden_size, intermediate_size, heads, .. } = self;
        SavedFloats {
            // sum, mean and deviation of a norm
            layer_inputs: (layers + 1) * (hidden_size + 2),
            // q, k, v, o; log_sum; the sum, mean and deviation of the other norm; u
            inside_layers: layers * (5 * hidden_size + heads + 2 + intermediate_size),
        }
    }

    fn build(self: Box<Self>, weights: &Weights, _max_length: usize) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(Bert::new(*self, weights)?))
    }
}

impl Bert {
    fn new(config: Config, weights: &Weights) -> Result<Self> {
        let (d, f, names) = (config.hidden_size, config.intermediate_size, config.names);
        let norm = |name: &str| LayerNorm::new(weights, name, d, config.epsilon, true);
        let layer = |l: usize| {
            let (name, site) = (format!("{}.{l}", names.layers), l as u32 * DROPOUT_SITES);
            let linear = |part: &str, shape: (usize, usize), site: u32| {
                Linear::new(weights, &format!("{name}.{part}"), shape, true, site)
            };
            let [query, key, value, attention_output, intermediate, output] = names.linears;
            let [attention_output_norm, output_norm] = names.norms;
            Ok::<_, Error>(Layer {
                query: linear(query, (d, d), site)?,
                key: linear(key, (d, d), site + 1)?,
                value: linear(value, (d, d), site + 2)?,
                attention_output_dense: linear(attention_output, (d, d), site + 3)?,
                attention_output_layer_norm: norm(&format!("{name}.{attention_output_norm}"))?,
                intermediate_dense: linear(intermediate, (f, d), site + 4)?,
                output_dense: linear(output, (d, f), site + 5)?,
                output_layer_norm: norm(&format!("{name}.{output_norm}"))?,
                first_site: site,
            })
        };
        let embeddings = |name: &str, rows: usize| {
            Ok::<_, Error>(Parameter::new(weights.matrix(name, rows, d)?, ParameterKind::Embedding))
        };
        let position_rows = config.position_offset + config.max_positions;
        let token_types = |rows| embeddings(Names::TOKEN_TYPE_EMBEDDINGS, rows);
        let relative_bias = |name: &str| RelativeBias::new(weights, name, config.heads);
        Ok(Self {
            word_embeddings: embeddings(Names::WORD_EMBEDDINGS, config.vocab_size)?,
            position_embeddings: embeddings(Names::POSITION_EMBEDDINGS, position_rows)?,
            token_type_embeddings: config.type_vocab_size.map(token_types).transpose()?,
            embeddings_layer_norm: norm(Names::EMBEDDINGS_LAYER_NORM)?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            relative_attention_bias: names.relative_attention_bias.map(relative_bias).transpose()?,
            config,
        })
    }

    /// Relative attention bias for each distance from −128 to 128, (H, 257); `None` in families without one.
    fn attention_bias(&self, pass: &Pass) -> Result<Option<Tensor>> {
        self.relative_attention_bias.as_ref().map(|relative| relative.bias(pass)).transpose()
    }

    fn drop_embeddings(&self, x: Tensor, pass: &Pass) -> Result<Tensor> {
        let site = self.layers.len() as u32 * DROPOUT_SITES;
        pass.apply_dropout(x, self.config.dropout.hidden, site)
    }

    /// Recomputes the input of layer `l` from the tape of the norm below it.
    fn layer_input(&self, l: usize, tape: &Tape, pass: &Pass) -> Result<Tensor> {
        match tape.layers[..l].last() {
            Some(below) => self.layers[l - 1].output_layer_norm.recompute(&below.output_layer_norm, pass),
            None => {
                let x = self.embeddings_layer_norm.recompute(&tape.embeddings_layer_norm, pass)?;
                self.drop_embeddings(x, pass)
            }
        }
    }
}

impl Encoder for Bert {
    fn config(&self) -> &dyn EncoderConfig {
        &self.config
    }

    fn forward(&self, ids: &Tensor, pass: &Pass, save: Saved) -> Result<(Tensor, Option<encoder::Tape>)> {
        let tables = embedding::Tables {
            word_embeddings: self.word_embeddings.value(),
            position_embeddings: Some(self.position_embeddings.value()),
            position_offset: self.config.position_offset,
            token_type_embeddings: self.token_type_embeddings.as_ref().map(Parameter::value),
        };
        let sum = pass.round(embedding::forward(ids, pass.packing, &tables)?)?;
        let (x, embeddings_layer_norm) = self.embeddings_layer_norm.forward(&sum, None, pass)?;
        let mut x = self.drop_embeddings(x, pass)?;
        let bias = self.attention_bias(pass)?;
        let mut layers = Vec::new();
        for layer in &self.layers {
            let (y, tape) = layer.forward(x, bias.as_ref(), pass, &self.config, save)?;
            x = y;
            layers.extend(tape);
        }
        let tape = Tape { embeddings_layer_norm, layers };
        Ok((x, (save > Saved::None).then(|| encoder::Tape::new(tape))))
    }

    fn backward(
        &self,
        ids: &Tensor,
        tape: encoder::Tape,
        dy: Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()> {
        let mut tape: Tape = tape.into_inner()?;
        let tables = [
            Some(&self.word_embeddings),
            Some(&self.position_embeddings),
            self.token_type_embeddings.as_ref(),
        ];
        let embeddings_trained = tables.iter().flatten().any(|table| table.is_trained())
            || self.embeddings_layer_norm.is_trained();
        let bias = self.attention_bias(pass)?;
        let mut dx = Some(dy);
        for (l, layer) in self.layers.iter().enumerate().rev() {
            let (Some(dy), Some(layer_tape)) = (dx.take(), tape.layers.pop()) else { break };
            let x = self.layer_input(l, &tape, pass)?;
            let needs_dx = l > 0 || embeddings_trained;
            let (d, dbias) = gradients.run_with_deferred(|| {
                layer.backward(&x, layer_tape, dy, bias.as_ref(), needs_dx, pass, gradients, &self.config)
            })?;
            dx = d;
            if let (Some(relative), Some(dbias)) = (&self.relative_attention_bias, dbias) {
                relative.backward(&dbias, gradients)?;
            }
        }
        if let (true, Some(dx)) = (embeddings_trained, dx) {
            let dx = self.drop_embeddings(dx, pass)?;
            let norm_tape = &tape.embeddings_layer_norm;
            let dx = self.embeddings_layer_norm.backward(norm_tape, &dx, None, pass, gradients)?;
            let [words, positions, token_types] =
                tables.map(|table| table.map(|parameter| gradients.grad_slot(parameter)).transpose());
            let (words, positions, token_types) =
                (words?.flatten(), positions?.flatten(), token_types?.flatten());
            let (words, positions, token_types) = (words.as_ref(), positions.as_ref(), token_types.as_ref());
            let offset = self.config.position_offset;
            embedding::backward(&dx, ids, pass.packing, offset, words, positions, token_types)?;
        }
        Ok(())
    }

    fn visit(&mut self, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        let names = self.config.names;
        visitor.parameter(Names::WORD_EMBEDDINGS, &mut self.word_embeddings)?;
        visitor.parameter(Names::POSITION_EMBEDDINGS, &mut self.position_embeddings)?;
        if let Some(token_types) = &mut self.token_type_embeddings {
            visitor.parameter(Names::TOKEN_TYPE_EMBEDDINGS, token_types)?;
        }
        self.embeddings_layer_norm.visit(Names::EMBEDDINGS_LAYER_NORM, visitor)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let name = format!("{}.{l}", names.layers);
            for (part, linear) in names.linears.iter().zip(layer.linears()) {
                linear.visit(&format!("{name}.{part}"), visitor)?;
            }
            let [attention_output_norm, output_norm] = names.norms;
            layer.attention_output_layer_norm.visit(&format!("{name}.{attention_output_norm}"), visitor)?;
            layer.output_layer_norm.visit(&format!("{name}.{output_norm}"), visitor)?;
        }
        match (&mut self.relative_attention_bias, names.relative_attention_bias) {
            (Some(relative), Some(name)) => relative.visit(name, visitor),
            _ => Ok(()),
        }
    }

    fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let names = self.config.names;
        let layers = self.layers.iter_mut().enumerate();
        layers
            .flat_map(|(l, layer)| {
                let parts = names.linears.iter().zip(layer.linears());
                parts.map(move |(part, linear)| (format!("{}.{l}.{part}", names.layers), linear))
            })
            .collect()
    }
}

impl Layer {
    fn forward(
        &self,
        x: Tensor,
        bias: Option<&Tensor>,
        pass: &Pass,
        config: &Config,
        save: Saved,
    ) -> Result<(Tensor, Option<LayerTape>)> {
        let (activations, z) = self.activations(&x, bias, pass, config)?;
        let h = pass.round(activation::forward(&activations.u, config.activation)?)?;
        let activations = (save == Saved::All).then_some(activations);
        let (d, output_dense) = self.output_dense.forward(&h, pass)?; // (T, D)
        let d = pass.apply_dropout(d, config.dropout.hidden, self.first_site + 8)?;
        let (y, output_layer_norm) = self.output_layer_norm.forward(&d, Some(&z), pass)?;
        Ok((y, (save > Saved::None).then_some(LayerTape { activations, output_layer_norm, output_dense })))
    }

    /// Computes the activations up to the input of the last matrix product, and z (T, D), the input of the
    /// feed-forward layer.
    fn activations(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        pass: &Pass,
        config: &Config,
    ) -> Result<(Activations, Tensor)> {
        let (q, (k, v)) = rayon::join(
            || self.query.forward(x, pass),
            || rayon::join(|| self.key.forward(x, pass), || self.value.forward(x, pass)),
        );
        let ((q, q_tape), (k, k_tape), (v, v_tape)) = (q?, k?, v?); // (T, D)
        let attention = self.attention(pass, config);
        let (o, log_sum) = match bias {
            None => attention::forward(&q, &k, &v, pass.packing, &attention)?,
            Some(bias) => attention::forward_biased(&q, &k, &v, bias, pass.packing, &attention)?,
        };
        let o = pass.round(o)?;
        let (a, o_tape) = self.attention_output_dense.forward(&o, pass)?;
        let a = pass.apply_dropout(a, config.dropout.attention_output, self.first_site + 7)?;
        let (z, attention_output_layer_norm) = self.attention_output_layer_norm.forward(&a, Some(x), pass)?;
        let (u, u_tape) = self.intermediate_dense.forward(&z, pass)?; // (T, F)
        let adapters = [q_tape, k_tape, v_tape, o_tape, u_tape];
        Ok((Activations { q, k, v, o, log_sum, attention_output_layer_norm, u, adapters }, z))
    }

    /// Maps dy (T, D) to dx (T, D), which is `None` unless `needs_dx`, and to the gradient of the relative
    /// attention bias (H, 257).
    fn backward(
        &self,
        x: &Tensor,
        tape: LayerTape,
        dy: Tensor,
        bias: Option<&Tensor>,
        needs_dx: bool,
        pass: &Pass,
        gradients: &Gradients,
        config: &Config,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (activations, z) = match tape.activations {
            Some(activations) => {
                let z = self
                    .attention_output_layer_norm
                    .recompute(&activations.attention_output_layer_norm, pass)?;
                (activations, z)
            }
            None => self.activations(x, bias, pass, config)?,
        };
        let Activations { q, k, v, o, log_sum, attention_output_layer_norm, u, adapters } = activations;
        let [q_tape, k_tape, v_tape, o_tape, u_tape] = &adapters;
        let dz = self.output_layer_norm.backward(&tape.output_layer_norm, &dy, None, pass, gradients)?;
        let dd = pass.apply_dropout(dz.clone(), config.dropout.hidden, self.first_site + 8)?;
        let h = pass.round(activation::forward(&u, config.activation)?)?;
        let dh = self.output_dense.backward(&h, &tape.output_dense, &dd, None, pass, gradients)?;
        let du = pass.round(activation::backward(&u, &dh, config.activation)?)?;
        // A copy, because without dropout `dd` has the same memory, which deferred tasks still read.
        let dz = self.intermediate_dense.backward(&z, u_tape, &du, Some(dz.copy()?), pass, gradients)?;

        let dx = self.attention_output_layer_norm.backward(
            &attention_output_layer_norm,
            &dz,
            None,
            pass,
            gradients,
        )?;
        let da = pass.apply_dropout(dx.clone(), config.dropout.attention_output, self.first_site + 7)?;
        let d_o = self.attention_output_dense.backward(&o, o_tape, &da, None, pass, gradients)?;
        let (q, k, v, o, log_sum) = (&q, &k, &v, &o, &log_sum);
        let (packing, attention) = (pass.packing, self.attention(pass, config));
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
        if !needs_dx {
            for (linear, tape, d) in inputs {
                linear.backward_parameters(x, tape, &d, None, pass, gradients)?;
            }
            return Ok((None, dbias));
        }
        let mut dx = dx.copy()?; // a copy, because `da` may have the same memory
        for (linear, tape, d) in inputs {
            dx = linear.backward(x, tape, &d, Some(dx), pass, gradients)?;
        }
        Ok((Some(dx), dbias))
    }

    fn attention(&self, pass: &Pass, config: &Config) -> Attention {
        let head_width = config.hidden_size / config.heads;
        Attention {
            heads: config.heads,
            kv_heads: config.heads,
            head_width,
            scale: (head_width as f32).sqrt().recip(),
            left: None,
            right: None,
            dropout: pass.dropout_mask(config.dropout.probabilities, self.first_site + 6),
        }
    }

    /// Linear layers in the order of [`Names::linears`].
    fn linears(&mut self) -> [&mut Linear; 6] {
        [
            &mut self.query,
            &mut self.key,
            &mut self.value,
            &mut self.attention_output_dense,
            &mut self.intermediate_dense,
            &mut self.output_dense,
        ]
    }
}
