//! What config.json says of a decoder, family by family.

use kernels::activation::Activation;

use super::super::rotary::{Place, Rotary};
use super::super::settings::Settings;
use crate::Result;

/// The decoders that are told apart. Their blocks are the same; what a family has or lacks of them is in [`Shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `MistralModel`: a window over all layers.
    Mistral,
    /// `LlamaModel`.
    Llama,
    /// `Qwen2Model`: biases of query, key and value.
    Qwen2,
    /// `Qwen3Model`: norms of each head's queries and keys.
    Qwen3,
    /// `Gemma3TextModel`: norms before and after each block, windows in most layers.
    Gemma3,
}

/// What config.json says.
#[derive(Clone, Debug)]
pub struct Shape {
    pub(super) vocabulary: usize,
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_width: usize,
    pub(super) inner: usize,
    pub(super) positions: usize,
    pub(super) epsilon: f64,
    pub(super) activation: Activation,
    pub(super) biases: Biases,
    /// Whether each head's queries and keys are normed.
    pub(super) head_norms: bool,
    /// Gemma: norms multiply by 1 + w, what a block adds is normed, embeddings are multiplied by √D.
    pub(super) gemma: bool,
    /// Factor of q kᵀ.
    pub(super) scale: f32,
    /// What each layer sees, L of them.
    pub(super) sights: Vec<Sight>,
    /// The positions that [`Sight::rotary`] chooses from.
    pub(super) rotaries: Vec<Rotary>,
    pub(super) dropout: f32,
}

/// Which linear layers have a bias.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Biases {
    /// Query, key and value.
    pub(super) inputs: bool,
    pub(super) output: bool,
    pub(super) mlp: bool,
}

/// How far the tokens of a layer see, and which positions turn them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sight {
    pub(super) left: Option<usize>,
    pub(super) right: Option<usize>,
    /// Index in [`Shape::rotaries`].
    pub(super) rotary: usize,
}

impl Family {
    /// The family of a `model_type`.
    pub fn named(model_type: &str) -> Option<Self> {
        match model_type {
            "mistral" => Some(Self::Mistral),
            "llama" => Some(Self::Llama),
            "qwen2" => Some(Self::Qwen2),
            "qwen3" => Some(Self::Qwen3),
            "gemma3_text" => Some(Self::Gemma3),
            _ => None,
        }
    }
}

impl Shape {
    /// Reads and checks config.json. A field that is absent has the value that transformers gives it.
    pub fn read(family: Family, settings: &Settings, dropout: Option<f32>) -> Result<Self> {
        let gemma = family == Family::Gemma3;
        let (width, heads) = (settings.size("hidden_size")?, settings.size("num_attention_heads")?);
        let kv_heads = match family {
            _ if settings.is_null("num_key_value_heads") => heads,
            Family::Llama => settings.size_or("num_key_value_heads", heads)?,
            Family::Mistral => settings.size_or("num_key_value_heads", 8)?,
            Family::Qwen2 | Family::Qwen3 => settings.size_or("num_key_value_heads", 32)?,
            Family::Gemma3 => settings.size_or("num_key_value_heads", 4)?,
        };
        settings.divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)?;
        let head_width = match (settings.optional_size("head_dim")?, family) {
            (Some(width), _) => width,
            (None, Family::Qwen3) => 128,
            (None, Family::Gemma3) => 256,
            (None, _) => {
                settings.divides("num_attention_heads", heads, "hidden_size", width)?;
                width / heads
            }
        };
        if !head_width.is_multiple_of(2) {
            return Err(settings.wrong(format!(
                "heads are {head_width} wide (`head_dim`), and rotary positions need an even width"
            )));
        }
        for name in ["attn_logit_softcapping", "quantization_config"] {
            settings.expect(name, serde_json::Value::Null)?;
        }
        let bias = |name: &str| settings.flag(name, false);
        let biases = match family {
            Family::Mistral => Biases::default(),
            Family::Qwen2 => Biases { inputs: true, ..Biases::default() },
            Family::Llama => {
                let attention = bias("attention_bias")?;
                Biases { inputs: attention, output: attention, mlp: bias("mlp_bias")? }
            }
            Family::Qwen3 | Family::Gemma3 => {
                let attention = bias("attention_bias")?;
                Biases { inputs: attention, output: attention, mlp: false }
            }
        };
        let scaled_by =
            if gemma { settings.number("query_pre_attn_scalar", 256.0)? } else { head_width as f64 };
        if scaled_by <= 0.0 {
            return Err(
                settings.wrong(format!("`query_pre_attn_scalar` is {scaled_by}, expected a number above 0"))
            );
        }
        let (activation, named) =
            if gemma { ("hidden_activation", "gelu_pytorch_tanh") } else { ("hidden_act", "silu") };
        Ok(Self {
            vocabulary: settings.size("vocab_size")?,
            width,
            heads,
            kv_heads,
            head_width,
            inner: settings.size("intermediate_size")?,
            positions: settings.size("max_position_embeddings")?,
            epsilon: settings.number("rms_norm_eps", 1e-6)?,
            activation: settings.activation(activation, named)?,
            biases,
            head_norms: matches!(family, Family::Qwen3 | Family::Gemma3),
            gemma,
            scale: scaled_by.sqrt().recip() as f32,
            sights: sights(family, settings)?,
            rotaries: rotaries(family, settings)?,
            dropout: dropout.map_or_else(|| settings.rate("attention_dropout", 0.0), Ok)?,
        })
    }

    /// L.
    pub(super) fn layers(&self) -> usize {
        self.sights.len()
    }
}

fn rotaries(family: Family, settings: &Settings) -> Result<Vec<Rotary>> {
    let full = Place::ALL;
    if family != Family::Gemma3 {
        return Ok(vec![Rotary::read(settings, full)?]);
    }
    let local = Place { kind: "sliding_attention", base: "rope_local_base_freq", scaled: false, ..full };
    Ok(vec![Rotary::read(settings, Place { default: 1e6, ..full })?, Rotary::read(settings, local)?])
}

/// What each layer sees.
fn sights(family: Family, settings: &Settings) -> Result<Vec<Sight>> {
    let layers = settings.size("num_hidden_layers")?;
    let gemma = family == Family::Gemma3;
    // Two names for the same: a decoder whose tokens see the whole text.
    let both_ways = if gemma { "use_bidirectional_attention" } else { "is_causal" };
    let causal = settings.flag(both_ways, !gemma)? != gemma;
    let window = match family {
        Family::Llama => None,
        Family::Mistral if settings.is_null("sliding_window") => None,
        Family::Mistral => Some(settings.size_or("sliding_window", 4096)?),
        Family::Qwen2 | Family::Qwen3 => match settings.flag("use_sliding_window", false)? {
            true => Some(settings.size_or("sliding_window", 4096)?),
            false => None,
        },
        Family::Gemma3 => Some(settings.size_or("sliding_window", 4096)?),
    };
    let windowed = |l: usize| -> Result<bool> {
        match family {
            Family::Mistral | Family::Llama => Ok(true),
            Family::Qwen2 | Family::Qwen3 => {
                let first = settings.count("max_window_layers", 28)?;
                settings.windowed(l, layers, |l| l >= first)
            }
            Family::Gemma3 => {
                let pattern = settings.size_or("sliding_window_pattern", 6)?;
                settings.windowed(l, layers, |l| !(l + 1).is_multiple_of(pattern))
            }
        }
    };
    let reach = |window: usize| match (causal, gemma) {
        // transformers counts the token itself into a causal window
        (true, _) => window - 1,
        // Gemma's is as wide as both sides together
        (false, true) => window / 2,
        (false, false) => window,
    };
    let right = causal.then_some(0);
    (0..layers)
        .map(|l| {
            let window = window.filter(|_| family != Family::Llama);
            Ok(match window {
                Some(window) if windowed(l)? => Sight {
                    left: Some(reach(window)),
                    right: right.or(Some(reach(window))),
                    rotary: usize::from(gemma),
                },
                _ => Sight { left: None, right, rotary: 0 },
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn read(family: Family, more: Value) -> Result<Shape> {
        let mut fields = json!({"vocab_size": 9, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 4, "intermediate_size": 64, "max_position_embeddings": 128, "head_dim": 8});
        for (key, value) in more.as_object().unwrap() {
            fields[key] = value.clone();
        }
        Shape::read(family, &Settings::new(Path::new("m"), fields), None)
    }

    fn reaches(family: Family, more: Value) -> Vec<(Option<usize>, Option<usize>)> {
        read(family, more).unwrap().sights.iter().map(|sight| (sight.left, sight.right)).collect()
    }

    #[test]
    fn windows_are_those_of_transformers() {
        let (all, causal) = ((None, None), (None, Some(0)));
        assert_eq!(reaches(Family::Mistral, json!({}))[0], (Some(4095), Some(0)));
        assert_eq!(reaches(Family::Mistral, json!({"sliding_window": null}))[0], causal);
        assert_eq!(reaches(Family::Llama, json!({"sliding_window": 5}))[0], causal);
        assert_eq!(reaches(Family::Llama, json!({"is_causal": false}))[0], all);
        assert_eq!(reaches(Family::Qwen2, json!({"sliding_window": 5})), [causal; 4]);
        let some = json!({"sliding_window": 5, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(reaches(Family::Qwen3, some), [causal, causal, causal, (Some(4), Some(0))]);
        let typed = json!({"sliding_window": 5, "use_sliding_window": true, "max_window_layers": 0,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]});
        assert_eq!(reaches(Family::Qwen3, typed), [causal, (Some(4), Some(0)), causal, causal]);
        let gemma =
            json!({"sliding_window": 5, "sliding_window_pattern": 2, "use_bidirectional_attention": true});
        assert_eq!(reaches(Family::Gemma3, gemma), [(Some(2), Some(2)), all, (Some(2), Some(2)), all]);
        let rotaries: Vec<_> =
            read(Family::Gemma3, json!({})).unwrap().sights.iter().map(|sight| sight.rotary).collect();
        assert_eq!(rotaries, [1; 4]);
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
                json!({"layer_types": ["full_attention", "full_attention", "chunked_attention", "full_attention"]}),
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
