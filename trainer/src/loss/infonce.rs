//! InfoNCE over the candidates of a batch (van den Oord et al. 2018), as sentence-transformers' MultipleNegativesRankingLoss:
//!
//! ```text
//! loss = 1/B Σᵢ ( log Σⱼ exp(qᵢ·dⱼ/τ) − qᵢ·dₚ₍ᵢ₎/τ )
//! ```
//!
//! over the documents j of the batch, except those known to be positives of the row.

use std::ops::Range;

use candle_core::Tensor;
use kernels::infonce::{self, Candidates};

use super::{RowLoss, index};
use crate::Result;
use crate::data::batch::{CsrIndices, LossTable};

/// InfoNCE and its hyperparameters.
#[derive(Clone, Debug, PartialEq)]
pub struct InfoNce {
    /// Temperature τ, above 0.
    pub temperature: f64,
    /// Whether documents of other rows are negatives. If not, only the row's own negatives are.
    pub in_batch_negatives: bool,
    /// Whether the loss is the mean of both directions: queries among documents and positives among queries. Needs in-batch
    /// negatives.
    pub symmetric: bool,
    /// Candidates whose cosine exceeds the positive's by more than this are not negatives. None: all are.
    pub false_negative_margin: Option<f64>,
}

impl RowLoss for InfoNce {
    /// Its similarity is the cosine.
    const NORMALIZED: bool = true;

    fn evaluate(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        let queries = index(&table.queries[rows.clone()], embeddings)?;
        let candidates = index(&table.candidates, embeddings)?;
        let q = embeddings.index_select(&queries, 0)?; // (B, D)
        let c = embeddings.index_select(&candidates, 0)?; // (M, D)
        let lists = if self.in_batch_negatives { &table.excluded } else { &table.own }.of(rows.clone());
        let lists = infonce::CsrIndices { offsets: &lists.offsets, columns: &lists.columns };
        let by_query = infonce::InfoNce {
            positives: &table.positives[rows.clone()],
            candidates: match (self.in_batch_negatives, lists.columns.is_empty()) {
                (true, true) => Candidates::All,
                (true, false) => Candidates::AllBut(lists),
                (false, _) => Candidates::Only(lists),
            },
            scale: self.temperature.recip() as f32,
            margin: self.false_negative_margin.map(|margin| margin as f32),
        };
        let weight = weight as f32;
        let directions = if self.symmetric { 2.0 } else { 1.0 };
        let tape = infonce::forward(&q, &c, &by_query)?;
        let (dq, dc) = infonce::backward(&q, &c, &by_query, &tape, weight / directions)?;
        let mut losses = tape.losses;
        let mut d = embeddings.zeros_like()?.index_add(&queries, &dq, 0)?.index_add(&candidates, &dc, 0)?;

        if self.symmetric {
            let queries = index(&table.queries, embeddings)?;
            let q = embeddings.index_select(&queries, 0)?; // (all B, D)
            let positives: Vec<u32> =
                table.positives[rows.clone()].iter().map(|&p| table.candidates[p as usize]).collect();
            let positives = index(&positives, embeddings)?;
            let p = embeddings.index_select(&positives, 0)?; // (B, D)
            let diagonal: Vec<u32> = rows.clone().map(|row| row as u32).collect();
            let excluded = transposed(table).of(rows);
            let by_positive = infonce::InfoNce {
                positives: &diagonal,
                candidates: Candidates::AllBut(infonce::CsrIndices {
                    offsets: &excluded.offsets,
                    columns: &excluded.columns,
                }),
                ..by_query
            };
            let tape = infonce::forward(&p, &q, &by_positive)?;
            let (dp, dq) = infonce::backward(&p, &q, &by_positive, &tape, weight / directions)?;
            d = d.index_add(&positives, &dp, 0)?.index_add(&queries, &dq, 0)?;
            losses = ((losses + tape.losses)? / 2.0)?;
        }
        Ok((losses, d))
    }
}

/// For each row's positive, the other rows that have it among their known positives: queries that are not negatives of it.
fn transposed(table: &LossTable) -> CsrIndices {
    let rows = table.positives.len();
    let mut row_of = vec![None; table.candidates.len()];
    for (row, &positive) in table.positives.iter().enumerate() {
        row_of[positive as usize] = Some(row);
    }
    let mut excluded = vec![Vec::new(); rows];
    for (row, bounds) in table.excluded.offsets.windows(2).enumerate() {
        for &column in &table.excluded.columns[bounds[0] as usize..bounds[1] as usize] {
            if let Some(positive_of) = row_of[column as usize]
                && positive_of != row
            {
                excluded[positive_of].push(row as u32);
            }
        }
    }
    let mut lists = CsrIndices { offsets: vec![0], columns: Vec::new() };
    for row in excluded {
        lists.columns.extend(row);
        lists.offsets.push(lists.columns.len() as u32);
    }
    lists
}
