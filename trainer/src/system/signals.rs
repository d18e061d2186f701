//! TERM, INT and USR1 ask a run to stop: it finishes the step, writes a checkpoint and ends. Other work ends at once; TERM and INT also
//! remove what it had begun.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, thread};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::low_level::{emulate_default_handler, signal_name};

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

/// What a signal is called: `SIGTERM`.
pub(crate) fn name(signal: i32) -> String {
    signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}

/// A folder that TERM and INT remove before they end the program: not for a run, which finishes its step.
#[derive(Debug)]
pub(crate) struct Begun(PathBuf);

/// All of them; none where nobody listens yet.
static BEGUN: Mutex<Option<Vec<PathBuf>>> = Mutex::new(None);

impl Begun {
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        let mut begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
        if begun.is_none() {
            let listen = Error::io("listen to signals of", "this process");
            let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(listen)?;
            thread::spawn(move || {
                for signal in signals.forever() {
                    let begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
                    for folder in begun.iter().flatten() {
                        // Elsewhere first: nothing more is written there. Who notices waits for the lock until the program ends.
                        let gone = folder.with_extension("gone");
                        let _ = fs::rename(folder, &gone).and_then(|()| fs::remove_dir_all(&gone));
                    }
                    let _ = emulate_default_handler(signal);
                }
            });
        }
        begun.get_or_insert_default().push(folder.to_owned());
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(begun) = &mut *BEGUN.lock().unwrap_or_else(PoisonError::into_inner) {
            begun.retain(|folder| *folder != self.0);
        }
    }
}
