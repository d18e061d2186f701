//! Losses that see two embeddings at a time: a measure of each pair, and its gradient.
//!
//! What a loss makes of the measures is a few numbers a row, computed on the host in f64, which a GPU waits for; the embeddings
//! stay where they are.

use std::ops::Range;

use candle_core::{D, Tensor};

use super::{index, normalize};
use crate::Result;
use crate::data::batch::LossTable;

/// What is measured of two embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// a·b
    Dot,
    /// a·b / (‖a‖ ‖b‖)
    Cosine,
    /// ‖a − b‖
    Euclidean,
    /// Σ |aᵢ − bᵢ|
    Manhattan,
}

/// Distances shorter than this have no direction.
const SHORTEST: f64 = 1e-12;

/// Queries and the columns they are compared with, row by row.
pub(super) struct Pairs<'t> {
    queries: Vec<u32>,
    documents: Vec<u32>,
    offsets: Vec<usize>,
    scores: Vec<&'t [f32]>,
}

impl<'t> Pairs<'t> {
    /// Each of `rows` with its own columns: its positive first, then its negatives.
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

    /// Measures all pairs and lets `loss` judge a row: the measures and scores of its columns → its loss, and what each measure adds
    /// to it. The gradient is `weight` times that, as d(embeddings) (N, D).
    pub(super) fn per_row(
        &self,
        embeddings: &Tensor,
        measure: Measure,
        weight: f64,
        loss: impl Fn(&[f64], &[f32]) -> (f64, Vec<f64>),
    ) -> Result<(Tensor, Tensor)> {
        self.all_rows(embeddings, measure, |values| {
            let rows = self.offsets.windows(2).zip(&self.scores);
            let (losses, changes): (Vec<f32>, Vec<Vec<f64>>) = rows
                .map(|(bounds, scores)| {
                    let (loss, changes) = loss(&values[bounds[0]..bounds[1]], scores);
                    (loss as f32, changes)
                })
                .unzip();
            (losses, changes.concat().into_iter().map(|change| change * weight).collect())
        })
    }

    /// As [`Self::per_row`], all rows at once: the measures → the losses, and d(loss)/d(measure) of each pair.
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
        let (losses, changes) = loss(&on_host);
        let changes: Vec<f32> = changes.into_iter().map(|change| change as f32).collect();
        let changes = Tensor::from_vec(changes, (on_host.len(), 1), e.device())?; // (P, 1)
        let (da, db) = match measure {
            Measure::Dot | Measure::Cosine => (b.broadcast_mul(&changes)?, a.broadcast_mul(&changes)?),
            Measure::Euclidean => {
                let apart = values.unsqueeze(1)?.maximum(SHORTEST)?;
                let da = (a - b)?.broadcast_mul(&changes.div(&apart)?)?;
                (da.clone(), da.neg()?)
            }
            Measure::Manhattan => {
                let da = (a - b)?.sign()?.broadcast_mul(&changes)?;
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
