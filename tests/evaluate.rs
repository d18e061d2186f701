//! Evaluation from rows to metrics, against sentence-transformers on the same tiny model; validation loss.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tests::{golden, golden_json, metrics, program, stderr, write_config};
use trainer::config::{Config, EvaluationKind, EvaluationSet};
use trainer::eval::EvalSet;
use trainer::eval::embed::{LoadedModel, Role};
use trainer::model::Options;

#[test]
fn scores_are_those_of_sentence_transformers() {
    let expected = golden_json("", "metrics.json");
    let opened = LoadedModel::open(golden("bert").to_str().unwrap(), &Options::default()).unwrap();
    for (kind, name) in [(EvaluationKind::Retrieval, "retrieval"), (EvaluationKind::Triplet, "triplet")] {
        let path = golden("bert").join("rows.jsonl");
        let set = EvaluationSet { path, kind: Some(kind), ..EvaluationSet::default() };
        let set = EvalSet::open(&set, &Config::default()).unwrap();
        let scores = set.evaluate(&opened.embedder()).unwrap().scores;
        let expected = expected["folder"][name].as_object().unwrap();
        assert_eq!(scores.iter().count(), expected.len());
        for (metric, score) in scores.iter() {
            let expected = expected[metric].as_f64().unwrap();
            assert!((score - expected).abs() < 1e-6, "{metric}: {score}, expected {expected}");
        }
    }
}

#[test]
fn embeddings_come_in_the_order_of_the_texts_whatever_the_chunks() {
    let opened = LoadedModel::open(golden("bert").to_str().unwrap(), &Options::default()).unwrap();
    let texts = ["seven planets", "a", "iron is a metal; and so is tin, and zinc", "a", "", "seven planets"];
    let mut embedder = opened.embedder();
    let alone: Vec<Vec<f32>> = texts
        .iter()
        .map(|text| embedder.encode(&[text], Role::Text).unwrap().to_vec2::<f32>().unwrap().remove(0))
        .collect();
    for chunk_tokens in [1, 7, 4096] {
        embedder.chunk_tokens = chunk_tokens;
        let together = embedder.encode(&texts, Role::Text).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!((&together[0], &together[1]), (&together[5], &together[3]));
        for (one, other) in alone.iter().flatten().zip(together.iter().flatten()) {
            assert!((one - other).abs() < 1e-6, "{one} alone, {other} in chunks of {chunk_tokens}");
        }
    }
}

/// A run without updates, in batches of 16 of the 40 golden rows, that computes the validation loss on the
/// same rows.
fn without_updates(folder: &Path, name: &str, changes: impl Fn(&mut Value)) -> Vec<Value> {
    let place = folder.join(name);
    fs::create_dir(&place).unwrap();
    let rows = golden("bert").join("rows.jsonl");
    let mut config = tests::config(&golden("bert"), &rows, &place.join("out"));
    config["training"]["batch_size"] = json!(16);
    config["training"]["learning_rate"] = json!(0.0);
    config["data"]["negatives"] = json!(2);
    config["evaluation"] = json!({"metric": "loss", "sets": [{"name": "dev", "path": rows, "kind": "loss"}]});
    changes(&mut config);
    let mut command = program(if name == "ranks" { "launch" } else { "trainer" });
    command.args(if name == "ranks" { ["--cpus", "2"] } else { ["train", "--quiet"] });
    let output = command.arg(write_config(&place, &config)).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    metrics(&place.join("out"))
}

#[test]
fn the_validation_loss_is_the_training_loss_of_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let triplets = |config: &mut Value| config["loss"]["kind"] = json!("triplet");
    let (info_nce, triplet) = (
        without_updates(folder.path(), "info_nce", |_| {}),
        without_updates(folder.path(), "triplet", triplets),
    );
    for lines in [&info_nce, &triplet] {
        let steps: Vec<(f64, f64)> =
            lines.iter().filter_map(|line| Some((line["loss"].as_f64()?, line["rows"].as_f64()?))).collect();
        // The last batch is shorter.
        assert_eq!(steps.iter().map(|(_, rows)| *rows).collect::<Vec<_>>(), [16.0, 16.0, 8.0]);
        let mean = steps.iter().map(|(loss, rows)| loss * rows).sum::<f64>() / 40.0;
        let evaluated: Vec<f64> = lines.iter().filter_map(|line| line["eval"]["dev_loss"].as_f64()).collect();
        assert_eq!((evaluated.len(), evaluated[0]), (2, evaluated[1]));
        assert!((evaluated[0] - mean).abs() < 1e-5 * mean, "{evaluated:?}, {mean} in training");
    }
    let of_ranks = without_updates(folder.path(), "ranks", |_| {});
    let loss = |lines: &[Value]| lines[0]["eval"]["dev_loss"].as_f64().unwrap();
    assert!((loss(&of_ranks) - loss(&info_nce)).abs() < 1e-5 * loss(&info_nce));
}

#[test]
fn the_lowest_validation_loss_is_the_best() {
    let folder = tempfile::tempdir().unwrap();
    // A rate this high spoils the model after it has learned something.
    let lines = without_updates(folder.path(), "run", |config| {
        config["training"]["learning_rate"] = json!(2e-2);
        config["training"]["max_steps"] = json!(24);
        config["training"]["schedule"] = json!("constant");
        config["evaluation"]["every"] = json!(2);
    });
    let evaluated: Vec<(u64, f64)> = lines
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line["eval"]["dev_loss"].as_f64()?)))
        .filter(|(step, _)| *step > 0)
        .collect();
    let (best, _) = evaluated.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let link = folder.path().join("run/out/best");
    assert!(link.canonicalize().unwrap().ends_with(format!("step-{best:06}")), "{evaluated:?}");
    let report = fs::read_to_string(folder.path().join("run/out/report.html")).unwrap();
    assert!(
        report.contains(&format!("\"best\":{{\"step\":{best},"))
            && report.contains("\"lower_is_better\":true")
    );
}

#[test]
fn the_command_computes_the_loss_of_the_default_configuration() {
    let rows = golden("bert").join("rows.jsonl");
    let folder = tempfile::tempdir().unwrap();
    let run = |rows: &Path, command: &str, models: &[&str]| {
        let mut line = program("trainer");
        line.arg(command);
        for model in models {
            line.arg(model).arg(golden("bert"));
        }
        line.args(["--kind", "loss", "--output"]).arg(folder.path()).arg("--set").arg(rows).output().unwrap()
    };
    let output = run(&rows, "evaluate", &["--model"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let scores: Value = serde_json::from_slice(&output.stdout).unwrap();
    let loss = scores["rows_loss"].as_f64().unwrap();
    assert!(loss > 0.0 && loss.is_finite() && scores.as_object().unwrap().len() == 1);
    let output = run(&rows, "compare", &["--base", "--tuned"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with("rows, 40 rows") && text.contains("\nloss "), "{text}");

    // The set may be smaller than a batch; rows that are malformed are refused.
    let few = folder.path().join("few.jsonl");
    let text = fs::read_to_string(&rows).unwrap();
    fs::write(&few, text.lines().take(3).collect::<Vec<_>>().join("\n")).unwrap();
    assert!(run(&few, "evaluate", &["--model"]).status.success());
    fs::write(&few, "{\"query\": \"a\"}\n").unwrap();
    let output = run(&few, "evaluate", &["--model"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("few.jsonl:1:"), "{}", stderr(&output));
}
