//! What can go wrong, said to the person at the terminal: where, what was found, what was expected, what to do.
//!
//! An error does not know its exit status: the commands decide it by when it came (before anything was started: 2;
//! afterwards: 1).

use std::path::PathBuf;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its place. Messages name the value and what was expected; what to do follows after `\nhint: `.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that does not go together.
    #[error("{0}")]
    Usage(String),

    /// A key or value of the configuration. `origin` is `FILE:LINE`, or `command line` for a KEY=VALUE.
    #[error("{origin}: {field}: {message}")]
    Config {
        /// Where the value was written.
        origin: String,
        /// The dotted key, `data.train.0.path`.
        field: String,
        /// What is wrong and what was expected.
        message: String,
    },

    /// One row of a data file.
    #[error("{}:{line}: {message}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// Counted from 1, as editors do.
        line: u64,
        /// What is wrong and what was expected.
        message: String,
    },

    /// A file or folder whose content is not what it must be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what was expected.
        message: String,
    },

    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// A verb: `open`, `read`, `write`, `rename`.
        action: &'static str,
        /// Its reason.
        source: std::io::Error,
    },

    /// The loss, a gradient or what a step made of it is not finite.
    #[error("step {step}: {what} is not finite\n{rows}")]
    NonFinite {
        /// The optimizer step, from 1.
        step: u64,
        /// `the loss`, `the gradient norm`, `a parameter`.
        what: &'static str,
        /// The rows of the batch that caused it, one a line, or what to do.
        rows: String,
    },

    /// Another rank of the run, or what connects this one to it.
    #[error("rank {rank}: {message}")]
    Rank {
        /// Whose fault it is.
        rank: usize,
        /// The exit status it has, and this rank with it.
        status: u8,
        /// What happened there.
        message: String,
    },

    /// A signal asked for a stop; the state is in a checkpoint.
    #[error("stopped by {} after step {step}; --resume continues from there", crate::system::signals::name(*signal))]
    Stopped {
        /// The number of the signal.
        signal: i32,
        /// The last finished step.
        step: u64,
    },

    /// An op was called wrongly, or memory ran out.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// An I/O error with its path: `.map_err(Error::io("open", path))`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, action, source }
    }

    /// A file or folder whose content is wrong.
    pub fn file(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::File { path: path.into(), message: message.into() }
    }
}
