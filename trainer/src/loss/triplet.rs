//! The triplet loss (Schroff et al. 2015), as sentence-transformers' TripletLoss: the positive shall be closer than the negative
//! by a margin.
//!
//! ```text
//! loss = 1/B Σᵢ 1/nᵢ Σⱼ max(0, d(qᵢ, pᵢ) − d(qᵢ, nᵢⱼ) + margin)
//! ```
//!
//! over the nᵢ negatives of row i.

use std::ops::Range;

use candle_core::Tensor;

use super::pairs::{Measure, Pairs};
use crate::Result;
use crate::config::Distance;
use crate::data::batch::LossTable;

/// The loss and its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Triplet {
    /// d.
    pub distance: Distance,
    /// In units of the distance.
    pub margin: f64,
}

impl Triplet {
    /// embeddings (N, D) → the loss of each of the table's rows `rows` (B), and `weight` times their gradient (N, D).
    pub(super) fn evaluate(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        let (measure, sign) = match self.distance {
            // A distance of 1 − cos.
            Distance::Cosine => (Measure::Cosine, -1.0),
            Distance::Euclidean => (Measure::Euclidean, 1.0),
            Distance::Manhattan => (Measure::Manhattan, 1.0),
        };
        Pairs::of_rows(table, rows).per_row(embeddings, measure, weight, |measures, _| {
            let each = ((measures.len() - 1) as f64).recip();
            let mut loss = 0.0;
            let mut changes = vec![0.0; measures.len()];
            for negative in 1..measures.len() {
                let excess = sign * (measures[0] - measures[negative]) + self.margin;
                // Not `excess > 0`: what is not a number shall be seen.
                if excess <= 0.0 {
                    continue;
                }
                loss += each * excess;
                changes[0] += each * sign;
                changes[negative] -= each * sign;
            }
            (loss, changes)
        })
    }
}
