//! `launch` with several ranks: the result is the same although ranks are killed, stopped or disconnected
//! meanwhile.

#![expect(clippy::unwrap_used, reason = "a helper that fails must fail the test")]

mod common;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use common::{
    checkpoints, configuration, dead, kill, launch, ranks, said, started, wait_for_step, wait_until,
};
use rustix::process::Signal;

/// The loss of every step.
fn losses(folder: &Path) -> Vec<f64> {
    let text = fs::read_to_string(folder.join("run/metrics.jsonl")).unwrap();
    let loss = |line: &str| line.split("\"loss\":").nth(1)?.split(',').next()?.parse().ok();
    text.lines().filter_map(loss).collect()
}

#[track_caller]
fn same_losses(some: &[f64], one: &[f64]) {
    assert_eq!(some.len(), one.len());
    for (a, b) in some.iter().zip(one) {
        // The sums run in another order.
        assert!((a - b).abs() < 1e-5 * b.abs().max(0.1), "{a} and {b}");
    }
}

fn done(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

/// Checks that a run ends with `status`, leaves no process, and has printed `word`.
fn ends(run: Child, ranks: &[u32], status: i32, word: &str) {
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(status), "{}", said(&output));
    assert!(said(&output).contains(word), "`{word}` is not in: {}", said(&output));
    assert!(ranks.iter().all(|&rank| dead(rank)), "a rank is left behind");
}

#[test]
fn several_ranks_train_what_one_trains() {
    let (alone, together) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = |folder: &Path, options: &[&str]| {
        let config = configuration(folder, 3);
        done(&launch(options).arg(config).output().unwrap());
    };
    run(alone.path(), &[]);
    run(together.path(), &["--cpus", "3"]);
    same_losses(&losses(together.path()), &losses(alone.path()));
    for rank in 0..3 {
        assert!(together.path().join(format!("run/logs/rank-{rank}.log")).exists());
    }
    assert!(together.path().join("run/model/model.safetensors").exists());
}

#[test]
fn encoding_and_evaluation_on_several_ranks_give_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert");
    let texts = folder.path().join("texts.txt");
    let lines: Vec<String> =
        (0..60).map(|i| "iron gold water light ".repeat(1 + i % 9) + &i.to_string()).collect();
    fs::write(&texts, lines.join("\n")).unwrap();
    let encode = |ranks: &str| {
        let output = folder.path().join(format!("{ranks}.npy"));
        let mut command = launch(&["--cpus", ranks, "--", "encode", "--chunk-tokens", "64", "--model"]);
        done(&command.arg(&golden).arg("--input").arg(&texts).arg("--output").arg(&output).output().unwrap());
        fs::read(output).unwrap()
    };
    assert!(encode("1") == encode("3"));
    let evaluate = |ranks: &str| {
        let mut command = launch(&["--cpus", ranks, "--", "evaluate", "--chunk-tokens", "64", "--model"]);
        let output = command.arg(&golden).arg("--set").arg(golden.join("rows.jsonl")).output().unwrap();
        done(&output);
        output.stdout
    };
    let scores = evaluate("1");
    assert!(String::from_utf8_lossy(&scores).contains("ndcg@10"));
    assert_eq!(evaluate("2"), scores);
}

#[test]
fn a_signal_writes_one_checkpoint_and_is_the_status() {
    let folder = tempfile::tempdir().unwrap();
    let run = started(folder.path(), &["--cpus", "3"]);
    let processes = ranks(run.id());
    assert_eq!(processes.len(), 3);
    kill(run.id(), Signal::USR1);
    ends(run, &processes, 138, "");
    assert_eq!(checkpoints(folder.path()), 1);
}

#[test]
fn a_signal_to_one_rank_stops_all() {
    let folder = tempfile::tempdir().unwrap();
    let run = started(folder.path(), &["--cpus", "3"]);
    let processes = ranks(run.id());
    kill(processes[2], Signal::TERM);
    ends(run, &processes, 143, "");
    assert_eq!(checkpoints(folder.path()), 1);
}

#[test]
fn a_rank_that_is_killed_ends_all_and_is_named() {
    for victim in [0, 2] {
        let folder = tempfile::tempdir().unwrap();
        let run = started(folder.path(), &["--cpus", "3"]);
        let processes = ranks(run.id());
        kill(processes[victim], Signal::KILL);
        ends(run, &processes, 1, &format!("rank {victim} was killed by signal 9"));
    }
}

#[test]
fn a_launcher_that_is_killed_leaves_no_rank_behind() {
    for victim in [None, Some(0), Some(1)] {
        let folder = tempfile::tempdir().unwrap();
        let mut run = started(folder.path(), &["--cpus", "2"]);
        let processes = ranks(run.id());
        kill(run.id(), Signal::KILL);
        if let Some(victim) = victim {
            kill(processes[victim], Signal::KILL);
        }
        run.wait().unwrap();
        wait_until("the end of the ranks", || processes.iter().all(|&rank| dead(rank)));
        assert_eq!(checkpoints(folder.path()), usize::from(victim.is_none()));
    }
}

#[test]
fn a_rank_that_hangs_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let run = started(folder.path(), &["--cpus", "3", "--timeout", "6"]);
    let processes = ranks(run.id());
    kill(processes[1], Signal::STOP);
    ends(run, &processes, 1, "rank 1");
}

#[test]
fn ranks_that_hang_before_their_first_piece_of_work_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = configuration(folder.path(), 1);
    let rows = folder.path().join("rows.jsonl");
    // Opening a FIFO without a writer blocks.
    assert!(Command::new("mkfifo").arg(&rows).status().unwrap().success());
    let text = fs::read_to_string(&config).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert/rows.jsonl");
    fs::write(&config, text.replace(golden.to_str().unwrap(), rows.to_str().unwrap())).unwrap();
    let start = Instant::now();
    let run = launch(&["--cpus", "2", "--timeout", "3"]).arg(config).spawn().unwrap();
    ends(run, &[], 1, "hangs: it made no progress");
    assert!(start.elapsed() < Duration::from_secs(30), "a rank that hangs does not react to TERM");
}

#[test]
fn a_failed_run_restarts_from_its_newest_checkpoint() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = configuration(whole.path(), 60);
    done(&launch(&["--cpus", "2", "--quiet"]).arg(config).output().unwrap());

    let config = configuration(killed.path(), 60);
    let mut command = launch(&["--cpus", "2", "--quiet", "--restarts", "2"]);
    let mut run = command.arg(config).arg("checkpoint.every=20").spawn().unwrap();
    for (step, victim) in [(70, 1), (200, 0)] {
        wait_for_step(killed.path(), step, &mut run);
        let processes = ranks(run.id());
        kill(processes[victim], Signal::KILL);
        wait_until("another start", || {
            let now = ranks(run.id());
            now.len() == 2 && now.iter().all(|rank| !processes.contains(rank))
        });
    }
    let output = run.wait_with_output().unwrap();
    done(&output);
    assert_eq!(
        said(&output).matches("restarting from the newest checkpoint").count(),
        2,
        "{}",
        said(&output)
    );
    assert_eq!(losses(killed.path()), losses(whole.path()));
    let model = |folder: &Path| fs::read(folder.join("run/model/model.safetensors")).unwrap();
    assert!(model(killed.path()) == model(whole.path()), "the same bits");
}

#[test]
fn a_wrong_input_is_status_2_and_not_a_reason_to_restart() {
    let output = launch(&["--cpus", "3", "--restarts", "5", "/nonexistent/tiny.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(!said(&output).contains("restarting"), "{}", said(&output));
}

#[test]
fn gpus_that_cannot_be_used_are_an_error_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let config = configuration(folder.path(), 1);
    // There are no GPUs, or this build cannot use them.
    let output = launch(&["--gpus", "400"]).arg(config).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).starts_with("error: --gpus 400: "), "{}", said(&output));
    assert_eq!(said(&output).matches("error:").count(), 1);
    assert!(!folder.path().join("run").exists());
}

/// Starts the launcher of one of two nodes, whose rendezvous is at `port`.
fn node(folder: &Path, node: &str, port: u16, secret: &str) -> Child {
    let meeting = format!("127.0.0.1:{port}");
    let config = folder.join("tiny.yaml");
    let options =
        ["--cpus", "2", "--nodes", "2", "--node", node, "--rendezvous", &meeting, "--timeout", "20"];
    launch(&options).arg(config).env("LODESTONE_TOKEN", secret).spawn().unwrap()
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

#[test]
fn two_nodes_train_what_one_rank_trains() {
    let (alone, together) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    done(&launch(&[]).arg(configuration(alone.path(), 3)).output().unwrap());
    configuration(together.path(), 3);
    let port = free_port();
    let nodes = ["1", "0"].map(|number| node(together.path(), number, port, "secret"));
    nodes.into_iter().for_each(|node| done(&node.wait_with_output().unwrap()));
    same_losses(&losses(together.path()), &losses(alone.path()));
    assert!(together.path().join("run/logs/rank-3.log").exists());
}

#[test]
fn a_node_with_another_secret_is_rejected() {
    let folder = tempfile::tempdir().unwrap();
    configuration(folder.path(), 1);
    let port = free_port();
    let mut first = node(folder.path(), "0", port, "secret");
    let output = node(folder.path(), "1", port, "guessed").wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("LODESTONE_TOKEN differs"), "{}", said(&output));
    assert!(first.try_wait().unwrap().is_none(), "the other node still waits");
    kill(first.id(), Signal::TERM);
    first.wait().unwrap();
}

/// A configuration with adapters and dropout, whose result would show a dependence on the number of ranks.
fn adapted(folder: &Path) {
    let config = configuration(folder, 12);
    let text =
        fs::read_to_string(&config).unwrap().replace("max_query_length", "dropout: 0.1, max_query_length");
    let rows = text.replace("rows.jsonl}]", "rows.jsonl}], negatives: 2");
    fs::write(&config, rows + "lora: {rank: 4, alpha: 8, dropout: 0.1}\n").unwrap();
}

#[test]
fn nodes_with_other_weights_under_the_adapters_do_not_train_together() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    adapted(one.path());
    adapted(other.path());
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert");
    let copy = other.path().join("model");
    fs::create_dir(&copy).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(golden.join(name), copy.join(name)).unwrap();
    }
    let weights = golden.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(weights, &candle_core::Device::Cpu).unwrap();
    let (_, tensor) = tensors.iter_mut().find(|(name, _)| name.ends_with("output.dense.weight")).unwrap();
    *tensor = (&*tensor * 1.01).unwrap();
    candle_core::safetensors::save(&tensors, copy.join("model.safetensors")).unwrap();
    let config = other.path().join("tiny.yaml");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace(&format!("path: {},", golden.display()), &format!("path: {},", copy.display()));
    fs::write(config, text).unwrap();
    let port = free_port();
    let nodes = [node(other.path(), "1", port, "secret"), node(one.path(), "0", port, "secret")];
    for node in nodes {
        let output = node.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(
            said(&output).contains("has another configuration, data or model than rank 0"),
            "{}",
            said(&output)
        );
    }
}

#[test]
fn a_run_can_be_resumed_with_another_number_of_ranks() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    adapted(whole.path());
    done(&launch(&["--quiet"]).arg(whole.path().join("tiny.yaml")).output().unwrap());
    adapted(parts.path());
    let start = |ranks: &str| {
        let mut command = launch(&["--quiet", "--resume", "--cpus", ranks]);
        command.arg(parts.path().join("tiny.yaml")).spawn().unwrap()
    };
    for (ranks, step) in [("4", 13), ("2", 45)] {
        let mut run = start(ranks);
        wait_for_step(parts.path(), step, &mut run);
        kill(run.id(), Signal::TERM);
        let output = run.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(143), "{}", said(&output));
    }
    done(&start("3").wait_with_output().unwrap());
    same_losses(&losses(parts.path()), &losses(whole.path()));
    let adapter = |folder: &Path| {
        let path = folder.join("run/model/adapter_model.safetensors");
        let tensors = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
        let mut names: Vec<String> = tensors.keys().cloned().collect();
        names.sort();
        names
            .iter()
            .flat_map(|name| tensors[name].flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect::<Vec<_>>()
    };
    let (a, b) = (adapter(parts.path()), adapter(whole.path()));
    let norm = |of: &dyn Fn(usize) -> f32| (0..b.len()).map(|i| f64::from(of(i)).powi(2)).sum::<f64>().sqrt();
    let error = norm(&|i| a[i] - b[i]) / norm(&|i| b[i]);
    assert!(a.len() == b.len() && error < 1e-5, "the adapter differs by {error:e}");
}
