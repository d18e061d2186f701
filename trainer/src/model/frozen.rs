//! What is not trained: which parameters, and whether ranks hold the same of what is never handed round.

use candle_core::DType;
use xxhash_rust::xxh3::Xxh3;

use super::Model;
use crate::Result;
use crate::config::Freeze;

/// Places of a tensor that are looked at, and elements at each.
const PLACES: usize = 8;
const ELEMENTS: usize = 32;

/// Whether a parameter is of a kind that is not to be trained.
pub(super) fn is(name: &str, kinds: &[Freeze]) -> bool {
    let norm = name.to_lowercase().contains("norm");
    kinds.iter().any(|kind| match kind {
        Freeze::Embeddings => name.starts_with("embed") && !norm,
        Freeze::Norms => norm,
    })
}

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
