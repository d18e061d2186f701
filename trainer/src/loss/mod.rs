//! Losses: embeddings in, the loss and its gradient out. They know neither encoders nor ranks.
//!
//! A loss gets all embeddings of a batch, the table of its rows, and which of them it is to judge: those of one rank. It returns
//! their losses, and what they add to the gradient of the mean over all rows of the batch; so the sum over ranks is the gradient.

mod cosent;
mod distill;
mod infonce;
mod matryoshka;
mod pairs;
#[cfg(test)]
mod tests;
mod triplet;
mod normalize;

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

/// What is minimised: the losses of a run, of which each table of a batch names one.
#[derive(Clone, Debug, PartialEq)]
pub struct Losses {
    /// The positive among all candidates.
    pub info_nce: InfoNce,
    /// The positive before the negatives.
    pub triplet: Triplet,
    /// Scored pairs in their order.
    pub cosent: CoSent,
    /// A teacher's differences.
    pub margin_mse: MarginMse,
    /// A teacher's distribution.
    pub kl: Kl,
    /// Whether shorter embeddings are judged too.
    pub matryoshka: Option<Matryoshka>,
    /// Whether embeddings come with length 1. InfoNCE compares cosines, whatever the model returns.
    pub unit: bool,
}

impl Losses {
    /// As the configuration has them, for embeddings that come with length 1 or not (`unit`).
    pub fn new(loss: &config::Loss, unit: bool) -> Self {
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
            unit,
        }
    }

    /// embeddings (N, D) → the loss of each of the batch's rows `rows` (B), and what they add to d(mean loss)/d(embeddings) (N, D).
    /// The mean is over all rows of the batch, whoever has the others.
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
            let (of_rows, d) = match table.loss {
                _ if local.is_empty() => continue,
                LossKind::InfoNce if self.unit => {
                    self.info_nce.evaluate(embeddings, table, local.clone(), weight)?
                }
                LossKind::InfoNce => {
                    let (e, lengths) = normalize::forward(embeddings)?; // (N, D), (N, 1)
                    let (of_rows, d) = self.info_nce.evaluate(&e, table, local.clone(), weight)?;
                    (of_rows, normalize::backward(&d, &e, &lengths)?)
                }
                LossKind::Triplet => self.triplet.evaluate(embeddings, table, local.clone(), weight)?,
                LossKind::CoSent => self.cosent.evaluate(embeddings, table, local.clone(), weight)?,
                LossKind::MarginMse => self.margin_mse.evaluate(embeddings, table, local.clone(), weight)?,
                LossKind::Kl => self.kl.evaluate(embeddings, table, local.clone(), weight)?,
            };
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
}

/// Those of the defaults of a configuration.
impl Default for Losses {
    fn default() -> Self {
        Self::new(&config::Loss::default(), true)
    }
}

/// Rows of `of`, where they are.
fn index(indices: &[u32], of: &Tensor) -> Result<Tensor> {
    Ok(kernels::upload(indices, of.device())?)
}
