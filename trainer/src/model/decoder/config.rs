//! config.json of the decoder stack and its families.
//!
//! A new family needs a row in [`MODEL_TYPES`], a variant of [`Family`] and its branches in [`Config::read`].

use kernels::activation::Activation;

use super::super::config_json::ConfigJson;
use super::super::rope::{RopeKeys, RopeParameters};
use crate::Result;

/// Values of `model_type`, and the family that each means.
pub const MODEL_TYPES: &[(&str, Family)] = &[
    ("mistral", Family::Mistral),
    ("llama", Family::Llama),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("gemma3_text", Family::Gemma3),
];

/// Families of the decoder stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `MistralModel`: a sliding window in all layers.
    Mistral,
    /// `LlamaModel`.
    Llama,
    /// `Qwen2Model`: biases in query, key and value projection.
    Qwen2,
    /// `Qwen3Model`: norms of each head's queries and keys.
    Qwen3,
    /// `Gemma3TextModel`: norms before and after each block, sliding windows in most layers.
    Gemma3,
}

/// Checked config.json of the decoder stack.
#[derive(Clone, Debug)]
pub struct Config {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) intermediate_size: usize,
    pub(super) max_positions: usize,
    pub(super) epsilon: f64,
    pub(super) activation: Activation,
    pub(super) biases: Biases,
    /// Whether each head's queries and keys are normalised.
    pub(super) qk_norm: bool,
    /// Gemma: norms multiply by 1 + w, the output of each block is normalised, embeddings are multiplied by
    /// √D.
    pub(super) gemma: bool,
    /// Factor of the attention scores q kᵀ.
    pub(super) scale: f32,
    /// Attention window of each layer (L).
    pub(super) windows: Vec<AttentionWindow>,
    /// RoPE parameters that [`AttentionWindow::rope`] indexes.
    pub(super) rope_parameters: Vec<RopeParameters>,
    /// Dropout rate of the attention probabilities.
    pub(super) dropout: f32,
}

/// Linear layers that have a bias.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Biases {
    /// Query, key and value projection.
    pub(super) qkv: bool,
    pub(super) output: bool,
    pub(super) mlp: bool,
}

/// Attention window of a layer, and the RoPE of its queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AttentionWindow {
    /// Number of tokens before a query that it attends to; `None` for all.
    pub(super) left: Option<usize>,
    /// Number of tokens after a query that it attends to; `None` for all.
    pub(super) right: Option<usize>,
    /// Index in [`Config::rope_parameters`].
    pub(super) rope: usize,
}

impl Config {
    /// Reads and checks config.json. A missing field has the default of transformers. `dropout` replaces the
    /// rate.
    pub fn read(family: Family, json: &ConfigJson, dropout: Option<f32>) -> Result<Self> {
        let gemma = family == Family::Gemma3;
        let (hidden_size, heads) = (json.size("hidden_size")?, json.size("num_attention_heads")?);
        let kv_heads = match family {
            _ if json.is_null("num_key_value_heads") => heads,
            Family::Llama => json.size_or("num_key_value_heads", heads)?,
            Family::Mistral => json.size_or("num_key_value_heads", 8)?,
            Family::Qwen2 | Family::Qwen3 => json.size_or("num_key_value_heads", 32)?,
            Family::Gemma3 => json.size_or("num_key_value_heads", 4)?,
        };
        json.divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)?;
        let head_dim = match (json.optional_size("head_dim")?, family) {
            (Some(width), _) => width,
            (None, Family::Qwen3) => 128,
            (None, Family::Gemma3) => 256,
            (None, _) => {
                json.divides("num_attention_heads", heads, "hidden_size", hidden_size)?;
                hidden_size / heads
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(json.error(format!(
                "heads are {head_dim} wide (`head_dim`), and rope max_positions need an even hidden_size"
            )));
        }
        for name in ["attn_logit_softcapping", "quantization_config"] {
            json.expect(name, serde_json::Value::Null)?;
        }
        let bias = |name: &str| json.flag(name, false);
        let biases = match family {
            Family::Mistral => Biases::default(),
            Family::Qwen2 => Biases { qkv: true, ..Biases::default() },
            Family::Llama => {
                let attention = bias("attention_bias")?;
                Biases { qkv: attention, output: attention, mlp: bias("mlp_bias")? }
            }
            Family::Qwen3 | Family::Gemma3 => {
                let attention = bias("attention_bias")?;
                Biases { qkv: attention, output: attention, mlp: false }
            }
        };
        let scaled_by = if gemma { json.number("query_pre_attn_scalar", 256.0)? } else { head_dim as f64 };
        if scaled_by <= 0.0 {
            return Err(
                json.error(format!("`query_pre_attn_scalar` is {scaled_by}, expected a number above 0"))
            );
        }
        let (activation, named) =
            if gemma { ("hidden_activation", "gelu_pytorch_tanh") } else { ("hidden_act", "silu") };
        Ok(Self {
            vocab_size: json.size("vocab_size")?,
            hidden_size,
            heads,
            kv_heads,
            head_dim,
            intermediate_size: json.size("intermediate_size")?,
            max_positions: json.size("max_position_embeddings")?,
            epsilon: json.number("rms_norm_eps", 1e-6)?,
            activation: json.activation(activation, named)?,
            biases,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            gemma,
            scale: scaled_by.sqrt().recip() as f32,
            windows: windows(family, json)?,
            rope_parameters: rope_parameters(family, json)?,
            dropout: dropout.map_or_else(|| json.rate("attention_dropout", 0.0), Ok)?,
        })
    }
}

/// RoPE of the layers with full attention and, in Gemma, of those with a sliding window.
fn rope_parameters(family: Family, json: &ConfigJson) -> Result<Vec<RopeParameters>> {
    let full = RopeKeys::DEFAULT;
    if family != Family::Gemma3 {
        return Ok(vec![RopeParameters::read(json, full)?]);
    }
    let local =
        RopeKeys { layer_type: "sliding_attention", base: "rope_local_base_freq", scaled: false, ..full };
    Ok(vec![
        RopeParameters::read(json, RopeKeys { default: 1e6, ..full })?,
        RopeParameters::read(json, local)?,
    ])
}

/// Attention window of each layer (L).
fn windows(family: Family, json: &ConfigJson) -> Result<Vec<AttentionWindow>> {
    let layers = json.size("num_hidden_layers")?;
    let gemma = family == Family::Gemma3;
    // Gemma and the others have different names for a decoder with bidirectional attention.
    let direction = if gemma { "use_bidirectional_attention" } else { "is_causal" };
    let causal = json.flag(direction, !gemma)? != gemma;
    let window = match family {
        Family::Llama => None,
        Family::Mistral if json.is_null("sliding_window") => None,
        Family::Mistral => Some(json.size_or("sliding_window", 4096)?),
        Family::Qwen2 | Family::Qwen3 => match json.flag("use_sliding_window", false)? {
            true => Some(json.size_or("sliding_window", 4096)?),
            false => None,
        },
        Family::Gemma3 => Some(json.size_or("sliding_window", 4096)?),
    };
    let windowed = |l: usize| -> Result<bool> {
        match family {
            Family::Mistral | Family::Llama => Ok(true),
            Family::Qwen2 | Family::Qwen3 => {
                let first = json.count("max_window_layers", 28)?;
                json.windowed(l, layers, |l| l >= first)
            }
            Family::Gemma3 => {
                let pattern = json.size_or("sliding_window_pattern", 6)?;
                json.windowed(l, layers, |l| !(l + 1).is_multiple_of(pattern))
            }
        }
    };
    let side = |window: usize| match (causal, gemma) {
        // A causal window of transformers includes the token itself.
        (true, _) => window - 1,
        // A bidirectional window of Gemma counts the tokens of both sides.
        (false, true) => window / 2,
        (false, false) => window,
    };
    let right = causal.then_some(0);
    (0..layers)
        .map(|l| {
            Ok(match window {
                Some(window) if windowed(l)? => AttentionWindow {
                    left: Some(side(window)),
                    right: right.or(Some(side(window))),
                    rope: usize::from(gemma),
                },
                _ => AttentionWindow { left: None, right, rope: 0 },
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn read(family: Family, more: Value) -> Result<Config> {
        let mut fields = json!({"vocab_size": 9, "hidden_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 4,
            "intermediate_size": 64, "max_position_embeddings": 128, "head_dim": 8});
        for (key, value) in more.as_object().unwrap() {
            fields[key] = value.clone();
        }
        Config::read(family, &ConfigJson::new(Path::new("m"), fields), None)
    }

    fn sides(family: Family, more: Value) -> Vec<(Option<usize>, Option<usize>)> {
        read(family, more).unwrap().windows.iter().map(|window| (window.left, window.right)).collect()
    }

    #[test]
    fn windows_are_those_of_transformers() {
        let (all, causal) = ((None, None), (None, Some(0)));
        assert_eq!(sides(Family::Mistral, json!({}))[0], (Some(4095), Some(0)));
        assert_eq!(sides(Family::Mistral, json!({"sliding_window": null}))[0], causal);
        assert_eq!(sides(Family::Llama, json!({"sliding_window": 5}))[0], causal);
        assert_eq!(sides(Family::Llama, json!({"is_causal": false}))[0], all);
        assert_eq!(sides(Family::Qwen2, json!({"sliding_window": 5})), [causal; 4]);
        let some = json!({"sliding_window": 5, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(sides(Family::Qwen3, some), [causal, causal, causal, (Some(4), Some(0))]);
        let typed = json!({"sliding_window": 5, "use_sliding_window": true, "max_window_layers": 0,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]});
        assert_eq!(sides(Family::Qwen3, typed), [causal, (Some(4), Some(0)), causal, causal]);
        let gemma =
            json!({"sliding_window": 5, "sliding_window_pattern": 2, "use_bidirectional_attention": true});
        assert_eq!(sides(Family::Gemma3, gemma), [(Some(2), Some(2)), all, (Some(2), Some(2)), all]);
        let rope_parameters: Vec<_> =
            read(Family::Gemma3, json!({})).unwrap().windows.iter().map(|window| window.rope).collect();
        assert_eq!(rope_parameters, [1; 4]);
    }

    #[test]
    fn what_changes_the_result_and_is_not_supported_is_named() {
        for (family, more, expected) in [
            (Family::Gemma3, json!({"attn_logit_softcapping": 50.0}), "`attn_logit_softcapping` is 50.0"),
            (Family::Llama, json!({"quantization_config": {"bits": 4}}), "`quantization_config` is"),
            (Family::Llama, json!({"hidden_act": "mish"}), "`hidden_act` is `mish`"),
            (
                Family::Qwen2,
                json!({"use_sliding_window": true, "layer_types": ["full_attention"]}),
                "`layer_types` has 1",
            ),
            (
                Family::Gemma3,
                json!({"layer_types":
                    ["full_attention", "full_attention", "chunked_attention", "full_attention"]}),
                "`layer_types` has \"chunked_attention\"",
            ),
            (Family::Qwen3, json!({"num_key_value_heads": 3}), "`num_key_value_heads` is 3"),
            (Family::Qwen3, json!({"attention_bias": "yes"}), "`attention_bias` is \"yes\""),
        ] {
            let error = read(family, more).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
