//! Helpers for the tests of `launch`: start, watch and stop a run of the tiny golden model.

#![allow(dead_code, reason = "each test binary uses only a part")]
#![expect(clippy::unwrap_used, reason = "a helper that fails must fail the test")]

// With the feature `cuda`, the trainer's kernels resolve candle's calls to NVIDIA's libraries, so it must be
// linked.
use trainer as _;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Writes a configuration that trains for `epochs` epochs into `folder`.
pub(crate) fn configuration(folder: &Path, epochs: u32) -> PathBuf {
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

pub(crate) fn launch(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_launch"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Starts a run that does not end by itself, and waits for its first step.
pub(crate) fn started(folder: &Path, options: &[&str]) -> Child {
    let config = configuration(folder, 1_000_000);
    let mut child = launch(options).args(["--quiet", config.to_str().unwrap()]).spawn().unwrap();
    wait_for_step(folder, 1, &mut child);
    child
}

/// Waits until a run has finished a step.
pub(crate) fn wait_for_step(folder: &Path, step: u64, child: &mut Child) {
    let metrics = folder.join("run/metrics.jsonl");
    wait_until("a step", || {
        assert!(child.try_wait().unwrap().is_none(), "the run ended early");
        fs::read_to_string(&metrics).is_ok_and(|text| text.contains(&format!("\"step\":{step},")))
    });
}

/// Waits up to two minutes, far longer than any machine needs.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if done() {
            return;
        }
        sleep(Duration::from_millis(20));
    }
    panic!("timed out waiting for {what}");
}

pub(crate) fn checkpoints(folder: &Path) -> usize {
    let Ok(found) = fs::read_dir(folder.join("run/checkpoints")) else { return 0 };
    found.filter(|entry| entry.as_ref().unwrap().path().join("DONE").exists()).count()
}

pub(crate) fn kill(id: u32, signal: Signal) {
    kill_process(Pid::from_raw(id as i32).unwrap(), signal).unwrap();
}

/// The process ids of a launcher's ranks, in the order of the ranks.
pub(crate) fn ranks(launcher: u32) -> Vec<u32> {
    let children =
        fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap_or_default();
    let mut ranks: Vec<u32> = children.split_whitespace().map(|id| id.parse().unwrap()).collect();
    ranks.sort_by_key(|id| {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        let rank = environment.split(|&byte| byte == 0).find_map(|variable| variable.strip_prefix(b"RANK="));
        rank.map(|rank| String::from_utf8_lossy(rank).parse::<u32>().unwrap())
    });
    ranks
}

/// Whether a process has ended.
pub(crate) fn dead(id: u32) -> bool {
    // An adopted process whose parent does not wait for it stays as a zombie (state Z).
    let stat = fs::read_to_string(format!("/proc/{id}/stat"));
    stat.is_err() || stat.is_ok_and(|s| s.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}
