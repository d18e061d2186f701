//! MPNet's attention bias by the distance from query to key, in buckets that widen with the distance (Raffel et al. 2020,
//! section 2.1): one table for all layers.

use candle_core::{DType, Tensor};

use super::params::{Gradients, Parameter, Visit};
use super::pass::Pass;
use super::weights::Weights;
use crate::Result;

/// Rows of the table.
pub const BUCKETS: usize = 32;
/// Distances from here on share the last bucket of their side.
const REACH: isize = 128;

/// The table.
#[derive(Debug)]
pub struct Relative {
    weight: Parameter, // (32, H)
}

impl Relative {
    /// Takes the table `name`.
    pub fn new(weights: &Weights, name: &str, heads: usize) -> Result<Self> {
        Ok(Self { weight: Parameter::frozen(weights.matrix(name, BUCKETS, heads)?) })
    }

    /// The bias of every distance, (H, 2·128 + 1).
    pub fn bias(&self, pass: &Pass) -> Result<Tensor> {
        let table = pass.value(&self.weight)?.to_dtype(DType::F32)?;
        Ok(table.index_select(&buckets(&table)?, 0)?.t()?.contiguous()?)
    }

    /// Adds the gradient of the bias to the table's.
    pub fn backward(&self, dbias: &Tensor, gradients: &Gradients) -> Result<()> {
        let Some(dweight) = gradients.of(&self.weight)? else { return Ok(()) };
        let sum = dweight.index_add(&buckets(&dweight)?, &dbias.t()?.contiguous()?, 0)?;
        Ok(dweight.slice_set(&sum, 0, 0)?)
    }

    /// Whether it is trained.
    pub fn trained(&self) -> bool {
        self.weight.slot().is_some()
    }

    /// The table under `name`.
    pub fn visit(&mut self, name: &str, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter(name, &mut self.weight)
    }
}

/// (2·128 + 1) of every distance, where `table` is.
fn buckets(table: &Tensor) -> Result<Tensor> {
    let all: Vec<u32> = (-REACH..=REACH).map(|distance| bucket(distance) as u32).collect();
    Ok(kernels::upload(&all, table.device())?)
}

/// The row of the table for a key `distance` tokens after its query: on each side one row for each of the first eight
/// distances, then eight that widen.
fn bucket(distance: isize) -> usize {
    const SIDE: usize = BUCKETS / 2;
    const EXACT: usize = SIDE / 2;
    let (side, far) = (if distance > 0 { SIDE } else { 0 }, distance.unsigned_abs());
    if far < EXACT {
        return side + far;
    }
    let wide = (far as f32 / EXACT as f32).ln() / (REACH as f32 / EXACT as f32).ln();
    side + (EXACT + (wide * EXACT as f32) as usize).min(SIDE - 1)
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_are_those_of_transformers() {
        // MPNetEncoder.relative_position_bucket of 0, −1, −2 …: where each bucket begins.
        let begins = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        for (n, &begin) in begins.iter().enumerate() {
            let end = begins.get(n + 1).copied().unwrap_or(300);
            for far in begin..end {
                assert_eq!(bucket(-far), n, "{far} before");
                if far > 0 {
                    assert_eq!(bucket(far), 16 + n, "{far} after");
                }
            }
        }
    }
}
