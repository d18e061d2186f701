//! What config.json says of an encoder with norms after its blocks, and what its family calls its tensors.

use kernels::activation::Activation;

use super::super::relative;
use super::super::settings::Settings;
use crate::Result;

/// The families that share these blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `BertModel`.
    Bert,
    /// `RobertaModel`, `XLMRobertaModel`, `CamembertModel`: positions begin after the padding token's.
    Roberta,
    /// `MPNetModel`: the same, without kinds, with a bias by distance.
    MPNet,
    /// `DistilBertModel`: without kinds, other names.
    DistilBert,
}

/// What config.json says.
#[derive(Clone, Debug)]
pub struct Shape {
    pub(super) names: &'static Names,
    pub(super) vocabulary: usize,
    pub(super) width: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) inner: usize,
    /// Tokens of the longest text.
    pub(super) positions: usize,
    /// Rows of the table of positions that no text uses.
    pub(super) offset: usize,
    pub(super) kinds: Option<usize>,
    pub(super) epsilon: f64,
    pub(super) activation: Activation,
    pub(super) dropout: Dropout,
}

/// Rates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dropout {
    /// Of embeddings and of what the feed-forward layer adds.
    pub(super) hidden: f32,
    /// Of attention's probabilities.
    pub(super) probabilities: f32,
    /// Of what attention adds.
    pub(super) attention_output: f32,
}

/// What a family calls its tensors.
#[derive(Debug)]
pub(super) struct Names {
    /// Before the number of a layer.
    pub(super) layers: &'static str,
    /// Query, key, value, output, up, down.
    pub(super) linears: [&'static str; 6],
    /// After attention, after the feed-forward layer.
    pub(super) norms: [&'static str; 2],
    pub(super) relative: Option<&'static str>,
}

impl Names {
    pub(super) const WORD: &str = "embeddings.word_embeddings.weight";
    pub(super) const POSITION: &str = "embeddings.position_embeddings.weight";
    pub(super) const KIND: &str = "embeddings.token_type_embeddings.weight";
    pub(super) const NORM: &str = "embeddings.LayerNorm";

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
        relative: None,
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
        relative: Some("encoder.relative_attention_bias.weight"),
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
        relative: None,
    };
}

impl Family {
    /// The family of a `model_type`.
    pub fn named(model_type: &str) -> Option<Self> {
        match model_type {
            "bert" => Some(Self::Bert),
            "roberta" | "xlm-roberta" | "camembert" => Some(Self::Roberta),
            "mpnet" => Some(Self::MPNet),
            "distilbert" => Some(Self::DistilBert),
            _ => None,
        }
    }
}

impl Shape {
    /// Reads and checks config.json.
    pub fn read(family: Family, settings: &Settings, dropout: Option<f32>) -> Result<Self> {
        settings.expect("position_embedding_type", "absolute")?;
        settings.expect("is_decoder", false)?;
        settings.expect("add_cross_attention", false)?;
        settings.expect("quantization_config", serde_json::Value::Null)?;
        settings.expect("relative_attention_num_buckets", relative::BUCKETS)?;
        let distil = family == Family::DistilBert;
        // DistilBERT's names, and the others'.
        let name = |own: &'static str, usual: &'static str| if distil { own } else { usual };
        let (d, h) = (name("dim", "hidden_size"), name("n_heads", "num_attention_heads"));
        let (width, heads) = (settings.size(d)?, settings.size(h)?);
        settings.divides(h, heads, d, width)?;
        let offset = match family {
            Family::Bert | Family::DistilBert => 0,
            Family::Roberta => settings.count("pad_token_id", 1)? + 1,
            Family::MPNet => 2,
        };
        let rows = settings.size("max_position_embeddings")?;
        let positions = rows.checked_sub(offset).filter(|&positions| positions > 0).ok_or_else(|| {
            settings.wrong(format!(
                "`max_position_embeddings` is {rows}, of which no text uses the first {offset}"
            ))
        })?;
        let rate = |name: &str| dropout.map_or_else(|| settings.rate(name, 0.1), Ok);
        let hidden = rate(name("dropout", "hidden_dropout_prob"))?;
        Ok(Self {
            names: match family {
                Family::Bert | Family::Roberta => &Names::BERT,
                Family::MPNet => &Names::MPNET,
                Family::DistilBert => &Names::DISTILBERT,
            },
            vocabulary: settings.size("vocab_size")?,
            width,
            layers: settings.size(name("n_layers", "num_hidden_layers"))?,
            heads,
            inner: settings.size(name("hidden_dim", "intermediate_size"))?,
            positions,
            offset,
            kinds: match family {
                Family::Bert | Family::Roberta => Some(settings.size_or("type_vocab_size", 2)?),
                Family::MPNet | Family::DistilBert => None,
            },
            epsilon: if distil { 1e-12 } else { settings.number("layer_norm_eps", 1e-12)? },
            activation: settings.activation(name("activation", "hidden_act"), "gelu")?,
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

    fn read(family: Family, more: Value) -> Result<Shape> {
        let mut fields = json!({"vocab_size": 9, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
            "intermediate_size": 64, "max_position_embeddings": 66, "type_vocab_size": 1});
        for (key, value) in more.as_object().unwrap() {
            fields[key] = value.clone();
        }
        Shape::read(family, &Settings::new(Path::new("m"), fields), None)
    }

    #[test]
    fn positions_begin_after_the_padding_tokens() {
        let positions = |family, more| {
            let shape = read(family, more).unwrap();
            (shape.positions, shape.offset)
        };
        assert_eq!(positions(Family::Bert, json!({"pad_token_id": 3})), (66, 0));
        assert_eq!(positions(Family::Roberta, json!({})), (64, 2));
        assert_eq!(positions(Family::Roberta, json!({"pad_token_id": 0})), (65, 1));
        assert_eq!(positions(Family::MPNet, json!({"pad_token_id": 7})), (64, 2));
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
            (Family::Roberta, json!({"max_position_embeddings": 2}), "of which no text uses the first 2"),
            (Family::Bert, json!({"num_attention_heads": 5}), "`num_attention_heads` is 5"),
            (Family::DistilBert, json!({}), "lacks `dim`"),
        ] {
            let error = read(family, more).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
