//! A run that was stopped and resumed equals one that was not: same losses, same order, same bits.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::{golden, metrics, program, write_config};

/// 40 rows in batches of 6, shuffled, with dropout everywhere: 7 steps an epoch, the last one shorter.
fn run_config(name: &str, adapted: bool, folder: &Path, run: &str) -> PathBuf {
    let place = folder.join(run);
    std::fs::create_dir(&place).unwrap();
    let mut config = tests::config(&golden(name), &golden(name).join("rows.jsonl"), &place.join("out"));
    config["model"]["dropout"] = json!(0.1);
    config["data"] = json!({"train": [{"path": golden(name).join("rows.jsonl")}], "negatives": 1});
    config["training"] = json!({"batch_size": 6, "epochs": 40, "learning_rate": 1e-3, "chunk_tokens": 64});
    config["checkpoint"] = json!({"every": 9, "keep": 2});
    if adapted {
        config["lora"] = json!({"rank": 4, "alpha": 8, "dropout": 0.1});
    }
    write_config(&place, &config)
}

fn start(config: &Path, resume: bool) -> Child {
    let mut command = program("trainer");
    command.arg("train").arg(config);
    if resume {
        command.arg("--resume");
    }
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(config: &Path, resume: bool) {
    let output = start(config, resume).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", tests::stderr(&output));
}

fn output(config: &Path) -> PathBuf {
    config.with_file_name("out")
}

/// Waits until the run has written `lines` lines of metrics.
fn wait_for(config: &Path, lines: usize, child: &mut Child) {
    let path = output(config).join("metrics.jsonl");
    let deadline = Instant::now() + Duration::from_secs(120);
    while std::fs::read_to_string(&path).unwrap_or_default().lines().count() < lines {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before step {lines}");
        assert!(Instant::now() < deadline, "no step {lines} within two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill(child: &Child, signal: &str) {
    let sent = std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// The lines of metrics.jsonl without durations, times and memory.
fn curve(config: &Path) -> Vec<Value> {
    let mut lines = metrics(&output(config));
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        for key in ["seconds", "tokens_per_second", "time", "memory", "gpu_memory"] {
            line.remove(key);
        }
    }
    lines
}

fn bits(config: &Path) -> Vec<u8> {
    let last = output(config).join("checkpoints/step-000280/parameters.safetensors");
    std::fs::read(last).unwrap()
}

fn stopped_and_resumed(name: &str, adapted: bool) {
    let place = tempfile::tempdir().unwrap();
    let whole = run_config(name, adapted, place.path(), "whole");
    finish(&whole, false);
    assert_eq!(curve(&whole).len(), 280);

    let parts = run_config(name, adapted, place.path(), "parts");
    // Two signals in the middle of an epoch; then a kill, which loses the steps after the last checkpoint.
    for (resume, lines, signal, status) in
        [(false, 17, "-TERM", Some(143)), (true, 60, "-USR1", Some(138)), (true, 140, "-KILL", None)]
    {
        let mut child = start(&parts, resume);
        wait_for(&parts, lines, &mut child);
        kill(&child, signal);
        let output = child.wait_with_output().unwrap();
        let said = tests::stderr(&output);
        assert_eq!(output.status.code(), status, "{said}");
        if status.is_some() {
            let resumed_by = format!("`trainer train {} --resume`", parts.display());
            assert!(said.contains("; the checkpoint is ") && said.contains(&resumed_by), "{said}");
        }
    }
    finish(&parts, true);
    assert_eq!(curve(&parts), curve(&whole), "{name}: the same losses in the same order");
    assert!(bits(&parts) == bits(&whole), "{name}: the same parameters to the last bit");
}

#[test]
fn bert_trained_whole_ends_with_the_same_bits() {
    stopped_and_resumed("bert", false);
}

#[test]
fn mistral_with_adapters_ends_with_the_same_bits() {
    stopped_and_resumed("mistral", true);
}

#[test]
fn an_evaluation_that_a_stop_did_not_wait_for_is_made_up_for() {
    let place = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|run| {
        let path = run_config("bert", false, place.path(), run);
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["training"]["epochs"] = json!(4);
        config["evaluation"] =
            json!({"every": 1, "metric": "cosine_ndcg@10", "sets": [{"path": golden("bert").join("rows.jsonl")}]});
        write_config(path.parent().unwrap(), &config)
    });
    finish(&whole, false);
    assert_eq!(curve(&whole).len(), 28 + 29);
    let mut child = start(&parts, false);
    wait_for(&parts, 15, &mut child);
    kill(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let stopped = curve(&parts);
    assert!(stopped.last().unwrap().get("eval").is_none(), "the step that was stopped was evaluated");
    finish(&parts, true);
    assert_eq!(curve(&parts), curve(&whole));
}

#[test]
fn a_run_with_another_configuration_is_not_continued() {
    let place = tempfile::tempdir().unwrap();
    let config = run_config("bert", false, place.path(), "run");
    let mut child = start(&config, false);
    wait_for(&config, 3, &mut child);
    kill(&child, "-TERM");
    child.wait().unwrap();
    let other = program("trainer")
        .args(["train", "--resume"])
        .arg(&config)
        .arg("training.batch_size=8")
        .output()
        .unwrap();
    assert_eq!(other.status.code(), Some(2));
    assert!(tests::stderr(&other).contains("belongs to another run"), "{}", tests::stderr(&other));
}
