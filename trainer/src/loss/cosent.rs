//! CoSENT for scored pairs (Huang et al. 2024), as sentence-transformers' CoSENTLoss: a pair with a higher score has a higher
//! cosine than every pair with a lower score.
//!
//! ```text
//! loss = log(1 + Σ exp(scale · (cosⱼ − cosᵢ)))    over all i, j with scoreᵢ > scoreⱼ
//! ```
//!
//! All scored pairs of a batch share this one number, and each of them has it as its loss. So in a batch with rows of other
//! losses it is weighted by the number of scored pairs, and a batch of scored pairs alone has exactly this loss. Sorting by score
//! computes the sum in O(B log B).

use std::ops::Range;

use candle_core::Tensor;

use super::RowLoss;
use super::pairs::{Measure, Pairs};
use crate::Result;
use crate::data::batch::LossTable;

/// CoSENT and its hyperparameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CoSent {
    /// Factor of the differences of cosines, above 0.
    pub scale: f64,
}

impl RowLoss for CoSent {
    fn evaluate(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        let count = table.queries.len();
        // Each row is compared with the rows of all ranks.
        Pairs::of_rows(table, 0..count).all_rows(embeddings, Measure::Cosine, |cosines| {
            let (loss, changes) = self.of(cosines, &table.scores);
            let local = |row| if rows.contains(&row) { weight * count as f64 } else { 0.0 };
            let changes = changes.into_iter().enumerate().map(|(row, change)| local(row) * change).collect();
            (vec![loss as f32; rows.len()], changes)
        })
    }
}

impl CoSent {
    /// The loss and its derivative by each cosine.
    fn of(&self, cosines: &[f64], scores: &[f32]) -> (f64, Vec<f64>) {
        let mut order: Vec<usize> = (0..cosines.len()).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        let equal = || order.chunk_by(|&a, &b| scores[a] == scores[b]);
        // log Σ exp(−scale · cos) over the pairs with a higher score, and log Σ exp(scale · cos) over those with a lower one.
        let (mut above, mut below) =
            (vec![f64::NEG_INFINITY; cosines.len()], vec![f64::NEG_INFINITY; cosines.len()]);
        let mut sum = f64::NEG_INFINITY;
        for pairs in equal().rev() {
            pairs.iter().for_each(|&pair| above[pair] = sum);
            sum = pairs.iter().fold(sum, |sum, &pair| log_add(sum, -self.scale * cosines[pair]));
        }
        let mut sum = f64::NEG_INFINITY;
        for pairs in equal() {
            pairs.iter().for_each(|&pair| below[pair] = sum);
            sum = pairs.iter().fold(sum, |sum, &pair| log_add(sum, self.scale * cosines[pair]));
        }
        let loss = (0..cosines.len())
            .fold(0.0, |loss, pair| log_add(loss, self.scale * cosines[pair] + above[pair]));
        let change = |pair: usize| {
            let z = self.scale * cosines[pair];
            self.scale * ((z + above[pair] - loss).exp() - (below[pair] - z - loss).exp())
        };
        (loss, (0..cosines.len()).map(change).collect())
    }
}

/// log(exp(a) + exp(b)).
fn log_add(a: f64, b: f64) -> f64 {
    let (high, low) = if a > b { (a, b) } else { (b, a) };
    if low == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}
