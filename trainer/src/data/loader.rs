//! Batches made in the background, a few ahead of the step that uses them: this rank's share of the tokenising.
//!
//! One thread reads rows and builds batches in their order; tokenising is shared among a few threads of its own pool, so
//! that it does not stand in the way of the products on the main one. A bounded channel hands batches over: when it is
//! full the thread waits, when its other end is gone the thread ends.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::batch::Cursor;
use super::builder::{Builder, Draft, Options, Part};
use super::mixture::Mixture;
use super::tokenize::Tokenizer;
use crate::{Error, Result};

/// Batches that wait for their step.
const AHEAD: usize = 3;

/// An iterator over the batches from a cursor on. After an error there is nothing more.
pub struct Loader {
    batches: Option<Receiver<Result<Draft>>>,
    /// Batches still to come.
    left: u64,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts to make `batches` batches from `cursor` on.
    ///
    /// # Errors
    /// The cursor is not of this mixture; a prompt or a length does not fit the tokenizer; no thread can be started.
    pub fn start(
        mixture: Arc<Mixture>,
        tokenizer: Arc<Tokenizer>,
        options: Options,
        cursor: Cursor,
        batches: u64,
        part: Part,
    ) -> Result<Self> {
        // What is wrong from the start is said at the start.
        mixture.walk(&cursor)?;
        Builder::new(&mixture, &tokenizer, options)?;
        // Not the processor's cores: ranks beside this one have theirs.
        let threads = rayon::current_num_threads();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads((threads / 2).clamp(1, 8))
            .thread_name(|i| format!("tokenise-{i}"))
            .build()
            .map_err(|e| Error::Failed(format!("cannot start threads to read the data: {e}")))?;
        let (sender, receiver) = sync_channel(AHEAD);
        let thread = std::thread::Builder::new()
            .name("loader".to_owned())
            .spawn(move || {
                if let Err(error) =
                    work(&mixture, &tokenizer, options, &cursor, batches, part, &pool, &sender)
                {
                    // Nobody listens any more: then nobody misses it.
                    let _ = sender.send(Err(error));
                }
            })
            .map_err(|e| Error::Failed(format!("cannot start a thread to read the data: {e}")))?;
        Ok(Self { batches: Some(receiver), left: batches, thread: Some(thread) })
    }
}

fn work(
    mixture: &Mixture,
    tokenizer: &Tokenizer,
    options: Options,
    cursor: &Cursor,
    batches: u64,
    part: Part,
    pool: &rayon::ThreadPool,
    sender: &SyncSender<Result<Draft>>,
) -> Result<()> {
    let builder = Builder::new(mixture, tokenizer, options)?;
    let mut walk = mixture.walk(cursor)?;
    for _ in 0..batches {
        let picked = walk.step()?;
        let batch = pool.install(|| builder.draft(picked, part))?;
        if sender.send(Ok(batch)).is_err() {
            break;
        }
    }
    Ok(())
}

impl Iterator for Loader {
    type Item = Result<Draft>;

    fn next(&mut self) -> Option<Result<Draft>> {
        if self.left == 0 {
            return None;
        }
        let received = self.batches.as_ref()?.recv().unwrap_or_else(|_| {
            // The thread is gone without a word: it panicked, and has said so on standard error.
            Err(Error::Bug("the thread that reads the data panicked".to_owned()))
        });
        self.left = if received.is_ok() { self.left - 1 } else { 0 };
        Some(received)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The channel first: the thread waits in it, or finds it gone after the batch at hand.
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
