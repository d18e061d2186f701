//! A rank: the trainer, tied to its launcher's life.

use std::ffi::OsString;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use trainer::system::heartbeat;

/// The first argument that makes this binary a rank; the launcher's process id and patience follow, then the trainer's
/// arguments.
pub(crate) const ARGUMENT: &str = "__rank";

/// Becomes the trainer.
pub(crate) fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    // A launcher that is killed outright can hand nothing on: then the kernel asks the rank to write its checkpoint
    // and stop. The launcher may be gone already, before the kernel was asked.
    let asked = set_parent_process_death_signal(Some(Signal::TERM));
    let mut number = || arguments.next().and_then(|argument| argument.to_str()?.parse::<u64>().ok());
    let (launcher, patience) = (number(), number());
    let (Ok(()), Some(patience)) = (asked, patience) else { return ended() };
    if parent() != launcher || thread::Builder::new().spawn(move || guard(launcher, patience)).is_err() {
        return ended();
    }
    trainer::cli::main(std::iter::once("trainer".into()).chain(arguments))
}

/// Ends a rank that hangs where no launcher is left to do it.
#[expect(clippy::exit, reason = "the thread that could return hangs")]
fn guard(launcher: Option<u64>, patience: u64) {
    let mut last = (heartbeat::beats(), Instant::now());
    loop {
        thread::sleep(Duration::from_secs(1));
        let beats = heartbeat::beats();
        if parent() == launcher || beats != last.0 {
            last = (beats, Instant::now());
        } else if last.1.elapsed() > Duration::from_secs(patience) {
            std::process::exit(128 + Signal::TERM.as_raw());
        }
    }
}

fn parent() -> Option<u64> {
    getppid().map(|id| id.as_raw_nonzero().get() as u64)
}

fn ended() -> ExitCode {
    ExitCode::from(128 + Signal::TERM.as_raw() as u8)
}
