//! Models by their id on the Hugging Face hub.
//!
//! Only what is read here is fetched: configurations, the tokenizer, safetensors. The small files come first, so that a model
//! that cannot be used is refused before its weights are on their way.

use std::path::{Path, PathBuf};

use super::adapter;
use super::encoder::Encoder;
use super::settings::Settings;
use crate::config::WeightInit;
use crate::data::tokenize::{self, Tokenizer};
use crate::hub::{Found, Hub, Repository, is_id, is_name};
use crate::model::Folder;
use crate::{Error, Result};

/// What is needed of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// All of it.
    Whole,
    /// All but its weights, which are drawn from the seed.
    Shape,
    /// What an adapter stands on. The tokenizer is the adapter's own.
    Base,
}

/// The folder of a model: `id_or_path` itself where it is a folder, else that of the model with this id on the hub, which is
/// fetched into the cache if need be. As sentence-transformers has it, `NAME` may also be `sentence-transformers/NAME`.
///
/// # Errors
/// Neither a folder nor an id; no such model, or no right to it; no network and not in the cache; a model that
/// [`Folder::open`] refuses, of a family that is not known, without a tokenizer, or without safetensors.
pub fn resolve(id_or_path: &str) -> Result<PathBuf> {
    resolve_for(id_or_path, WeightInit::Pretrained)
}

/// As [`resolve`]; where the weights are drawn from the seed, those of the hub are not fetched.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_for(id_or_path: &str, init: WeightInit) -> Result<PathBuf> {
    find(id_or_path, if init == WeightInit::Pretrained { Need::Whole } else { Need::Shape })
}

/// As [`resolve`], of the model that an adapter belongs to.
///
/// # Errors
/// As [`resolve`], but for the tokenizer.
pub(super) fn resolve_base(id_or_path: &str) -> Result<PathBuf> {
    find(id_or_path, Need::Base)
}

/// As [`resolve`], of an adapter of PEFT. Of the hub only the adapter itself is fetched: what it is put on is there already.
///
/// # Errors
/// As [`resolve`], and a folder without `adapter_config.json`.
pub fn resolve_adapter(id_or_path: &str) -> Result<PathBuf> {
    let Some(path) = folder(id_or_path)? else { return fetch_adapter(&Hub::new()?, id_or_path) };
    if path.join(ADAPTER[0]).is_file() {
        return Ok(path);
    }
    Err(no_adapter(&path))
}

fn find(id_or_path: &str, need: Need) -> Result<PathBuf> {
    match folder(id_or_path)? {
        Some(path) => Ok(path),
        None => fetch(&Hub::new()?, id_or_path, need),
    }
}

/// The folder `id_or_path`; none where it is an id of the hub.
fn folder(id_or_path: &str) -> Result<Option<PathBuf>> {
    let path = Path::new(id_or_path);
    if path.is_dir() {
        return Ok(Some(path.to_path_buf()));
    }
    if path.exists() {
        return Err(Error::file(path, "is a file, expected a model folder or an id of the hub"));
    }
    if !is_id(id_or_path) && !is_name(id_or_path) {
        let message = "no such model folder, and no id of the hub either, which is ORG/NAME";
        return Err(Error::file(path, message));
    }
    Ok(None)
}

/// What an id may mean. Models without an organisation are the hub's oldest, or those that sentence-transformers knows.
fn repositories(id: &str) -> Vec<Repository> {
    let known = (!id.contains('/')).then(|| format!("sentence-transformers/{id}"));
    std::iter::once(id).chain(known.as_deref()).map(Repository::model).collect()
}

/// The folder of model `id`, with what is needed of it.
fn fetch(hub: &Hub, id: &str, need: Need) -> Result<PathBuf> {
    let (repositories, weights) = (repositories(id), need != Need::Shape);
    let (repository, snapshot) = match hub.first(&repositories, |path| is_whole(path, weights))? {
        (_, Found::Cached(path)) => return Ok(path),
        (repository, Found::Listed(snapshot)) => (repository, snapshot),
    };
    let names: Vec<_> = snapshot.names.iter().map(String::as_str).collect();
    let wanted = Wanted::choose(id, &names, weights)?;
    hub.fetch(repository, &snapshot, &wanted.small)?;
    let folder = Folder::open(&snapshot.path)?;
    if wanted.weights.iter().any(|name| !snapshot.path.join(name).exists()) {
        check(&folder, need)?;
    }
    hub.fetch(repository, &snapshot, &wanted.weights)?;
    hub.note(repository, &snapshot)?;
    Ok(snapshot.path)
}

/// Refuses a model that no weights would help: an unknown family, settings that are not supported, no tokenizer.
fn check(folder: &Folder, need: Need) -> Result<()> {
    if need == Need::Whole {
        Tokenizer::open(&folder.path, folder.lower_case)?;
    }
    if folder.adapter.is_some() {
        adapter::check(&folder.path)?;
    }
    let settings = Settings::new(&folder.path, folder.config.clone());
    // Weights are asked for when all of config.json has been read; that far it goes here.
    let mut read = false;
    let weights = |_: &[&str]| {
        read = true;
        Err(Error::Bug("the weights are not fetched yet".to_owned()))
    };
    let encoder = Encoder::new(&settings, weights, Some(0.0), 1);
    if read { Ok(()) } else { encoder.map(drop) }
}

/// What PEFT writes of an adapter.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The folder of adapter `id`, without what else its repository has.
fn fetch_adapter(hub: &Hub, id: &str) -> Result<PathBuf> {
    let repositories = repositories(id);
    let whole = |path: &Path| ADAPTER.iter().all(|name| path.join(name).is_file());
    let (repository, snapshot) = match hub.first(&repositories, whole)? {
        (_, Found::Cached(path)) => return Ok(path),
        (repository, Found::Listed(snapshot)) => (repository, snapshot),
    };
    let [config, weights] = ADAPTER;
    let has = |wanted: &str| snapshot.names.iter().any(|name| name == wanted);
    if !has(config) {
        return Err(no_adapter(Path::new(id)));
    }
    if !has(weights) {
        return Err(Error::file(id, format!("has no {weights}, and pickled weights are not read")));
    }
    hub.fetch(repository, &snapshot, &[config])?;
    adapter::check(&snapshot.path)?;
    hub.fetch(repository, &snapshot, &[weights])?;
    hub.note(repository, &snapshot)?;
    Ok(snapshot.path)
}

fn no_adapter(place: &Path) -> Error {
    let message = "has no adapter_config.json: expected a LoRA adapter as PEFT writes it";
    Error::file(place, message)
}

/// Whether a snapshot is a model that can be opened: with its weights, where they are needed.
fn is_whole(snapshot: &Path, weights: bool) -> bool {
    let Ok(folder) = Folder::open(snapshot) else { return false };
    let has = |name: &str| folder.path.join(name).exists();
    let transformer = || {
        ["model.safetensors", "adapter_model.safetensors"].into_iter().any(has)
            || shards(&folder.path).is_some_and(|names| names.iter().all(|name| has(name)))
    };
    let dense = || folder.dense.iter().all(|dense| dense.path.join("model.safetensors").exists());
    !weights || (transformer() && dense())
}

/// The files of a model that are read here.
#[derive(Debug, PartialEq)]
struct Wanted<'a> {
    small: Vec<&'a str>,
    weights: Vec<&'a str>,
}

impl<'a> Wanted<'a> {
    fn choose(id: &str, names: &[&'a str], weights: bool) -> Result<Self> {
        let small = names.iter().copied().filter(|name| is_small(name)).collect();
        if !weights {
            return Ok(Self { small, weights: Vec::new() });
        }
        let mut weights: Vec<_> = names.iter().copied().filter(|name| is_weights(name)).collect();
        // A whole file beside its own shards.
        if weights.contains(&"model.safetensors") {
            weights.retain(|name| !name.starts_with("model-"));
        }
        if weights.is_empty() {
            let found = match names.iter().find(|name| name.ends_with(".bin") || name.ends_with(".pt")) {
                Some(name) => format!("its weights are pickled ({name}), which is not read"),
                None => "it has no weights".into(),
            };
            return Err(Error::file(id, format!("{found}, expected model.safetensors")));
        }
        Ok(Self { small, weights })
    }
}

/// A configuration or a tokenizer file of the model itself, not of another format's copy in a folder of its own.
fn is_small(name: &str) -> bool {
    let file = in_module(name).unwrap_or(name);
    let sentence = file.starts_with("sentence_") && file.ends_with("_config.json") && !file.contains('/');
    let settings = [
        "config.json",
        "modules.json",
        "config_sentence_transformers.json",
        "adapter_config.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
    ];
    sentence || settings.contains(&file) || tokenize::FILES.contains(&file)
}

/// The name inside a module's folder, `1_Pooling/config.json`: that of the transformer may be `0_Transformer`.
fn in_module(name: &str) -> Option<&str> {
    let (module, file) = name.split_once('/')?;
    let digit = module.starts_with(|c: char| c.is_ascii_digit());
    (digit && module.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).then_some(file)
}

/// `model.safetensors`, a shard `model-00001-of-00002.safetensors`, an adapter, or those of a module like `2_Dense`.
fn is_weights(name: &str) -> bool {
    let name = in_module(name).unwrap_or(name);
    let shard = || name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-");
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    ["model.safetensors", "adapter_model.safetensors"].contains(&name)
        || shard().is_some_and(|(number, count)| digits(number) && digits(count))
}

/// The files that an index of shards names.
fn shards(snapshot: &Path) -> Option<Vec<String>> {
    let index = std::fs::read(snapshot.join("model.safetensors.index.json")).ok()?;
    let index: serde_json::Value = serde_json::from_slice(&index).ok()?;
    index.get("weight_map")?.as_object()?.values().map(|name| name.as_str().map(String::from)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::testing::{Answer, Server, body, hub, listing};

    const API: &str = "/api/models/org/name/revision/main";
    const CONFIG: &str =
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert/config.json"));
    const TOKENIZER: &str =
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert/tokenizer.json"));

    fn model() -> Vec<(&'static str, Answer)> {
        vec![
            (
                API,
                listing(&[
                    ".gitattributes",
                    "config.json",
                    "modules.json",
                    "1_Pooling/config.json",
                    "tokenizer.json",
                    "model.safetensors",
                    "pytorch_model.bin",
                    "onnx/model.onnx",
                    "onnx/config.json",
                ]),
            ),
            (
                "/org/name/resolve/abc123/config.json",
                Answer::Redirect("/api/resolve-cache/config.json".into()),
            ),
            ("/api/resolve-cache/config.json", body(CONFIG)),
            (
                "/org/name/resolve/abc123/modules.json",
                body(
                    r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#,
                ),
            ),
            ("/org/name/resolve/abc123/1_Pooling/config.json", body(r#"{"pooling_mode_cls_token": true}"#)),
            ("/org/name/resolve/abc123/tokenizer.json", body(TOKENIZER)),
            ("/org/name/resolve/abc123/model.safetensors", body("weights")),
        ]
    }

    #[test]
    fn what_is_needed_lands_in_the_cache_and_serves_offline() {
        let server = Server::start(&model());
        let home = tempfile::tempdir().unwrap();
        let online = hub(&server.endpoint, home.path(), &[("HF_TOKEN", "secret")]);
        let snapshot = fetch(&online, "org/name", Need::Whole).unwrap();
        assert_eq!(snapshot, home.path().join("hub/models--org--name/snapshots/abc123"));
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), b"weights");
        assert!(snapshot.join("1_Pooling/config.json").exists());
        assert!(!snapshot.join("pytorch_model.bin").exists() && !snapshot.join("onnx").exists());
        assert_eq!(std::fs::read_to_string(snapshot.join("../../refs/main")).unwrap(), "abc123");
        let seen = server.seen.lock().unwrap().clone();
        assert!(seen.iter().all(|(.., token)| token == "Bearer secret"), "{seen:?}");
        assert_eq!(seen.last().unwrap().0, "/org/name/resolve/abc123/model.safetensors");

        // A second time only the listing is asked for.
        assert_eq!(fetch(&online, "org/name", Need::Whole).unwrap(), snapshot);
        assert_eq!(server.paths().len(), seen.len() + 1);

        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "1")]);
        assert_eq!(fetch(&offline, "org/name", Need::Whole).unwrap(), snapshot);
        let error = fetch(&offline, "org/other", Need::Whole).unwrap_err().to_string();
        assert!(error.contains("org/other: not a folder") && error.contains("HF_HUB_OFFLINE"), "{error}");

        // Without a network the cache serves too.
        let unreachable = hub("http://127.0.0.1:1", home.path(), &[]);
        assert_eq!(fetch(&unreachable, "org/name", Need::Whole).unwrap(), snapshot);
        let error = fetch(&unreachable, "org/other", Need::Whole).unwrap_err().to_string();
        assert!(error.contains("cannot be reached") && error.contains("hint"), "{error}");
    }

    #[test]
    fn weights_that_are_drawn_are_not_fetched() {
        let server = Server::start(&model());
        let home = tempfile::tempdir().unwrap();
        let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::Shape).unwrap();
        assert!(snapshot.join("config.json").exists() && !snapshot.join("model.safetensors").exists());
        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "true")]);
        assert_eq!(fetch(&offline, "org/name", Need::Shape).unwrap(), snapshot);
        assert!(fetch(&offline, "org/name", Need::Whole).is_err());
    }

    #[test]
    fn a_download_cut_short_goes_on_where_it_stopped() {
        let weights: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        let mut routes = model();
        routes.pop();
        routes.push(("/org/name/resolve/abc123/model.safetensors", Answer::CutOnce(70_000, weights.clone())));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::Whole).unwrap();
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights);
        let seen = server.seen.lock().unwrap().clone();
        let (.., range, _) = seen.last().unwrap();
        assert_eq!(range, "bytes=70000-");
        assert!(!snapshot.join("model.safetensors.incomplete").exists());
    }

    #[test]
    fn a_file_that_changed_meanwhile_begins_anew() {
        let (first, second) = (vec![1u8; 5000], vec![2u8; 4000]);
        let mut routes = model();
        routes.pop();
        let answer = Answer::CutThenChanged(3000, first, second.clone());
        routes.push(("/org/name/resolve/abc123/model.safetensors", answer));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::Whole).unwrap();
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), second);
        assert_eq!(server.seen.lock().unwrap().last().unwrap().1, "bytes=3000-");
        let left: Vec<_> = std::fs::read_dir(&snapshot).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!left.iter().any(|path| path.to_str().unwrap().contains("incomplete")), "{left:?}");
    }

    #[test]
    fn refusals_say_what_to_do() {
        let cases: &[(Answer, &str, &str)] = &[
            (Answer::Status(404), "", "no such repository or file"),
            (Answer::Status(401), "", "HF_TOKEN is not set"),
            (Answer::Status(403), "secret", "does not accept HF_TOKEN"),
            (Answer::Status(503), "", "try again later"),
            (body("<html>"), "", "unexpected answer"),
            (listing(&["config.json", "pytorch_model.bin"]), "", "pickled (pytorch_model.bin)"),
            (listing(&["config.json"]), "", "it has no weights"),
        ];
        for (answer, token, expected) in cases {
            let server = Server::start(&[(API, answer.clone())]);
            let home = tempfile::tempdir().unwrap();
            let error =
                fetch(&hub(&server.endpoint, home.path(), &[("HF_TOKEN", token)]), "org/name", Need::Whole)
                    .unwrap_err();
            let error = error.to_string();
            assert!(
                error.starts_with("org/name: ") && error.contains(expected),
                "expected {expected:?} in {error:?}"
            );
        }
    }

    #[test]
    fn a_model_that_cannot_be_used_is_refused_before_its_weights() {
        let modules = r#"[{"path": "", "type": "sentence_transformers.models.LSTM"}]"#;
        let t5 = CONFIG.replace(r#""model_type": "bert""#, r#""model_type": "t5""#);
        let without: Vec<&str> = vec!["config.json", "vocab.txt", "model.safetensors"];
        for (route, answer, expected) in [
            ("/org/name/resolve/abc123/modules.json", body(modules), "module LSTM is not supported"),
            ("/api/resolve-cache/config.json", body(&t5), "`model_type` is `t5`"),
            ("/org/name/resolve/abc123/tokenizer.json", body("{}"), "this is not a tokenizer"),
            (API, listing(&without), "has vocab.txt but no tokenizer.json"),
        ] {
            let mut routes = model();
            routes.push(("/org/name/resolve/abc123/vocab.txt", body("")));
            routes.push((route, answer));
            let server = Server::start(&routes);
            let home = tempfile::tempdir().unwrap();
            let hub = hub(&server.endpoint, home.path(), &[]);
            let error = fetch(&hub, "org/name", Need::Whole).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!server.paths().iter().any(|path| path.ends_with(".safetensors")));
        }
        // An adapter brings its own tokenizer.
        let mut routes = model();
        routes.push((API, listing(&["config.json", "model.safetensors"])));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::Base).unwrap();
    }

    #[test]
    fn names_without_an_organisation_are_found() {
        let files = |repository: &str| {
            let at = |file: &str| format!("/{repository}/resolve/abc123/{file}");
            let list = listing(&["config.json", "tokenizer.json", "model.safetensors"]);
            [
                (format!("/api/models/{repository}/revision/main"), list),
                (at("config.json"), body(CONFIG)),
                (at("tokenizer.json"), body(TOKENIZER)),
                (at("model.safetensors"), body("weights")),
            ]
        };
        let routes = [files("old"), files("sentence-transformers/small")].concat();
        let mut routes: Vec<_> =
            routes.iter().map(|(path, answer)| (path.as_str(), answer.clone())).collect();
        // As the hub answers of what does not exist.
        routes.push(("/api/models/small/revision/main", Answer::Status(401)));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let online = hub(&server.endpoint, home.path(), &[]);
        for (name, folder) in [("old", "models--old"), ("small", "models--sentence-transformers--small")] {
            let snapshot = fetch(&online, name, Need::Whole).unwrap();
            assert_eq!(snapshot, home.path().join("hub").join(folder).join("snapshots/abc123"));
            for env in [("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", "unused")] {
                let alone = hub("http://127.0.0.1:1", home.path(), &[env]);
                assert_eq!(fetch(&alone, name, Need::Whole).unwrap(), snapshot);
            }
        }
        let error = fetch(&online, "no-such", Need::Whole).unwrap_err().to_string();
        assert!(error.starts_with("no-such: no such folder, and no such repository"), "{error}");
        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "1")]);
        let error = fetch(&offline, "no-such", Need::Whole).unwrap_err().to_string();
        assert!(error.starts_with("no-such: not a folder, and not whole in the cache"), "{error}");
    }

    #[test]
    fn of_an_adapter_only_its_own_files_are_fetched() {
        let config =
            r#"{"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8}"#;
        let list = listing(&["README.md", ADAPTER[0], ADAPTER[1], "tokenizer.json"]);
        let routes = |config: &str| {
            vec![
                (API, list.clone()),
                ("/org/name/resolve/abc123/adapter_config.json", body(config)),
                ("/org/name/resolve/abc123/adapter_model.safetensors", body("weights")),
            ]
        };
        let server = Server::start(&routes(config));
        let home = tempfile::tempdir().unwrap();
        let snapshot = fetch_adapter(&hub(&server.endpoint, home.path(), &[]), "org/name").unwrap();
        assert_eq!(server.paths().len(), 3, "{:?}", server.paths());
        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "1")]);
        assert_eq!(fetch_adapter(&offline, "org/name").unwrap(), snapshot);

        let refused = |routes: &[(&str, Answer)], expected: &str| {
            let server = Server::start(routes);
            let home = tempfile::tempdir().unwrap();
            let hub = hub(&server.endpoint, home.path(), &[]);
            let error = fetch_adapter(&hub, "org/name").unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!server.paths().iter().any(|path| path.ends_with(".safetensors")));
        };
        refused(&routes(&config.replace("LORA", "IA3")), "`peft_type` is \"IA3\"");
        refused(&[(API, listing(&["config.json"]))], "org/name: has no adapter_config.json");
        refused(&[(API, listing(&[ADAPTER[0], "adapter_model.bin"]))], "has no adapter_model.safetensors");
    }

    #[test]
    fn folders_are_taken_as_they_are_and_nonsense_is_refused() {
        let here = tempfile::tempdir().unwrap();
        assert_eq!(resolve(here.path().to_str().unwrap()).unwrap(), here.path());
        for text in ["./no/such", "/no/such", "a/b/c", "../x", "org/", "org/na me", "na me", "a--b", ""] {
            let error = resolve(text).unwrap_err().to_string();
            assert!(error.contains("no id of the hub either"), "{text:?}: {error}");
        }
        for id in ["no-such", "org/name"] {
            assert_eq!(folder(id).unwrap(), None);
        }
        let file = here.path().join("run.yaml");
        std::fs::write(&file, "").unwrap();
        let error = resolve(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("is a file, expected a model folder"), "{error}");
    }

    #[test]
    fn a_transformer_may_have_a_folder_of_its_own() {
        let names = [
            "modules.json",
            "0_Transformer/config.json",
            "0_Transformer/tokenizer.json",
            "0_Transformer/sentence_bert_config.json",
            "0_Transformer/model.safetensors",
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "onnx/config.json",
            "onnx/model.safetensors",
        ];
        let wanted = Wanted::choose("", &names, true).unwrap();
        assert_eq!(wanted.small, [&names[..4], &names[5..7]].concat());
        assert_eq!(wanted.weights, [names[4], names[7]]);
    }

    #[test]
    fn a_snapshot_without_a_dense_layer_is_not_whole() {
        let place = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = place.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let modules = ["0_Transformer", "1_Pooling", "2_Dense"].map(|path| {
            let kind = path.split_once('_').unwrap().1;
            format!(r#"{{"path": "{path}", "type": "sentence_transformers.models.{kind}"}}"#)
        });
        write("modules.json", &format!("[{}]", modules.join(",")));
        write("0_Transformer/config.json", "{}");
        write("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true}"#);
        write("2_Dense/config.json", r#"{"in_features": 2, "out_features": 2, "bias": false}"#);
        assert!(is_whole(place.path(), false));
        write("0_Transformer/model.safetensors", "");
        assert!(!is_whole(place.path(), true));
        write("2_Dense/model.safetensors", "");
        assert!(is_whole(place.path(), true));
    }

    #[test]
    fn shards_are_taken_only_without_a_whole_file() {
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let names = [
            shards[0],
            shards[1],
            "model.safetensors.index.json",
            "consolidated.safetensors",
            "model-fp16.safetensors",
        ];
        assert_eq!(Wanted::choose("", &names, true).unwrap().weights, shards);
        assert_eq!(Wanted::choose("", &names, true).unwrap().small, ["model.safetensors.index.json"]);
        let both = [shards[0], shards[1], "model.safetensors"];
        assert_eq!(Wanted::choose("", &both, true).unwrap().weights, ["model.safetensors"]);
    }
}
