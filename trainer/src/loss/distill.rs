//! Losses for distillation: a teacher has scored each row's positive and negatives.
//!
//! [`MarginMse`] (Hofstätter et al. 2020), as sentence-transformers' MarginMSELoss:
//!
//! ```text
//! loss = 1/B Σᵢ 1/nᵢ Σⱼ ((qᵢ·pᵢ − qᵢ·nᵢⱼ) − (tᵢₚ − tᵢⱼ))²
//! ```
//!
//! [`Kl`] (Lin et al. 2020), as sentence-transformers' DistillKLDivLoss:
//!
//! ```text
//! loss = 1/B Σᵢ τ² KL(softmax(tᵢ/τₜ) ‖ softmax(qᵢ·cᵢ/τ))
//! ```
//!
//! over the row's positive and negatives cᵢ. Both use only differences of the teacher's scores.

use std::ops::Range;

use candle_core::Tensor;

use super::RowLoss;
use super::pairs::{Measure, Pairs};
use crate::Result;
use crate::data::batch::LossTable;

/// MarginMSE: squared error of the differences between the positive's and the negatives' scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MarginMse;

/// KL divergence from the teacher's distribution over the row's candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kl {
    /// Temperature τ of the student, above 0.
    pub temperature: f64,
    /// Temperature τₜ of the teacher, above 0.
    pub teacher_temperature: f64,
}

impl RowLoss for MarginMse {
    fn evaluate(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        Pairs::of_rows(table, rows).per_row(embeddings, Measure::Dot, weight, |dots, scores| {
            let teacher = |column: usize| f64::from(scores[column]);
            let weight = ((dots.len() - 1) as f64).recip();
            let mut loss = 0.0;
            let mut changes = vec![0.0; dots.len()];
            for negative in 1..dots.len() {
                let error = (dots[0] - dots[negative]) - (teacher(0) - teacher(negative));
                loss += weight * error * error;
                changes[0] += 2.0 * weight * error;
                changes[negative] -= 2.0 * weight * error;
            }
            (loss, changes)
        })
    }
}

impl RowLoss for Kl {
    fn evaluate(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        Pairs::of_rows(table, rows).per_row(embeddings, Measure::Dot, weight, |dots, scores| {
            let student = log_softmax(dots.iter().map(|dot| dot / self.temperature));
            let teacher =
                log_softmax(scores.iter().map(|&score| f64::from(score) / self.teacher_temperature));
            // A probability of 0 contributes 0, although its logarithm is −∞.
            let term = |(t, s): (&f64, &f64)| if *t == f64::NEG_INFINITY { 0.0 } else { t.exp() * (t - s) };
            let divergence: f64 = teacher.iter().zip(&student).map(term).sum();
            let change = |(t, s): (&f64, &f64)| self.temperature * (s.exp() - t.exp());
            let changes = teacher.iter().zip(&student).map(change).collect();
            (self.temperature.powi(2) * divergence, changes)
        })
    }
}

fn log_softmax(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let values: Vec<f64> = values.collect();
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = top + values.iter().map(|value| (value - top).exp()).sum::<f64>().ln();
    values.into_iter().map(|value| value - log_sum).collect()
}
