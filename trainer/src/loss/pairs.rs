//! The common part of losses over pairs of embeddings: a similarity or distance of each pair, and its gradient.
//!
//! A loss computes a few numbers per row from these measures, on the CPU in f64, while the embeddings stay on their device. A GPU
//! waits for them.

use std::ops::Range;

use candle_core::{D, Tensor};

use super::{index, normalize};
use crate::Result;
use crate::data::batch::LossTable;

/// A similarity or distance of two embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// Dot product a·b.
    Dot,
    /// Cosine a·b / (‖a‖ ‖b‖).
    Cosine,
    /// Euclidean distance ‖a − b‖.
    Euclidean,
    /// Manhattan distance Σ |aᵢ − bᵢ|.
    Manhattan,
}

/// Lower bound of the distance that a gradient is divided by.
const MIN_DISTANCE: f64 = 1e-12;

/// The pairs of query and document of some rows.
pub(super) struct Pairs<'t> {
    queries: Vec<u32>,
    documents: Vec<u32>,
    offsets: Vec<usize>,
    scores: Vec<&'t [f32]>,
}

impl<'t> Pairs<'t> {
    /// The pairs of `rows`: each query with its positive, then with its negatives.
    pub(super) fn of_rows(table: &'t LossTable, rows: Range<usize>) -> Self {
        let mut pairs =
            Self { queries: Vec::new(), documents: Vec::new(), offsets: vec![0], scores: Vec::new() };
        for row in rows {
            let own = table.own.offsets[row] as usize..table.own.offsets[row + 1] as usize;
            for &column in &table.own.columns[own.clone()] {
                pairs.queries.push(table.queries[row]);
                pairs.documents.push(table.candidates[column as usize]);
            }
            pairs.offsets.push(pairs.documents.len());
            pairs.scores.push(table.scores.get(own).unwrap_or_default());
        }
        pairs
    }

    /// Computes the measure of all pairs, and from it the losses (B) and `weight` times their gradient (N, D). `loss` maps the
    /// measures and scores of a row to its loss and the derivative of the loss by each measure.
    pub(super) fn per_row(
        &self,
        embeddings: &Tensor,
        measure: Measure,
        weight: f64,
        loss: impl Fn(&[f64], &[f32]) -> (f64, Vec<f64>),
    ) -> Result<(Tensor, Tensor)> {
        self.all_rows(embeddings, measure, |values| {
            let rows = self.offsets.windows(2).zip(&self.scores);
            let (losses, derivatives): (Vec<f32>, Vec<Vec<f64>>) = rows
                .map(|(bounds, scores)| {
                    let (loss, derivatives) = loss(&values[bounds[0]..bounds[1]], scores);
                    (loss as f32, derivatives)
                })
                .unzip();
            (losses, derivatives.concat().into_iter().map(|derivative| derivative * weight).collect())
        })
    }

    /// Like [`Self::per_row`], with all rows at once: `loss` maps the measures of all pairs to the losses (B) and the derivative by
    /// each measure.
    pub(super) fn all_rows(
        &self,
        embeddings: &Tensor,
        measure: Measure,
        loss: impl FnOnce(&[f64]) -> (Vec<f32>, Vec<f64>),
    ) -> Result<(Tensor, Tensor)> {
        if self.queries.is_empty() {
            let (losses, _) = loss(&[]);
            return Ok((Tensor::new(losses, embeddings.device())?, embeddings.zeros_like()?));
        }
        let (queries, documents) = (index(&self.queries, embeddings)?, index(&self.documents, embeddings)?);
        let scaled = (measure == Measure::Cosine).then(|| normalize::forward(embeddings)).transpose()?;
        let e = scaled.as_ref().map_or(embeddings, |(unit, _)| unit);
        let (a, b) = (e.index_select(&queries, 0)?, e.index_select(&documents, 0)?); // (P, D)
        let values = match measure {
            Measure::Dot | Measure::Cosine => (&a * &b)?.sum(D::Minus1)?,
            Measure::Euclidean => (&a - &b)?.sqr()?.sum(D::Minus1)?.sqrt()?,
            Measure::Manhattan => (&a - &b)?.abs()?.sum(D::Minus1)?,
        }; // (P)
        let on_host: Vec<f64> = values.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        let (losses, derivatives) = loss(&on_host);
        let derivatives: Vec<f32> = derivatives.into_iter().map(|derivative| derivative as f32).collect();
        let derivatives = Tensor::from_vec(derivatives, (on_host.len(), 1), e.device())?; // (P, 1)
        let (da, db) = match measure {
            Measure::Dot | Measure::Cosine => {
                (b.broadcast_mul(&derivatives)?, a.broadcast_mul(&derivatives)?)
            }
            Measure::Euclidean => {
                let distance = values.unsqueeze(1)?.maximum(MIN_DISTANCE)?;
                let da = (a - b)?.broadcast_mul(&derivatives.div(&distance)?)?;
                (da.clone(), da.neg()?)
            }
            Measure::Manhattan => {
                let da = (a - b)?.sign()?.broadcast_mul(&derivatives)?;
                (da.clone(), da.neg()?)
            }
        };
        let d = e.zeros_like()?.index_add(&queries, &da, 0)?.index_add(&documents, &db, 0)?;
        let d = match &scaled {
            Some((unit, lengths)) => normalize::backward(&d, unit, lengths)?,
            None => d,
        };
        Ok((Tensor::new(losses, d.device())?, d))
    }
}
