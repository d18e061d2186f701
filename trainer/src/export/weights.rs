//! Writes weights as safetensors: one file, or shards with an index.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use crate::Result;
use crate::system::progress::Progress;
use crate::system::safetensors;

/// Largest size of a file in bytes, as on the hub. A larger tensor gets a file for itself.
pub(super) const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// Writes `model.safetensors` into `folder`, or `model-00001-of-0000N.safetensors` … and
/// `model.safetensors.index.json`.
pub(super) fn write(folder: &Path, tensors: &[(String, Tensor)], limit: usize) -> Result<()> {
    let shards = split_shards(tensors, limit);
    if shards.len() == 1 {
        return safetensors::write(&folder.join("model.safetensors"), tensors);
    }
    let total: usize = tensors.iter().map(|(_, tensor)| bytes(tensor)).sum();
    let mut map = Map::new();
    let mut progress = Progress::new("weights, MB", (total / 1_000_000) as u64, 0);
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        safetensors::write(&folder.join(&name), shard)?;
        map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), Value::from(name.as_str()))));
        progress.advance((shard.iter().map(|(_, tensor)| bytes(tensor)).sum::<usize>() / 1_000_000) as u64);
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    super::write_json(&folder.join("model.safetensors.index.json"), &index)
}

/// Groups consecutive tensors into shards of at most `limit` bytes.
fn split_shards(tensors: &[(String, Tensor)], limit: usize) -> Vec<&[(String, Tensor)]> {
    let mut shards = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (index, (_, tensor)) in tensors.iter().enumerate() {
        if size + bytes(tensor) > limit && index > start {
            shards.push(&tensors[start..index]);
            (start, size) = (index, 0);
        }
        size += bytes(tensor);
    }
    shards.push(&tensors[start..]);
    shards
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * DType::F32.size_in_bytes()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, safetensors::load};

    use super::*;

    fn tensors() -> Vec<(String, Tensor)> {
        let tensor = |n: usize| Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap();
        [("a", 3), ("b", 2), ("c", 9), ("d", 1), ("e", 1)].map(|(name, n)| (name.into(), tensor(n))).into()
    }

    #[test]
    fn small_models_are_one_file() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &tensors(), MAX_SHARD_BYTES).unwrap();
        let back = load(folder.path().join("model.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(back.len(), 5);
        assert_eq!(back["b"].to_vec1::<f32>().unwrap(), [0.0, 1.0]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn large_models_are_shards_with_an_index() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &tensors(), 20).unwrap();
        let index: Value = serde_json::from_slice(
            &std::fs::read(folder.path().join("model.safetensors.index.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(index["metadata"]["total_size"], 64);
        for (name, number) in [("a", 1), ("b", 1), ("c", 2), ("d", 3), ("e", 3)] {
            let file = format!("model-{number:05}-of-00003.safetensors");
            assert_eq!(index["weight_map"][name], file);
            assert!(load(folder.path().join(file), &Device::Cpu).unwrap().contains_key(name));
        }
    }
}
