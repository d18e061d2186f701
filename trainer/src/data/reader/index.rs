//! Where the rows of a file are, in little memory: the place of about one row in every four kilobytes.
//!
//! A row is found by cutting the records from the last known place on, so it costs a page more to read than it has; and a
//! hundred million short rows take some twenty megabytes.

use std::ops::Range;

/// Bytes between places that are kept, at least.
const APART: u64 = 4096;

/// Places of rows, which are added in order.
#[derive(Debug, Default)]
pub(super) struct Index {
    places: Vec<Place>,
    rows: u64,
    end: u64,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    row: u64,
    offset: u64,
}

impl Index {
    /// One more row, which begins at `offset`.
    pub(super) fn push(&mut self, offset: u64) {
        if self.places.last().is_none_or(|last| offset - last.offset >= APART) {
            self.places.push(Place { row: self.rows, offset });
        }
        self.rows += 1;
    }

    /// All rows are in; the text ends at `end`.
    pub(super) fn finish(&mut self, end: u64) {
        self.end = end;
        self.places.shrink_to_fit();
    }

    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// A part of the text that has `row`, and how many rows come before it there.
    pub(super) fn find(&self, row: u64) -> (Range<u64>, u64) {
        let next = self.places.partition_point(|place| place.row <= row);
        let place = self.places[next - 1];
        (place.offset..self.places.get(next).map_or(self.end, |next| next.offset), row - place.row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_lies_in_a_part_that_begins_with_a_known_one() {
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
            assert!(index.places.len() as u64 <= 1 + end / APART);
            for (row, offset) in offsets.iter().enumerate() {
                let (part, before) = index.find(row as u64);
                let first = offsets.iter().position(|other| *other == part.start).unwrap();
                assert_eq!(first as u64 + before, row as u64);
                assert!(part.contains(offset) && offset - part.start < APART);
                assert!(part.end >= offset + lengths[row]);
            }
        }
    }
}
