//! Digest of the frozen parameters, by which ranks check that they have the same model.

use candle_core::DType;
use xxhash_rust::xxh3::Xxh3;

use super::Model;
use crate::Result;

/// Number of places of a tensor that are sampled.
const PLACES: usize = 8;
/// Number of elements that are sampled at each place.
const ELEMENTS: usize = 32;

impl Model {
    /// Digest of samples of every frozen parameter: enough to tell models apart, at little cost.
    pub fn frozen_digest(&self) -> Result<u64> {
        let mut digest = Xxh3::new();
        for (name, parameter) in self.parameters().filter(|(_, parameter)| !parameter.is_trained()) {
            digest.update(name.as_bytes());
            let values = parameter.value().flatten_all()?;
            let length = values.elem_count();
            for place in 0..PLACES {
                let start = length * place / PLACES;
                let sample = values.narrow(0, start, ELEMENTS.min(length - start))?;
                digest.update(bytemuck::cast_slice(&sample.to_dtype(DType::F32)?.to_vec1::<f32>()?));
            }
        }
        Ok(digest.digest())
    }
}
