//! `launch`: starts the ranks of a run and brings them home. Processes, not tensors.
//!
//! A rank is this very binary, started again with a hidden first argument: there is no second program to find, and
//! the ranks cannot be of another build than their launcher.

/// The command line.
mod args;
/// What a rank does before it becomes the trainer.
mod rank;
/// Children, signals, exit statuses.
mod spawn;

use std::env;
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == rank::ARGUMENT) {
        return rank::run(arguments);
    }
    let arguments = args::Arguments::parse();
    match arguments.command() {
        Ok(command) => match spawn::supervise(&mut spawn::rank(&command)) {
            Ok(code) => ExitCode::from(code),
            Err(error) => failed(&format!("cannot start a rank: {error}"), 1),
        },
        Err(message) => failed(&message, 2),
    }
}

#[expect(clippy::print_stderr, reason = "the last word before the exit")]
fn failed(message: &str, status: u8) -> ExitCode {
    eprintln!("error: {message}");
    ExitCode::from(status)
}
