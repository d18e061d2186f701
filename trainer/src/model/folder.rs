//! Parses a model folder, except its weights and its tokenizer: pooling, dense layers, prompts, maximum
//! length.
//!
//! A folder of sentence-transformers has `modules.json` and a configuration of each module. Two schemas are
//! read: the legacy one (booleans `pooling_mode_*`, `max_seq_length`), and the compact one of
//! sentence-transformers 5.4 and later (`pooling_mode`, the length in `tokenizer_config.json`). A folder
//! without `modules.json` is a bare transformer; its pooling follows from the architecture.
//!
//! An unknown module or pooling mode is an error, because ignoring it would give other embeddings. Nothing is
//! fetched here: `model/locate.rs` finds the folders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::peft::{AdapterConfig, CONFIG_FILE};
use crate::config::Pooling;
use crate::{Error, Result};

/// Content of a model folder, except its weights and its tokenizer.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// Folder of the transformer, with `config.json` and the tokenizer: the model folder, or the subfolder
    /// that `modules.json` names.
    pub path: PathBuf,
    /// Folder of the encoder's weights: `path`, or the folder of the base model if `path` holds an adapter
    /// without them.
    pub weights: PathBuf,
    /// Content of `config.json`, that of the base model if an adapter has none.
    pub config: Value,
    /// Content of `adapter_config.json`, if the folder has a LoRA adapter of PEFT.
    pub adapter: Option<AdapterConfig>,
    /// Pooling; `None` without `modules.json`.
    pub pooling: Option<Pooling>,
    /// Whether embeddings are normalised to length 1; `None` without `modules.json`.
    pub normalize: Option<bool>,
    /// Dense layers between pooling and normalisation, in their order.
    pub dense: Vec<Dense>,
    /// Whether mean pooling includes the tokens of the prompt.
    pub include_prompt: bool,
    /// Number of tokens, special ones included, at which texts are truncated: `max_seq_length`, or
    /// `model_max_length` of the tokenizer. See [`Self::max_length_within`].
    pub max_length: Option<usize>,
    /// Whether texts are lower-cased before the normaliser of the tokenizer.
    pub lower_case: bool,
    /// Prompts by name: `query`, `document`, `passage`, …
    pub prompts: BTreeMap<String, String>,
    /// Name of the prompt for texts that are neither queries nor documents.
    pub default_prompt: Option<String>,
}

/// A `Dense` module of sentence-transformers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dense {
    /// Name of its folder.
    pub name: String,
    /// Its folder, with `config.json` and the weights.
    pub path: PathBuf,
    /// I: elements of its input.
    pub inputs: usize,
    /// O: elements of its output.
    pub outputs: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Activation function of its output.
    pub activation: DenseActivation,
}

/// Activation function of a dense layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseActivation {
    /// The identity.
    Identity,
    /// The hyperbolic tangent.
    Tanh,
    /// GELU by the error function.
    Gelu,
    /// max(x, 0).
    Relu,
    /// x·σ(x).
    Silu,
}

impl DenseActivation {
    const NAMES: [(Self, &str); 5] = [
        (Self::Identity, "torch.nn.modules.linear.Identity"),
        (Self::Tanh, "torch.nn.modules.activation.Tanh"),
        (Self::Gelu, "torch.nn.modules.activation.GELU"),
        (Self::Relu, "torch.nn.modules.activation.ReLU"),
        (Self::Silu, "torch.nn.modules.activation.SiLU"),
    ];

    /// Name of the class in torch.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(activation, _)| *activation == self).map_or("", |(_, name)| name)
    }
}

impl ModelFolder {
    /// Parses the folder at `path`. The base model of an adapter must be a folder, too.
    ///
    /// # Errors
    /// As [`Self::open_with`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, |base| {
            let base = PathBuf::from(base);
            if base.is_dir() { Ok(base) } else { Err(Error::file(base, "no such model folder")) }
        })
    }

    /// Parses the folder at `path`. `base` maps `base_model_name_or_path` of an adapter to the folder of the
    /// base model; it is called only if the folder has an adapter, and lacks weights or `config.json`.
    ///
    /// # Errors
    /// There is no such folder or no `config.json`; a file is malformed; `base` fails; a module, a pooling
    /// mode or a setting is not supported.
    pub fn open_with(path: &Path, base: impl FnOnce(&str) -> Result<PathBuf>) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::file(path, "no such model folder"));
        }
        let Modules { transformer, pooling, dense, include_prompt, normalize } = Modules::open(path)?;
        let adapter = AdapterConfig::open(&transformer)?;
        let config = read::<Value>(&transformer.join("config.json"))?;
        let weights = match &adapter {
            Some(adapter) if config.is_none() || !transformer.join("model.safetensors").is_file() => {
                base(adapter.required_base_model()?).map_err(|error| {
                    Error::file(transformer.join(CONFIG_FILE), format!("its base model: {error}"))
                })?
            }
            _ => transformer.clone(),
        };
        let config = match config {
            Some(config) => config,
            // transformers takes a folder with a config.json for a whole model, so PEFT writes none with an
            // adapter.
            None if adapter.is_some() => read(&weights.join("config.json"))?
                .ok_or_else(|| Error::file(&weights, "has no config.json"))?,
            None => {
                let hint = "a model folder has config.json, the files of the tokenizer and *.safetensors";
                return Err(Error::file(path, format!("has no config.json\nhint: {hint}")));
            }
        };
        let sentence_bert = SentenceBertConfig::open(&transformer)?;
        let tokenizer: TokenizerConfig =
            read(&transformer.join("tokenizer_config.json"))?.unwrap_or_default();
        let Prompts { prompts, default_prompt } = Prompts::open(path)?;
        Ok(Self {
            path: transformer,
            weights,
            config,
            adapter,
            pooling,
            normalize,
            dense,
            include_prompt,
            max_length: sentence_bert.max_seq_length.or_else(|| tokenizer.max_length()),
            lower_case: sentence_bert.do_lower_case.unwrap_or(false),
            prompts,
            default_prompt,
        })
    }

    /// Number of tokens at which texts are truncated unless the configuration says otherwise:
    /// [`Self::max_length`], at most the `max_positions` of the model.
    pub fn max_length_within(&self, max_positions: usize) -> usize {
        self.max_length.map_or(max_positions, |length| length.min(max_positions))
    }

    /// Prompt of queries; empty if the folder has none.
    pub fn query_prompt(&self) -> &str {
        self.prompts.get("query").map_or("", String::as_str)
    }

    /// Prompt of documents: the first of `document`, `passage` and `corpus` that exists, as in
    /// `encode_document` of sentence-transformers; empty if the folder has none.
    pub fn document_prompt(&self) -> &str {
        ["document", "passage", "corpus"]
            .iter()
            .find_map(|name| self.prompts.get(*name))
            .map_or("", String::as_str)
    }

    /// Prompt of texts that are neither queries nor documents: that of `default_prompt_name`; empty if the
    /// folder has none.
    pub fn text_prompt(&self) -> &str {
        self.default_prompt.as_ref().and_then(|name| self.prompts.get(name)).map_or("", String::as_str)
    }
}

/// One entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    class: String,
}

/// Modules of a model folder: a transformer, its pooling, optional dense layers, optional normalisation.
pub(super) struct Modules {
    /// Folder of the transformer.
    pub(super) transformer: PathBuf,
    /// Dense layers after pooling.
    pub(super) dense: Vec<Dense>,
    pooling: Option<Pooling>,
    include_prompt: bool,
    normalize: Option<bool>,
}

impl Modules {
    /// Reads `modules.json` and the configurations of the modules. Without `modules.json`, the folder is a
    /// bare transformer.
    ///
    /// # Errors
    /// A file is missing or malformed, or a module is not supported.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        match read::<Vec<Module>>(&folder.join("modules.json"))? {
            Some(modules) => Self::read(folder, &modules),
            None => Ok(Self {
                transformer: folder.to_owned(),
                dense: Vec::new(),
                pooling: None,
                include_prompt: true,
                normalize: None,
            }),
        }
    }

    fn read(folder: &Path, modules: &[Module]) -> Result<Self> {
        let place = folder.join("modules.json");
        // A class is `sentence_transformers.models.Pooling`, or since 5.4
        // `sentence_transformers.sentence_transformer.modules.pooling.Pooling`. Other classes are code of the
        // model's repository.
        let names: Vec<_> = modules
            .iter()
            .map(|module| match module.class.split_once('.') {
                Some(("sentence_transformers", rest)) => rest.rsplit('.').next().unwrap_or(rest),
                _ => module.class.as_str(),
            })
            .collect();
        let expected = "expected Transformer, Pooling and optionally Dense and Normalize, in this order";
        let known = ["Transformer", "Pooling", "Dense", "Normalize"];
        if let Some(other) = names.iter().find(|name| !known.contains(name)) {
            return Err(Error::file(place, format!("module {other} is not supported, {expected}")));
        }
        let (["Transformer", "Pooling", rest @ ..], [transformer, pooling, others @ ..]) =
            (names.as_slice(), modules)
        else {
            return Err(Error::file(place, format!("found {}, {expected}", names.join(", "))));
        };
        let (normalize, dense) = match (rest, others) {
            ([.., "Normalize"], [dense @ .., normalize]) => (Some(normalize), dense),
            _ => (None, others),
        };
        if rest[..dense.len()].iter().any(|name| *name != "Dense") {
            return Err(Error::file(place, format!("found {}, {expected}", names.join(", "))));
        }
        if let Some(module) = normalize {
            let place = folder.join(&module.path).join("config.json");
            let config: NormalizeConfig = read(&place)?.unwrap_or_default();
            for name in [config.module_input_name, config.module_output_name].into_iter().flatten() {
                if name != "sentence_embedding" {
                    let message =
                        format!("Normalize of {name} is not supported, expected sentence_embedding");
                    return Err(Error::file(place, message));
                }
            }
        }
        let place = folder.join(&pooling.path).join("config.json");
        let config: PoolingConfig = read(&place)?.ok_or_else(|| Error::file(&place, "no such file"))?;
        Ok(Self {
            transformer: folder.join(&transformer.path),
            dense: dense.iter().map(|module| Dense::open(folder, &module.path)).collect::<Result<_>>()?,
            pooling: Some(config.pooling(&place)?),
            include_prompt: config.include_prompt.unwrap_or(true),
            normalize: Some(normalize.is_some()),
        })
    }
}

/// Content of `2_Dense/config.json`.
#[derive(Deserialize)]
struct DenseConfig {
    in_features: usize,
    out_features: usize,
    bias: Option<bool>,
    activation_function: Option<String>,
    module_input_name: Option<String>,
    module_output_name: Option<String>,
}

impl Dense {
    fn open(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let place = path.join("config.json");
        let config: DenseConfig = read(&place)?.ok_or_else(|| Error::file(&place, "no such file"))?;
        for name in [config.module_input_name, config.module_output_name].into_iter().flatten() {
            if name != "sentence_embedding" {
                let message = format!("Dense of {name} is not supported, expected sentence_embedding");
                return Err(Error::file(place, message));
            }
        }
        // The default of the module's class.
        let class = config.activation_function.unwrap_or_else(|| DenseActivation::Tanh.name().to_owned());
        let found = DenseActivation::NAMES.iter().find(|(_, name)| *name == class);
        let Some((activation, _)) = found else {
            let known: Vec<_> = DenseActivation::NAMES.iter().map(|(_, name)| *name).collect();
            let message =
                format!("activation_function {class} is not supported, expected {}", known.join(", "));
            return Err(Error::file(place, message));
        };
        let (inputs, outputs) = (config.in_features, config.out_features);
        if inputs == 0 || outputs == 0 {
            let message = format!("{inputs} in_features and {outputs} out_features, expected both above 0");
            return Err(Error::file(place, message));
        }
        let name = name.trim_end_matches('/').to_owned();
        Ok(Self { name, path, inputs, outputs, bias: config.bias.unwrap_or(true), activation: *activation })
    }
}

/// Content of `1_Pooling/config.json`, in either schema.
#[derive(Deserialize)]
struct PoolingConfig {
    pooling_mode: Option<Modes>,
    include_prompt: Option<bool>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Modes {
    One(String),
    Many(Vec<String>),
}

impl PoolingConfig {
    /// The only pooling mode. sentence-transformers concatenates the results of several, which is not
    /// supported.
    fn pooling(&self, place: &Path) -> Result<Pooling> {
        let modes: Vec<&str> = match &self.pooling_mode {
            Some(Modes::One(mode)) => vec![mode],
            Some(Modes::Many(modes)) => modes.iter().map(String::as_str).collect(),
            None => {
                let legacy = self.others.iter().filter(|(_, value)| **value == Value::Bool(true));
                let modes: Vec<_> = legacy.filter_map(|(key, _)| key.strip_prefix("pooling_mode_")).collect();
                // The default of sentence-transformers is the mean.
                if modes.is_empty() { vec!["mean"] } else { modes }
            }
        };
        match modes.as_slice() {
            ["mean" | "mean_tokens"] => Ok(Pooling::Mean),
            ["cls" | "cls_token"] => Ok(Pooling::Cls),
            ["lasttoken"] => Ok(Pooling::LastToken),
            _ => {
                let message = format!(
                    "pooling by {} is not supported, expected one of mean, cls, lasttoken",
                    modes.join(" + ")
                );
                Err(Error::file(place, message))
            }
        }
    }
}

#[derive(Default, Deserialize)]
struct NormalizeConfig {
    module_input_name: Option<String>,
    module_output_name: Option<String>,
}

/// Content of `sentence_bert_config.json`, whose name depends on the architecture in old folders.
#[derive(Default, Deserialize)]
struct SentenceBertConfig {
    max_seq_length: Option<usize>,
    do_lower_case: Option<bool>,
    transformer_task: Option<String>,
}

impl SentenceBertConfig {
    fn open(root: &Path) -> Result<Self> {
        for name in ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"] {
            let place = root.join(format!("sentence_{name}_config.json"));
            let Some(config) = read::<Self>(&place)? else { continue };
            return match config.transformer_task.as_deref() {
                None | Some("feature-extraction") => Ok(config),
                Some(task) => {
                    let message = format!(
                        "transformer_task {task:?} is not supported, expected \"feature-extraction\""
                    );
                    Err(Error::file(place, message))
                }
            };
        }
        Ok(Self::default())
    }
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    model_max_length: Option<f64>,
}

impl TokenizerConfig {
    /// The maximum length; transformers writes 1e30 for a tokenizer without one.
    fn max_length(&self) -> Option<usize> {
        self.model_max_length.filter(|length| (1.0..1e9).contains(length)).map(|length| length as usize)
    }
}

/// Content of `config_sentence_transformers.json`.
#[derive(Default, Deserialize)]
struct SentenceTransformersConfig {
    prompts: Option<BTreeMap<String, Option<String>>>,
    default_prompt_name: Option<String>,
    truncate_dim: Option<usize>,
}

/// Prompts of a model folder.
struct Prompts {
    prompts: BTreeMap<String, String>,
    default_prompt: Option<String>,
}

impl Prompts {
    fn open(folder: &Path) -> Result<Self> {
        let place = folder.join("config_sentence_transformers.json");
        let config: SentenceTransformersConfig = read(&place)?.unwrap_or_default();
        if let Some(dimension) = config.truncate_dim {
            let message = format!("truncate_dim: {dimension} is not supported, expected null");
            return Err(Error::file(place, message));
        }
        let prompts = config.prompts.unwrap_or_default().into_iter();
        let prompts: BTreeMap<_, _> =
            prompts.map(|(name, prompt)| (name, prompt.unwrap_or_default())).collect();
        match config.default_prompt_name {
            Some(name) if !prompts.contains_key(&name) => {
                let known: Vec<_> = prompts.keys().map(String::as_str).collect();
                let known = known.join(", ");
                let message =
                    format!("default_prompt_name is {name:?}, expected one of the prompts ({known})");
                Err(Error::file(place, message))
            }
            default_prompt => Ok(Self { prompts, default_prompt }),
        }
    }
}

/// Reads the JSON file at `path`; `None` if there is no such file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::read("read", path)(error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::file(path, format!("malformed: {error}")))
}

#[cfg(test)]
mod tests;
