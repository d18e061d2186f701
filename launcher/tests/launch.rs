//! `launch` with one rank: a run of the tiny golden model that ends or is stopped in several ways.

mod common;

use std::fs;

use common::{checkpoints, configuration, dead, kill, launch, ranks, said, started, wait_until};
use rustix::process::Signal;

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
        let run = started(folder.path(), &[]);
        kill(run.id(), signal);
        let output = run.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
        assert_eq!(checkpoints(folder.path()), 1);
    }
}

#[test]
fn a_launcher_that_is_killed_leaves_no_rank_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = started(folder.path(), &[]);
    let rank = ranks(run.id())[0];
    kill(run.id(), Signal::KILL);
    run.wait().unwrap();
    wait_until("the end of the rank", || dead(rank));
    assert_eq!(checkpoints(folder.path()), 1);
}
