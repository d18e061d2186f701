//! Matryoshka representation learning (Kusupati et al. 2022), as sentence-transformers' MatryoshkaLoss: the first dimensions of an
//! embedding are trained to be an embedding themselves.
//!
//! ```text
//! loss = Σₖ wₖ · loss(e[:, ..dₖ] / ‖e[:, ..dₖ]‖)
//! ```

use candle_core::Tensor;

use super::normalize;
use crate::{Error, Result};

/// The dimensions on which a loss is evaluated.
#[derive(Clone, Debug, PartialEq)]
pub struct Matryoshka {
    /// Dimension dₖ and weight wₖ of each term.
    pub dims: Vec<(usize, f64)>,
}

impl Matryoshka {
    /// embeddings (N, D) → the weighted sums over the dimensions of the losses (B) and of the gradients (N, D) that `loss` returns.
    pub(super) fn evaluate(
        &self,
        embeddings: &Tensor,
        loss: impl Fn(&Tensor) -> Result<(Tensor, Tensor)>,
    ) -> Result<(Tensor, Tensor)> {
        let (_, width) = embeddings.dims2()?;
        let mut losses: Option<Tensor> = None;
        let mut d = embeddings.zeros_like()?;
        for &(dim, weight) in &self.dims {
            let (e, lengths) = normalize::forward(&embeddings.narrow(1, 0, dim)?.contiguous()?)?; // (N, dim)
            let (of_dim, de) = loss(&e)?;
            let of_dim = (of_dim * weight)?;
            losses = Some(match losses {
                Some(losses) => (losses + of_dim)?,
                None => of_dim,
            });
            let de = (normalize::backward(&de, &e, &lengths)? * weight)?;
            d = (d + de.pad_with_zeros(1, 0, width - dim)?)?;
        }
        let losses = losses.ok_or_else(|| Error::Bug("loss.matryoshka has no dims".to_owned()))?;
        Ok((losses, d))
    }
}
