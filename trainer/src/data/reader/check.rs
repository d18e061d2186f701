//! Checks every row of a file once, on all threads, while the file is read.

use std::collections::HashMap;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::index::Index;
use super::parser::Parser;
use super::records::{Record, RowError};
use super::table::DroppedNegatives;
use crate::system::heartbeat;

/// Bytes that are collected before the threads check them.
const COLLECTED: usize = 8 << 20;

/// Rows per task.
const ROWS: usize = 512;

/// The result for the rows checked so far, and the rows that wait to be checked.
#[derive(Default)]
pub(super) struct Checker {
    pub(super) index: Index,
    pub(super) digest: Xxh3,
    pub(super) found: Summary,
    bytes: Vec<u8>,
    /// Line of each pending row, and the end of its text in `bytes`.
    pending: Vec<(u64, usize)>,
}

/// What the rows of a file have.
#[derive(Default)]
pub(super) struct Summary {
    /// Whether any row has columns for negatives.
    pub(super) negatives: bool,
    pub(super) dropped: DroppedNegatives,
    /// Class of each row; empty if the rows have no labels.
    pub(super) labels: Vec<u32>,
    /// Label of each class.
    pub(super) classes: Vec<String>,
    numbers: HashMap<String, u32>,
    rows: u64,
}

/// What the rows of one task have.
#[derive(Default)]
struct ChunkSummary {
    negatives: bool,
    dropped: DroppedNegatives,
    labels: Vec<String>,
}

impl Checker {
    /// Adds a row; checks the pending rows once there are enough of them.
    pub(super) fn add(&mut self, record: &Record<'_>, parser: &Parser) -> Result<(), RowError> {
        self.index.push(record.offset);
        self.digest.update(record.bytes);
        self.digest.update(b"\n");
        self.bytes.extend_from_slice(record.bytes);
        self.pending.push((record.line, self.bytes.len()));
        if self.bytes.len() >= COLLECTED { self.check_pending(parser) } else { Ok(()) }
    }

    /// Checks the pending rows; the error is that of the first wrong row.
    pub(super) fn check_pending(&mut self, parser: &Parser) -> Result<(), RowError> {
        let Self { found, bytes, pending, .. } = self;
        let starts = [0].into_iter().chain(pending.iter().map(|(_, end)| *end));
        let rows: Vec<(u64, &[u8])> =
            pending.iter().zip(starts).map(|((line, end), start)| (*line, &bytes[start..*end])).collect();
        let summaries: Vec<Result<ChunkSummary, RowError>> =
            rows.par_chunks(ROWS).map(|rows| summarise(rows, parser)).collect();
        for (summary, rows) in summaries.into_iter().zip(rows.chunks(ROWS)) {
            found.add(summary?, rows.len() as u64);
        }
        pending.clear();
        bytes.clear();
        heartbeat::record_work();
        Ok(())
    }
}

/// Parses some rows.
fn summarise(rows: &[(u64, &[u8])], parser: &Parser) -> Result<ChunkSummary, RowError> {
    let (mut summary, mut cache) = (ChunkSummary::default(), None);
    for (number, (line, bytes)) in rows.iter().enumerate() {
        let (row, negatives) =
            parser.parse(bytes, &mut cache).map_err(|message| RowError { line: *line, message })?;
        summary.negatives |= negatives;
        if row.dropped > 0 && summary.dropped.negatives == 0 {
            summary.dropped.first = number as u64;
        }
        summary.dropped.negatives += row.dropped;
        summary.labels.extend(row.label);
    }
    Ok(summary)
}

impl Summary {
    fn add(&mut self, summary: ChunkSummary, rows: u64) {
        self.negatives |= summary.negatives;
        if self.dropped.negatives == 0 {
            self.dropped.first = self.rows + summary.dropped.first;
        }
        self.dropped.negatives += summary.dropped.negatives;
        for label in summary.labels {
            let Self { labels, classes, numbers, .. } = self;
            labels.push(*numbers.entry(label).or_insert_with_key(|label| {
                classes.push(label.clone());
                classes.len() as u32 - 1
            }));
        }
        self.rows += rows;
    }
}
