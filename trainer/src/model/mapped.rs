//! Safetensors files, memory-mapped: one file or the shards of a checkpoint.
//!
//! A tensor goes from the map straight into memory of its own, as f32, and its pages are given back: however large the
//! checkpoint, there is one copy of it, and of what is read one tensor more at most.

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

/// The tensors of some files.
pub struct Mapped {
    files: Vec<(PathBuf, Mmap)>,
    places: BTreeMap<String, Place>,
}

/// Where a tensor lies.
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Mapped {
    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// A file that is cut off, or is not in the format of safetensors.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let (mut files, mut places) = (Vec::new(), BTreeMap::new());
        for (number, path) in paths.iter().enumerate() {
            complete(path)?;
            let file = File::open(path).map_err(Error::read("open", path))?;
            // SAFETY: a mapped file must not change underneath us. Model files are written once and renamed into place, by this
            // program and by the hub's cache; whoever edits one in place during a run breaks every reader of it.
            #[expect(unsafe_code, reason = "reading a 14 GB file through a map spares a second copy of it")]
            let map = unsafe { Mmap::map(&file) }.map_err(Error::read("map", path))?;
            let (header, metadata) = SafeTensors::read_metadata(&map)
                .map_err(|error| Error::file(path, format!("is not a safetensors file: {error}")))?;
            let start = 8 + header;
            places.extend(metadata.tensors().into_iter().map(|(name, info)| {
                let (from, to) = info.data_offsets;
                let (dtype, shape) = (info.dtype, info.shape.clone());
                (name, Place { file: number, dtype, shape, bytes: start + from..start + to })
            }));
            files.push((path.clone(), map));
        }
        Ok(Self { files, places })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The shape of the tensor `name`, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.places.get(name).map(|place| place.shape.as_slice())
    }

    /// The tensor `name` as f32.
    ///
    /// # Errors
    /// There is none, or its elements are neither f32, bf16 nor f16.
    pub fn load(&self, name: &str) -> Result<Tensor> {
        let Some(Place { file, dtype, shape, bytes }) = self.places.get(name) else {
            return Err(Error::Usage(format!("no weights are called `{name}`")));
        };
        let (path, map) = &self.files[*file];
        let elements = match dtype {
            Dtype::F32 => widened(&map[bytes.clone()], f32::from_le_bytes),
            Dtype::BF16 => widened(&map[bytes.clone()], |x| bf16::from_le_bytes(x).to_f32()),
            Dtype::F16 => widened(&map[bytes.clone()], |x| f16::from_le_bytes(x).to_f32()),
            other => {
                let message = format!("`{name}` is stored as {other:?}, expected F32, BF16 or F16");
                return Err(Error::file(path, message));
            }
        };
        release(map, bytes);
        Ok(Tensor::from_vec(elements, shape.as_slice(), &Device::Cpu)?)
    }
}

/// The numbers of N bytes each, on all threads.
fn widened<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    const PIECE: usize = 1 << 16;
    let mut elements = vec![0f32; bytes.len() / N];
    elements.par_chunks_mut(PIECE).zip(bytes.par_chunks(N * PIECE)).for_each(|(elements, bytes)| {
        for (element, bytes) in elements.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *element = number(*bytes);
        }
    });
    elements
}

/// Tells the kernel that these pages are not needed any more. Without the kernel's help they only stay a while longer.
fn release(map: &Mmap, bytes: &Range<usize>) {
    #[cfg(unix)]
    // SAFETY: the map is of a file and read-only, so a page that is dropped is read from the file again when it is needed.
    #[expect(unsafe_code, reason = "pages of a map are given back one range at a time")]
    let _ =
        unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
}

/// Refuses a file that is shorter than its header says, which is what a broken download leaves.
fn complete(path: &Path) -> Result<()> {
    let mut file = std::fs::File::open(path).map_err(Error::read("open", path))?;
    let size = file.metadata().map_err(Error::read("read", path))?.len();
    let mut word = [0u8; 8];
    let whole = |needed: u64| {
        Err(Error::file(
            path,
            format!("is cut off: it has {size} bytes, its header asks for {needed}\nhint: download it again"),
        ))
    };
    if file.read_exact(&mut word).is_err() {
        return whole(8);
    }
    let header = u64::from_le_bytes(word);
    if header > size.saturating_sub(8) {
        return whole(header.saturating_add(8));
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
        return whole(8 + header + end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn halves_and_wholes_of_several_files_are_f32() {
        let folder = tempfile::tempdir().unwrap();
        let numbers: Vec<f32> = (0..200_000).map(|i| (i % 255) as f32 - 100.0).collect();
        let tensor = Tensor::from_slice(&numbers, (200, 1000), &Device::Cpu).unwrap();
        let mut paths = Vec::new();
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let path = folder.path().join(format!("{dtype:?}.safetensors"));
            // An odd name before it puts the numbers at an odd address.
            let odd = Tensor::zeros(1, DType::U8, &Device::Cpu).unwrap();
            let tensors =
                [(format!("{dtype:?}"), tensor.to_dtype(dtype).unwrap()), (format!("a{dtype:?}"), odd)];
            candle_core::safetensors::save(&tensors.into_iter().collect(), &path).unwrap();
            paths.push(path);
        }
        let mapped = Mapped::open(&paths).unwrap();
        assert_eq!(mapped.names().count(), 8);
        for name in ["F32", "BF16", "F16"] {
            assert_eq!(mapped.shape(name), Some(&[200, 1000][..]));
            // Twice, because the first time gives the pages back.
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
