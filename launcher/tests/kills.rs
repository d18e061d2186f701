//! Kills runs at random times: a rank, the launcher or both, during the rendezvous or while a checkpoint is
//! written. Every run must end with the bits of an uninterrupted one, no process may be left behind, and no
//! incomplete checkpoint may be used.
//!
//! LODESTONE_KILLS is the number of kills. The default is small.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failure fails the test, which prints what it did"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread::sleep;
use std::time::Duration;

use common::{configuration, launch, ranks, said, wait_until};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Pid, Signal, kill_process};

const SECRET: &str = "of the runs that are killed";
const RANKS: &str = "3";

/// The processes of these runs, recognised by their secret.
fn living() -> Vec<u32> {
    let variable = format!("LODESTONE_TOKEN={SECRET}");
    let belongs = |id: &u32| {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|other| other == variable.as_bytes())
    };
    let ids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(belongs).collect()
}

fn start(folder: &Path) -> Child {
    let mut command = launch(&["--cpus", RANKS, "--resume", "--quiet"]);
    command.arg(folder.join("tiny.yaml")).arg("checkpoint.every=15").arg("checkpoint.keep=2");
    command.env("LODESTONE_TOKEN", SECRET).spawn().unwrap()
}

fn result(folder: &Path) -> (Vec<String>, Vec<u8>) {
    let lines = fs::read_to_string(folder.join("run/metrics.jsonl")).unwrap();
    // Without the times.
    let lines = lines.lines().map(|line| line.split(",\"seconds\"").next().unwrap().to_owned()).collect();
    (lines, fs::read(folder.join("run/model/model.safetensors")).unwrap())
}

fn writes_a_checkpoint(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder.join("run/checkpoints")) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with(".tmp"))
}

/// Kills a process, which may have ended by itself just now.
fn kill(id: u32) -> bool {
    Pid::from_raw(id as i32).is_some_and(|id| kill_process(id, Signal::KILL).is_ok())
}

#[test]
fn every_run_ends_with_the_bits_of_an_uninterrupted_one() {
    let kills: u64 = std::env::var("LODESTONE_KILLS").map_or(6, |kills| kills.parse().unwrap());
    let place = || {
        let folder = tempfile::tempdir().unwrap();
        configuration(folder.path(), 60);
        folder
    };
    let whole = place();
    let output = start(whole.path()).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let whole = result(whole.path());

    let mut random = ChaCha8Rng::seed_from_u64(kills);
    let (mut done, mut killed, mut counts) = (0, 0, BTreeMap::<&str, u64>::new());
    while killed < kills {
        let folder = place();
        loop {
            let mut run = start(folder.path());
            let (what, victims) =
                if killed < kills { attack(folder.path(), &mut run, &mut random) } else { ("", vec![]) };
            // Both victims count as one attack, because the second may already have ended with the first.
            let hit = victims.into_iter().filter(|&victim| kill(victim)).count() > 0;
            let output = run.wait_with_output().unwrap();
            wait_until("the end of all processes of the run", || living().is_empty());
            // A zombie can be killed, too, but that is no attack.
            if output.status.success() {
                break;
            }
            if hit {
                killed += 1;
                *counts.entry(what).or_default() += 1;
            }
            assert_ne!(output.status.code(), Some(2), "{}", said(&output));
        }
        assert!(result(folder.path()) == whole, "a run that was killed ended with another result");
        done += 1;
    }
    println!("{killed} kills in {done} runs, each with the bits of an uninterrupted one: {counts:?}");
}

/// Waits for a random moment and chooses the victims of an attack.
fn attack(folder: &Path, run: &mut Child, random: &mut ChaCha8Rng) -> (&'static str, Vec<u32>) {
    let launcher = run.id();
    let any = |random: &mut ChaCha8Rng| {
        let ranks = ranks(launcher);
        if ranks.is_empty() { launcher } else { ranks[random.random_range(0..ranks.len())] }
    };
    match random.random_range(0..5) {
        0 => {
            sleep(Duration::from_millis(random.random_range(200..1500)));
            ("a rank", vec![any(random)])
        }
        1 => {
            sleep(Duration::from_millis(random.random_range(200..1500)));
            ("the launcher", vec![launcher])
        }
        2 => {
            sleep(Duration::from_millis(random.random_range(200..1500)));
            ("both", vec![launcher, any(random)])
        }
        3 => {
            sleep(Duration::from_millis(random.random_range(0..60)));
            ("during the rendezvous", vec![any(random)])
        }
        _ => {
            while !writes_a_checkpoint(folder) && run.try_wait().unwrap().is_none() {
                std::hint::spin_loop();
            }
            ("while a checkpoint is written", vec![ranks(launcher).first().copied().unwrap_or(launcher)])
        }
    }
}
