//! Embeddings scaled to length 1, and back.

use candle_core::{D, Tensor};

use crate::Result;

/// A length that nothing is divided by less than, as torch's `normalize` has it.
const SHORTEST: f64 = 1e-12;

/// e (N, D) → e/‖e‖ (N, D), and ‖e‖ (N, 1).
pub(super) fn forward(e: &Tensor) -> Result<(Tensor, Tensor)> {
    let lengths = e.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(SHORTEST)?;
    Ok((e.broadcast_div(&lengths)?, lengths))
}

/// d(e/‖e‖) (N, D) → de (N, D): what lies along e does not change the direction.
pub(super) fn backward(d: &Tensor, unit: &Tensor, lengths: &Tensor) -> Result<Tensor> {
    let along = (d * unit)?.sum_keepdim(D::Minus1)?;
    Ok((d - unit.broadcast_mul(&along)?)?.broadcast_div(lengths)?)
}
