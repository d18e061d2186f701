//! A batch: the list of its unique sequences, and the table by which the loss reads their embeddings.
//!
//! Rows exist only for the loss. The encoder sees a list of sequences, each text once however often it occurs, so
//! chunks and ranks may cut that list as they like.

use std::ops::Range;

use crate::config::LossKind;

/// One text as the encoder sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sequence {
    /// Token ids, special tokens included; never empty.
    pub ids: Vec<u32>,
    /// Leading tokens that mean pooling leaves out: the prompt's, where the model says `include_prompt: false`.
    pub skip: u32,
}

/// Lists of candidate columns, one a row, laid end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lists {
    /// (B+1) row i's columns are `columns[offsets[i]..offsets[i + 1]]`.
    pub offsets: Vec<u32>,
    /// Ascending within a row.
    pub columns: Vec<u32>,
}

impl Lists {
    /// Those of some rows.
    pub fn of(&self, rows: Range<usize>) -> Self {
        let offsets = &self.offsets[rows.start..=rows.end];
        let (first, last) = (offsets[0], offsets[rows.len()]);
        Self {
            offsets: offsets.iter().map(|offset| offset - first).collect(),
            columns: self.columns[first as usize..last as usize].to_vec(),
        }
    }
}

/// Which embeddings a loss compares: the rows of a batch that have this loss. Indices point into [`Batch::sequences`] (queries,
/// candidates) or into `candidates` (everything called a column).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// How they are judged.
    pub loss: LossKind,
    /// (B) their numbers in the batch, ascending.
    pub rows: Vec<u32>,
    /// (B) the sequence of each row's query.
    pub queries: Vec<u32>,
    /// (M) the sequence of each column: the positives of all rows, then their first negatives, their second, …
    pub candidates: Vec<u32>,
    /// (B) the column of each row's positive.
    pub positives: Vec<u32>,
    /// Columns that row i must not count as negatives: its own positive's text, or another known positive of its query.
    /// Empty lists where `mask_known_positives` is off.
    pub excluded: Lists,
    /// Row i's own columns, its positive first and then its negatives, less the excluded. The candidates without in-batch
    /// negatives.
    pub own: Lists,
    /// What the data say of each column of `own`: a pair's score, or a teacher's. Empty where the loss does not ask.
    pub scores: Vec<f32>,
}

impl Table {
    /// How many candidates beyond each row's own positive are masked, because they are known to answer its query, and of how many.
    /// Candidates are all columns if `in_batch`, else a row's own.
    fn masked(&self, in_batch: bool) -> (usize, usize) {
        let (rows, columns) = (self.queries.len(), self.candidates.len());
        match in_batch {
            true => (self.excluded.columns.len(), rows * columns.saturating_sub(1)),
            // Every column is one row's own, and `own` lacks those that are masked.
            false => (columns - self.own.columns.len(), columns - rows),
        }
    }
}

/// Where a row came from, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowId {
    /// Index into the configuration's `data.train`.
    pub dataset: u32,
    /// Row number in that data set, from 0.
    pub row: u64,
}

/// Where the reader of the training rows stands: enough to go on with the very next batch.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cursor {
    /// Epochs finished.
    pub epoch: u64,
    /// Rows of this epoch's order that were looked at.
    pub position: u64,
    /// Rows that were looked at but put off, because a text of theirs stood in the batch already (`no_duplicates`).
    pub deferred: Vec<u64>,
}

/// The rows of one optimizer step.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Unique texts. A sequence's index here is its number in the global batch.
    pub sequences: Vec<Sequence>,
    /// What the losses compare: one table for each loss that the batch has rows of.
    pub tables: Vec<Table>,
    /// (B) where each row came from.
    pub rows: Vec<RowId>,
    /// Where to go on after this batch.
    pub cursor: Cursor,
    /// Epochs done after this batch, a fraction.
    pub epoch: f64,
}

impl Batch {
    /// Tokens of the unique sequences: what the encoder computes.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.ids.len()).sum()
    }

    /// Share of the candidates beyond each row's own positive that InfoNCE masks.
    pub fn masked(&self, in_batch: bool) -> f64 {
        let tables = self.tables.iter().filter(|table| table.loss == LossKind::InfoNce);
        let (masked, others) = tables
            .map(|table| table.masked(in_batch))
            .fold((0, 0), |(masked, others), of_table| (masked + of_table.0, others + of_table.1));
        if others == 0 { 0.0 } else { masked as f64 / others as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_rows_of_lists_are_lists() {
        let lists = Lists { offsets: vec![0, 2, 2, 5], columns: vec![1, 4, 0, 2, 3] };
        assert_eq!(lists.of(0..3), lists);
        assert_eq!(lists.of(1..3), Lists { offsets: vec![0, 0, 3], columns: vec![0, 2, 3] });
        assert_eq!(lists.of(2..2), Lists { offsets: vec![0], columns: vec![] });
    }

    #[test]
    fn what_is_masked_is_counted_beyond_the_own_positive() {
        // Three rows, a negative each; row 0 masks row 2's positive and its own negative.
        let table = Table {
            queries: vec![0, 1, 2],
            candidates: vec![3, 4, 5, 6, 7, 8],
            positives: vec![0, 1, 2],
            excluded: Lists { offsets: vec![0, 2, 2, 2], columns: vec![2, 3] },
            own: Lists { offsets: vec![0, 1, 3, 5], columns: vec![0, 1, 4, 2, 5] },
            ..Table::default()
        };
        assert_eq!(table.masked(true), (2, 15));
        assert_eq!(table.masked(false), (1, 3));
        assert_eq!(Table::default().masked(true), (0, 0));
    }
}
