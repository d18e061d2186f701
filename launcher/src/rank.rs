//! A rank: runs the trainer, and ends it when the launcher is gone.

use std::ffi::OsString;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use trainer::system::heartbeat;

/// The first argument that makes this binary a rank. The launcher's process id and the timeout in seconds
/// follow, then the trainer's arguments.
pub(crate) const ARGUMENT: &str = "__rank";

/// Runs the trainer with the remaining arguments.
pub(crate) fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    // When the launcher is killed, the kernel sends TERM, so that the rank writes a checkpoint and stops. The
    // launcher may have ended before that is set up, so its process id is checked as well.
    let armed = set_parent_process_death_signal(Some(Signal::TERM));
    let mut number = || arguments.next().and_then(|argument| argument.to_str()?.parse::<u64>().ok());
    let (launcher, timeout) = (number(), number());
    let (Ok(()), Some(timeout)) = (armed, timeout) else { return ended() };
    if parent() != launcher || thread::Builder::new().spawn(move || guard(launcher, timeout)).is_err() {
        return ended();
    }
    trainer::cli::main(std::iter::once("trainer".into()).chain(arguments))
}

/// Ends a rank that hangs after its launcher has ended.
#[expect(clippy::exit, reason = "the main thread hangs, so it cannot return")]
fn guard(launcher: Option<u64>, timeout: u64) {
    let mut last = (heartbeat::work_count(), Instant::now());
    loop {
        thread::sleep(Duration::from_secs(1));
        let work = heartbeat::work_count();
        if parent() == launcher || work != last.0 {
            last = (work, Instant::now());
        } else if last.1.elapsed() > Duration::from_secs(timeout) {
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
