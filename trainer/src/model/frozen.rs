//! Whether ranks hold the same weights where nothing is trained, and so nothing handed round.

use candle_core::DType;
use xxhash_rust::xxh3::Xxh3;

use super::Model;
use crate::Result;

/// Places of a tensor that are looked at, and elements at each.
const PLACES: usize = 8;
const ELEMENTS: usize = 32;

impl Model {
    /// A digest of some elements of every tensor that is not trained: enough to tell one model from another, at no cost.
    pub fn frozen_digest(&self) -> Result<u64> {
        let mut digest = Xxh3::new();
        for (name, parameter) in self.parameters.iter().filter(|(_, parameter)| parameter.slot().is_none()) {
            digest.update(name.as_bytes());
            let values = parameter.value().flatten_all()?;
            let length = values.elem_count();
            for place in 0..PLACES {
                let start = length * place / PLACES;
                let some = values.narrow(0, start, ELEMENTS.min(length - start))?;
                digest.update(bytemuck::cast_slice(&some.to_dtype(DType::F32)?.to_vec1::<f32>()?));
            }
        }
        Ok(digest.digest())
    }
}
