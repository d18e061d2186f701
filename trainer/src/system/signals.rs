//! TERM, INT and USR1: a training run finishes its step, writes a checkpoint and ends. Other commands end at
//! once; on TERM and INT they first remove the folders that they have not finished.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, thread};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::low_level::emulate_default_handler;

use crate::{Error, Result};

/// A flag that is set by the signals that request a stop.
#[derive(Clone, Debug)]
pub struct Signals(Arc<AtomicUsize>);

impl Signals {
    /// Starts to listen. A repeated signal changes nothing, because Ctrl-C in a terminal may reach a rank
    /// twice: directly, and forwarded by the launcher.
    pub fn listen() -> Result<Self> {
        let requested = Arc::new(AtomicUsize::new(0));
        for signal in [SIGTERM, SIGINT, SIGUSR1] {
            signal_hook::flag::register_usize(signal, Arc::clone(&requested), signal as usize)
                .map_err(Error::system("listen to signals"))?;
        }
        Ok(Self(requested))
    }

    /// The signal that requested a stop, if any.
    pub fn requested(&self) -> Option<i32> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            signal => i32::try_from(signal).ok(),
        }
    }
}

/// Removes an unfinished folder when TERM or INT ends the program. A training run does not use it, since it
/// finishes its step.
#[derive(Debug)]
pub(crate) struct CleanupGuard(PathBuf);

/// The folders of all guards; `None` until the thread that handles the signals has started.
static GUARDED: Mutex<Option<Vec<PathBuf>>> = Mutex::new(None);

impl CleanupGuard {
    /// Guards `folder` until the guard is dropped.
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        let mut guarded = GUARDED.lock().unwrap_or_else(PoisonError::into_inner);
        if guarded.is_none() {
            let listen = Error::system("listen to signals");
            let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(listen)?;
            thread::spawn(move || {
                for signal in signals.forever() {
                    let guarded = GUARDED.lock().unwrap_or_else(PoisonError::into_inner);
                    for folder in guarded.iter().flatten() {
                        // Rename before deleting, so that no thread writes into the folder meanwhile; a
                        // thread that fails blocks on the lock until exit.
                        let gone = folder.with_extension("gone");
                        let _ = fs::rename(folder, &gone).and_then(|()| fs::remove_dir_all(&gone));
                    }
                    let _ = emulate_default_handler(signal);
                }
            });
        }
        guarded.get_or_insert_default().push(folder.to_owned());
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for CleanupGuard {
    fn drop(&mut self) {
        if let Some(guarded) = &mut *GUARDED.lock().unwrap_or_else(PoisonError::into_inner) {
            guarded.retain(|folder| *folder != self.0);
        }
    }
}
