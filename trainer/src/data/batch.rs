//! A batch: the list of its unique sequences, and the tables that tell each loss which embeddings to compare.
//!
//! Rows exist only for the loss. The encoder sees a list of sequences in which each text occurs once, and
//! this list can be cut into chunks and divided among ranks in any way.

use std::ops::Range;

use crate::config::LossKind;

/// The token ids of one text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sequence {
    /// Token ids, special tokens included. Never empty.
    pub ids: Vec<u32>,
    /// Number of leading tokens that mean pooling leaves out: the prompt's, where the model says
    /// `include_prompt: false`.
    pub skip: u32,
}

/// A list of candidate columns for each row, in compressed-sparse-row form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CsrIndices {
    /// (B+1) The columns of row i are `columns[offsets[i]..offsets[i + 1]]`.
    pub offsets: Vec<u32>,
    /// Ascending within a row.
    pub columns: Vec<u32>,
}

impl CsrIndices {
    /// The lists of a range of rows.
    pub fn of(&self, rows: Range<usize>) -> Self {
        let offsets = &self.offsets[rows.start..=rows.end];
        let (first, last) = (offsets[0], offsets[rows.len()]);
        Self {
            offsets: offsets.iter().map(|offset| offset - first).collect(),
            columns: self.columns[first as usize..last as usize].to_vec(),
        }
    }
}

/// Which embeddings a loss compares, for the B rows of a batch that have this loss.
///
/// `queries` and `candidates` are indices of [`Batch::sequences`]; a *column* is an index of `candidates`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossTable {
    /// The loss of these rows.
    pub loss: LossKind,
    /// (B) Numbers of the rows in the batch, ascending.
    pub rows: Vec<u32>,
    /// (B) Sequence of each row's query.
    pub queries: Vec<u32>,
    /// (M) Sequence of each column: the positives of all rows, then their first negatives, their second, …
    pub candidates: Vec<u32>,
    /// (B) Column of each row's positive.
    pub positives: Vec<u32>,
    /// Columns that a row must not count as negatives: the text of its own positive, or another known
    /// positive of its query. Empty lists if `mask_known_positives` is off.
    pub excluded: CsrIndices,
    /// Columns of a row's own positive and negatives, in this order, without the excluded ones. Without
    /// in-batch negatives these are its candidates.
    pub own: CsrIndices,
    /// Score of each column of `own` in the data: the pair's, or a teacher's. Empty if the loss does not use
    /// scores.
    pub scores: Vec<f32>,
}

impl LossTable {
    /// Number of masked candidates, known to answer their row's query, and number of all candidates; a row's
    /// own positive counts for neither. Candidates are all columns if `in_batch`, else the row's own.
    fn masked(&self, in_batch: bool) -> (usize, usize) {
        let (rows, columns) = (self.queries.len(), self.candidates.len());
        match in_batch {
            true => (self.excluded.columns.len(), rows * columns.saturating_sub(1)),
            // Every column belongs to one row, and `own` lacks the masked ones.
            false => (columns - self.own.columns.len(), columns - rows),
        }
    }
}

/// Identifies a row in error messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowId {
    /// Index of the data set in `data.train`.
    pub dataset: u32,
    /// Number of the row in that data set, from 0.
    pub row: u64,
}

/// Position in the training data: enough to continue with exactly the next batch.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cursor {
    /// Number of finished epochs.
    pub epoch: u64,
    /// Number of rows of this epoch that have been read.
    pub position: u64,
    /// Places in the epoch of rows that have been read but deferred, because a text of theirs was already in
    /// the batch (`no_duplicates`).
    pub deferred: Vec<u64>,
}

/// The rows of one optimizer step.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Unique texts; the index of a sequence is its number in the global batch.
    pub sequences: Vec<Sequence>,
    /// One table for each loss that rows of the batch have.
    pub tables: Vec<LossTable>,
    /// (B) Origin of each row.
    pub rows: Vec<RowId>,
    /// Position after this batch.
    pub cursor: Cursor,
    /// Epochs done after this batch, with a fraction.
    pub epoch: f64,
}

impl Batch {
    /// Number of tokens of the unique sequences, which the encoder computes.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.ids.len()).sum()
    }

    /// Fraction of the candidates that InfoNCE masks; a row's own positive is not counted.
    pub fn masked(&self, in_batch: bool) -> f64 {
        let tables = self.tables.iter().filter(|table| table.loss.traits().in_batch_negatives);
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
    fn a_range_of_rows_has_their_lists() {
        let lists = CsrIndices { offsets: vec![0, 2, 2, 5], columns: vec![1, 4, 0, 2, 3] };
        assert_eq!(lists.of(0..3), lists);
        assert_eq!(lists.of(1..3), CsrIndices { offsets: vec![0, 0, 3], columns: vec![0, 2, 3] });
        assert_eq!(lists.of(2..2), CsrIndices { offsets: vec![0], columns: vec![] });
    }

    #[test]
    fn masked_candidates_are_counted_without_the_own_positive() {
        // Three rows, a negative each; row 0 masks row 2's positive and its own negative.
        let table = LossTable {
            queries: vec![0, 1, 2],
            candidates: vec![3, 4, 5, 6, 7, 8],
            positives: vec![0, 1, 2],
            excluded: CsrIndices { offsets: vec![0, 2, 2, 2], columns: vec![2, 3] },
            own: CsrIndices { offsets: vec![0, 1, 3, 5], columns: vec![0, 1, 4, 2, 5] },
            ..LossTable::default()
        };
        assert_eq!(table.masked(true), (2, 15));
        assert_eq!(table.masked(false), (1, 3));
        assert_eq!(LossTable::default().masked(true), (0, 0));
    }
}
