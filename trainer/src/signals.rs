//! TERM, INT and USR1 ask a run to stop: it finishes the step, writes a checkpoint and ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use crate::{Error, Result};

/// Whether somebody asked for a stop.
#[derive(Clone, Debug)]
pub struct Signals(Arc<AtomicUsize>);

impl Signals {
    /// Starts to listen. A repeated signal changes nothing: a terminal's Ctrl-C reaches launcher and rank, and the launcher
    /// hands it on once more.
    pub fn listen() -> Result<Self> {
        let asked = Arc::new(AtomicUsize::new(0));
        for signal in [SIGTERM, SIGINT, SIGUSR1] {
            signal_hook::flag::register_usize(signal, Arc::clone(&asked), signal as usize)
                .map_err(Error::io("listen to signals of", "this process"))?;
        }
        Ok(Self(asked))
    }

    /// The signal that asked for a stop.
    pub fn asked(&self) -> Option<i32> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            signal => i32::try_from(signal).ok(),
        }
    }
}
