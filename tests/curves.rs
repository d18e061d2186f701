//! The losses of three short runs are equal to those in `tests/expected`, so that a change of numerics is noticed.
//!
//! After an intended change, `LODESTONE_WRITE_EXPECTED=1 cargo test --test system -- curves` writes the files anew; the commit
//! says why they changed.

use std::env::var_os;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tests::{golden, metrics, minilm, program, stderr, write_config};

/// Relative difference allowed: processors with other vector instructions add in another order.
const TOLERANCE: f64 = 1e-5;

/// Trains `config` in `folder` and compares the loss of each step with `tests/expected/NAME.json`.
fn compare(name: &str, mut config: Value, folder: &Path) {
    config["output"] = json!(folder.join("out"));
    config["loss"] = json!({"temperature": 0.05});
    config["logging"] = json!({"tensorboard": false});
    let ran = program("trainer").arg("train").arg(write_config(folder, &config)).output().unwrap();
    assert!(ran.status.success(), "{}", stderr(&ran));
    let losses: Vec<f64> =
        metrics(&folder.join("out")).iter().filter_map(|line| line["loss"].as_f64()).collect();

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("expected/{name}.json"));
    if var_os("LODESTONE_WRITE_EXPECTED").is_some() {
        fs::write(&path, serde_json::to_string_pretty(&losses).unwrap() + "\n").unwrap();
    }
    let expected: Vec<f64> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(losses.len(), expected.len(), "{name}: steps");
    for (step, (loss, expected)) in losses.iter().zip(&expected).enumerate() {
        let error = (loss / expected - 1.0).abs();
        assert!(error < TOLERANCE, "{name}: the loss of step {} is {loss}, expected {expected}", step + 1);
    }
}

/// Writes the data of the quickstart into `folder`.
fn quickstart(folder: &Path) -> PathBuf {
    let written = program("examples/quickstart").arg("--output").arg(folder).output().unwrap();
    assert!(written.status.success(), "{}", stderr(&written));
    folder.to_owned()
}

fn lora() -> Value {
    json!({"rank": 8, "alpha": 16, "dropout": 0.1})
}

#[test]
fn the_quickstart_has_the_expected_losses() {
    let place = tempfile::tempdir().unwrap();
    let data = quickstart(&place.path().join("data"));
    let config = json!({
        "model": {"path": data.join("model"), "init": "random"},
        "data": {"train": [{"path": data.join("train.jsonl")}]},
        "training": {"batch_size": 64, "max_steps": 20, "learning_rate": 3e-3},
    });
    compare("quickstart", config, place.path());
}

#[test]
fn minilm_with_adapters_has_the_expected_losses() {
    let Some(model) = minilm() else { return };
    let place = tempfile::tempdir().unwrap();
    let data = quickstart(&place.path().join("data"));
    let config = json!({
        "model": {"path": model},
        "lora": lora(),
        "data": {"train": [{"path": data.join("train.jsonl")}]},
        "training": {"batch_size": 32, "max_steps": 10, "learning_rate": 1e-3},
    });
    compare("minilm_lora", config, place.path());
}

#[test]
fn mistral_with_adapters_has_the_expected_losses() {
    let place = tempfile::tempdir().unwrap();
    let config = json!({
        "model": {"path": golden("mistral")},
        "lora": lora(),
        "data": {"train": [{"path": golden("mistral").join("rows.jsonl")}], "negatives": 1},
        "training": {"batch_size": 4, "max_steps": 10, "learning_rate": 1e-3},
    });
    compare("mistral_lora", config, place.path());
}
