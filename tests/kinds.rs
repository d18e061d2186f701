//! Rows of all kinds are trained together, each with its loss, on any number of ranks, and a stopped run can be
//! resumed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::{golden, metrics, program, stderr, write_config};

/// Writes four datasets and a configuration: texts with a class label, scored pairs, triplets, and rows with
/// a teacher's scores.
fn config(folder: &Path, run: &str, batching: &str) -> PathBuf {
    let things = ["iron", "gold", "tin", "zinc", "neon", "mars", "venus", "peru", "mali", "chad"];
    let thing = |row: usize| things[row % things.len()];
    let write = |name: &str, rows: usize, row: &dyn Fn(usize) -> Value| {
        let path = folder.join(name);
        let lines: String = (0..rows).map(|n| format!("{}\n", row(n))).collect();
        std::fs::write(&path, lines).unwrap();
        path
    };
    let labelled = write("labelled.jsonl", 40, &|row| {
        let label = ["metal", "gas", "planet"][row % 3];
        json!({"text": format!("{} number {row}", thing(row)), "label": label})
    });
    let scored = write("scored.jsonl", 25, &|row| {
        let other = if row % 5 < 2 { thing(row) } else { thing(row + 3) };
        json!({"s1": format!("{row} is {}", thing(row)), "s2": format!("{other} is {row}"), "score": row % 6})
    });
    let triplets = write("triplets.jsonl", 30, &|row| {
        json!({"query": format!("what is {row}?"), "positive": format!("{} is {row}", thing(row)),
               "negative": format!("{} is not {row}", thing(row + 1))})
    });
    let taught = write("taught.jsonl", 20, &|row| {
        json!({"query": format!("who has {row}?"), "positive": format!("{} has {row}", thing(row)),
               "negatives": [format!("{} has none", thing(row + 1)), format!("nobody has {}", row + 1)],
               "scores": [3.0, row as f64 / 10.0, -1.5]})
    });
    let place = folder.join(run);
    std::fs::create_dir(&place).unwrap();
    let mut config = tests::config(&golden("bert"), &labelled, &place.join("out"));
    config["model"]["dropout"] = json!(0.1);
    config["data"] = json!({
        "train": [
            {"path": labelled, "samples": 36}, {"path": scored}, {"path": triplets, "loss": "triplet"},
            {"path": taught, "loss": "kl"},
        ],
        "negatives": 2,
        "batching": batching,
    });
    config["loss"] =
        json!({"temperature": 0.05, "margin": 1, "matryoshka": {"dims": [32, 16], "weights": [1, 0.5]}});
    config["training"] = json!({"batch_size": 8, "epochs": 6, "learning_rate": 1e-3, "chunk_tokens": 64});
    config["checkpoint"] = json!({"every": 1000, "keep": 2});
    write_config(&place, &config)
}

fn run(command: &mut Command, config: &Path) {
    let output = command.arg(config).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

fn losses(config: &Path) -> Vec<f64> {
    metrics(&config.with_file_name("out")).iter().filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
fn a_mixture_of_all_kinds_trains_alike_on_any_number_of_ranks() {
    for batching in ["mixed", "per_dataset"] {
        let folder = tempfile::tempdir().unwrap();
        let one = config(folder.path(), "one", batching);
        run(program("trainer").args(["train", "--quiet"]), &one);
        // 36 + 25 + 30 + 20 rows in batches of 8, six epochs.
        let steps = if batching == "mixed" { 14 * 6 } else { (5 + 4 + 4 + 3) * 6 };
        let of_one = losses(&one);
        assert_eq!(of_one.len(), steps);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&of_one[..steps / 6]), mean(&of_one[steps / 6 * 5..]));
        assert!(last < 0.95 * first, "{batching}: from {first} to {last}");
        let three = config(folder.path(), "three", batching);
        run(program("launch").args(["--cpus", "3"]), &three);
        let of_three = losses(&three);
        assert_eq!(of_three.len(), steps);
        // Runs diverge slowly, because the order of sums changes their last bits.
        for (a, b) in of_three.iter().zip(&of_one).take(10) {
            assert!((a - b).abs() < 1e-4 * b.abs().max(0.1), "{batching}: {a} on three ranks, {b} on one");
        }
    }
}

#[test]
fn a_stopped_run_of_all_kinds_resumes_with_equal_losses() {
    let folder = tempfile::tempdir().unwrap();
    let whole = config(folder.path(), "whole", "mixed");
    run(program("trainer").args(["train", "--quiet"]), &whole);
    let stopped = config(folder.path(), "stopped", "mixed");
    let mut child = program("trainer")
        .args(["train", "--quiet"])
        .arg(&stopped)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let path = stopped.with_file_name("out").join("metrics.jsonl");
    let deadline = Instant::now() + Duration::from_secs(120);
    while std::fs::read_to_string(&path).unwrap_or_default().lines().count() < 5 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be stopped");
        assert!(Instant::now() < deadline, "no five steps within two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    run(program("trainer").args(["train", "--quiet", "--resume"]), &stopped);
    assert_eq!(losses(&stopped), losses(&whole));
}

#[test]
fn the_plan_shows_the_kinds_of_rows() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "plan", "mixed");
    let output = program("trainer").args(["plan"]).arg(&config).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr);
    for expected in [
        "labelled: 36 rows per epoch (labelled, info_nce)",
        "scored: 25 rows per epoch (similarity, cosent)",
        "triplets: 30 rows per epoch (pairs, triplet)",
        "taught: 20 rows per epoch (pairs, kl)",
    ] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    let output =
        program("trainer").args(["plan"]).arg(&config).arg("loss.matryoshka.dims.0=64").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(
        text.contains("loss.matryoshka.dims.0: 64, but the model's embeddings have 32 dimensions"),
        "{text}"
    );
}

#[test]
fn the_plan_estimates_the_speedup_by_ranks_before_the_data_exists() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "plan", "mixed");
    let plan = || {
        let options = ["--ranks", "1,4", "--tokens-per-second", "96", "--link-rate", "1"];
        let output = program("trainer").arg("plan").arg(&config).args(options).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    let rows = |text: &str| -> Vec<Vec<String>> {
        let table = text.lines().skip_while(|line| !line.ends_with("speed-up")).skip(1);
        table.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
    };
    let (status, whole, _) = plan();
    assert_eq!((status, rows(&whole).len()), (Some(0), 2), "{whole}");
    std::fs::remove_file(folder.path().join("taught.jsonl")).unwrap();
    let (status, outline, error) = plan();
    assert_eq!(status, Some(2));
    assert!(
        error.contains("taught.jsonl") && outline.contains("as if every text had the maximum length"),
        "{outline}"
    );
    // 8 rows of one query and three documents, each of 24 tokens.
    let outline = rows(&outline);
    assert_eq!((&outline[0][1][..], &outline[0][4][..]), ("768", "8.000"));
    assert_eq!((&outline[1][0][..], &outline[1][1][..]), ("4", "192"));
    let tokens = |rows: &[Vec<String>]| rows[0][1].parse::<usize>().unwrap();
    assert!(tokens(&rows(&whole)) < tokens(&outline), "the upper bound is above the real number");
}
