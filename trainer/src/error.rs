//! Errors. A message names the file and line, the field, the value and what was expected; what to do follows
//! after `\nhint: `.
//!
//! The exit status of a command follows from the variant ([`Error::exit_status`]).

use std::io;
use std::path::{Path, PathBuf};

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line, the environment or an argument is wrong. Status 2.
    #[error("{0}")]
    Usage(String),

    /// A key or value of the configuration is wrong. Status 2.
    #[error("{origin}: {field}: {message}")]
    Config {
        /// Where the value was written: `FILE:LINE`, or `command line` for a KEY=VALUE.
        origin: String,
        /// The dotted key, `data.train.0.path`.
        field: String,
        /// What is wrong and what was expected.
        message: String,
    },

    /// A row of a data file is wrong. Status 2.
    #[error("{}:{line}: {message}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong and what was expected.
        message: String,
    },

    /// The content of an input file or folder is wrong. Status 2.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what was expected.
        message: String,
    },

    /// An input cannot be opened or read. Status 2.
    #[error("{}: cannot {action}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// A verb: `open`, `read`, `unpack`.
        action: &'static str,
        /// The reason of the operating system.
        source: io::Error,
    },

    /// An output cannot be created, written or put in its place. Status 1.
    #[error("{}: cannot {action}: {source}{}", path.display(), disk_hint(source))]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// A verb: `create`, `write`, `rename`.
        action: &'static str,
        /// The reason of the operating system.
        source: io::Error,
    },

    /// The run or command failed after it had started. Status 1.
    #[error("{0}")]
    Failed(String),

    /// The loss, a gradient or a result of an optimizer step is not finite. Status 1.
    #[error("step {step}: {what} is not finite\n{rows}")]
    NonFinite {
        /// The optimizer step, from 1.
        step: u64,
        /// `the loss`, `the gradient norm`, `a parameter`.
        what: &'static str,
        /// The rows of the batch that caused it, one per line, or a hint.
        rows: String,
    },

    /// A rank of the run has failed, or the connection to it. Status of that rank.
    #[error("rank {rank}: {message}")]
    Rank {
        /// The rank that failed first.
        rank: usize,
        /// Its exit status, which all ranks return.
        status: u8,
        /// Its error message.
        message: String,
    },

    /// A signal requested a stop, and the run has written a checkpoint. Status 128 + signal.
    #[error(
        "stopped by {} after step {step}; the checkpoint is {}\nhint: `{resume}` continues from there",
        signal_name(*signal), checkpoint.display()
    )]
    Stopped {
        /// The number of the signal.
        signal: i32,
        /// The last finished step.
        step: u64,
        /// The folder of the checkpoint.
        checkpoint: PathBuf,
        /// The command line that continues the run.
        resume: String,
    },

    /// An operation on tensors failed, for example because memory ran out. Status 1.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),

    /// This crate contradicts itself, which no input may cause. Status 1.
    #[error(
        "internal error: {0}\nhint: this is a bug in lodestone; please report it with this message, the \
         command, its configuration and the output of `trainer --version`"
    )]
    Bug(String),
}

impl Error {
    /// An input cannot be read: `.map_err(Error::read("open", path))`.
    pub fn read(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, action, source }
    }

    /// An output cannot be written: `.map_err(Error::write("create", path))`.
    pub fn write(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Write { path, action, source }
    }

    /// The operating system refused something else: `.map_err(Error::system("start a thread"))`.
    pub fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Failed(format!("cannot {action}: {source}"))
    }

    /// The content of a file or folder is wrong.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_owned(), message: message.into() }
    }

    /// The exit status of a command that ends with this error: 2 if the command line, the configuration or an
    /// input is wrong and nothing was started, 128 + S if signal S requested a stop, 1 otherwise.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_)
            | Self::Config { .. }
            | Self::Row { .. }
            | Self::File { .. }
            | Self::Read { .. } => 2,
            Self::Stopped { signal, .. } => 128 + u8::try_from(*signal).unwrap_or(0),
            Self::Rank { status, .. } => *status,
            Self::Write { .. }
            | Self::Failed(_)
            | Self::NonFinite { .. }
            | Self::Tensor(_)
            | Self::Bug(_) => 1,
        }
    }

    /// The same error after the run has started. A wrong input is a failure then, so that the launcher may
    /// restart the run.
    #[must_use]
    pub fn during_run(self) -> Self {
        if self.exit_status() == 2 { Self::Failed(self.to_string()) } else { self }
    }
}

/// The name of a signal: `SIGTERM`.
fn signal_name(signal: i32) -> String {
    let name = signal_hook::low_level::signal_name(signal);
    name.map_or_else(|| format!("signal {signal}"), str::to_owned)
}

fn disk_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "\nhint: the disk is full; free some space"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_follows_from_the_variant() {
        let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
        for (error, status) in [
            (Error::Usage("--range is empty".to_owned()), 2),
            (Error::file("model", "has no config.json"), 2),
            (Error::read("open", "rows.jsonl")(refused()), 2),
            (Error::write("create", "out.npy")(refused()), 1),
            (Error::system("start a thread")(refused()), 1),
            (Error::Stopped { signal: 15, step: 3, checkpoint: "c".into(), resume: "r".into() }, 143),
            (Error::Rank { rank: 1, status: 7, message: "no memory".to_owned() }, 7),
            (Error::Bug("a tape of another encoder".to_owned()), 1),
        ] {
            assert_eq!(error.exit_status(), status, "{error}");
            assert_eq!(error.during_run().exit_status(), if status == 2 { 1 } else { status });
        }
    }

    #[test]
    fn messages_say_what_to_do() {
        let full = Error::write("write", "out.npy")(io::ErrorKind::StorageFull.into()).to_string();
        assert!(
            full.starts_with("out.npy: cannot write: ") && full.contains("hint: the disk is full"),
            "{full}"
        );
        let bug = Error::Bug("no layers".to_owned()).to_string();
        assert!(
            bug.starts_with("internal error: no layers\nhint: ") && bug.contains("please report"),
            "{bug}"
        );
    }
}
