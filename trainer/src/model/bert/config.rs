//! config.json of the BERT stack, and the tensor names of its families.
//!
//! A new family needs a row in [`MODEL_TYPES`], a variant of [`Family`], its `Names` and its branches in
//! [`Config::read`].

use kernels::activation::Activation;

use super::super::config_json::ConfigJson;
use super::super::relative_bias;
use crate::Result;

/// Values of `model_type`, and the family that each means.
pub const MODEL_TYPES: &[(&str, Family)] = &[
    ("bert", Family::Bert),
    ("roberta", Family::Roberta),
    ("xlm-roberta", Family::Roberta),
    ("camembert", Family::Roberta),
    ("mpnet", Family::MPNet),
    ("distilbert", Family::DistilBert),
];

/// Families of the BERT stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `BertModel`.
    Bert,
    /// `RobertaModel`, `XLMRobertaModel`, `CamembertModel`: position ids start at `pad_token_id + 1`.
    Roberta,
    /// `MPNetModel`: position ids start at 2, no token types, a relative attention bias.
    MPNet,
    /// `DistilBertModel`: no token types, other names.
    DistilBert,
}

/// Checked config.json of the BERT stack.
#[derive(Clone, Debug)]
pub struct Config {
    /// Tensor names of the family.
    pub(super) names: &'static Names,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) intermediate_size: usize,
    /// Number of tokens of the longest text: the rows of the position table from `position_offset` on.
    pub(super) max_positions: usize,
    /// Position id of the first token: rows of the position table before it are unused.
    pub(super) position_offset: usize,
    /// Number of token types; `None` for a family without them.
    pub(super) type_vocab_size: Option<usize>,
    pub(super) epsilon: f64,
    pub(super) activation: Activation,
    pub(super) dropout: Dropout,
}

/// Dropout rates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dropout {
    /// Rate of the embeddings and of the output of the feed-forward layer.
    pub(super) hidden: f32,
    /// Rate of the attention probabilities.
    pub(super) probabilities: f32,
    /// Rate of the output of the attention layer.
    pub(super) attention_output: f32,
}

/// Tensor names of a family in its checkpoints.
#[derive(Debug)]
pub(super) struct Names {
    /// Prefix of a layer's number.
    pub(super) layers: &'static str,
    /// Linear layers: query, key, value, attention output, intermediate, output.
    pub(super) linears: [&'static str; 6],
    /// Norms: after attention, after the feed-forward layer.
    pub(super) norms: [&'static str; 2],
    /// Table of relative attention biases.
    pub(super) relative_attention_bias: Option<&'static str>,
}

impl Names {
    pub(super) const WORD_EMBEDDINGS: &str = "embeddings.word_embeddings.weight";
    pub(super) const POSITION_EMBEDDINGS: &str = "embeddings.position_embeddings.weight";
    pub(super) const TOKEN_TYPE_EMBEDDINGS: &str = "embeddings.token_type_embeddings.weight";
    pub(super) const EMBEDDINGS_LAYER_NORM: &str = "embeddings.LayerNorm";

    const BERT: Self = Self {
        layers: "encoder.layer",
        linears: [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ],
        norms: ["attention.output.LayerNorm", "output.LayerNorm"],
        relative_attention_bias: None,
    };
    const MPNET: Self = Self {
        linears: [
            "attention.attn.q",
            "attention.attn.k",
            "attention.attn.v",
            "attention.attn.o",
            "intermediate.dense",
            "output.dense",
        ],
        norms: ["attention.LayerNorm", "output.LayerNorm"],
        relative_attention_bias: Some("encoder.relative_attention_bias.weight"),
        ..Self::BERT
    };
    const DISTILBERT: Self = Self {
        layers: "transformer.layer",
        linears: [
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        ],
        norms: ["sa_layer_norm", "output_layer_norm"],
        relative_attention_bias: None,
    };
}

impl Config {
    /// Reads and checks config.json. `dropout` replaces its rates.
    pub fn read(family: Family, json: &ConfigJson, dropout: Option<f32>) -> Result<Self> {
        json.expect("position_embedding_type", "absolute")?;
        json.expect("is_decoder", false)?;
        json.expect("add_cross_attention", false)?;
        json.expect("quantization_config", serde_json::Value::Null)?;
        json.expect("relative_attention_num_buckets", relative_bias::BUCKETS)?;
        let distil = family == Family::DistilBert;
        let name =
            |of_distilbert: &'static str, usual: &'static str| if distil { of_distilbert } else { usual };
        let (d, h) = (name("dim", "hidden_size"), name("n_heads", "num_attention_heads"));
        let (hidden_size, heads) = (json.size(d)?, json.size(h)?);
        json.divides(h, heads, d, hidden_size)?;
        let position_offset = match family {
            Family::Bert | Family::DistilBert => 0,
            Family::Roberta => json.count("pad_token_id", 1)? + 1,
            Family::MPNet => 2,
        };
        let rows = json.size("max_position_embeddings")?;
        let max_positions = rows
            .checked_sub(position_offset)
            .filter(|&max_positions| max_positions > 0)
            .ok_or_else(|| {
                json.error(format!(
                    "`max_position_embeddings` is {rows}, expected more than the {position_offset} rows \
                     before the first position"
                ))
            })?;
        let rate = |name: &str| dropout.map_or_else(|| json.rate(name, 0.1), Ok);
        let hidden = rate(name("dropout", "hidden_dropout_prob"))?;
        Ok(Self {
            names: match family {
                Family::Bert | Family::Roberta => &Names::BERT,
                Family::MPNet => &Names::MPNET,
                Family::DistilBert => &Names::DISTILBERT,
            },
            vocab_size: json.size("vocab_size")?,
            hidden_size,
            layers: json.size(name("n_layers", "num_hidden_layers"))?,
            heads,
            intermediate_size: json.size(name("hidden_dim", "intermediate_size"))?,
            max_positions,
            position_offset,
            type_vocab_size: match family {
                Family::Bert | Family::Roberta => Some(json.size_or("type_vocab_size", 2)?),
                Family::MPNet | Family::DistilBert => None,
            },
            epsilon: if distil { 1e-12 } else { json.number("layer_norm_eps", 1e-12)? },
            activation: json.activation(name("activation", "hidden_act"), "gelu")?,
            dropout: Dropout {
                hidden,
                probabilities: rate(name("attention_dropout", "attention_probs_dropout_prob"))?,
                attention_output: if distil { 0.0 } else { hidden },
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    fn read(family: Family, more: Value) -> Result<Config> {
        let mut fields = json!({"vocab_size": 9, "hidden_size": 32, "num_attention_heads": 4,
            "num_hidden_layers": 2, "intermediate_size": 64,
            "max_position_embeddings": 66, "type_vocab_size": 1});
        for (key, value) in more.as_object().unwrap() {
            fields[key] = value.clone();
        }
        Config::read(family, &ConfigJson::new(Path::new("m"), fields), None)
    }

    #[test]
    fn position_ids_start_after_that_of_the_padding_token() {
        let max_positions = |family, more| {
            let config = read(family, more).unwrap();
            (config.max_positions, config.position_offset)
        };
        assert_eq!(max_positions(Family::Bert, json!({"pad_token_id": 3})), (66, 0));
        assert_eq!(max_positions(Family::Roberta, json!({})), (64, 2));
        assert_eq!(max_positions(Family::Roberta, json!({"pad_token_id": 0})), (65, 1));
        assert_eq!(max_positions(Family::MPNet, json!({"pad_token_id": 7})), (64, 2));
    }

    #[test]
    fn what_changes_the_result_and_is_not_supported_is_named() {
        for (family, more, expected) in [
            (
                Family::Bert,
                json!({"position_embedding_type": "relative_key"}),
                "`position_embedding_type` is \"relative_key\"",
            ),
            (Family::Roberta, json!({"is_decoder": true}), "`is_decoder` is true"),
            (
                Family::MPNet,
                json!({"relative_attention_num_buckets": 64}),
                "`relative_attention_num_buckets` is 64",
            ),
            (
                Family::Roberta,
                json!({"max_position_embeddings": 2}),
                "expected more than the 2 rows before the first position",
            ),
            (Family::Bert, json!({"num_attention_heads": 5}), "`num_attention_heads` is 5"),
            (Family::DistilBert, json!({}), "lacks `dim`"),
        ] {
            let error = read(family, more).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
