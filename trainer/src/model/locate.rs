//! Finds models and adapters by their path or by their id on the Hugging Face hub, and fetches them if they
//! are not cached.
//!
//! Only files that this program reads are fetched: configurations, the tokenizer, safetensors. The small
//! files come first, so that an unsupported model is refused before its weights are downloaded.

use std::path::{Path, PathBuf};

use super::architecture;
use super::config_json::ConfigJson;
use super::folder::{ModelFolder, Modules};
use super::peft::{self, AdapterConfig};
use crate::config::WeightInit;
use crate::data::tokenize::{self, Tokenizer};
use crate::hub::{Hub, Lookup, Repository, is_id, is_name};
use crate::{Error, Result};

/// Files of a model that a caller needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Need {
    weights: bool,
    /// Whether it is the base model of an adapter. Its tokenizer is not needed: the adapter has one.
    base: bool,
}

impl Need {
    /// A model with its weights and tokenizer.
    const MODEL: Self = Self { weights: true, base: false };
    /// A model whose weights are initialised at random.
    const CONFIG: Self = Self { weights: false, base: false };
    /// The base model of an adapter.
    #[cfg(test)]
    const BASE: Self = Self { weights: true, base: true };
}

/// Finds the model at the path or hub id `id_or_path`, fetches it if needed, and parses its folder.
///
/// The id `NAME` also stands for `sentence-transformers/NAME`. Weights are not fetched if `init` is random.
/// The base model of an adapter is fetched, too.
///
/// # Errors
/// `id_or_path` is neither a folder nor an id; the hub has no such model or denies access; there is no
/// network and the model is not cached; the model has no tokenizer or no safetensors, or is not supported.
pub fn model(id_or_path: &str, init: WeightInit) -> Result<ModelFolder> {
    let need = if init == WeightInit::Pretrained { Need::MODEL } else { Need::CONFIG };
    let path = find(id_or_path, need)?;
    ModelFolder::open_with(&path, |base| find(base, Need { base: true, ..need }))
}

/// Finds the LoRA adapter at the path or hub id `id_or_path` and fetches it if needed, without its base
/// model.
///
/// # Errors
/// As [`model`]; the folder has no `adapter_config.json`.
pub fn adapter(id_or_path: &str) -> Result<AdapterConfig> {
    let folder = match local(id_or_path)? {
        Some(folder) => folder,
        None => fetch_adapter(&Hub::new()?, id_or_path)?,
    };
    AdapterConfig::open(&folder)?.ok_or_else(|| no_adapter(&folder))
}

/// Folder of a model.
fn find(id_or_path: &str, need: Need) -> Result<PathBuf> {
    match local(id_or_path)? {
        Some(folder) => Ok(folder),
        None => fetch(&Hub::new()?, id_or_path, need),
    }
}

/// The folder `id_or_path`; `None` if it is an id of the hub.
fn local(id_or_path: &str) -> Result<Option<PathBuf>> {
    let path = Path::new(id_or_path);
    if path.is_dir() {
        return Ok(Some(path.to_path_buf()));
    }
    if path.exists() {
        return Err(Error::file(path, "is a file, expected a model folder or an id of the hub"));
    }
    if !is_id(id_or_path) && !is_name(id_or_path) {
        let message = "no such model folder, and not an id of the hub either, which is ORG/NAME";
        return Err(Error::file(path, message));
    }
    Ok(None)
}

/// Repositories that an id may mean, in the order in which they are tried. An id without an organisation may
/// be a repository of that name, as the oldest models of the hub have it, or `sentence-transformers/ID`.
fn repositories(id: &str) -> Vec<Repository> {
    let prefixed = (!id.contains('/')).then(|| format!("sentence-transformers/{id}"));
    std::iter::once(id).chain(prefixed.as_deref()).map(Repository::model).collect()
}

/// Fetches what is needed of the model `id` into the cache, and returns its folder.
fn fetch(hub: &Hub, id: &str, need: Need) -> Result<PathBuf> {
    let repositories = repositories(id);
    let (repository, snapshot) = match hub.first(&repositories, |path| is_complete(path, need.weights))? {
        (_, Lookup::Cached(path)) => return Ok(path),
        (repository, Lookup::Listed(snapshot)) => (repository, snapshot),
    };
    let names: Vec<_> = snapshot.names.iter().map(String::as_str).collect();
    let wanted = Wanted::choose(id, &names, need.weights)?;
    hub.fetch(repository, &snapshot, &wanted.small)?;
    let folder = ModelFolder::open_with(&snapshot.path, |base| match local(base)? {
        _ if need.base => Err(Error::file(id, "is an adapter, expected a base model")),
        Some(folder) => Ok(folder),
        None => fetch(hub, base, Need { base: true, ..need }),
    })?;
    if wanted.weights.iter().any(|name| !snapshot.path.join(name).exists()) {
        check(&folder, need)?;
    }
    hub.fetch(repository, &snapshot, &wanted.weights)?;
    hub.note(repository, &snapshot)?;
    Ok(snapshot.path)
}

/// Refuses a model that is not supported or has no tokenizer, before its weights are fetched.
fn check(folder: &ModelFolder, need: Need) -> Result<()> {
    if need.weights && !need.base {
        Tokenizer::open(&folder.path, folder.lower_case)?;
    }
    if let Some(adapter) = &folder.adapter {
        adapter.lora()?;
    }
    architecture::read_config(&ConfigJson::new(&folder.path, folder.config.clone()), Some(0.0)).map(drop)
}

/// Fetches the adapter `id`, without the other files of its repository, and returns its folder.
fn fetch_adapter(hub: &Hub, id: &str) -> Result<PathBuf> {
    let repositories = repositories(id);
    let complete =
        |path: &Path| [peft::CONFIG_FILE, peft::WEIGHTS_FILE].iter().all(|name| path.join(name).is_file());
    let (repository, snapshot) = match hub.first(&repositories, complete)? {
        (_, Lookup::Cached(path)) => return Ok(path),
        (repository, Lookup::Listed(snapshot)) => (repository, snapshot),
    };
    let has = |wanted: &str| snapshot.names.iter().any(|name| name == wanted);
    if !has(peft::CONFIG_FILE) {
        return Err(no_adapter(Path::new(id)));
    }
    if !has(peft::WEIGHTS_FILE) {
        let message = format!("has no {}, and pickled weights are not supported", peft::WEIGHTS_FILE);
        return Err(Error::file(id, message));
    }
    hub.fetch(repository, &snapshot, &[peft::CONFIG_FILE])?;
    let adapter = AdapterConfig::open(&snapshot.path)?.ok_or_else(|| no_adapter(&snapshot.path))?;
    adapter.lora()?;
    hub.fetch(repository, &snapshot, &[peft::WEIGHTS_FILE])?;
    hub.note(repository, &snapshot)?;
    Ok(snapshot.path)
}

fn no_adapter(place: &Path) -> Error {
    let message = "has no adapter_config.json: expected a LoRA adapter as PEFT writes it";
    Error::file(place, message)
}

/// Whether a cached snapshot has the files of a model, and its weights if `weights` is true. It fetches
/// nothing and does not look for the base model of an adapter.
fn is_complete(snapshot: &Path, weights: bool) -> bool {
    let Ok(Modules { transformer, dense, .. }) = Modules::open(snapshot) else { return false };
    let has = |name: &str| transformer.join(name).exists();
    let has_config = has("config.json") || has(peft::CONFIG_FILE);
    let has_weights = || {
        let single = ["model.safetensors", peft::WEIGHTS_FILE].into_iter().any(has);
        single || shards(&transformer).is_some_and(|names| names.iter().all(|name| has(name)))
    };
    let has_dense = || dense.iter().all(|dense| dense.path.join("model.safetensors").exists());
    has_config && (!weights || (has_weights() && has_dense()))
}

/// Names of the files that are fetched.
#[derive(Debug, PartialEq)]
struct Wanted<'a> {
    /// Configurations and the tokenizer.
    small: Vec<&'a str>,
    weights: Vec<&'a str>,
}

impl<'a> Wanted<'a> {
    /// Chooses among the `names` of the files of repository `id`.
    fn choose(id: &str, names: &[&'a str], weights: bool) -> Result<Self> {
        let small = names.iter().copied().filter(|name| is_small(name)).collect();
        if !weights {
            return Ok(Self { small, weights: Vec::new() });
        }
        let mut weights: Vec<_> = names.iter().copied().filter(|name| is_weights(name)).collect();
        // A repository may have the weights twice: in one file, and in shards.
        if weights.contains(&"model.safetensors") {
            weights.retain(|name| !name.starts_with("model-"));
        }
        if weights.is_empty() {
            let found = match names.iter().find(|name| name.ends_with(".bin") || name.ends_with(".pt")) {
                Some(name) => format!("its weights are pickled ({name}), which is not supported"),
                None => "it has no weights".into(),
            };
            return Err(Error::file(id, format!("{found}, expected model.safetensors")));
        }
        Ok(Self { small, weights })
    }
}

/// Whether a file is a configuration or a tokenizer of the model. Those in subfolders that are not modules
/// belong to copies of the model in other formats, such as `onnx`.
fn is_small(name: &str) -> bool {
    let file = in_module(name).unwrap_or(name);
    let sentence_bert =
        file.starts_with("sentence_") && file.ends_with("_config.json") && !file.contains('/');
    let configurations = [
        "config.json",
        "modules.json",
        "config_sentence_transformers.json",
        peft::CONFIG_FILE,
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ];
    sentence_bert || configurations.contains(&file) || tokenize::FILES.contains(&file)
}

/// Name of a file inside the folder of a module, `config.json` for `1_Pooling/config.json`; `None` if the
/// file is not in such a folder.
fn in_module(name: &str) -> Option<&str> {
    let (module, file) = name.split_once('/')?;
    let digit = module.starts_with(|c: char| c.is_ascii_digit());
    (digit && module.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).then_some(file)
}

/// Whether a file has weights of the model, of a shard `model-00001-of-00002.safetensors`, of an adapter, or
/// of a module like `2_Dense`.
fn is_weights(name: &str) -> bool {
    let name = in_module(name).unwrap_or(name);
    let shard = || name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-");
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    ["model.safetensors", peft::WEIGHTS_FILE].contains(&name)
        || shard().is_some_and(|(number, count)| digits(number) && digits(count))
}

/// Names of the shards in `model.safetensors.index.json`.
fn shards(folder: &Path) -> Option<Vec<String>> {
    let index = std::fs::read(folder.join("model.safetensors.index.json")).ok()?;
    let index: serde_json::Value = serde_json::from_slice(&index).ok()?;
    index.get("weight_map")?.as_object()?.values().map(|name| name.as_str().map(String::from)).collect()
}

#[cfg(test)]
mod tests;
