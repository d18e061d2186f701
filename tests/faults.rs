//! Bad input gives one clear message and exit status 2 before anything is started. A later failure gives
//! status 1 and loses nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tests::{golden, model_folder, program, stderr, tensors, write_config};

/// A folder with a model, rows and a valid configuration.
struct Case {
    place: tempfile::TempDir,
    model: tempfile::TempDir,
    config: Value,
}

impl Case {
    fn new() -> Self {
        let (place, model) = (tempfile::tempdir().unwrap(), model_folder("bert", false));
        fs::copy(golden("bert").join("rows.jsonl"), place.path().join("rows.jsonl")).unwrap();
        let config = tests::config(model.path(), &place.path().join("rows.jsonl"), &place.path().join("out"));
        Self { place, model, config }
    }

    fn rows(self, name: &str, text: impl AsRef<[u8]>) -> Self {
        let path = self.place.path().join(name);
        fs::write(&path, text).unwrap();
        self.set("data", json!({"train": [{"path": path}]}))
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        let mut at = &mut self.config;
        for part in key.split('.') {
            at = &mut at[part];
        }
        *at = value;
        self
    }

    fn train(&self) -> Output {
        let config = write_config(self.place.path(), &self.config);
        program("trainer").arg("train").arg(config).output().unwrap()
    }

    /// Checks that training is refused with status 2, all of `words` in the message, and no run started.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let output = self.train();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
        assert_eq!(message.matches("error:").count(), 1, "one message: {message}");
        assert!(!self.place.path().join("out/metrics.jsonl").exists(), "nothing is started: {message}");
    }
}

#[test]
fn wrong_keys_and_values_of_the_configuration_are_refused() {
    let case = Case::new().set("training.leraning_rate", json!(1));
    case.refused(&["config.yaml:1", "training.leraning_rate", "learning_rate"]);
    Case::new().set("training.batch_size", json!("many")).refused(&["training.batch_size", "many"]);
    Case::new().set("loss.temperature", json!(0)).refused(&["loss.temperature"]);
    Case::new().set("model.max_query_length", json!(65)).refused(&[
        "model.max_query_length",
        "65",
        "64 positions",
    ]);
    let rows = golden("bert").join("rows.jsonl");
    for (kind, metric, known) in [
        ("retrieval", "cosine_ndcg@11", "rows_cosine_ndcg@10"),
        ("triplet", "cosine_ndcg@10", "rows_max_accuracy"),
    ] {
        let sets = json!({"metric": metric, "sets": [{"path": rows, "kind": kind}]});
        Case::new().set("evaluation", sets).refused(&["config.yaml:1", "evaluation.metric", metric, known]);
    }
    let sets = json!({"sets": [{"path": rows}, {"path": rows, "kind": "triplet"}]});
    Case::new().set("evaluation", sets).refused(&[
        "evaluation.sets.1",
        "two sets are named `rows`",
        "`name`",
    ]);
    // With only its own document as a candidate, the loss of a row would always be 0.
    let pairs = "{\"query\": \"a\", \"positive\": \"b\"}\n".repeat(8);
    let without_negatives =
        Case::new().rows("pairs.jsonl", pairs).set("loss.in_batch_negatives", json!(false));
    without_negatives.refused(&[
        "loss.in_batch_negatives",
        "pairs has no negatives",
        "always be 0",
        "trainer mine",
    ]);
    let none = Case::new().set("loss.in_batch_negatives", json!(false)).set("data.negatives", json!(0));
    none.refused(&["loss.in_batch_negatives", "rows has no negatives"]);
    let output = program("trainer").args(["train", "/no/such/config.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("/no/such/config.yaml"));
}

#[test]
fn rows_are_named_by_file_and_line() {
    let good = r#"{"query": "a", "positive": "b"}"#;
    let after = |bad: &[u8]| [good.as_bytes(), b"\n", bad, b"\n", good.as_bytes()].concat();
    Case::new()
        .set("data", json!({"train": [{"path": "/no/such/rows.jsonl"}]}))
        .refused(&["/no/such/rows.jsonl"]);
    Case::new().rows("x.jsonl", after(b"{\"query\": ")).refused(&["x.jsonl:2"]);
    Case::new().rows("x.jsonl", after(br#"{"query": "a"}"#)).refused(&["x.jsonl:2", "positive"]);
    Case::new()
        .rows("x.jsonl", after(br#"{"query": "a", "positive": "  "}"#))
        .refused(&["x.jsonl:2", "positive"]);
    Case::new()
        .rows("x.jsonl", after(b"{\"query\": \"a\xff\", \"positive\": \"b\"}"))
        .refused(&["x.jsonl:2", "UTF-8"]);
    Case::new().rows("x.csv", "query,positive\na,b\nc\n").refused(&["x.csv:3"]);
    Case::new().rows("x.csv", "query,positive\na,b\nc,\n").refused(&["x.csv:3", "positive"]);
    Case::new().rows("x.jsonl", good).refused(&["training.batch_size", "4 rows", "1"]);
}

#[test]
fn damaged_model_folders_are_refused() {
    let case = Case::new();
    let path = |name: &str| case.model.path().join(name);
    let weights = fs::read(path("model.safetensors")).unwrap();
    fs::remove_file(path("model.safetensors")).unwrap();
    case.refused(&["has no model.safetensors", "init: random"]);
    fs::write(path("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    case.refused(&["model.safetensors", "cut off"]);

    fs::write(path("model.safetensors"), &weights).unwrap();
    let mut all = tensors(&path("model.safetensors"));
    let word = all.remove("embeddings.word_embeddings.weight").unwrap();
    let key = "encoder.layer.1.attention.self.key.weight";
    let other = all.insert(key.to_owned(), Tensor::zeros((3, 3), DType::F32, &Device::Cpu).unwrap()).unwrap();
    all.insert("embeddings.word_embeddings.weight".to_owned(), word);
    candle_core::safetensors::save(&all, path("model.safetensors")).unwrap();
    case.refused(&[key, "[3, 3]", "[32, 32]"]);
    all.remove(key);
    candle_core::safetensors::save(&all, path("model.safetensors")).unwrap();
    case.refused(&["lack the tensor", key]);
    all.insert(key.to_owned(), other);
    candle_core::safetensors::save(&all, path("model.safetensors")).unwrap();

    let text = fs::read_to_string(path("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["model_type"] = json!("gpt2");
    fs::write(path("config.json"), config.to_string()).unwrap();
    case.refused(&["config.json", "gpt2", "bert, mistral"]);
    config["model_type"] = json!("bert");
    config["position_embedding_type"] = json!("relative_key");
    fs::write(path("config.json"), config.to_string()).unwrap();
    case.refused(&["position_embedding_type", "relative_key"]);
    fs::write(path("config.json"), &text).unwrap();

    let tokenizer = fs::read_to_string(path("tokenizer.json")).unwrap();
    let mut more: Value = serde_json::from_str(&tokenizer).unwrap();
    more["model"]["vocab"]["a-token-too-many"] = json!(92);
    fs::write(path("tokenizer.json"), more.to_string()).unwrap();
    case.refused(&["93 tokens", "92 rows"]);
    fs::write(path("tokenizer.json"), &tokenizer[..100]).unwrap();
    case.refused(&["tokenizer.json"]);
    fs::write(path("tokenizer.json"), tokenizer).unwrap();
    assert!(case.train().status.success(), "the repaired model trains");
}

#[test]
fn an_output_folder_that_holds_a_run_is_refused() {
    let case = Case::new();
    assert!(case.train().status.success());
    let before = fs::read(case.place.path().join("out/metrics.jsonl")).unwrap();
    let output = case.train();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("already holds a run"), "{}", stderr(&output));
    assert_eq!(fs::read(case.place.path().join("out/metrics.jsonl")).unwrap(), before);
}

#[test]
fn an_output_folder_that_cannot_be_written_is_refused() {
    let case = Case::new().set("output", json!("/proc/no/such/place"));
    let output = case.train();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let closed = tempfile::tempdir().unwrap();
    fs::set_permissions(closed.path(), fs::Permissions::from_mode(0o555)).unwrap();
    // Root may write everywhere except to a read-only file system.
    let _disk = fs::write(closed.path().join("probe"), "").is_ok().then(|| Disk::mount(closed.path(), "ro"));
    if fs::write(closed.path().join("probe"), "").is_ok() {
        println!(
            "skipped: a read-only folder, because root may write everywhere and cannot mount a file system here"
        );
        return;
    }
    Case::new().set("output", json!(closed.path().join("out"))).refused(&["cannot create"]);
}

/// A tmpfs that is unmounted at the end of the test.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    /// Mounts it; `None` where this process may not.
    fn mount(place: &'a Path, options: &str) -> Option<Self> {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(place).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(place))
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_leaves_only_complete_checkpoints() {
    let place = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(place.path(), "size=900k") else {
        println!("skipped: a full disk, because no tmpfs can be mounted here (needs root)");
        return;
    };
    let out = disk.0.join("out");
    // A checkpoint takes about 300 KB: the third does not fit.
    let case = Case::new().set("output", json!(out)).set("checkpoint", json!({"every": 1, "keep": 9}));
    let output = case.train();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("disk"), "{}", stderr(&output));
    let names: Vec<String> = fs::read_dir(out.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(!names.is_empty());
    for name in names {
        let path = out.join("checkpoints").join(&name);
        assert!(path.join("DONE").is_file(), "{name} is incomplete");
        assert!(tensors(&path.join("parameters.safetensors")).len() > 30);
    }
}

#[test]
fn a_loss_that_is_not_finite_names_its_step_and_rows() {
    let case = Case::new().set("training.learning_rate", json!(1e30)).set("checkpoint", json!({"every": 1}));
    let output = case.train();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("is not finite") && message.contains("rows.jsonl:"), "{message}");
    let checkpoints = case.place.path().join("out/checkpoints");
    let complete: Vec<_> = fs::read_dir(checkpoints)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("DONE").is_file())
        .collect();
    assert!(!complete.is_empty());
    for (name, tensor) in complete.iter().flat_map(|path| tensors(&path.join("parameters.safetensors"))) {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|value| value.is_finite()), "{name} is not finite in a checkpoint");
    }
}

/// Changes the model so that the loss of every text with a `;` is not finite.
fn without_semicolons(case: &Case) {
    let path = |name: &str| case.model.path().join(name);
    let tokenizer: Value = serde_json::from_slice(&fs::read(path("tokenizer.json")).unwrap()).unwrap();
    let row = tokenizer["model"]["vocab"][";"].as_u64().unwrap() as usize;
    let mut all = tensors(&path("model.safetensors"));
    let table = all.iter_mut().find(|(name, _)| name.ends_with("word_embeddings.weight")).unwrap().1;
    let mut rows = table.to_vec2::<f32>().unwrap();
    rows[row].fill(3e38); // finite, but sums of it are not
    *table = Tensor::new(rows, &Device::Cpu).unwrap();
    candle_core::safetensors::save(&all, path("model.safetensors")).unwrap();
}

#[test]
fn a_step_that_is_not_finite_is_skipped_if_the_configuration_allows_it() {
    let text = |n: usize| if n == 5 { format!("iron {n};") } else { format!("iron {n}") };
    let rows: Vec<String> =
        (0..12).map(|n| json!({"query": text(n), "positive": format!("metal {n}")}).to_string()).collect();
    let case = Case::new().rows("x.jsonl", rows.join("\n")).set("lora", json!({"rank": 2}));
    without_semicolons(&case);
    let case = case.set("data.shuffle", json!(false));
    let output = case.train();
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(message.contains("step 2: the loss is not finite") && message.contains("x.jsonl:6"), "{message}");
    assert!(!message.contains("x.jsonl:5:"), "{message}");

    fs::remove_dir_all(case.place.path().join("out")).unwrap();
    let case = case.set("training.max_nonfinite", json!(2));
    let output = case.train();
    assert!(output.status.success(), "{}", stderr(&output));
    let losses: Vec<_> = tests::metrics(&case.place.path().join("out"))
        .into_iter()
        .map(|line| line["loss"].as_f64().is_some_and(f64::is_finite))
        .collect();
    assert_eq!(losses, [true, false, true]);
    let adapters = tensors(&case.place.path().join("out/model/adapter_model.safetensors"));
    let finite = |tensor: &Tensor| {
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|value| value.is_finite())
    };
    assert!(!adapters.is_empty() && adapters.values().all(finite), "{adapters:?}");
}

#[test]
fn texts_of_any_length_and_script_train() {
    let long = "iron ".repeat(20_000);
    let rows: Vec<String> =
        ["a", "数学", "\u{1F600}\u{200D}\u{1F525}", "ﷺ", "e\u{301}\u{302}", "\u{0}x", &long, "Ж"]
            .iter()
            .map(|text| json!({"query": text, "positive": format!("{text} {text}")}).to_string())
            .collect();
    let output = Case::new().rows("x.jsonl", rows.join("\n")).train();
    assert!(output.status.success(), "{}", stderr(&output));
}
