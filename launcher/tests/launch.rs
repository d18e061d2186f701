//! `launch` as its users meet it: a run of the tiny golden model, stopped in several ways.

#![expect(clippy::unwrap_used, reason = "what fails here is a test that fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// A configuration in a folder of its own; `epochs` decides whether the run ends by itself.
fn configuration(folder: &Path, epochs: u32) -> PathBuf {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert");
    let path = folder.join("tiny.yaml");
    let text = format!(
        "output: {output}\nmodel: {{path: {golden}, max_query_length: 16, max_document_length: 16}}\n\
         data: {{train: [{{path: {golden}/rows.jsonl}}]}}\n\
         training: {{epochs: {epochs}, batch_size: 4, learning_rate: 1.0e-4}}\n\
         checkpoint: {{every: 1000000}}\n",
        output = folder.join("run").display(),
        golden = golden.display(),
    );
    fs::write(&path, text).unwrap();
    path
}

fn launch(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_launch"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A run that would go on for long, and has done its first steps.
fn started(folder: &Path) -> Child {
    let config = configuration(folder, 1_000_000);
    let mut child = launch(&["--quiet", config.to_str().unwrap()]).spawn().unwrap();
    let metrics = folder.join("run/metrics.jsonl");
    wait_until("the first step", || {
        assert!(child.try_wait().unwrap().is_none(), "the run ended early");
        fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"step\":1,"))
    });
    child
}

/// Patience, not a measurement: far beyond what any machine needs.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if done() {
            return;
        }
        sleep(Duration::from_millis(20));
    }
    panic!("{what} did not come");
}

fn checkpoints(folder: &Path) -> usize {
    let Ok(found) = fs::read_dir(folder.join("run/checkpoints")) else { return 0 };
    found.filter(|entry| entry.as_ref().unwrap().path().join("DONE").exists()).count()
}

fn kill(id: u32, signal: Signal) {
    kill_process(Pid::from_raw(id as i32).unwrap(), signal).unwrap();
}

#[test]
fn a_configuration_is_trained_and_the_rank_keeps_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let config = configuration(folder.path(), 1);
    let output = launch(&[config.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(folder.path().join("run/model/model.safetensors").exists());
    assert!(!fs::read_to_string(folder.path().join("run/logs/rank-0.log")).unwrap().is_empty());
}

#[test]
fn other_commands_of_the_trainer_run_too() {
    let output = launch(&["--", "--version"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("trainer "));
}

#[test]
fn a_wrong_configuration_is_the_launchers_status_2_too() {
    let output = launch(&["/nonexistent/tiny.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("/nonexistent/tiny.yaml"), "{}", said(&output));
}

#[test]
fn a_signal_writes_a_checkpoint_and_is_the_status() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::USR1, 138)] {
        let folder = tempfile::tempdir().unwrap();
        let run = started(folder.path());
        kill(run.id(), signal);
        let output = run.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
        assert_eq!(checkpoints(folder.path()), 1);
    }
}

#[test]
fn a_launcher_that_is_killed_leaves_no_rank_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = started(folder.path());
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.id())).unwrap();
    let rank: u32 = children.trim().parse().unwrap();
    kill(run.id(), Signal::KILL);
    run.wait().unwrap();
    wait_until("the end of the rank", || {
        // Who adopts it may not ask for its status: then it stays in the table as Z, and is dead all the same.
        let stat = fs::read_to_string(format!("/proc/{rank}/stat"));
        stat.is_err()
            || stat.is_ok_and(|s| s.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
    });
    assert_eq!(checkpoints(folder.path()), 1);
}
