//! `launch`: starts the ranks of a run and brings them home. Processes, not tensors.
//!
//! A rank is this very binary, started again with a hidden first argument: there is no second program to find, and
//! the ranks cannot be of another build than their launcher.

/// The command line.
mod args;
/// The ranks of a run over its nodes, and where they meet.
mod cluster;
/// Which GPUs are to be seen.
mod gpu;
/// What a rank does before it becomes the trainer.
mod rank;
/// Children, signals, exit statuses.
mod spawn;

use std::env;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Arguments, Job};
use crate::cluster::Cluster;
use crate::spawn::Launcher;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    trainer::comm::open_files();
    let mut arguments = env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == rank::ARGUMENT) {
        return rank::run(arguments);
    }
    let done = Arguments::parse().job().map_err(|message| (message, 2)).and_then(run);
    match done {
        Ok(status) => ExitCode::from(status),
        Err((message, status)) => {
            say(&format!("error: {message}"));
            ExitCode::from(status)
        }
    }
}

/// Runs the job's ranks, again where they fail and may be, and returns the status to leave with.
fn run(job: Job) -> Result<u8, (String, u8)> {
    let cannot = |error: std::io::Error| (format!("cannot start a rank: {error}"), 1);
    let cluster = Cluster::new(&job)?;
    let mut launcher = Launcher::new(job.timeout).map_err(cannot)?;
    let mut command = job.command;
    for left in (0..=job.restarts).rev() {
        let start = |local| spawn::command(&cluster, local, &command, job.timeout);
        let commands = (0..cluster.ranks()).map(start).collect();
        let ended = launcher.run(commands, cluster.rank(0)).map_err(cannot)?;
        if let Some(message) = &ended.message {
            say(&format!("error: {message}"));
        }
        if !ended.failed || left == 0 || launcher.stopped() {
            return Ok(ended.status);
        }
        say(&format!("the run goes on from its newest checkpoint; it may fail {} more times", left - 1));
        if !command.iter().any(|argument| argument == "--resume") {
            command.push("--resume".into());
        }
    }
    Ok(1)
}

#[expect(clippy::print_stderr, reason = "the launcher's own word, where the ranks left none")]
fn say(message: &str) {
    eprintln!("{message}");
}
