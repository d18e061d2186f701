//! NumPy files of float32 rows (N, D): written atomically, read by row.
//!
//! The format is NEP 1: magic, version, length of the header, a Python dictionary padded so that the numbers
//! begin at a multiple of 64 bytes, then the rows.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::system::atomic::AtomicFile;
use crate::{Error, Result};

/// Writes a file of float32 rows (N, D).
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    file: AtomicFile,
    rows: usize,
    width: usize,
}

impl Writer {
    /// Begins a file of `rows` rows of `width` numbers.
    ///
    /// # Errors
    /// The path names no file, or it cannot be created.
    pub fn create(target: &Path, rows: usize, width: usize) -> Result<Self> {
        let mut file = AtomicFile::create(target)?;
        file.write_all(&header(rows, width)).map_err(Error::write("write", target))?;
        Ok(Self { target: target.to_owned(), file, rows, width })
    }

    /// Appends rows (n, D).
    ///
    /// # Errors
    /// There are more rows than announced, or of another width; the disk is full.
    pub fn write(&mut self, embeddings: &Tensor) -> Result<()> {
        let (rows, width) = embeddings.dims2()?;
        let Some(left) = self.rows.checked_sub(rows).filter(|_| width == self.width) else {
            return Err(self.changed());
        };
        self.rows = left;
        for row in embeddings.to_vec2::<f32>()? {
            let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.file.write_all(&bytes).map_err(Error::write("write", &self.target))?;
        }
        Ok(())
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// Rows are missing; the disk is full.
    pub fn finish(self) -> Result<()> {
        if self.rows > 0 {
            return Err(self.changed());
        }
        self.file.commit()
    }

    fn changed(&self) -> Error {
        Error::Failed(format!("{}: the input has changed while it was read", self.target.display()))
    }
}

fn header(rows: usize, width: usize) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
    let length = (10 + text.len() + 1).next_multiple_of(64) - 10;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend_from_slice(&(length as u16).to_le_bytes());
    header.extend_from_slice(format!("{text:<0$}\n", length - 1).as_bytes());
    header
}

/// Reads rows of a file, which stay on disk.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: File,
    start: u64,
    rows: usize,
    width: usize,
}

impl Reader {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// It cannot be read, is not a NumPy file of float32 rows in C order, or is truncated.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::read("open", path))?;
        let wrong =
            |message: &str| Error::file(path, format!("{message}, expected float32 rows (N, D) as .npy"));
        let mut start = [0; 12];
        file.read_exact_at(&mut start[..10], 0).map_err(|_| wrong("is too short"))?;
        let (begin, length) = match start {
            [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, low, high, ..] => {
                (10, usize::from(u16::from_le_bytes([low, high])))
            }
            [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, ..] => {
                file.read_exact_at(&mut start[8..], 8).map_err(|_| wrong("is too short"))?;
                (12, u32::from_le_bytes([start[8], start[9], start[10], start[11]]) as usize)
            }
            _ => return Err(wrong("is not a NumPy file")),
        };
        if length > 1 << 16 {
            return Err(wrong("has a header of more than 64 KiB"));
        }
        let mut header = vec![0; length];
        file.read_exact_at(&mut header, begin).map_err(|_| wrong("is too short"))?;
        let header = String::from_utf8_lossy(&header).replace(' ', "");
        let (rows, width) =
            shape(&header).ok_or_else(|| wrong(&format!("has the header {}", header.trim())))?;
        let start = begin + length as u64;
        let bytes = file.metadata().map_err(Error::read("read", path))?.len();
        let numbers = rows.checked_mul(width).and_then(|count| count.checked_mul(4));
        if numbers.is_none_or(|numbers| bytes.checked_sub(start) != Some(numbers as u64)) {
            return Err(wrong(&format!(
                "has {bytes} bytes, which is not the length of {rows} × {width} numbers"
            )));
        }
        Ok(Self { path: path.to_owned(), file, start, rows, width })
    }

    /// Number of rows, N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers per row, D.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Reads the rows of `range` into `numbers` (n, D).
    ///
    /// # Errors
    /// The file cannot be read, or was truncated meanwhile.
    pub fn read(&self, range: Range<usize>, numbers: &mut [f32]) -> Result<()> {
        let offset = self.start + (range.start * self.width * 4) as u64;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(numbers);
        self.file.read_exact_at(bytes, offset).map_err(Error::read("read", &self.path))?;
        if cfg!(target_endian = "big") {
            bytes.chunks_exact_mut(4).for_each(<[u8]>::reverse);
        }
        Ok(())
    }
}

/// The shape (N, D) in a header without spaces.
fn shape(header: &str) -> Option<(usize, usize)> {
    if !header.contains("'descr':'<f4'") || !header.contains("'fortran_order':False") {
        return None;
    }
    let (_, shape) = header.split_once("'shape':(")?;
    let (rows, width) = shape.split_once(')')?.0.split_once(',')?;
    Some((rows.parse().ok()?, width.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn the_file_appears_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        let mut npy = Writer::create(&path, 3, 2).unwrap();
        npy.write(&Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap()).unwrap();
        assert!(!path.exists());
        npy.write(&Tensor::new(&[[5f32, -6.5]], &Device::Cpu).unwrap()).unwrap();
        npy.finish().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(&bytes[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert!(bytes[10..].starts_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }  "));
        assert_eq!(bytes[127], b'\n');
        let numbers: Vec<f32> =
            bytes[128..].chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        assert_eq!(numbers, [1.0, 2.0, 3.0, 4.0, 5.0, -6.5]);

        let short = Writer::create(&folder.path().join("y.npy"), 1, 2).unwrap();
        assert!(short.finish().is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        let npy = Reader::open(&path).unwrap();
        assert_eq!((npy.rows(), npy.width()), (3, 2));
        let mut rows = [0.0; 4];
        npy.read(1..3, &mut rows).unwrap();
        assert_eq!(rows, [3.0, 4.0, 5.0, -6.5]);
        assert!(npy.read(2..4, &mut rows).is_err());
    }

    #[test]
    fn headers_of_any_length_are_aligned() {
        for (rows, width) in [(0, 1), (7, 384), (usize::MAX, usize::MAX)] {
            let header = header(rows, width);
            assert_eq!(header.len() % 64, 0);
            assert_eq!(u16::from_le_bytes([header[8], header[9]]) as usize, header.len() - 10);
        }
    }

    #[test]
    fn other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npy");
        let mut long = header(2, 3);
        long.extend_from_slice(&[0; 20]);
        let text = |from: &str, to: &str| {
            String::from_utf8_lossy(&header(2, 3)[10..]).replace(from, to).into_bytes()
        };
        let with = |text: Vec<u8>| [&header(2, 3)[..10], &text].concat();
        for (bytes, expected) in [
            (b"PK".to_vec(), "is too short"),
            (b"not an array at all".to_vec(), "is not a NumPy file"),
            (long, "has 148 bytes, which is not the length of 2 × 3 numbers"),
            (with(text("<f4", "<f8")), "has the header {'descr':'<f8'"),
            (with(text("(2, 3)", "(6,)  ")), "'shape':(6,)"),
            (with(text("False", "True ")), "'fortran_order':True"),
        ] {
            fs::write(&path, bytes).unwrap();
            let error = Reader::open(&path).unwrap_err().to_string();
            assert!(
                error.contains(expected) && error.contains("x.npy"),
                "expected {expected:?} in {error:?}"
            );
        }
        let second = [b"\x93NUMPY\x02\x00".as_slice(), &118u32.to_le_bytes(), &header(0, 3)[10..]].concat();
        fs::write(&path, second).unwrap();
        assert_eq!(Reader::open(&path).unwrap().rows(), 0);
    }
}
