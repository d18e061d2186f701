//! The triplet loss (Schroff et al. 2015), as sentence-transformers' TripletLoss: the positive is closer to the query than the
//! negative by a margin.
//!
//! ```text
//! loss = 1/B Σᵢ 1/nᵢ Σⱼ max(0, d(qᵢ, pᵢ) − d(qᵢ, nᵢⱼ) + margin)
//! ```
//!
//! over the nᵢ negatives of row i.

use std::ops::Range;

use candle_core::Tensor;

use super::RowLoss;
use super::pairs::{Measure, Pairs};
use crate::Result;
use crate::config::Distance;
use crate::data::batch::LossTable;

/// The triplet loss and its hyperparameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Triplet {
    /// Distance d.
    pub distance: Distance,
    /// Margin, in units of the distance.
    pub margin: f64,
}

impl RowLoss for Triplet {
    fn evaluate(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        let (measure, sign) = match self.distance {
            // The distance is 1 − cos.
            Distance::Cosine => (Measure::Cosine, -1.0),
            Distance::Euclidean => (Measure::Euclidean, 1.0),
            Distance::Manhattan => (Measure::Manhattan, 1.0),
        };
        Pairs::of_rows(table, rows).per_row(embeddings, measure, weight, |measures, _| {
            let weight = ((measures.len() - 1) as f64).recip();
            let mut loss = 0.0;
            let mut changes = vec![0.0; measures.len()];
            for negative in 1..measures.len() {
                let excess = sign * (measures[0] - measures[negative]) + self.margin;
                // Not `excess > 0`: a NaN must reach the loss.
                if excess <= 0.0 {
                    continue;
                }
                loss += weight * excess;
                changes[0] += weight * sign;
                changes[negative] -= weight * sign;
            }
            (loss, changes)
        })
    }
}
