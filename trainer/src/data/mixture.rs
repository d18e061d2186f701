//! Chooses the rows of each step from all data sets, in an order that is a pure function of the seed and a
//! cursor.
//!
//! Batches are cut from *streams* of rows: a single one if batches mix the data sets, else one for each data
//! set. In every epoch a stream has its own order (`permutation`), and its batch number n has exactly
//! `min(batch_size, rows left)` rows, so the number of batches is known in advance: ceil(rows / batch_size),
//! summed over the streams. No list of drawn rows is kept: a [`Cursor`] holds a position and the deferred
//! rows, and a sampler that starts there continues exactly.
//!
//! With `no_duplicates`, a row that shares a text with another row of the batch is deferred to a later batch.
//! Rows still deferred at the end of the epoch are used anyway.

use std::collections::HashSet;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::batch::{Cursor, RowId};
use super::permutation::Permutation;
pub use super::set::{Example, TrainSet};
use crate::config::{Batching, Config};
use crate::{Error, Result};

/// First number of the `purpose` of a [`Permutation`]: of a stream's rows, and of an epoch's batches. No two
/// uses in `mixture.rs`, `set.rs` and `labels.rs` have the same number, so all orders are independent.
const ROWS: u64 = 3;
const BATCHES: u64 = 4;

/// Maximum number of deferred rows of a stream. Once it is reached, a row is used even if it repeats a text
/// of the batch.
const MAX_DEFERRED: usize = 1 << 16;

/// All training data, open and checked.
pub struct Mixture {
    sets: Vec<TrainSet>,
    streams: Vec<Stream>,
    rows: u64,
    batches: u64,
    batch_size: u64,
    negatives: usize,
    shuffle: bool,
    no_duplicates: bool,
    seed: u64,
}

/// Rows from which batches are cut: those at the places `start..start + rows` of an epoch.
///
/// A place is a number below [`Mixture::rows`]; [`Mixture::example`] maps it to a row.
struct Stream {
    start: u64,
    rows: u64,
    batches: u64,
}

/// Makes names unique, since those derived from files may be equal: the second `train` becomes `train-2`.
fn distinct_names(sets: &mut [TrainSet]) {
    for i in 1..sets.len() {
        let (before, rest) = sets.split_at_mut(i);
        let name = &mut rest[0].name;
        let taken = |name: &str| before.iter().any(|other| other.name == name);
        let free = |number: usize| Some(format!("{name}-{number}")).filter(|name| !taken(name));
        if taken(name)
            && let Some(other) = (2..).find_map(free)
        {
            *name = other;
        }
    }
}

/// The rows of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledRows {
    /// In the order of the batch.
    pub examples: Vec<Example>,
    /// Position after these rows.
    pub cursor: Cursor,
    /// Epochs done after these rows, with a fraction.
    pub epoch: f64,
}

impl Mixture {
    /// Opens `data.train` and checks every row.
    ///
    /// # Errors
    /// A file cannot be opened or read; a row is wrong; there are fewer rows than one batch has.
    pub fn open(config: &Config) -> Result<Self> {
        let seed = config.seed;
        let opened: Vec<Result<TrainSet>> =
            config.data.train.par_iter().enumerate().map(|(i, set)| TrainSet::open(config, i, set)).collect();
        // In the order of the configuration, so that the same error is reported every time.
        let mut sets: Vec<TrainSet> = opened.into_iter().collect::<Result<_>>()?;
        distinct_names(&mut sets);
        let rows = sets.iter().map(|set| set.rows).sum();
        let batch_size = config.training.batch_size as u64;
        if rows < batch_size {
            return Err(config.error(
                "training.batch_size",
                format!("{batch_size} rows per step, but an epoch of the data sets has only {rows} rows"),
            ));
        }
        let mut streams: Vec<Stream> = Vec::new();
        let counts: Vec<u64> = match config.data.batching {
            Batching::Mixed => vec![rows],
            Batching::PerDataset => sets.iter().map(|set| set.rows).collect(),
        };
        for rows in counts {
            let start = streams.last().map_or(0, |stream| stream.start + stream.rows);
            streams.push(Stream { start, rows, batches: rows.div_ceil(batch_size) });
        }
        let batches = streams.iter().map(|stream| stream.batches).sum();
        let data = &config.data;
        let (negatives, shuffle, no_duplicates) = (data.negatives, data.shuffle, data.no_duplicates);
        Ok(Self { sets, streams, rows, batches, batch_size, negatives, shuffle, no_duplicates, seed })
    }

    /// Number of rows of an epoch.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Number of batches of an epoch.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// The data sets, in the order of the configuration.
    pub fn sets(&self) -> &[TrainSet] {
        &self.sets
    }

    /// A hash of all rows and of what their order depends on: a cursor fits only data with the same digest.
    pub fn digest(&self) -> u64 {
        let mut digest = Xxh3::new();
        let mut add = |number: u64| digest.update(&number.to_le_bytes());
        for set in &self.sets {
            add(set.source.digest());
            add(set.samples);
            add(set.rows);
            add(set.loss as u64);
        }
        add(self.streams.len() as u64);
        add(self.batch_size);
        add(self.negatives as u64);
        add(u64::from(self.shuffle));
        add(u64::from(self.no_duplicates));
        add(self.seed);
        digest.digest()
    }

    /// An error about a row, with its file and line.
    pub fn error(&self, row: RowId, message: impl Into<String>) -> Error {
        self.sets[row.dataset as usize].source.error(row.row, message)
    }

    /// A sampler that continues from `cursor`, without end.
    ///
    /// # Errors
    /// The cursor does not fit this mixture.
    pub fn sampler(&self, cursor: &Cursor) -> Result<BatchSampler<'_>> {
        BatchSampler::at(self, cursor)
    }

    /// The stream of batch number `slot` of an epoch.
    fn stream_of(&self, epoch: u64, slot: u64) -> usize {
        let mut batch = slot;
        if self.shuffle && self.streams.len() > 1 {
            batch = Permutation::new(self.batches, self.seed, &[BATCHES, epoch]).at(slot);
        }
        let mut stream = 0;
        while batch >= self.streams[stream].batches {
            batch -= self.streams[stream].batches;
            stream += 1;
        }
        stream
    }

    /// The stream that contains a place of the epoch.
    fn stream_at(&self, place: u64) -> usize {
        self.streams.partition_point(|stream| stream.start + stream.rows <= place)
    }

    /// Number of rows of a stream's batch number `batch`.
    fn size_of(&self, stream: usize, batch: u64) -> u64 {
        self.batch_size.min(self.streams[stream].rows - batch * self.batch_size)
    }

    /// The row at a place of an epoch.
    fn example(&self, epoch: u64, place: u64) -> Result<Example> {
        let stream = self.stream_at(place);
        let Stream { start, rows, .. } = self.streams[stream];
        let mut within = place;
        if self.shuffle {
            within =
                start + Permutation::new(rows, self.seed, &[ROWS, epoch, stream as u64]).at(place - start);
        }
        let mut dataset = 0;
        while within >= self.sets[dataset].rows {
            within -= self.sets[dataset].rows;
            dataset += 1;
        }
        self.sets[dataset].example(dataset as u32, epoch, within, self.negatives)
    }
}

/// Yields the rows of one batch after another.
pub struct BatchSampler<'a> {
    mixture: &'a Mixture,
    epoch: u64,
    /// Number of batches of this epoch that are done.
    slot: u64,
    streams: Vec<StreamState>,
}

/// Progress of a stream in its epoch.
#[derive(Default)]
struct StreamState {
    batches: u64,
    /// Number of rows that have been read.
    read: u64,
    deferred: Vec<Deferred>,
}

/// A deferred row: its place in the epoch, and the hashes of its texts, so that it need not be read to be
/// tried again.
struct Deferred {
    place: u64,
    keys: Vec<u64>,
}

impl<'a> BatchSampler<'a> {
    fn at(mixture: &'a Mixture, cursor: &Cursor) -> Result<Self> {
        let streams = mixture.streams.iter().map(|_| StreamState::default()).collect();
        let mut sampler = Self { mixture, epoch: cursor.epoch, slot: 0, streams };
        let misfit = || {
            Error::Usage(
                "the checkpoint does not fit the training data: the data or the batch size have changed since"
                    .to_owned(),
            )
        };
        let mut done = cursor.position.checked_sub(cursor.deferred.len() as u64).ok_or_else(misfit)?;
        while done > 0 && sampler.slot < mixture.batches {
            let stream = mixture.stream_of(sampler.epoch, sampler.slot);
            let size = mixture.size_of(stream, sampler.streams[stream].batches);
            done = done.checked_sub(size).ok_or_else(misfit)?;
            sampler.streams[stream].batches += 1;
            sampler.streams[stream].read += size;
            sampler.slot += 1;
        }
        if done > 0 {
            return Err(misfit());
        }
        for place in &cursor.deferred {
            if *place >= mixture.rows {
                return Err(misfit());
            }
            let keys = mixture.example(sampler.epoch, *place)?.keys();
            let progress = &mut sampler.streams[mixture.stream_at(*place)];
            progress.read += 1;
            progress.deferred.push(Deferred { place: *place, keys });
        }
        let fits = |(progress, stream): (&StreamState, &Stream)| progress.read <= stream.rows;
        if !sampler.streams.iter().zip(&mixture.streams).all(fits) {
            return Err(misfit());
        }
        sampler.start_epoch_if_done();
        Ok(sampler)
    }

    /// The current position.
    pub fn cursor(&self) -> Cursor {
        Cursor {
            epoch: self.epoch,
            position: self.streams.iter().map(|stream| stream.read).sum(),
            deferred: self
                .streams
                .iter()
                .flat_map(|stream| stream.deferred.iter().map(|row| row.place))
                .collect(),
        }
    }

    /// Begins the next epoch if this one is done.
    fn start_epoch_if_done(&mut self) {
        if self.slot == self.mixture.batches {
            self.epoch += 1;
            self.slot = 0;
            self.streams.fill_with(StreamState::default);
        }
    }

    /// The rows of the next step.
    ///
    /// # Errors
    /// A row cannot be read.
    pub fn next_rows(&mut self) -> Result<SampledRows> {
        let mixture = self.mixture;
        let stream = mixture.stream_of(self.epoch, self.slot);
        let progress = &mut self.streams[stream];
        let size = mixture.size_of(stream, progress.batches) as usize;
        let examples = progress.take(mixture, self.epoch, stream, size)?;
        progress.batches += 1;
        self.slot += 1;
        let read: u64 = self.streams.iter().map(|stream| stream.read).sum();
        let deferred: usize = self.streams.iter().map(|stream| stream.deferred.len()).sum();
        let epoch = self.epoch as f64 + (read - deferred as u64) as f64 / mixture.rows as f64;
        self.start_epoch_if_done();
        Ok(SampledRows { examples, cursor: self.cursor(), epoch })
    }
}

impl StreamState {
    /// Takes `size` rows: first deferred ones that now fit, then new ones, then the remaining deferred ones.
    fn take(&mut self, mixture: &Mixture, epoch: u64, stream: usize, size: usize) -> Result<Vec<Example>> {
        let Stream { start, rows, .. } = mixture.streams[stream];
        let mut examples = Vec::with_capacity(size);
        let mut present: HashSet<u64> = HashSet::new();
        let mut deferred = Vec::new();
        for row in std::mem::take(&mut self.deferred) {
            if examples.len() < size && !row.keys.iter().any(|key| present.contains(key)) {
                present.extend(&row.keys);
                examples.push(mixture.example(epoch, row.place)?);
            } else {
                deferred.push(row);
            }
        }
        while examples.len() < size && self.read < rows {
            let place = start + self.read;
            let example = mixture.example(epoch, place)?;
            self.read += 1;
            if mixture.no_duplicates {
                let keys = example.keys();
                if deferred.len() < MAX_DEFERRED && keys.iter().any(|key| present.contains(key)) {
                    deferred.push(Deferred { place, keys });
                    continue;
                }
                present.extend(&keys);
            }
            examples.push(example);
        }
        let missing = size - examples.len();
        for row in deferred.drain(..missing) {
            examples.push(mixture.example(epoch, row.place)?);
        }
        self.deferred = deferred;
        Ok(examples)
    }
}

#[cfg(test)]
mod tests;
