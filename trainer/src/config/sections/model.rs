//! `model` and `lora`: the encoder, and adapters beside its weights.

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::check::Check;
use crate::config::{Dtype, Freeze, Pooling, Targets, WeightInit};

/// The encoder, its precision and the lengths of its inputs.
///
/// ```yaml
/// model:
///   path: intfloat/multilingual-e5-base
///   dtype: bf16
///   max_query_length: 64
///   max_document_length: 256
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Model folder, or id of a model on the Hugging Face hub (`ORG/NAME`). Required.
    pub path: String,
    /// Initial weights.
    pub init: WeightInit,
    /// How the token vectors of a text are pooled into its embedding. Default: what the model folder says, else what is usual for
    /// the architecture.
    pub pooling: Option<Pooling>,
    /// Scale embeddings to length 1. Default: what the model folder says, else true.
    pub normalize: Option<bool>,
    /// Data type of matrix products and activations. Trained parameters, gradients and the optimizer's state stay f32.
    pub dtype: Dtype,
    /// Let a GPU round the inputs of f32 matrix products to TF32. Has no effect on a CPU.
    pub tf32: bool,
    /// Maximum number of tokens of a query, with prompt and special tokens. Longer queries are truncated. Default: what the model
    /// folder says.
    pub max_query_length: Option<usize>,
    /// Maximum number of tokens of a document, with prompt and special tokens. Longer documents are truncated. Default: what the
    /// model folder says.
    pub max_document_length: Option<usize>,
    /// Dropout probability of the encoder's hidden states and attention weights, in [0, 1). Default: what the model's
    /// `config.json` says.
    pub dropout: Option<f64>,
    /// Parameters that are not trained. Only without `lora`, which freezes the whole encoder.
    /// Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<Freeze>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            path: String::new(),
            init: WeightInit::Pretrained,
            pooling: None,
            normalize: None,
            dtype: Dtype::F32,
            tf32: true,
            max_query_length: None,
            max_document_length: None,
            dropout: None,
            freeze: Vec::new(),
        }
    }
}

impl Model {
    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        check.that(
            !self.path.is_empty(),
            "path",
            "missing: expected a model folder or the id of a model on the hub",
        )?;
        let zero_tokens = "expected at least 1 token, found 0";
        check.that(self.max_query_length != Some(0), "max_query_length", zero_tokens)?;
        check.that(self.max_document_length != Some(0), "max_document_length", zero_tokens)?;
        check.probability("dropout", self.dropout.unwrap_or(0.0))
    }
}

/// Low-rank adapters (LoRA). If the section is there, only the adapters are trained; without it, the whole model is.
///
/// ```yaml
/// lora: {rank: 16, alpha: 32, dropout: 0.05, targets: [q_proj, v_proj]}
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// PEFT adapter to continue training: a folder, or the id of a repository on the hub. The other keys of this section then
    /// default to the adapter's own values. Default: none, a new adapter is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Rank of the adapter's two matrices (PEFT's `r`). Default: 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// The adapter's output is multiplied by alpha / rank (PEFT's `lora_alpha`). Default: 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Dropout probability of the adapter's input, in [0, 1). Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Linear layers that get an adapter: `all-linear`, a list of module names, or a regular expression that matches the whole
    /// module name (PEFT's `target_modules`). Default: all-linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
    /// Multiply the adapter's output by alpha / √rank instead (rank-stabilised LoRA). Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rslora: Option<bool>,
}

impl Lora {
    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        check.at_least_1("rank", self.rank.map_or(1, |rank| rank as u64))?;
        check.positive("alpha", self.alpha.unwrap_or(1.0))?;
        check.probability("dropout", self.dropout.unwrap_or(0.0))?;
        match &self.targets {
            Some(Targets::Names(names)) => check.that(
                !names.is_empty(),
                "targets",
                "expected `all-linear` or at least one module name, found an empty list",
            ),
            Some(Targets::Pattern(pattern)) => match Regex::new(pattern) {
                Ok(_) => Ok(()),
                Err(error) => Err(check.error(
                    "targets",
                    &format!(
                        "expected `all-linear`, a list or a regular expression, found `{pattern}`: {error}"
                    ),
                )),
            },
            Some(Targets::AllLinear) | None => Ok(()),
        }
    }
}
