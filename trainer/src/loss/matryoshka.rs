//! Matryoshka representation learning (Kusupati et al. 2022), as sentence-transformers' MatryoshkaLoss: the first numbers of an
//! embedding shall be an embedding of their own.
//!
//! ```text
//! loss = Σₖ wₖ · loss(e[:, ..dₖ] / ‖e[:, ..dₖ]‖)
//! ```

use candle_core::Tensor;

use super::normalize;
use crate::{Error, Result};

/// Around any loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Matryoshka {
    /// dₖ and wₖ.
    pub dims: Vec<(usize, f64)>,
}

impl Matryoshka {
    /// embeddings (N, D) → the weighted sum of what `loss` has for each width, and of its gradients (N, D).
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
