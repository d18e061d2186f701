//! Scales embeddings to length 1.

use candle_core::{D, Tensor};

use crate::Result;

/// Lower bound of the length that an embedding is divided by, as in torch's `normalize`.
const MIN_LENGTH: f64 = 1e-12;

/// e (N, D) → e/‖e‖ (N, D), and ‖e‖ (N, 1).
pub(super) fn forward(e: &Tensor) -> Result<(Tensor, Tensor)> {
    let lengths = e.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(MIN_LENGTH)?;
    Ok((e.broadcast_div(&lengths)?, lengths))
}

/// d(e/‖e‖) (N, D) → de (N, D): the component along e does not change e/‖e‖ and is removed.
pub(super) fn backward(d: &Tensor, unit: &Tensor, lengths: &Tensor) -> Result<Tensor> {
    let along = (d * unit)?.sum_keepdim(D::Minus1)?;
    Ok((d - unit.broadcast_mul(&along)?)?.broadcast_div(lengths)?)
}
