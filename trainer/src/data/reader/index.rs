//! A sparse index of a file's rows: the offset of about one row in every four kilobytes.
//!
//! A row is found by reading records from the nearest indexed row before it, at most a page more than the row
//! itself. The index of a hundred million short rows takes about twenty megabytes.

use std::ops::Range;

/// Minimum number of bytes between two entries.
const SPACING: u64 = 4096;

/// Offsets of rows, added in order.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: Vec<Entry>,
    rows: u64,
    end: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    row: u64,
    offset: u64,
}

impl Index {
    /// Adds a row that begins at `offset`.
    pub(super) fn push(&mut self, offset: u64) {
        if self.entries.last().is_none_or(|last| offset - last.offset >= SPACING) {
            self.entries.push(Entry { row: self.rows, offset });
        }
        self.rows += 1;
    }

    /// Ends the index; the text ends at `end`.
    pub(super) fn finish(&mut self, end: u64) {
        self.end = end;
        self.entries.shrink_to_fit();
    }

    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// A range of the text that contains `row`, and the number of rows before it in that range.
    pub(super) fn find(&self, row: u64) -> (Range<u64>, u64) {
        let next = self.entries.partition_point(|entry| entry.row <= row);
        let entry = self.entries[next - 1];
        (entry.offset..self.entries.get(next).map_or(self.end, |next| next.offset), row - entry.row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_lies_in_a_range_that_begins_with_an_indexed_row() {
        for lengths in [&[1_u64; 20_000][..], &[4095, 1, 4096, 70_000, 2, 3, 4090, 9][..], &[5][..]] {
            let mut offsets: Vec<u64> = vec![7];
            offsets.extend(lengths.iter().scan(7, |at, length| {
                *at += length;
                Some(*at)
            }));
            let end = offsets.pop().unwrap();
            let mut index = Index::default();
            offsets.iter().for_each(|offset| index.push(*offset));
            index.finish(end);
            assert_eq!(index.rows(), lengths.len() as u64);
            assert!(index.entries.len() as u64 <= 1 + end / SPACING);
            for (row, offset) in offsets.iter().enumerate() {
                let (part, before) = index.find(row as u64);
                let first = offsets.iter().position(|other| *other == part.start).unwrap();
                assert_eq!(first as u64 + before, row as u64);
                assert!(part.contains(offset) && offset - part.start < SPACING);
                assert!(part.end >= offset + lengths[row]);
            }
        }
    }
}
