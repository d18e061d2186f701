//! What is written opens again and embeds alike.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Map, Value, json};
use tests::{FAMILIES, copy, program, stderr, write_config};
use trainer::config::Config;
use trainer::eval::embed::{LoadedModel, Role};
use trainer::export::{self, TrainedRun};
use trainer::model::Options;

const TEXTS: [&str; 3] =
    ["the metal melts at a high heat", "a", "Zürich – naïve café №7, and how long is it?"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

fn open(folder: &Path) -> LoadedModel {
    LoadedModel::open(folder.to_str().unwrap(), &Options::default()).unwrap()
}

fn embed(opened: &LoadedModel) -> Vec<Vec<f32>> {
    let embeddings: Tensor = opened.embedder().encode(&TEXTS, Role::Text).unwrap();
    embeddings.to_vec2().unwrap()
}

/// The golden adapter of model `name` in a folder as it is written here: configuration and tokenizer beside it.
fn adapter(name: &str) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    copy(&golden(name), place.path());
    copy(&golden(name).join("adapter"), place.path());
    fs::remove_file(place.path().join("model.safetensors")).unwrap();
    let path = place.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["base_model_name_or_path"] = golden(name).to_str().unwrap().into();
    fs::write(&path, config.to_string()).unwrap();
    place
}

/// Writes the model of `folder` at `target` as a run would, and says how it embeds.
fn write(folder: &Path, merge: bool, target: &Path) -> Vec<Vec<f32>> {
    let mut opened = open(folder);
    let mut config = Config::default();
    config.model.path = folder.to_str().unwrap().to_owned();
    let none = Map::new();
    let trained = TrainedRun { config: &config, step: 1, before: &none, after: &none };
    let before = embed(&opened);
    export::write_run(&mut opened.model, &trained, export::Options { merge, replace: false }, target)
        .unwrap();
    before
}

/// Writes the model of `folder` as a run would and opens it again.
fn again(folder: &Path, merge: bool) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("model");
    let before = write(folder, merge, &target);
    let whole = merge || !folder.join("adapter_config.json").exists();
    assert_eq!(target.join("model.safetensors").exists(), whole);
    assert_eq!(target.join("adapter_model.safetensors").exists(), !whole);
    (before, embed(&open(&target)))
}

#[test]
fn a_whole_model_keeps_its_bits() {
    for name in FAMILIES {
        let (before, after) = again(&golden(name), false);
        assert_eq!(before, after, "{name}");
    }
}

#[test]
fn adapters_keep_their_bits_and_merged_weights_nearly() {
    for name in FAMILIES {
        let folder = adapter(name);
        let (before, after) = again(folder.path(), false);
        assert_eq!(before, after, "{name}");
        assert_ne!(before, embed(&open(&golden(name))), "{name}: the adapter does nothing");
        let (before, merged) = again(folder.path(), true);
        // One rounding of W + αBA against two sums: a few units in the last place of f32, through a few layers.
        for (one, other) in before.iter().flatten().zip(merged.iter().flatten()) {
            assert!((one - other).abs() < 1e-5, "{name}: {one}, merged {other}");
        }
    }
}

#[test]
fn what_is_written_opened_and_written_again_has_the_same_bits() {
    for name in FAMILIES {
        let place = tempfile::tempdir().unwrap();
        let (one, two) = (place.path().join("one"), place.path().join("two"));
        write(&golden(name), false, &one);
        write(&one, false, &two);
        let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
        assert!(weights(&one) == weights(&two), "{name}: other weights");
        for file in ["config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"] {
            let text = |folder: &Path| fs::read_to_string(folder.join(file)).unwrap();
            assert_eq!(text(&one), text(&two), "{name}: {file}");
        }
    }
}

/// What text-embeddings-inference asks of a folder before it serves it: the files, and the fields that it has no default for.
#[test]
fn text_embeddings_inference_reads_what_is_written() {
    for name in FAMILIES {
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("model");
        write(&golden(name), false, &target);
        let read = |file: &str| -> Value {
            let text = fs::read(target.join(file)).unwrap_or_else(|_| panic!("{name} has no {file}"));
            serde_json::from_slice(&text).unwrap()
        };
        let config = read("config.json");
        assert!(config["model_type"].is_string(), "{name}");
        let architectures = config["architectures"].as_array().unwrap();
        assert!(
            architectures.iter().all(|a| a.as_str().unwrap().ends_with("Model")),
            "{name}: {architectures:?}"
        );
        let positions = config["max_position_embeddings"].as_u64().unwrap();

        let pooling = read("1_Pooling/config.json");
        for mode in ["cls_token", "mean_tokens"] {
            assert!(pooling[format!("pooling_mode_{mode}")].is_boolean(), "{name}: {mode}");
        }
        let modes: Vec<&str> =
            ["cls_token", "mean_tokens", "lasttoken", "max_tokens", "mean_sqrt_len_tokens"]
                .into_iter()
                .filter(|mode| pooling[format!("pooling_mode_{mode}")] == Value::Bool(true))
                .collect();
        assert_eq!(modes.len(), 1, "{name}: {modes:?}");

        let length = read("sentence_bert_config.json")["max_seq_length"].as_u64().unwrap();
        assert!(0 < length && length <= positions, "{name}: {length} of {positions}");
        assert!(read("tokenizer.json")["model"]["vocab"].is_object(), "{name}");
        let weights = tests::tensors(&target.join("model.safetensors"));
        // Its loaders look for the names of the bare encoder, as AutoModel saves them.
        let words =
            ["embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight", "embed_tokens.weight"];
        assert!(words.iter().any(|word| weights.contains_key(*word)), "{name}");
        assert!(weights.values().all(|tensor| tensor.dtype() == candle_core::DType::F32), "{name}");
        for module in read("modules.json").as_array().unwrap() {
            let kind = module["type"].as_str().unwrap();
            assert!(kind.starts_with("sentence_transformers.models."), "{name}: {kind}");
            if kind.ends_with("Dense") {
                let place = module["path"].as_str().unwrap();
                assert!(read(&format!("{place}/config.json"))["in_features"].is_u64(), "{name}");
                assert!(target.join(place).join("model.safetensors").is_file(), "{name}");
            }
        }
    }
}

#[test]
fn a_configuration_alone_is_a_model_whose_weights_are_drawn() {
    let place = tempfile::tempdir().unwrap();
    let shape = place.path().join("shape");
    fs::create_dir(&shape).unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(golden("bert").join("config.json")).unwrap()).unwrap();
    config["vocab_size"] = json!(300);
    fs::write(shape.join("config.json"), config.to_string()).unwrap();
    let mut run = tests::config(&shape, &golden("bert").join("rows.jsonl"), &place.path().join("out"));
    run["model"]["init"] = json!("random");
    run["training"]["max_steps"] = json!(2);
    let output = program("trainer").arg("train").arg(write_config(place.path(), &run)).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    // What is written is whole: its tokenizer makes a token of every byte.
    let texts = place.path().join("texts.txt");
    fs::write(&texts, "one\ntwo\n").unwrap();
    let npy = place.path().join("new/x.npy");
    let output = program("trainer")
        .args(["encode", "--model"])
        .arg(place.path().join("out/model"))
        .arg("--input")
        .arg(&texts)
        .arg("--output")
        .arg(&npy)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(npy.exists());
}
