//! `loss`: what training minimises.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::check::Check;
use crate::config::{Distance, LossKind};

/// The loss function. Keys that belong to one loss are ignored by the others.
///
/// ```yaml
/// loss:
///   kind: info_nce
///   temperature: 0.05
///   matryoshka: {dims: [384, 128]}
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Loss {
    /// Loss of the data sets that have no `loss` of their own. Similarity rows always have cosent.
    pub kind: LossKind,
    /// Temperature by which similarities are divided (info_nce, kl), above 0. It is 1 / `scale` of sentence-transformers.
    pub temperature: f64,
    /// Use the other rows' texts as negatives (info_nce). If false, only the row's own negatives count.
    pub in_batch_negatives: bool,
    /// Add the loss in the other direction, in which each positive has to find its query (info_nce). Needs `in_batch_negatives`.
    pub symmetric: bool,
    /// Leave out candidates that are known to be positives of the query (info_nce).
    pub mask_known_positives: bool,
    /// Leave out candidates whose cosine with the query exceeds the positive's by more than this (info_nce). Default: none is left
    /// out.
    pub false_negative_margin: Option<f64>,
    /// Margin by which the negative must be farther away than the positive (triplet), in units of `distance`.
    pub margin: f64,
    /// Distance between two embeddings (triplet).
    pub distance: Distance,
    /// Factor of the differences of cosines (cosent), above 0.
    pub scale: f64,
    /// Temperature by which the teacher's scores are divided (kl), above 0.
    pub teacher_temperature: f64,
    /// Train truncated embeddings too (Matryoshka representation learning), with any loss. Default: only whole embeddings are
    /// trained.
    pub matryoshka: Option<Matryoshka>,
}

/// Matryoshka representation learning: the loss is computed on the first dimensions of each embedding, for
/// several numbers of dimensions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Matryoshka {
    /// Numbers of dimensions to train. The whole embedding is trained only if its size is listed. Required.
    pub dims: Vec<usize>,
    /// Weight of the loss at each of `dims`. Default: 1 each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Vec<f64>>,
}

impl Matryoshka {
    /// Each length with its weight.
    pub fn pairs(&self) -> Vec<(usize, f64)> {
        let weight = |i: usize| self.weights.as_ref().map_or(1.0, |weights| weights[i]);
        self.dims.iter().enumerate().map(|(i, &dim)| (dim, weight(i))).collect()
    }

    fn check(&self, check: &Check) -> Result<()> {
        check.that(!self.dims.is_empty(), "dims", "missing: expected a list of lengths")?;
        for (i, &dim) in self.dims.iter().enumerate() {
            let key = format!("dims.{i}");
            check.at_least_1(&key, dim as u64)?;
            check.that(!self.dims[..i].contains(&dim), &key, &format!("{dim} is in the list twice"))?;
        }
        let Some(weights) = &self.weights else { return Ok(()) };
        let (found, expected) = (weights.len(), self.dims.len());
        check.that(
            found == expected,
            "weights",
            &format!("expected {expected}, one for each of `dims`, found {found}"),
        )?;
        weights
            .iter()
            .enumerate()
            .try_for_each(|(i, &weight)| check.positive(&format!("weights.{i}"), weight))
    }
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            kind: LossKind::InfoNce,
            temperature: 0.02,
            in_batch_negatives: true,
            symmetric: false,
            mask_known_positives: true,
            false_negative_margin: None,
            margin: 5.0,
            distance: Distance::Euclidean,
            scale: 20.0,
            teacher_temperature: 1.0,
            matryoshka: None,
        }
    }
}

impl Loss {
    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        check.positive("temperature", self.temperature)?;
        check.that(
            self.in_batch_negatives || !self.symmetric,
            "symmetric",
            "expected false where loss.in_batch_negatives is false: a positive can only find its query among those of the batch",
        )?;
        let margin = self.false_negative_margin.unwrap_or(0.0);
        check.that(
            margin.is_finite(),
            "false_negative_margin",
            "expected a number, a difference of cosines",
        )?;
        check.non_negative("margin", self.margin)?;
        check.positive("scale", self.scale)?;
        check.positive("teacher_temperature", self.teacher_temperature)?;
        match &self.matryoshka {
            Some(matryoshka) => matryoshka.check(&check.section("matryoshka")),
            None => Ok(()),
        }
    }
}
