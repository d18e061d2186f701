//! Models by their id on the Hugging Face hub.
//!
//! Only what is read here is fetched: configurations, the tokenizer, safetensors. The small files come first, so that a model
//! that cannot be used is refused before its weights are on their way.

use std::path::{Path, PathBuf};

use crate::config::Init;
use crate::data::tokenize;
use crate::hub::{Found, Hub, Repository, is_id};
use crate::model::Folder;
use crate::{Error, Result};

/// The folder of a model: `id_or_path` itself where it is a folder, else that of the model with this id on the hub, which is
/// fetched into the cache if need be.
///
/// # Errors
/// Neither a folder nor an id; no such model, or no right to it; no network and not in the cache; a model that
/// [`Folder::open`] refuses, or without safetensors.
pub fn resolve(id_or_path: &str) -> Result<PathBuf> {
    resolve_for(id_or_path, Init::Pretrained)
}

/// As [`resolve`]; where the weights are drawn from the seed, those of the hub are not fetched.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_for(id_or_path: &str, init: Init) -> Result<PathBuf> {
    let path = Path::new(id_or_path);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if !is_id(id_or_path) {
        let message = "no such model folder, and no id of the hub either, which is ORG/NAME";
        return Err(Error::file(path, message));
    }
    fetch(&Hub::new()?, id_or_path, init == Init::Pretrained)
}

/// As [`resolve`], of an adapter of PEFT.
///
/// # Errors
/// As [`resolve`], and a folder without `adapter_config.json`.
pub fn resolve_adapter(id_or_path: &str) -> Result<PathBuf> {
    let path = resolve(id_or_path)?;
    if path.join("adapter_config.json").is_file() {
        return Ok(path);
    }
    let message = "has no adapter_config.json: expected a LoRA adapter as PEFT writes it";
    Err(Error::file(path, message))
}

/// The folder of model `id`, with its weights or without.
fn fetch(hub: &Hub, id: &str, weights: bool) -> Result<PathBuf> {
    let repository = Repository::model(id);
    let snapshot = match hub.snapshot(&repository, |path| is_whole(path, weights))? {
        Found::Cached(path) => return Ok(path),
        Found::Listed(snapshot) => snapshot,
    };
    let names: Vec<_> = snapshot.names.iter().map(String::as_str).collect();
    let wanted = Wanted::choose(id, &names, weights)?;
    hub.fetch(&repository, &snapshot, &wanted.small)?;
    Folder::open(&snapshot.path)?;
    hub.fetch(&repository, &snapshot, &wanted.weights)?;
    hub.note(&repository, &snapshot)?;
    Ok(snapshot.path)
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
    let sentence = file.starts_with("sentence_") && file.ends_with("_config.json");
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
            ("/api/resolve-cache/config.json", body("{}")),
            (
                "/org/name/resolve/abc123/modules.json",
                body(
                    r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#,
                ),
            ),
            ("/org/name/resolve/abc123/1_Pooling/config.json", body(r#"{"pooling_mode_cls_token": true}"#)),
            ("/org/name/resolve/abc123/tokenizer.json", body("{}")),
            ("/org/name/resolve/abc123/model.safetensors", body("weights")),
        ]
    }

    #[test]
    fn what_is_needed_lands_in_the_cache_and_serves_offline() {
        let server = Server::start(&model());
        let home = tempfile::tempdir().unwrap();
        let online = hub(&server.endpoint, home.path(), &[("HF_TOKEN", "secret")]);
        let snapshot = fetch(&online, "org/name", true).unwrap();
        assert_eq!(snapshot, home.path().join("hub/models--org--name/snapshots/abc123"));
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), b"weights");
        assert!(snapshot.join("1_Pooling/config.json").exists());
        assert!(!snapshot.join("pytorch_model.bin").exists() && !snapshot.join("onnx").exists());
        assert_eq!(std::fs::read_to_string(snapshot.join("../../refs/main")).unwrap(), "abc123");
        let seen = server.seen.lock().unwrap().clone();
        assert!(seen.iter().all(|(.., token)| token == "Bearer secret"), "{seen:?}");
        assert_eq!(seen.last().unwrap().0, "/org/name/resolve/abc123/model.safetensors");

        // A second time only the listing is asked for.
        assert_eq!(fetch(&online, "org/name", true).unwrap(), snapshot);
        assert_eq!(server.paths().len(), seen.len() + 1);

        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "1")]);
        assert_eq!(fetch(&offline, "org/name", true).unwrap(), snapshot);
        let error = fetch(&offline, "org/other", true).unwrap_err().to_string();
        assert!(error.contains("org/other: not a folder") && error.contains("HF_HUB_OFFLINE"), "{error}");

        // Without a network the cache serves too.
        let unreachable = hub("http://127.0.0.1:1", home.path(), &[]);
        assert_eq!(fetch(&unreachable, "org/name", true).unwrap(), snapshot);
        let error = fetch(&unreachable, "org/other", true).unwrap_err().to_string();
        assert!(error.contains("cannot be reached") && error.contains("hint"), "{error}");
    }

    #[test]
    fn weights_that_are_drawn_are_not_fetched() {
        let server = Server::start(&model());
        let home = tempfile::tempdir().unwrap();
        let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", false).unwrap();
        assert!(snapshot.join("config.json").exists() && !snapshot.join("model.safetensors").exists());
        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "true")]);
        assert_eq!(fetch(&offline, "org/name", false).unwrap(), snapshot);
        assert!(fetch(&offline, "org/name", true).is_err());
    }

    #[test]
    fn a_download_cut_short_goes_on_where_it_stopped() {
        let weights: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        let mut routes = model();
        routes.pop();
        routes.push(("/org/name/resolve/abc123/model.safetensors", Answer::CutOnce(70_000, weights.clone())));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", true).unwrap();
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
        let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", true).unwrap();
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
            let error = fetch(&hub(&server.endpoint, home.path(), &[("HF_TOKEN", token)]), "org/name", true)
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
        let mut routes = model();
        routes.push((
            "/org/name/resolve/abc123/modules.json",
            body(r#"[{"path": "", "type": "sentence_transformers.models.LSTM"}]"#),
        ));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let error =
            fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", true).unwrap_err().to_string();
        assert!(error.contains("module LSTM is not supported"), "{error}");
        assert!(!server.paths().iter().any(|path| path.ends_with(".safetensors")));
    }

    #[test]
    fn folders_are_taken_as_they_are_and_nonsense_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(resolve(folder.path().to_str().unwrap()).unwrap(), folder.path());
        for text in ["no-such", "./no/such", "/no/such", "a/b/c", "../x", "org/", "org/na me", ""] {
            let error = resolve(text).unwrap_err().to_string();
            assert!(error.contains("no id of the hub either"), "{text:?}: {error}");
        }
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
