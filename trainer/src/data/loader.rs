//! Prepares batches in the background, a few ahead of the step that uses them.
//!
//! One thread reads rows and builds partial batches in order; its own small thread pool tokenises, so
//! that it does not delay the matrix products on the main pool. Batches go through a bounded channel: the
//! thread waits while it is full, and ends when the receiver is dropped.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::batch::Cursor;
use super::builder::{BatchOptions, Builder, PartialBatch};
use super::mixture::Mixture;
use super::partition::Shard;
use super::tokenize::Tokenizer;
use crate::{Error, Result};

/// Number of batches that are prepared ahead of their step.
const PREFETCHED: usize = 3;

/// An iterator over the batches from a cursor on. It ends after an error.
pub struct Loader {
    batches: Option<Receiver<Result<PartialBatch>>>,
    /// Number of batches that are still to come.
    left: u64,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts to prepare `batches` batches from `cursor` on.
    ///
    /// # Errors
    /// The cursor does not fit the mixture; a prompt or a length does not fit the tokenizer; no thread can be
    /// started.
    pub fn start(
        mixture: Arc<Mixture>,
        tokenizer: Arc<Tokenizer>,
        options: BatchOptions,
        cursor: Cursor,
        batches: u64,
        shard: Shard,
    ) -> Result<Self> {
        // Errors that are known from the start are reported here and not by the thread.
        mixture.sampler(&cursor)?;
        Builder::new(&mixture, &tokenizer, options)?;
        // Relative to this rank's threads, because other ranks use the other cores.
        let threads = rayon::current_num_threads();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads((threads / 2).clamp(1, 8))
            .thread_name(|i| format!("tokenise-{i}"))
            .build()
            .map_err(|e| Error::Failed(format!("cannot start threads to read the data: {e}")))?;
        let (sender, receiver) = sync_channel(PREFETCHED);
        let thread = std::thread::Builder::new()
            .name("loader".to_owned())
            .spawn(move || {
                if let Err(error) =
                    produce(&mixture, &tokenizer, options, &cursor, batches, shard, &pool, &sender)
                {
                    // Sending fails if the receiver is gone, and then the error does not matter.
                    let _ = sender.send(Err(error));
                }
            })
            .map_err(|e| Error::Failed(format!("cannot start a thread to read the data: {e}")))?;
        Ok(Self { batches: Some(receiver), left: batches, thread: Some(thread) })
    }
}

/// Runs on the loader's thread until all batches are sent or the receiver is gone.
fn produce(
    mixture: &Mixture,
    tokenizer: &Tokenizer,
    options: BatchOptions,
    cursor: &Cursor,
    batches: u64,
    shard: Shard,
    pool: &rayon::ThreadPool,
    sender: &SyncSender<Result<PartialBatch>>,
) -> Result<()> {
    let builder = Builder::new(mixture, tokenizer, options)?;
    let mut sampler = mixture.sampler(cursor)?;
    for _ in 0..batches {
        let rows = sampler.next_rows()?;
        let partial = pool.install(|| builder.partial(rows, shard))?;
        if sender.send(Ok(partial)).is_err() {
            break;
        }
    }
    Ok(())
}

impl Iterator for Loader {
    type Item = Result<PartialBatch>;

    fn next(&mut self) -> Option<Result<PartialBatch>> {
        if self.left == 0 {
            return None;
        }
        let received = self.batches.as_ref()?.recv().unwrap_or_else(|_| {
            // The thread ended without a message: it panicked, and has written why to standard error.
            Err(Error::Bug("the thread that reads the data panicked".to_owned()))
        });
        self.left = if received.is_ok() { self.left - 1 } else { 0 };
        Some(received)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Drop the receiver first: the thread may be waiting to send.
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
