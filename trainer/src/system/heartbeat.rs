//! Signs of life. A launcher that sees none ends the run, and ranks that wait for another look at its.
//!
//! Whoever does a piece of work that takes a while (a chunk, a collective, a megabyte of rows) beats once for it. A launcher gives its ranks a
//! file to write to, 24 bytes a rank: ticks of a clock thread, which stand still when the process does; beats, which stand still
//! when its work does; and whether it waits for other ranks, whose fault it is then.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

static BEATS: AtomicU64 = AtomicU64::new(0);
static WAITING: AtomicBool = AtomicBool::new(false);

/// Between two ticks.
const TICK: Duration = Duration::from_millis(200);

/// Bytes of a rank in the launcher's file.
pub const SLOT: u64 = 24;

/// The launcher's file, and the number of this rank in it, `PATH:SLOT`.
pub const VARIABLE: &str = "LODESTONE_PULSE";

/// What a rank has said last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Of the clock thread.
    pub ticks: u64,
    /// Pieces of work done.
    pub beats: u64,
    /// Whether the rank waits for others.
    pub waiting: bool,
}

/// A piece of work is done.
pub fn beat() {
    BEATS.fetch_add(1, Ordering::Relaxed);
}

/// Pieces of work done so far.
pub fn beats() -> u64 {
    BEATS.load(Ordering::Relaxed)
}

/// Waits for other ranks inside of `f`.
pub fn waiting<R>(f: impl FnOnce() -> R) -> R {
    WAITING.store(true, Ordering::Relaxed);
    let result = f();
    WAITING.store(false, Ordering::Relaxed);
    beat();
    result
}

impl Pulse {
    /// Of rank `slot` of a launcher's file.
    pub fn read(file: &std::fs::File, slot: u64) -> io::Result<Self> {
        let mut bytes = [0; SLOT as usize];
        file.read_exact_at(&mut bytes, slot * SLOT)?;
        let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| bytes[8 * i + k]));
        Ok(Self { ticks: number(0), beats: number(1), waiting: number(2) != 0 })
    }

    fn write(self, file: &std::fs::File, slot: u64) -> io::Result<()> {
        let numbers = [self.ticks, self.beats, u64::from(self.waiting)];
        file.write_all_at(&numbers.map(u64::to_le_bytes).concat(), slot * SLOT)
    }
}

/// Tells the launcher, from a thread of its own, for as long as the process lives.
pub fn tell(path: &Path, slot: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    thread::Builder::new().name("pulse".to_owned()).spawn(move || {
        for ticks in 1.. {
            let waiting = WAITING.load(Ordering::Relaxed);
            // Without a launcher nobody reads it.
            if (Pulse { ticks, beats: beats(), waiting }).write(&file, slot).is_err() {
                return;
            }
            thread::sleep(TICK);
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_writes_the_other_reads() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * SLOT).unwrap();
        let pulse = Pulse { ticks: 7, beats: u64::MAX, waiting: true };
        pulse.write(&file, 1).unwrap();
        assert_eq!(Pulse::read(&file, 1).unwrap(), pulse);
        assert_eq!(Pulse::read(&file, 2).unwrap(), Pulse::default());
        assert!(Pulse::read(&file, 3).is_err());
    }

    #[test]
    fn a_rank_that_lives_ticks() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SLOT).unwrap();
        tell(file.path(), 0).unwrap();
        let mut last = Pulse::default();
        for _ in 0..1000 {
            last = Pulse::read(file.as_file(), 0).unwrap();
            if last.ticks > 2 {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        assert!(last.ticks > 2);
    }
}
