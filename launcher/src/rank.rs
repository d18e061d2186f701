//! A rank: the trainer, tied to its launcher's life.

use std::ffi::OsString;
use std::process::ExitCode;

use rustix::process::{Signal, getppid, set_parent_process_death_signal};

/// The first argument that makes this binary a rank; the launcher's process id follows, then the trainer's arguments.
pub(crate) const ARGUMENT: &str = "__rank";

/// Becomes the trainer.
pub(crate) fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    // A launcher that is killed outright can hand nothing on: then the kernel asks the rank to write its checkpoint
    // and stop. The launcher may be gone already, before the kernel was asked.
    let asked = set_parent_process_death_signal(Some(Signal::TERM));
    let launcher = arguments.next().and_then(|id| id.to_str()?.parse().ok());
    let parent = getppid().map(|id| id.as_raw_nonzero().get());
    if asked.is_err() || parent != launcher {
        return ExitCode::from(128 + Signal::TERM.as_raw() as u8);
    }
    trainer::cli::main(std::iter::once("trainer".into()).chain(arguments))
}
