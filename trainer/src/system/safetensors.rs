//! Writes safetensors files piece by piece. Each piece is flushed to the disk and counts as work done, so
//! that a slow disk is not taken for a rank that hangs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use candle_core::{DType, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::system::heartbeat;
use crate::{Error, Result};

/// Bytes that are flushed to the disk at once: a few seconds of work for a slow disk.
const PIECE: usize = 64 << 20;

/// Writes tensors as f32 in the order of their names, and flushes the file to the disk.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut tensors: Vec<&(String, Tensor)> = tensors.iter().collect();
    tensors.sort_by_key(|(name, _)| name);
    let failed = || Error::write("write", path);
    let header = header(&tensors).map_err(failed())?;
    let mut file = File::create(path).map_err(Error::write("create", path))?;
    file.write_all(&header).map_err(failed())?;
    let mut unflushed = 0;
    for (_, tensor) in tensors {
        let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        for piece in bytemuck::cast_slice::<f32, u8>(&values).chunks(PIECE) {
            file.write_all(piece).map_err(failed())?;
            unflushed += piece.len();
            if unflushed >= PIECE {
                file.sync_data().map_err(failed())?;
                unflushed = 0;
            }
            heartbeat::record_work();
        }
    }
    file.sync_all().map_err(failed())
}

/// The header: its length, then the names, shapes and offsets of the tensors as JSON.
fn header(tensors: &[&(String, Tensor)]) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let info = |(name, tensor): &&(String, Tensor)| {
        let start = end;
        end += tensor.elem_count() * DType::F32.size_in_bytes();
        let shape = tensor.dims().to_vec();
        (name.clone(), TensorInfo { dtype: Dtype::F32, shape, data_offsets: (start, end) })
    };
    let infos = tensors.iter().map(info).collect();
    // transformers rejects a file that does not name its framework.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(io::Error::other)?;
    let mut text = serde_json::to_vec(&metadata)?;
    text.resize(text.len().next_multiple_of(size_of::<u64>()), b' ');
    Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use candle_core::{Device, safetensors::load};

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensors = [
            ("b.weight", Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap()),
            ("empty", Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap()),
            ("a", Tensor::new(&[0.5f32, 2.0], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()),
            ("transposed", Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap().t().unwrap()),
        ];
        write(&path, &tensors.map(|(name, tensor)| (name.to_owned(), tensor))).unwrap();
        let back = load(&path, &Device::Cpu).unwrap();
        assert_eq!(back.len(), 4);
        assert_eq!(back["b.weight"].to_vec2::<f32>().unwrap(), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        assert_eq!(back["a"].to_vec1::<f32>().unwrap(), [0.5, 2.0]);
        assert_eq!(back["transposed"].to_vec2::<f32>().unwrap(), [[1.0, 3.0], [2.0, 4.0]]);
        assert_eq!(back["empty"].dims(), [0, 3]);
        let bytes = std::fs::read(&path).unwrap();
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((header % 8, metadata.metadata().as_ref().unwrap()["format"].as_str()), (0, "pt"));
        // The file has the same permissions as the other files of a model.
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain));
    }

    #[test]
    fn each_tensor_counts_as_work() {
        // More than all other tests of this process record meanwhile.
        const COUNT: usize = 100_000;
        let one = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let tensors: Vec<_> = (0..COUNT).map(|number| (number.to_string(), one.clone())).collect();
        let before = heartbeat::work_count();
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("x.safetensors"), &tensors).unwrap();
        assert!(heartbeat::work_count() - before >= COUNT as u64);
    }
}
