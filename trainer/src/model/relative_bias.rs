//! MPNet's relative attention bias: the distance from query to key selects a row of a table that all layers
//! share. Buckets widen with the distance (Raffel et al. 2020, section 2.1).

use candle_core::{DType, Tensor};

use super::params::{Gradients, Parameter, ParameterKind, ParameterVisitor};
use super::pass::Pass;
use super::weights::Weights;
use crate::Result;

/// Number of rows of the table: `relative_attention_num_buckets` of config.json.
pub const BUCKETS: usize = 32;
/// Distance from which on all distances share the last bucket of their side, `max_distance` in transformers.
const MAX_DISTANCE: isize = 128;

/// Table of relative attention biases.
#[derive(Debug)]
pub struct RelativeBias {
    weight: Parameter, // (32, H)
}

impl RelativeBias {
    /// Takes the table `name` (32, H).
    pub fn new(weights: &Weights, name: &str, heads: usize) -> Result<Self> {
        // It is not an embedding: `model.freeze: [embeddings]` leaves it trained.
        Ok(Self { weight: Parameter::new(weights.matrix(name, BUCKETS, heads)?, ParameterKind::Weight) })
    }

    /// Bias of each head for each distance from −128 to 128, f32 (H, 257).
    pub fn bias(&self, pass: &Pass) -> Result<Tensor> {
        let table = pass.value(&self.weight)?.to_dtype(DType::F32)?;
        Ok(table.index_select(&buckets(&table)?, 0)?.t()?.contiguous()?)
    }

    /// Adds the gradient of the table, given that of [`Self::bias`]: dbias (H, 257).
    pub fn backward(&self, dbias: &Tensor, gradients: &Gradients) -> Result<()> {
        let Some(dweight) = gradients.grad_slot(&self.weight)? else { return Ok(()) };
        let sum = dweight.index_add(&buckets(&dweight)?, &dbias.t()?.contiguous()?, 0)?;
        Ok(dweight.slice_set(&sum, 0, 0)?)
    }

    /// Visits the table `name`.
    pub fn visit(&mut self, name: &str, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        visitor.parameter(name, &mut self.weight)
    }
}

/// Row of the table for each distance, u32 (257), on the device of `table`.
fn buckets(table: &Tensor) -> Result<Tensor> {
    let all: Vec<u32> = (-MAX_DISTANCE..=MAX_DISTANCE).map(|distance| bucket(distance) as u32).collect();
    Ok(kernels::upload(&all, table.device())?)
}

/// Row of the table for a key `distance` tokens after its query. On each side, the first eight distances have
/// a row each, and the next eight rows cover ranges that widen.
fn bucket(distance: isize) -> usize {
    const SIDE: usize = BUCKETS / 2;
    const EXACT: usize = SIDE / 2;
    let (side, far) = (if distance > 0 { SIDE } else { 0 }, distance.unsigned_abs());
    if far < EXACT {
        return side + far;
    }
    let wide = (far as f32 / EXACT as f32).ln() / (MAX_DISTANCE as f32 / EXACT as f32).ln();
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
