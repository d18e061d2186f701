//! Losses: embeddings in, the loss of each row and the gradient of the embeddings out. They know neither
//! encoders nor ranks.
//!
//! A loss gets all embeddings of a batch, the table of its rows, and the range of rows that this rank evaluates. It returns the
//! losses of these rows, and their part of the gradient of the mean over all rows of the batch. So the sum over ranks is the
//! gradient.

mod cosent;
mod distill;
mod infonce;
mod matryoshka;
mod normalize;
mod pairs;
#[cfg(test)]
mod tests;
mod triplet;

use std::ops::Range;

use candle_core::{DType, Tensor};

pub use cosent::CoSent;
pub use distill::{Kl, MarginMse};
pub use infonce::InfoNce;
pub use matryoshka::Matryoshka;
pub use triplet::Triplet;

use crate::Result;
use crate::config::{self, LossKind};
use crate::data::batch::LossTable;

/// A loss over the rows of one table.
trait RowLoss {
    /// Whether the embeddings must have length 1.
    const NORMALIZED: bool = false;

    /// embeddings (N, D) → the loss of each of the table's rows `rows` (B), and `weight` times the gradient of their sum (N, D).
    fn evaluate(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)>;
}

/// The losses of a run. Each table of a batch names one of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Losses {
    /// Cross-entropy of the positive among all candidates.
    pub info_nce: InfoNce,
    /// The positive closer than the negative by a margin.
    pub triplet: Triplet,
    /// Order of scored pairs.
    pub cosent: CoSent,
    /// Differences of a teacher's scores.
    pub margin_mse: MarginMse,
    /// Distribution of a teacher's scores.
    pub kl: Kl,
    /// Dimensions on which the loss is also evaluated; none: only on whole embeddings.
    pub matryoshka: Option<Matryoshka>,
    /// Whether the embeddings passed to [`Losses::evaluate`] have length 1.
    pub normalized: bool,
}

impl Losses {
    /// The losses of the section `loss` of a configuration. `normalized`: the model returns embeddings of length 1.
    pub fn new(loss: &config::Loss, normalized: bool) -> Self {
        Self {
            info_nce: InfoNce {
                temperature: loss.temperature,
                in_batch_negatives: loss.in_batch_negatives,
                symmetric: loss.symmetric,
                false_negative_margin: loss.false_negative_margin,
            },
            triplet: Triplet { distance: loss.distance, margin: loss.margin },
            cosent: CoSent { scale: loss.scale },
            margin_mse: MarginMse,
            kl: Kl { temperature: loss.temperature, teacher_temperature: loss.teacher_temperature },
            matryoshka: loss.matryoshka.as_ref().map(|matryoshka| Matryoshka { dims: matryoshka.pairs() }),
            normalized,
        }
    }

    /// embeddings (N, D) → the loss of each of the batch's rows `rows` (B), and their part of the gradient of the mean loss over
    /// all rows of the batch (N, D).
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn evaluate(
        &self,
        embeddings: &Tensor,
        tables: &[LossTable],
        rows: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        match &self.matryoshka {
            Some(matryoshka) => {
                matryoshka.evaluate(embeddings, |e| self.evaluate_tables(e, tables, rows.clone()))
            }
            None => self.evaluate_tables(embeddings, tables, rows),
        }
    }

    fn evaluate_tables(
        &self,
        embeddings: &Tensor,
        tables: &[LossTable],
        rows: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        let all: usize = tables.iter().map(|table| table.rows.len()).sum();
        let weight = (all as f64).recip();
        let mut losses = kernels::zeros(rows.len(), DType::F32, embeddings.device())?;
        let mut sum: Option<Tensor> = None;
        for table in tables {
            let place = |row: usize| table.rows.partition_point(|&other| (other as usize) < row);
            let local = place(rows.start)..place(rows.end);
            if local.is_empty() {
                continue;
            }
            let (of_rows, d) = self.evaluate_table(embeddings, table, local.clone(), weight)?;
            let places: Vec<u32> = table.rows[local].iter().map(|&row| row - rows.start as u32).collect();
            losses = losses.index_add(&index(&places, embeddings)?, &of_rows, 0)?;
            sum = Some(match sum {
                Some(sum) => (sum + d)?,
                None => d,
            });
        }
        let d = sum.map_or_else(|| embeddings.zeros_like(), Ok)?;
        Ok((losses, d))
    }

    fn evaluate_table(
        &self,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        match table.loss {
            LossKind::InfoNce => self.evaluate_loss(&self.info_nce, embeddings, table, rows, weight),
            LossKind::Triplet => self.evaluate_loss(&self.triplet, embeddings, table, rows, weight),
            LossKind::CoSent => self.evaluate_loss(&self.cosent, embeddings, table, rows, weight),
            LossKind::MarginMse => self.evaluate_loss(&self.margin_mse, embeddings, table, rows, weight),
            LossKind::Kl => self.evaluate_loss(&self.kl, embeddings, table, rows, weight),
        }
    }

    /// Evaluates a loss, on embeddings scaled to length 1 if it needs them so.
    fn evaluate_loss<L: RowLoss>(
        &self,
        loss: &L,
        embeddings: &Tensor,
        table: &LossTable,
        rows: Range<usize>,
        weight: f64,
    ) -> Result<(Tensor, Tensor)> {
        if self.normalized || !L::NORMALIZED {
            return loss.evaluate(embeddings, table, rows, weight);
        }
        let (e, lengths) = normalize::forward(embeddings)?; // (N, D), (N, 1)
        let (losses, d) = loss.evaluate(&e, table, rows, weight)?;
        Ok((losses, normalize::backward(&d, &e, &lengths)?))
    }
}

/// The losses of a configuration without a section `loss`, for embeddings of length 1.
impl Default for Losses {
    fn default() -> Self {
        Self::new(&config::Loss::default(), true)
    }
}

/// Indices as a tensor on the device of `tensor`.
fn index(indices: &[u32], tensor: &Tensor) -> Result<Tensor> {
    Ok(kernels::upload(indices, tensor.device())?)
}
