use super::*;
use crate::hub::testing::{Answer, Server, body, hub, listing};

const API: &str = "/api/models/org/name/revision/main";
const CONFIG: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert/config.json"));
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
        ("/org/name/resolve/abc123/config.json", Answer::Redirect("/api/resolve-cache/config.json".into())),
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
fn fetched_files_are_cached_and_used_offline() {
    let server = Server::start(&model());
    let home = tempfile::tempdir().unwrap();
    let online = hub(&server.endpoint, home.path(), &[("HF_TOKEN", "secret")]);
    let snapshot = fetch(&online, "org/name", Need::MODEL).unwrap();
    assert_eq!(snapshot, home.path().join("hub/models--org--name/snapshots/abc123"));
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), b"weights");
    assert!(snapshot.join("1_Pooling/config.json").exists());
    assert!(!snapshot.join("pytorch_model.bin").exists() && !snapshot.join("onnx").exists());
    assert_eq!(std::fs::read_to_string(snapshot.join("../../refs/main")).unwrap(), "abc123");
    let seen = server.seen.lock().unwrap().clone();
    assert!(seen.iter().all(|(.., token)| token == "Bearer secret"), "{seen:?}");
    assert_eq!(seen.last().unwrap().0, "/org/name/resolve/abc123/model.safetensors");

    // The second time, only the listing is requested.
    assert_eq!(fetch(&online, "org/name", Need::MODEL).unwrap(), snapshot);
    assert_eq!(server.paths().len(), seen.len() + 1);

    let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(fetch(&offline, "org/name", Need::MODEL).unwrap(), snapshot);
    let error = fetch(&offline, "org/other", Need::MODEL).unwrap_err().to_string();
    assert!(error.contains("org/other: no such folder") && error.contains("HF_HUB_OFFLINE"), "{error}");

    // Without a network, the cache is used.
    let unreachable = hub("http://127.0.0.1:1", home.path(), &[]);
    assert_eq!(fetch(&unreachable, "org/name", Need::MODEL).unwrap(), snapshot);
    let error = fetch(&unreachable, "org/other", Need::MODEL).unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && error.contains("hint"), "{error}");
}

#[test]
fn weights_that_are_random_are_not_fetched() {
    let server = Server::start(&model());
    let home = tempfile::tempdir().unwrap();
    let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::CONFIG).unwrap();
    assert!(snapshot.join("config.json").exists() && !snapshot.join("model.safetensors").exists());
    let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "true")]);
    assert_eq!(fetch(&offline, "org/name", Need::CONFIG).unwrap(), snapshot);
    assert!(fetch(&offline, "org/name", Need::MODEL).is_err());
}

#[test]
fn an_interrupted_download_resumes_where_it_stopped() {
    let weights: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
    let mut routes = model();
    routes.pop();
    routes.push(("/org/name/resolve/abc123/model.safetensors", Answer::CutOnce(70_000, weights.clone())));
    let server = Server::start(&routes);
    let home = tempfile::tempdir().unwrap();
    let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::MODEL).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights);
    let seen = server.seen.lock().unwrap().clone();
    let (.., range, _) = seen.last().unwrap();
    assert_eq!(range, "bytes=70000-");
    assert!(!snapshot.join("model.safetensors.incomplete").exists());
}

#[test]
fn a_file_that_changed_meanwhile_is_downloaded_from_the_start() {
    let (first, second) = (vec![1u8; 5000], vec![2u8; 4000]);
    let mut routes = model();
    routes.pop();
    let answer = Answer::CutThenChanged(3000, first, second.clone());
    routes.push(("/org/name/resolve/abc123/model.safetensors", answer));
    let server = Server::start(&routes);
    let home = tempfile::tempdir().unwrap();
    let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::MODEL).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), second);
    assert_eq!(server.seen.lock().unwrap().last().unwrap().1, "bytes=3000-");
    let left: Vec<_> = std::fs::read_dir(&snapshot).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!left.iter().any(|path| path.to_str().unwrap().contains("incomplete")), "{left:?}");
}

#[test]
fn failed_requests_say_what_to_do() {
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
            fetch(&hub(&server.endpoint, home.path(), &[("HF_TOKEN", token)]), "org/name", Need::MODEL)
                .unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("org/name: ") && error.contains(expected),
            "expected {expected:?} in {error:?}"
        );
    }
}

#[test]
fn an_unsupported_model_is_refused_before_its_weights_are_fetched() {
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
        let error = fetch(&hub, "org/name", Need::MODEL).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(!server.paths().iter().any(|path| path.ends_with(".safetensors")));
    }
    // The base model of an adapter needs no tokenizer.
    let mut routes = model();
    routes.push((API, listing(&["config.json", "model.safetensors"])));
    let server = Server::start(&routes);
    let home = tempfile::tempdir().unwrap();
    fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::BASE).unwrap();
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
    let mut routes: Vec<_> = routes.iter().map(|(path, answer)| (path.as_str(), answer.clone())).collect();
    // The answer of the hub for a repository that does not exist.
    routes.push(("/api/models/small/revision/main", Answer::Status(401)));
    let server = Server::start(&routes);
    let home = tempfile::tempdir().unwrap();
    let online = hub(&server.endpoint, home.path(), &[]);
    for (name, folder) in [("old", "models--old"), ("small", "models--sentence-transformers--small")] {
        let snapshot = fetch(&online, name, Need::MODEL).unwrap();
        assert_eq!(snapshot, home.path().join("hub").join(folder).join("snapshots/abc123"));
        for env in [("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", "unused")] {
            let alone = hub("http://127.0.0.1:1", home.path(), &[env]);
            assert_eq!(fetch(&alone, name, Need::MODEL).unwrap(), snapshot);
        }
    }
    let error = fetch(&online, "no-such", Need::MODEL).unwrap_err().to_string();
    assert!(error.starts_with("no-such: no such folder, and no such repository"), "{error}");
    let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "1")]);
    let error = fetch(&offline, "no-such", Need::MODEL).unwrap_err().to_string();
    assert!(error.starts_with("no-such: no such folder, and no complete copy in the cache"), "{error}");
}

#[test]
fn of_an_adapter_only_its_own_files_are_fetched() {
    let config = r#"{"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8}"#;
    let list = listing(&["README.md", peft::CONFIG_FILE, peft::WEIGHTS_FILE, "tokenizer.json"]);
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
    refused(&[(API, listing(&[peft::CONFIG_FILE, "adapter_model.bin"]))], "has no adapter_model.safetensors");
}

#[test]
fn folders_are_used_as_they_are_and_malformed_ids_are_refused() {
    let here = tempfile::tempdir().unwrap();
    assert_eq!(find(here.path().to_str().unwrap(), Need::MODEL).unwrap(), here.path());
    for text in ["./no/such", "/no/such", "a/b/c", "../x", "org/", "org/na me", "na me", "a--b", ""] {
        let error = find(text, Need::MODEL).unwrap_err().to_string();
        assert!(error.contains("not an id of the hub either"), "{text:?}: {error}");
    }
    for id in ["no-such", "org/name"] {
        assert_eq!(local(id).unwrap(), None);
    }
    let file = here.path().join("run.yaml");
    std::fs::write(&file, "").unwrap();
    let error = find(file.to_str().unwrap(), Need::MODEL).unwrap_err().to_string();
    assert!(error.contains("is a file, expected a model folder"), "{error}");
}

#[test]
fn a_transformer_may_be_in_a_subfolder() {
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
fn a_snapshot_without_a_dense_layer_is_not_complete() {
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
    assert!(is_complete(place.path(), false));
    write("0_Transformer/model.safetensors", "");
    assert!(!is_complete(place.path(), true));
    write("2_Dense/model.safetensors", "");
    assert!(is_complete(place.path(), true));
}

#[test]
fn shards_are_fetched_only_without_a_single_file() {
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

/// An adapter on the hub, and its base model in another repository.
fn adapter_and_base() -> Vec<(&'static str, Answer)> {
    let config = r#"{"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8}"#;
    vec![
        (API, listing(&[peft::CONFIG_FILE, peft::WEIGHTS_FILE, "tokenizer.json"])),
        ("/org/name/resolve/abc123/adapter_config.json", body(config)),
        ("/org/name/resolve/abc123/adapter_model.safetensors", body("weights")),
        ("/org/name/resolve/abc123/tokenizer.json", body(TOKENIZER)),
        ("/api/models/org/base/revision/main", listing(&["config.json", "model.safetensors"])),
        ("/org/base/resolve/abc123/config.json", body(CONFIG)),
        ("/org/base/resolve/abc123/model.safetensors", body("weights")),
    ]
}

#[test]
fn the_base_model_of_an_adapter_is_fetched_from_the_same_hub() {
    let server = Server::start(&adapter_and_base());
    let home = tempfile::tempdir().unwrap();
    let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::MODEL).unwrap();
    assert!(snapshot.join(peft::WEIGHTS_FILE).exists());
    let base = home.path().join("hub/models--org--base/snapshots/abc123");
    assert!(base.join("model.safetensors").exists() && base.join("config.json").exists());
}

#[test]
fn asking_whether_an_adapter_is_cached_fetches_nothing() {
    let server = Server::start(&adapter_and_base());
    let home = tempfile::tempdir().unwrap();
    let snapshot = fetch(&hub(&server.endpoint, home.path(), &[]), "org/name", Need::MODEL).unwrap();
    std::fs::remove_dir_all(home.path().join("hub/models--org--base")).unwrap();
    let requests = server.paths().len();
    assert!(is_complete(&snapshot, true));
    assert_eq!(server.paths().len(), requests);
}

#[test]
fn an_adapter_is_no_base_model() {
    let mut routes = adapter_and_base();
    let config = r#"{"base_model_name_or_path": "org/name", "peft_type": "LORA", "r": 4, "lora_alpha": 8}"#;
    routes.push(("/org/name/resolve/abc123/adapter_config.json", body(config)));
    let server = Server::start(&routes);
    let home = tempfile::tempdir().unwrap();
    let hub = hub(&server.endpoint, home.path(), &[]);
    let error = fetch(&hub, "org/name", Need::MODEL).unwrap_err().to_string();
    assert!(error.contains("is an adapter, expected a base model"), "{error}");
}
