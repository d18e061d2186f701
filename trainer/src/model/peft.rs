//! adapter_config.json, in which PEFT describes a LoRA adapter.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::Lora;
use crate::{Error, Result};

/// Name of the configuration of an adapter.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the weights of an adapter.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Content of one adapter_config.json.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    folder: PathBuf,
    fields: Value,
}

/// LoRA settings of a model, with PEFT's defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraConfig {
    /// R: rank of A and B.
    pub rank: usize,
    /// Numerator of the scale, alpha / rank.
    pub alpha: f64,
    /// Dropout rate of the adapter's input.
    pub dropout: f64,
    /// Whether the scale is alpha / √rank (rsLoRA).
    pub rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, dropout: 0.0, rslora: false }
    }
}

impl LoraConfig {
    /// Takes the settings of a configuration's section, and defaults for those that it leaves out.
    pub fn new(section: &Lora) -> Self {
        let Self { rank, alpha, dropout, rslora } = Self::default();
        Self {
            rank: section.rank.unwrap_or(rank),
            alpha: section.alpha.unwrap_or(alpha),
            dropout: section.dropout.unwrap_or(dropout),
            rslora: section.rslora.unwrap_or(rslora),
        }
    }

    /// Writes the settings into a configuration's section.
    pub fn write_into(self, section: &mut Lora) {
        let Self { rank, alpha, dropout, rslora } = self;
        (section.rank, section.alpha) = (Some(rank), Some(alpha));
        (section.dropout, section.rslora) = (Some(dropout), Some(rslora));
    }

    /// Factor of the adapter's output: alpha / rank, or alpha / √rank with rsLoRA.
    pub fn scale(self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }
}

impl AdapterConfig {
    /// Reads adapter_config.json in `folder`; `None` if there is none.
    ///
    /// # Errors
    /// The file cannot be read, or is not JSON.
    pub fn open(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(CONFIG_FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::read("read", path)(error)),
        };
        let fields = serde_json::from_slice(&text)
            .map_err(|error| Error::file(&path, format!("malformed: {error}")))?;
        Ok(Some(Self { folder: folder.to_owned(), fields }))
    }

    /// Folder of the adapter.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Path or hub id of the model that the adapter belongs to, if the file names one.
    pub fn base_model(&self) -> Option<&str> {
        self.fields["base_model_name_or_path"].as_str()
    }

    /// As [`Self::base_model`].
    ///
    /// # Errors
    /// The file names no model.
    pub fn required_base_model(&self) -> Result<&str> {
        let lacks = "lacks `base_model_name_or_path`, the model that the adapter belongs to";
        self.base_model().ok_or_else(|| self.error(lacks))
    }

    /// Checks the file and returns its LoRA settings. Which layers have adapters is known from the tensors.
    ///
    /// # Errors
    /// It is not a LoRA adapter, a number is missing, or a setting that changes the result is not supported.
    pub fn lora(&self) -> Result<LoraConfig> {
        let Self { fields, .. } = self;
        if fields["peft_type"].as_str() != Some("LORA") {
            return Err(self.error(format!("`peft_type` is {}, supported is LORA", fields["peft_type"])));
        }
        for name in [
            "use_dora",
            "bias",
            "lora_bias",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "fan_in_fan_out",
            "alora_invocation_tokens",
            "trainable_token_indices",
        ] {
            if !is_off(&fields[name]) {
                return Err(self.error(format!("`{name}` is {}, which is not supported", fields[name])));
            }
        }
        // The other initialisations change the weights of the base model.
        let init = fields["init_lora_weights"].as_str();
        if let Some(init) = init.filter(|init| !["gaussian", "eva"].contains(init)) {
            return Err(self.error(format!("`init_lora_weights` is `{init}`, which is not supported")));
        }
        let number = |name: &str| fields[name].as_f64().filter(|number| number.is_finite());
        let rank = fields["r"].as_u64().filter(|&rank| rank > 0);
        Ok(LoraConfig {
            rank: rank.ok_or_else(|| self.error("lacks `r`, a whole number"))? as usize,
            alpha: number("lora_alpha").ok_or_else(|| self.error("lacks `lora_alpha`, a number"))?,
            dropout: number("lora_dropout").unwrap_or(0.0),
            rslora: fields["use_rslora"].as_bool().unwrap_or(false),
        })
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::file(self.folder.join(CONFIG_FILE), message)
    }
}

/// Whether the value of a setting means that it is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text == "none",
        _ => false,
    }
}
