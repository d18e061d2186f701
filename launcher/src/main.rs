//! `launch`: starts the ranks of a run as processes, watches them and restarts them.
//!
//! A rank is the same binary, started with a hidden first argument. So there is no second program to find,
//! and ranks and launcher are always of the same build.

/// The command line.
mod args;
/// The ranks of this node among all nodes.
mod cluster;
/// The visible GPUs.
mod gpu;
/// The process of a rank.
mod rank;
/// Processes, signals and exit statuses.
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
    trainer::comm::raise_open_files_limit();
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

/// Runs the ranks of a job, restarts them after a failure, and returns the exit status.
fn run(job: Job) -> Result<u8, (String, u8)> {
    let cannot = |error: std::io::Error| (format!("cannot start a rank: {error}"), 1);
    let cluster = Cluster::new(&job)?;
    let mut launcher = Launcher::new(job.timeout).map_err(cannot)?;
    let mut command = job.command;
    for left in (0..=job.restarts).rev() {
        let start = |local| spawn::command(&cluster, local, &command, job.timeout);
        let commands = (0..cluster.ranks()).map(start).collect();
        let outcome = launcher.run(commands, cluster.rank(0)).map_err(cannot)?;
        if let Some(message) = &outcome.message {
            say(&format!("error: {message}"));
        }
        if !outcome.failed || left == 0 || launcher.stopped() {
            return Ok(outcome.status);
        }
        let plural = if left == 2 { "" } else { "s" };
        say(&format!("restarting from the newest checkpoint ({} restart{plural} left)", left - 1));
        if !command.iter().any(|argument| argument == "--resume") {
            command.push("--resume".into());
        }
    }
    Ok(1)
}

#[expect(clippy::print_stderr, reason = "messages of the launcher itself")]
fn say(message: &str) {
    eprintln!("{message}");
}
