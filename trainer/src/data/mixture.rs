//! Which rows make which step: all data sets, in an order that is a pure function of the seed and a cursor.
//!
//! A *lane* is a stream of rows that batches are cut from: one for all data sets when batches mix them, else one a data
//! set. In an epoch each lane has an order of its own (`permutation`), and batch n of a lane has exactly
//! `min(batch_size, what is left)` rows, so the number of batches is known in advance: ceil(rows / batch_size), summed
//! over the lanes. Nothing that was drawn is kept: [`Cursor`] holds a position and the rows put off, and the walk goes on
//! from there as if it had never stopped.
//!
//! `no_duplicates`: a row with a text that another row of the batch has already is put off to a later batch; what could
//! not be placed by the end of the epoch goes in anyway.

use std::collections::HashSet;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::batch::{Cursor, RowId};
use super::permutation::Permutation;
pub use super::set::{Example, Set};
use crate::config::{Batching, Config};
use crate::{Error, Result};

/// What the orders are drawn for.
const ROWS: u64 = 3;
const BATCHES: u64 = 4;

/// Rows that may wait for a batch without their texts. Beyond that a row goes in as it comes.
const WAITING: usize = 1 << 16;

/// All training data, open.
pub struct Mixture {
    sets: Vec<Set>,
    lanes: Vec<Lane>,
    rows: u64,
    batches: u64,
    batch_size: u64,
    negatives: usize,
    shuffle: bool,
    no_duplicates: bool,
    seed: u64,
}

/// A stream that batches are cut from: `rows` places of the epoch, from `start` on.
struct Lane {
    start: u64,
    rows: u64,
    batches: u64,
}

/// Names that were made from files may be alike: the second `train` is called `train-2`.
fn distinct_names(sets: &mut [Set]) {
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
pub struct Picked {
    /// In the order of the batch.
    pub examples: Vec<Example>,
    /// Where to go on.
    pub cursor: Cursor,
    /// Epochs done after these rows, a fraction.
    pub epoch: f64,
}

impl Mixture {
    /// Opens `data.train` and checks every row.
    ///
    /// # Errors
    /// A file cannot be opened or read; a row is wrong; there are fewer rows than one batch has.
    pub fn open(config: &Config) -> Result<Self> {
        let seed = config.seed;
        let opened: Vec<Result<Set>> =
            config.data.train.par_iter().enumerate().map(|(i, set)| Set::open(config, i, set)).collect();
        // In the order of the configuration, so that the same error comes first every time.
        let mut sets: Vec<Set> = opened.into_iter().collect::<Result<_>>()?;
        distinct_names(&mut sets);
        let rows = sets.iter().map(|set| set.rows).sum();
        let batch_size = config.training.batch_size as u64;
        if rows < batch_size {
            return Err(config.error(
                "training.batch_size",
                format!("{batch_size} rows a step, but the data sets have only {rows} an epoch"),
            ));
        }
        let mut lanes: Vec<Lane> = Vec::new();
        let counts: Vec<u64> = match config.data.batching {
            Batching::Mixed => vec![rows],
            Batching::PerDataset => sets.iter().map(|set| set.rows).collect(),
        };
        for rows in counts {
            let start = lanes.last().map_or(0, |lane| lane.start + lane.rows);
            lanes.push(Lane { start, rows, batches: rows.div_ceil(batch_size) });
        }
        let batches = lanes.iter().map(|lane| lane.batches).sum();
        let data = &config.data;
        let (negatives, shuffle, no_duplicates) = (data.negatives, data.shuffle, data.no_duplicates);
        Ok(Self { sets, lanes, rows, batches, batch_size, negatives, shuffle, no_duplicates, seed })
    }

    /// Rows of an epoch.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Batches of an epoch, exactly.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// The data sets, in the order of the configuration.
    pub fn sets(&self) -> &[Set] {
        &self.sets
    }

    /// A number that follows from all rows and from what their order depends on: a cursor only fits the same.
    pub fn digest(&self) -> u64 {
        let mut digest = Xxh3::new();
        let mut add = |number: u64| digest.update(&number.to_le_bytes());
        for set in &self.sets {
            add(set.source.digest());
            add(set.samples);
            add(set.rows);
            add(set.loss as u64);
        }
        add(self.lanes.len() as u64);
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

    /// Goes through the batches from `cursor` on, without end.
    ///
    /// # Errors
    /// The cursor is not of this mixture.
    pub fn walk(&self, cursor: &Cursor) -> Result<Walk<'_>> {
        Walk::at(self, cursor)
    }

    /// The lane of the batch number `slot` of an epoch.
    fn lane_of(&self, epoch: u64, slot: u64) -> usize {
        let mut batch = slot;
        if self.shuffle && self.lanes.len() > 1 {
            batch = Permutation::new(self.batches, self.seed, &[BATCHES, epoch]).at(slot);
        }
        let mut lane = 0;
        while batch >= self.lanes[lane].batches {
            batch -= self.lanes[lane].batches;
            lane += 1;
        }
        lane
    }

    /// The lane that a place of the epoch belongs to.
    fn lane_at(&self, place: u64) -> usize {
        self.lanes.partition_point(|lane| lane.start + lane.rows <= place)
    }

    /// Rows of a lane's batch number `batch`.
    fn size_of(&self, lane: usize, batch: u64) -> u64 {
        self.batch_size.min(self.lanes[lane].rows - batch * self.batch_size)
    }

    /// The row at one place of an epoch.
    fn example(&self, epoch: u64, place: u64) -> Result<Example> {
        let lane = self.lane_at(place);
        let Lane { start, rows, .. } = self.lanes[lane];
        let mut within = place;
        if self.shuffle {
            within = start + Permutation::new(rows, self.seed, &[ROWS, epoch, lane as u64]).at(place - start);
        }
        let mut dataset = 0;
        while within >= self.sets[dataset].rows {
            within -= self.sets[dataset].rows;
            dataset += 1;
        }
        self.sets[dataset].example(dataset as u32, epoch, within, self.negatives)
    }
}

/// The batches of a mixture, one after another.
pub struct Walk<'a> {
    mixture: &'a Mixture,
    epoch: u64,
    /// Batches of this epoch that are done.
    slot: u64,
    lanes: Vec<Progress>,
}

/// How far a lane is in its epoch.
#[derive(Default)]
struct Progress {
    batches: u64,
    /// Rows looked at.
    looked: u64,
    waiting: Vec<Waiting>,
}

/// A row put off: its place in the epoch, and its texts' keys, so that it need not be read to be tried again.
struct Waiting {
    place: u64,
    keys: Vec<u64>,
}

impl<'a> Walk<'a> {
    fn at(mixture: &'a Mixture, cursor: &Cursor) -> Result<Self> {
        let lanes = mixture.lanes.iter().map(|_| Progress::default()).collect();
        let mut walk = Self { mixture, epoch: cursor.epoch, slot: 0, lanes };
        let foreign = || {
            Error::Usage(
                "the checkpoint stands at a place that these data do not have: the data or the batch size have changed"
                    .to_owned(),
            )
        };
        let mut done = cursor.position.checked_sub(cursor.deferred.len() as u64).ok_or_else(foreign)?;
        while done > 0 && walk.slot < mixture.batches {
            let lane = mixture.lane_of(walk.epoch, walk.slot);
            let size = mixture.size_of(lane, walk.lanes[lane].batches);
            done = done.checked_sub(size).ok_or_else(foreign)?;
            walk.lanes[lane].batches += 1;
            walk.lanes[lane].looked += size;
            walk.slot += 1;
        }
        if done > 0 {
            return Err(foreign());
        }
        for place in &cursor.deferred {
            if *place >= mixture.rows {
                return Err(foreign());
            }
            let keys = mixture.example(walk.epoch, *place)?.keys();
            let progress = &mut walk.lanes[mixture.lane_at(*place)];
            progress.looked += 1;
            progress.waiting.push(Waiting { place: *place, keys });
        }
        let fits = |(progress, lane): (&Progress, &Lane)| progress.looked <= lane.rows;
        if !walk.lanes.iter().zip(&mixture.lanes).all(fits) {
            return Err(foreign());
        }
        walk.turn();
        Ok(walk)
    }

    /// Where the walk stands.
    pub fn cursor(&self) -> Cursor {
        Cursor {
            epoch: self.epoch,
            position: self.lanes.iter().map(|lane| lane.looked).sum(),
            deferred: self.lanes.iter().flat_map(|lane| lane.waiting.iter().map(|row| row.place)).collect(),
        }
    }

    /// Begins the next epoch where this one is done.
    fn turn(&mut self) {
        if self.slot == self.mixture.batches {
            self.epoch += 1;
            self.slot = 0;
            self.lanes.fill_with(Progress::default);
        }
    }

    /// The rows of the next step.
    ///
    /// # Errors
    /// A row cannot be read.
    pub fn step(&mut self) -> Result<Picked> {
        let mixture = self.mixture;
        let lane = mixture.lane_of(self.epoch, self.slot);
        let progress = &mut self.lanes[lane];
        let size = mixture.size_of(lane, progress.batches) as usize;
        let examples = progress.fill(mixture, self.epoch, lane, size)?;
        progress.batches += 1;
        self.slot += 1;
        let looked: u64 = self.lanes.iter().map(|lane| lane.looked).sum();
        let waiting: usize = self.lanes.iter().map(|lane| lane.waiting.len()).sum();
        let epoch = self.epoch as f64 + (looked - waiting as u64) as f64 / mixture.rows as f64;
        self.turn();
        Ok(Picked { examples, cursor: self.cursor(), epoch })
    }
}

impl Progress {
    /// Takes `size` rows: those that wait, then new ones, then whatever waits.
    fn fill(&mut self, mixture: &Mixture, epoch: u64, lane: usize, size: usize) -> Result<Vec<Example>> {
        let Lane { start, rows, .. } = mixture.lanes[lane];
        let mut examples = Vec::with_capacity(size);
        let mut present: HashSet<u64> = HashSet::new();
        let mut still = Vec::new();
        for row in std::mem::take(&mut self.waiting) {
            if examples.len() < size && !row.keys.iter().any(|key| present.contains(key)) {
                present.extend(&row.keys);
                examples.push(mixture.example(epoch, row.place)?);
            } else {
                still.push(row);
            }
        }
        while examples.len() < size && self.looked < rows {
            let place = start + self.looked;
            let example = mixture.example(epoch, place)?;
            self.looked += 1;
            if mixture.no_duplicates {
                let keys = example.keys();
                if still.len() < WAITING && keys.iter().any(|key| present.contains(key)) {
                    still.push(Waiting { place, keys });
                    continue;
                }
                present.extend(&keys);
            }
            examples.push(example);
        }
        let missing = size - examples.len();
        for row in still.drain(..missing) {
            examples.push(mixture.example(epoch, row.place)?);
        }
        self.waiting = still;
        Ok(examples)
    }
}

#[cfg(test)]
mod tests;
