//! Every row of a file looked at once, on all threads, while the file goes by.

use std::collections::HashMap;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::index::Index;
use super::records::Record;
use super::table::{Dropped, Parser, Wrong};
use crate::config::RowKind;
use crate::system::heartbeat;

/// Bytes that are gathered before the threads look at them.
const GATHERED: usize = 8 << 20;

/// Rows that one thread takes at a time.
const ROWS: usize = 512;

/// What is known of the rows so far, and those that wait to be looked at.
#[derive(Default)]
pub(super) struct Check {
    pub(super) index: Index,
    pub(super) digest: Xxh3,
    pub(super) found: Found,
    bytes: Vec<u8>,
    /// The line of each row that waits, and where its bytes end.
    waiting: Vec<(u64, usize)>,
}

/// What the rows have.
#[derive(Default)]
pub(super) struct Found {
    pub(super) kind: Option<RowKind>,
    /// Whether any row has columns of negatives.
    pub(super) negatives: bool,
    pub(super) dropped: Dropped,
    /// The class of each row, where they have one.
    pub(super) labels: Vec<u32>,
    /// The label of each class.
    pub(super) classes: Vec<String>,
    numbers: HashMap<String, u32>,
    rows: u64,
}

/// What one thread has found.
#[derive(Default)]
struct Part {
    negatives: bool,
    dropped: Dropped,
    labels: Vec<String>,
}

impl Check {
    /// One more row.
    pub(super) fn add(&mut self, record: &Record<'_>, parser: &Parser) -> Result<(), Wrong> {
        self.index.push(record.offset);
        self.digest.update(record.bytes);
        self.digest.update(b"\n");
        self.bytes.extend_from_slice(record.bytes);
        self.waiting.push((record.line, self.bytes.len()));
        if self.bytes.len() >= GATHERED { self.rest(parser) } else { Ok(()) }
    }

    /// Looks at the rows that wait; the first that is wrong is named.
    pub(super) fn rest(&mut self, parser: &Parser) -> Result<(), Wrong> {
        let Self { found, bytes, waiting, .. } = self;
        let starts = [0].into_iter().chain(waiting.iter().map(|(_, end)| *end));
        let rows: Vec<(u64, &[u8])> =
            waiting.iter().zip(starts).map(|((line, end), start)| (*line, &bytes[start..*end])).collect();
        let parts: Vec<Result<Part, Wrong>> = rows.par_chunks(ROWS).map(|rows| part(rows, parser)).collect();
        for (part, rows) in parts.into_iter().zip(rows.chunks(ROWS)) {
            found.add(part?, rows.len() as u64);
        }
        found.kind = parser.kind();
        waiting.clear();
        bytes.clear();
        heartbeat::record_work();
        Ok(())
    }
}

fn part(rows: &[(u64, &[u8])], parser: &Parser) -> Result<Part, Wrong> {
    let (mut part, mut known) = (Part::default(), None);
    for (number, (line, bytes)) in rows.iter().enumerate() {
        let (row, negatives) = parser.parse(bytes, &mut known).map_err(|message| (*line, message))?;
        part.negatives |= negatives;
        if row.dropped > 0 && part.dropped.negatives == 0 {
            part.dropped.first = number as u64;
        }
        part.dropped.negatives += row.dropped;
        part.labels.extend(row.label);
    }
    Ok(part)
}

impl Found {
    fn add(&mut self, part: Part, rows: u64) {
        self.negatives |= part.negatives;
        if self.dropped.negatives == 0 {
            self.dropped.first = self.rows + part.dropped.first;
        }
        self.dropped.negatives += part.dropped.negatives;
        for label in part.labels {
            let Self { labels, classes, numbers, .. } = self;
            labels.push(*numbers.entry(label).or_insert_with_key(|label| {
                classes.push(label.clone());
                classes.len() as u32 - 1
            }));
        }
        self.rows += rows;
    }
}
