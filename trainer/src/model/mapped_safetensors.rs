//! Memory-mapped safetensors files: one file, or the shards of a checkpoint.
//!
//! A tensor is copied from the map as f32, and the pages of the map are released at once. So there is one
//! copy of the checkpoint in memory, and one tensor more at most.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use crate::{Error, Result};

/// Tensors of one or more safetensors files.
pub struct MappedSafetensors {
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// File, type, shape and bytes of one tensor.
struct TensorInfo {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl MappedSafetensors {
    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// A file is cut off, or is not in the safetensors format.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        for (number, path) in paths.iter().enumerate() {
            check_length(path)?;
            let file = File::open(path).map_err(Error::read("open", path))?;
            // SAFETY: a mapped file must not change while it is read. This program and the hub's cache write
            // model files once and rename them into place. Editing such a file in place breaks every program
            // that maps it.
            #[expect(unsafe_code, reason = "reading a 14 GB file through a map avoids a second copy of it")]
            let map = unsafe { Mmap::map(&file) }.map_err(Error::read("map", path))?;
            let (header, metadata) = SafeTensors::read_metadata(&map)
                .map_err(|error| Error::file(path, format!("is not a safetensors file: {error}")))?;
            let start = 8 + header;
            tensors.extend(metadata.tensors().into_iter().map(|(name, info)| {
                let (from, to) = info.data_offsets;
                let (dtype, shape) = (info.dtype, info.shape.clone());
                (name, TensorInfo { file: number, dtype, shape, bytes: start + from..start + to })
            }));
            files.push((path.clone(), map));
        }
        Ok(Self { files, tensors })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of the tensor `name`; `None` if there is no such tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|info| info.shape.as_slice())
    }

    /// Loads the tensor `name` as f32 on the CPU.
    ///
    /// # Errors
    /// There is no such tensor, or its elements are neither f32, bf16 nor f16.
    pub fn load(&self, name: &str) -> Result<Tensor> {
        let Some(TensorInfo { file, dtype, shape, bytes }) = self.tensors.get(name) else {
            return Err(Error::Bug(format!("there is no tensor `{name}`")));
        };
        let (path, map) = &self.files[*file];
        let elements = match dtype {
            Dtype::F32 => to_f32s(&map[bytes.clone()], f32::from_le_bytes),
            Dtype::BF16 => to_f32s(&map[bytes.clone()], |x| bf16::from_le_bytes(x).to_f32()),
            Dtype::F16 => to_f32s(&map[bytes.clone()], |x| f16::from_le_bytes(x).to_f32()),
            other => {
                let message = format!("`{name}` is stored as {other:?}, expected F32, BF16 or F16");
                return Err(Error::file(path, message));
            }
        };
        release(map, bytes);
        Ok(Tensor::from_vec(elements, shape.as_slice(), &Device::Cpu)?)
    }
}

/// Converts numbers of N bytes each to f32, on all threads.
fn to_f32s<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    const PIECE: usize = 1 << 16;
    let mut elements = vec![0f32; bytes.len() / N];
    elements.par_chunks_mut(PIECE).zip(bytes.par_chunks(N * PIECE)).for_each(|(elements, bytes)| {
        for (element, bytes) in elements.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *element = number(*bytes);
        }
    });
    elements
}

/// Tells the operating system that these pages are no longer needed. It is a hint: if it fails, they stay in
/// memory for longer.
fn release(map: &Mmap, bytes: &Range<usize>) {
    #[cfg(unix)]
    // SAFETY: the map is read-only and backed by a file, so a released page is read from the file again when
    // it is needed.
    #[expect(unsafe_code, reason = "the map is released one range at a time")]
    let _ =
        unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
}

/// Refuses a file that is shorter than its header says, as an interrupted download leaves it.
fn check_length(path: &Path) -> Result<()> {
    let mut file = std::fs::File::open(path).map_err(Error::read("open", path))?;
    let size = file.metadata().map_err(Error::read("read", path))?.len();
    let mut word = [0u8; 8];
    let cut_off = |needed: u64| {
        Err(Error::file(
            path,
            format!("is cut off: it has {size} bytes, its header needs {needed}\nhint: download it again"),
        ))
    };
    if file.read_exact(&mut word).is_err() {
        return cut_off(8);
    }
    let header = u64::from_le_bytes(word);
    if header > size.saturating_sub(8) {
        return cut_off(header.saturating_add(8));
    }
    let mut json = vec![0u8; header as usize];
    file.read_exact(&mut json).map_err(Error::read("read", path))?;
    let json: serde_json::Value = serde_json::from_slice(&json)
        .map_err(|error| Error::file(path, format!("is not a safetensors file: {error}")))?;
    let end = json
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64())
        .max()
        .unwrap_or(0);
    if 8 + header + end > size {
        return cut_off(8 + header + end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn f32_bf16_and_f16_of_several_files_are_loaded_as_f32() {
        let folder = tempfile::tempdir().unwrap();
        let numbers: Vec<f32> = (0..200_000).map(|i| (i % 255) as f32 - 100.0).collect();
        let tensor = Tensor::from_slice(&numbers, (200, 1000), &Device::Cpu).unwrap();
        let mut paths = Vec::new();
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let path = folder.path().join(format!("{dtype:?}.safetensors"));
            // A tensor of one byte before it puts the numbers at an odd address.
            let odd = Tensor::zeros(1, DType::U8, &Device::Cpu).unwrap();
            let tensors =
                [(format!("{dtype:?}"), tensor.to_dtype(dtype).unwrap()), (format!("a{dtype:?}"), odd)];
            candle_core::safetensors::save(&tensors.into_iter().collect(), &path).unwrap();
            paths.push(path);
        }
        let mapped = MappedSafetensors::open(&paths).unwrap();
        assert_eq!(mapped.names().count(), 8);
        for name in ["F32", "BF16", "F16"] {
            assert_eq!(mapped.shape(name), Some(&[200, 1000][..]));
            // Twice, because the first load releases the pages.
            for _ in 0..2 {
                let got: Vec<f32> = mapped.load(name).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                assert_eq!(got, numbers, "{name}");
            }
        }
        let error = mapped.load("F64").unwrap_err().to_string();
        assert!(
            error.contains("F64.safetensors: `F64` is stored as F64, expected F32, BF16 or F16"),
            "{error}"
        );
        assert!(mapped.load("x").is_err() && mapped.shape("x").is_none());
    }
}
