//! What a model folder says besides its weights: how its vectors are pooled, its prompts, its longest text.
//!
//! A folder of sentence-transformers has `modules.json`, and beside it or below it a configuration for each module. Both
//! schemas are read: the legacy one (booleans `pooling_mode_*`, `max_seq_length`) and the compact one of
//! sentence-transformers 5.4 and later (`pooling_mode`, the length in `tokenizer_config.json`). A folder without
//! `modules.json` is a bare transformer: what it does not say is `None`, and the architecture decides.
//!
//! A module or a pooling mode that is not known here is an error. Leaving it out would give other embeddings.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::Pooling;
use crate::{Error, Result};

/// What a model folder says besides its weights.
#[derive(Clone, Debug)]
pub struct Folder {
    /// Where `config.json`, the tokenizer and the weights lie: the folder itself, unless `modules.json` puts the
    /// transformer in a folder of its own.
    pub path: PathBuf,
    /// `config.json`.
    pub config: Value,
    /// `adapter_config.json`, where the folder holds a LoRA adapter of PEFT.
    pub adapter: Option<Value>,
    /// None: the folder has no `modules.json`.
    pub pooling: Option<Pooling>,
    /// Whether embeddings are scaled to length one. None: the folder has no `modules.json`.
    pub normalize: Option<bool>,
    /// The dense layers between pooling and scaling, in their order.
    pub dense: Vec<Dense>,
    /// Whether the tokens of the prompt count in mean pooling.
    pub include_prompt: bool,
    /// Longest text in tokens, special tokens included. The model's positions may be fewer still.
    pub max_length: Option<usize>,
    /// Whether texts are put into lower case before the tokenizer's own normaliser.
    pub lower_case: bool,
    /// Prompts by name: `query`, `document`, `passage`, …
    pub prompts: BTreeMap<String, String>,
    /// The name of the prompt for texts that are neither query nor document.
    pub default_prompt: Option<String>,
}

/// A `Dense` module of sentence-transformers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dense {
    /// Its folder's name.
    pub name: String,
    /// Its folder, with `config.json` and the weights.
    pub path: PathBuf,
    /// I.
    pub inputs: usize,
    /// O.
    pub outputs: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// What follows the product.
    pub function: Function,
}

/// What a dense layer does to its product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// Nothing.
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

impl Function {
    const NAMES: [(Self, &str); 5] = [
        (Self::Identity, "torch.nn.modules.linear.Identity"),
        (Self::Tanh, "torch.nn.modules.activation.Tanh"),
        (Self::Gelu, "torch.nn.modules.activation.GELU"),
        (Self::Relu, "torch.nn.modules.activation.ReLU"),
        (Self::Silu, "torch.nn.modules.activation.SiLU"),
    ];

    /// Its path in torch.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(function, _)| *function == self).map_or("", |(_, name)| name)
    }
}

impl Folder {
    /// Reads the folder at `path`.
    ///
    /// # Errors
    /// No folder there, no `config.json`, malformed JSON, or a module, pooling mode or setting that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::file(path, "no such model folder"));
        }
        let modules = read::<Vec<Module>>(&path.join("modules.json"))?;
        let stack = modules.as_deref().map(|modules| Stack::open(path, modules)).transpose()?;
        let root = stack.as_ref().map_or_else(|| path.to_path_buf(), |stack| stack.transformer.clone());

        let adapter = read(&root.join("adapter_config.json"))?;
        let config = match (read::<Value>(&root.join("config.json"))?, &adapter) {
            (Some(config), _) => config,
            (None, Some(adapter)) => base_config(&root, adapter)?,
            (None, None) => {
                let hint = "a model folder holds config.json, the tokenizer's files and *.safetensors";
                return Err(Error::file(path, format!("has no config.json\nhint: {hint}")));
            }
        };

        let encoder = Encoder::open(&root)?;
        let tokenizer: TokenizerConfig = read(&root.join("tokenizer_config.json"))?.unwrap_or_default();
        let named: Named = read(&path.join("config_sentence_transformers.json"))?.unwrap_or_default();
        if let Some(dimension) = named.truncate_dim {
            let place = path.join("config_sentence_transformers.json");
            return Err(Error::file(
                place,
                format!("truncate_dim: {dimension} is not supported, expected null"),
            ));
        }
        let prompts: BTreeMap<_, _> = named
            .prompts
            .unwrap_or_default()
            .into_iter()
            .map(|(name, prompt)| (name, prompt.unwrap_or_default()))
            .collect();
        if let Some(name) = named.default_prompt_name.as_ref().filter(|name| !prompts.contains_key(*name)) {
            let place = path.join("config_sentence_transformers.json");
            let known: Vec<_> = prompts.keys().map(String::as_str).collect();
            let message =
                format!("default_prompt_name: {name:?} is none of the prompts ({})", known.join(", "));
            return Err(Error::file(place, message));
        }

        Ok(Self {
            path: root,
            config,
            adapter,
            pooling: stack.as_ref().map(|stack| stack.pooling),
            normalize: stack.as_ref().map(|stack| stack.normalize),
            dense: stack.as_ref().map(|stack| stack.dense.clone()).unwrap_or_default(),
            include_prompt: stack.as_ref().is_none_or(|stack| stack.include_prompt),
            max_length: encoder.max_seq_length.or_else(|| tokenizer.max_length()),
            lower_case: encoder.do_lower_case.unwrap_or(false),
            prompts,
            default_prompt: named.default_prompt_name,
        })
    }

    /// The prompt of a query, empty where the folder names none.
    pub fn query_prompt(&self) -> &str {
        self.prompts.get("query").map_or("", String::as_str)
    }

    /// The prompt of a document: the first of `document`, `passage`, `corpus` that is named, as sentence-transformers
    /// documents `encode_document`.
    pub fn document_prompt(&self) -> &str {
        ["document", "passage", "corpus"]
            .iter()
            .find_map(|name| self.prompts.get(*name))
            .map_or("", String::as_str)
    }

    /// The prompt of a text that is neither: `default_prompt_name`'s, or none.
    pub fn text_prompt(&self) -> &str {
        self.default_prompt.as_ref().and_then(|name| self.prompts.get(name)).map_or("", String::as_str)
    }
}

/// One entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

/// The modules that are understood: a transformer, its pooling, and maybe dense layers and the scaling to length one.
struct Stack {
    transformer: PathBuf,
    pooling: Pooling,
    dense: Vec<Dense>,
    include_prompt: bool,
    normalize: bool,
}

impl Stack {
    fn open(folder: &Path, modules: &[Module]) -> Result<Self> {
        let place = folder.join("modules.json");
        // Both `sentence_transformers.models.Pooling` and, since 5.4,
        // `sentence_transformers.sentence_transformer.modules.pooling.Pooling`; a model's own code is neither.
        let names: Vec<_> = modules
            .iter()
            .map(|module| match module.kind.split_once('.') {
                Some(("sentence_transformers", rest)) => rest.rsplit('.').next().unwrap_or(rest),
                _ => module.kind.as_str(),
            })
            .collect();
        let expected = "expected Transformer, Pooling and, if need be, Dense and Normalize, in this order";
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
            pooling: config.pooling(&place)?,
            include_prompt: config.include_prompt.unwrap_or(true),
            normalize: normalize.is_some(),
        })
    }
}

/// `2_Dense/config.json`.
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
        // torch's own default of the module.
        let function = config.activation_function.unwrap_or_else(|| Function::Tanh.name().to_owned());
        let found = Function::NAMES.iter().find(|(_, name)| *name == function);
        let Some((function, _)) = found else {
            let known: Vec<_> = Function::NAMES.iter().map(|(_, name)| *name).collect();
            let message =
                format!("activation_function {function} is not supported, expected {}", known.join(", "));
            return Err(Error::file(place, message));
        };
        let (inputs, outputs) = (config.in_features, config.out_features);
        if inputs == 0 || outputs == 0 {
            let message = format!("{inputs} in_features and {outputs} out_features, expected both above 0");
            return Err(Error::file(place, message));
        }
        let name = name.trim_end_matches('/').to_owned();
        Ok(Self { name, path, inputs, outputs, bias: config.bias.unwrap_or(true), function: *function })
    }
}

/// `1_Pooling/config.json` in either schema.
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
    /// The one mode. Several at once are concatenated by sentence-transformers, which is not supported here.
    fn pooling(&self, place: &Path) -> Result<Pooling> {
        let modes: Vec<&str> = match &self.pooling_mode {
            Some(Modes::One(mode)) => vec![mode],
            Some(Modes::Many(modes)) => modes.iter().map(String::as_str).collect(),
            None => {
                let legacy = self.others.iter().filter(|(_, value)| **value == Value::Bool(true));
                let modes: Vec<_> = legacy.filter_map(|(key, _)| key.strip_prefix("pooling_mode_")).collect();
                // Without any, sentence-transformers takes the mean.
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

/// `sentence_bert_config.json`, or the name it had for another architecture in the first versions.
#[derive(Default, Deserialize)]
struct Encoder {
    max_seq_length: Option<usize>,
    do_lower_case: Option<bool>,
    transformer_task: Option<String>,
}

impl Encoder {
    fn open(root: &Path) -> Result<Self> {
        for name in ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"] {
            let place = root.join(format!("sentence_{name}_config.json"));
            let Some(encoder) = read::<Self>(&place)? else { continue };
            return match encoder.transformer_task.as_deref() {
                None | Some("feature-extraction") => Ok(encoder),
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
    /// transformers writes 1e30 where a tokenizer knows no limit.
    fn max_length(&self) -> Option<usize> {
        self.model_max_length.filter(|length| (1.0..1e9).contains(length)).map(|length| length as usize)
    }
}

/// `config_sentence_transformers.json`.
#[derive(Default, Deserialize)]
struct Named {
    prompts: Option<BTreeMap<String, Option<String>>>,
    default_prompt_name: Option<String>,
    truncate_dim: Option<usize>,
}

/// The configuration of an adapter's base model. transformers takes a folder with a `config.json` for a whole model, so
/// those that hold an adapter alone have none.
fn base_config(folder: &Path, adapter: &Value) -> Result<Value> {
    let place = folder.join("adapter_config.json");
    let Some(base) = adapter["base_model_name_or_path"].as_str() else {
        let message = "lacks `base_model_name_or_path`, the model that the adapter belongs to";
        return Err(Error::file(place, message));
    };
    let base = super::hub::resolve_base(base)
        .map_err(|error| Error::file(place, format!("its base model: {error}")))?;
    read(&base.join("config.json"))?.ok_or_else(|| Error::file(base, "has no config.json"))
}

/// The JSON file at `path`; None where there is no such file.
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
