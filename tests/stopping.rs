//! Evaluation before, during and after training: the best checkpoint is kept, and early stopping ends the
//! run.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tests::{golden, metrics, program, stderr, write_config};
use trainer::config::{Config, EvaluationKind, EvaluationSet};
use trainer::eval::EvalSet;
use trainer::eval::embed::LoadedModel;
use trainer::model::Options;

const METRIC: &str = "rows_cosine_accuracy@10";

/// A run that memorises its forty rows, so that the metric stops improving.
fn run(place: &Path, ranks: u32) -> PathBuf {
    let rows = golden("bert").join("rows.jsonl");
    let folder = place.join(format!("{ranks}"));
    fs::create_dir(&folder).unwrap();
    let mut config = tests::config(&golden("bert"), &rows, &folder.join("out"));
    config["training"]["epochs"] = json!(100);
    config["training"]["batch_size"] = json!(10);
    config["training"]["schedule"] = json!("constant");
    config["evaluation"] = json!({"every": 5, "metric": "cosine_accuracy@10", "patience": 3, "sets": [{"name": "rows", "path": rows}]});
    config["checkpoint"] = json!({"every": 1000, "keep": 1});
    let config = write_config(&folder, &config);
    let output = match ranks {
        1 => program("trainer").arg("train").arg(config).output().unwrap(),
        _ => program("launch").args(["--cpus", &ranks.to_string()]).arg(config).output().unwrap(),
    };
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("early stopping at step"), "{}", stderr(&output));
    folder.join("out")
}

/// The steps of all evaluations with the selection metric.
fn evaluations(output: &Path) -> Vec<(u64, f64)> {
    let lines = metrics(output).into_iter();
    lines.filter_map(|line| Some((line["step"].as_u64()?, line["eval"][METRIC].as_f64()?))).collect()
}

#[test]
fn early_stopping_ends_with_the_best_evaluation() {
    let place = tempfile::tempdir().unwrap();
    let output = run(place.path(), 1);
    let found = evaluations(&output);
    let steps: Vec<u64> = found.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (0..steps.len() as u64).map(|n| 5 * n).collect::<Vec<_>>());
    let most = found.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    let (best, value) = *found.iter().find(|(_, value)| *value == most).unwrap();
    assert!(best > 0 && value > found[0].1, "{found:?}");
    // It stops three evaluations later, long before the last epoch.
    assert_eq!(*steps.last().unwrap(), best + 15);
    assert!(best + 15 < 400, "{found:?}");

    // The best checkpoint is kept although `keep` is 1, and the model is that one.
    let kept = fs::read(output.join("best/parameters.safetensors")).unwrap();
    let named = output.join(format!("checkpoints/step-{best:06}/parameters.safetensors"));
    assert_eq!(kept, fs::read(named).unwrap());
    let model = output.join("model");
    let opened = LoadedModel::open(model.to_str().unwrap(), &Options::default()).unwrap();
    let set = EvaluationSet {
        path: golden("bert").join("rows.jsonl"),
        kind: Some(EvaluationKind::Retrieval),
        ..Default::default()
    };
    let mut embedder = opened.embedder();
    embedder.set_max_length(Some(24)).unwrap();
    let scores = EvalSet::open(&set, &Config::default()).unwrap().evaluate(&embedder).unwrap().scores;
    assert_eq!(scores.get(METRIC), Some(value));

    // The model card has the scores of that step and of the base model.
    let card = fs::read_to_string(model.join("README.md")).unwrap();
    let at = |step: u64| -> Value {
        let mut lines = metrics(&output).into_iter();
        lines.find(|line| line["step"] == step && line.get("eval").is_some()).unwrap()["eval"].take()
    };
    let (base, tuned) = (at(0), at(best));
    let ndcg = "rows_cosine_ndcg@10";
    let (base, tuned) = (base[ndcg].as_f64().unwrap(), tuned[ndcg].as_f64().unwrap());
    let row = format!("| {ndcg} | {base:.4} | {tuned:.4} | {:+.4} |", tuned - base);
    assert!(
        card.contains(&row) && card.contains(&format!("- steps: {best} of 10 rows")),
        "{row} is not in {card}"
    );

    // A resumed run trains no further step.
    let lines = metrics(&output);
    let again = program("trainer")
        .args(["train", "--resume"])
        .arg(output.with_file_name("config.yaml"))
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(metrics(&output), lines);

    // Two ranks that divide the evaluations decide the same.
    let shared = evaluations(&run(place.path(), 2));
    assert_eq!(shared, found);
}

#[test]
fn the_best_model_is_loaded_at_the_end_of_a_run_that_asks_for_it() {
    let rows = golden("bert").join("rows.jsonl");
    let train = |load_best: bool| {
        let place = tempfile::tempdir().unwrap();
        let mut config = tests::config(&golden("bert"), &rows, &place.path().join("out"));
        config["training"] = json!({
            "batch_size": 8, "epochs": 4, "chunk_tokens": 64, "schedule": "constant", "warmup_steps": 0,
            "learning_rate": 0.05, "max_grad_norm": 0,
        });
        config["evaluation"] = json!({
            "every": "epoch", "metric": "cosine_ndcg@10", "load_best": load_best,
            "sets": [{"name": "rows", "path": rows}],
        });
        let ran = program("trainer").arg("train").arg(write_config(place.path(), &config)).output().unwrap();
        assert!(ran.status.success(), "{}", stderr(&ran));
        (place, stderr(&ran))
    };
    let value = |line: &Value| line["eval"]["rows_cosine_ndcg@10"].as_f64();
    for load_best in [false, true] {
        let (place, said) = train(load_best);
        let output = place.path().join("out");
        let lines = metrics(&output);
        let found: Vec<(u64, f64)> =
            lines.iter().filter_map(|line| Some((line["step"].as_u64()?, value(line)?))).collect();
        // Five steps an epoch, and the base model.
        assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 5, 10, 15, 20]);
        let most = found[1..].iter().map(|(_, value)| *value).fold(0.0, f64::max);
        let (best, _) = found[1..].iter().find(|(_, value)| *value == most).unwrap();
        // The learning rate is so high that the model gets worse.
        assert!(*best < 20 && most < found[0].1, "{found:?}");
        let step = if load_best { *best } else { 20 };
        for expected in [
            format!("best step {best}: cosine_ndcg@10 {most:.4}"),
            format!("{}/model is the model after step {step}", output.display()),
            format!("report: {}/report.html", output.display()),
            "the model is worse than its base: cosine_ndcg@10".to_owned(),
            "finished after step 20, in ".to_owned(),
        ] {
            assert!(said.contains(&expected), "{expected:?} is not in {said}");
        }
        let card = fs::read_to_string(output.join("model/README.md")).unwrap();
        assert!(card.contains(&format!("- steps: {step} of 8 rows")), "{card}");
    }
}
