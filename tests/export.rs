//! What is written opens again and embeds alike.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::{Map, Value};
use tests::{FAMILIES, copy};
use trainer::config::Config;
use trainer::embed::{Opened, Role};
use trainer::export::{self, Trained};
use trainer::model::Options;

const TEXTS: [&str; 3] =
    ["the metal melts at a high heat", "a", "Zürich – naïve café №7, and how long is it?"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

fn open(folder: &Path) -> Opened {
    Opened::open(folder.to_str().unwrap(), &Options::default()).unwrap()
}

fn embed(opened: &Opened) -> Vec<Vec<f32>> {
    let embeddings: Tensor = opened.embedder().encode(&TEXTS, Role::Text).unwrap();
    embeddings.to_vec2().unwrap()
}

/// The golden adapter of model `name` in a folder as it is written here: configuration and tokenizer beside it.
fn adapter(name: &str) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    copy(&golden(name), place.path());
    copy(&golden(name).join("adapter"), place.path());
    std::fs::remove_file(place.path().join("model.safetensors")).unwrap();
    let path = place.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["base_model_name_or_path"] = golden(name).to_str().unwrap().into();
    std::fs::write(&path, config.to_string()).unwrap();
    place
}

/// Writes the model of `folder` as a run would and opens it again.
fn again(folder: &Path, merge: bool) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let mut opened = open(folder);
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("model");
    let mut config = Config::default();
    config.model.path = folder.to_str().unwrap().to_owned();
    let none = Map::new();
    let trained = Trained { config: &config, step: 1, before: &none, after: &none };
    let before = embed(&opened);
    export::run(&mut opened.model, &trained, export::Options { merge, replace: false }, &target).unwrap();
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
