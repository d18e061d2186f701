//! Heartbeats of a rank, by which the launcher and the other ranks tell a slow rank from one that hangs.
//!
//! Code that does a unit of work which takes a while (a chunk, a collective, a megabyte of rows) calls
//! [`record_work`] once for it. The launcher gives its ranks a file with one record of [`SLOT`] bytes per
//! rank: the ticks of a clock thread, which stop when the process stops; the count of work, which stops when
//! the work hangs; and whether the rank waits for other ranks. A rank that waits is not to blame.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

static WORK: AtomicU64 = AtomicU64::new(0);
static WAITING: AtomicBool = AtomicBool::new(false);

/// Time between two ticks.
const TICK: Duration = Duration::from_millis(200);

/// Bytes of one rank's record in the launcher's file.
pub const SLOT: u64 = 24;

/// Environment variable that names the launcher's file and the record of this rank: `PATH:SLOT`.
pub const VARIABLE: &str = "LODESTONE_HEARTBEAT";

/// The last record of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// Ticks of the clock thread.
    pub ticks: u64,
    /// Units of work done.
    pub work: u64,
    /// Whether the rank waits for other ranks.
    pub waiting: bool,
}

/// Records that one unit of work is done.
pub fn record_work() {
    WORK.fetch_add(1, Ordering::Relaxed);
}

/// Number of units of work done so far.
pub fn work_count() -> u64 {
    WORK.load(Ordering::Relaxed)
}

/// Runs `f`, during which this rank counts as waiting for others.
pub fn while_waiting<R>(f: impl FnOnce() -> R) -> R {
    WAITING.store(true, Ordering::Relaxed);
    let result = f();
    WAITING.store(false, Ordering::Relaxed);
    record_work();
    result
}

impl Heartbeat {
    /// Reads record `slot` of a launcher's file.
    ///
    /// # Errors
    /// The file has no such record or cannot be read.
    pub fn read(file: &std::fs::File, slot: u64) -> io::Result<Self> {
        let mut bytes = [0; SLOT as usize];
        file.read_exact_at(&mut bytes, slot * SLOT)?;
        let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| bytes[8 * i + k]));
        Ok(Self { ticks: number(0), work: number(1), waiting: number(2) != 0 })
    }

    fn write(self, file: &std::fs::File, slot: u64) -> io::Result<()> {
        let numbers = [self.ticks, self.work, u64::from(self.waiting)];
        file.write_all_at(&numbers.map(u64::to_le_bytes).concat(), slot * SLOT)
    }
}

/// Starts a thread that writes this process's heartbeat to record `slot` of the file at `path` until the
/// process ends.
///
/// # Errors
/// The file cannot be opened for writing, or the thread cannot be started.
pub fn publish(path: &Path, slot: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    thread::Builder::new().name("heartbeat".to_owned()).spawn(move || {
        for ticks in 1.. {
            let waiting = WAITING.load(Ordering::Relaxed);
            // A write fails when the launcher has ended: then nothing reads it.
            if (Heartbeat { ticks, work: work_count(), waiting }).write(&file, slot).is_err() {
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
        let heartbeat = Heartbeat { ticks: 7, work: u64::MAX, waiting: true };
        heartbeat.write(&file, 1).unwrap();
        assert_eq!(Heartbeat::read(&file, 1).unwrap(), heartbeat);
        assert_eq!(Heartbeat::read(&file, 2).unwrap(), Heartbeat::default());
        assert!(Heartbeat::read(&file, 3).is_err());
    }

    #[test]
    fn a_rank_that_lives_ticks() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SLOT).unwrap();
        publish(file.path(), 0).unwrap();
        let mut last = Heartbeat::default();
        for _ in 0..1000 {
            last = Heartbeat::read(file.as_file(), 0).unwrap();
            if last.ticks > 2 {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        assert!(last.ticks > 2);
    }
}
