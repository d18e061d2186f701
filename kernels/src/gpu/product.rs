//! Matrix products where the kernels are: cuBLASLt on a GPU, in tests the CPU's product.

use super::Memory;
#[cfg(any(test, gpu))]
use super::Place;
use candle_core::{DType, Device, Result, bail};
use std::ffi::c_void;

/// A matrix, rows end to end from element `offset` of its memory on.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(super) memory: &'a Memory,
    pub(super) offset: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) dtype: DType,
    pub(super) transposed: bool,
}

impl<'a> Matrix<'a> {
    pub(crate) fn new(memory: &'a Memory, rows: usize, columns: usize, dtype: DType) -> Self {
        Self { memory, offset: 0, rows, columns, dtype, transposed: false }
    }

    /// `rows` rows from row `first` on.
    pub(crate) fn rows(self, first: usize, rows: usize) -> Self {
        Self { offset: self.offset + first * self.columns, rows, ..self }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as a factor.
    pub(super) fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }

    /// The first element.
    pub(super) fn address(&self) -> *mut c_void {
        self.memory.pointer::<u8>().wrapping_add(self.offset * self.dtype.size_in_bytes()).cast()
    }

    /// Of all elements.
    pub(super) fn bytes(&self) -> usize {
        self.rows * self.columns * self.dtype.size_in_bytes()
    }
}

/// `c = keep·c + scale·a·b`, summed in f32; `keep` is 0, when c is not read, or 1. `a` and `b` are of one type, `c` is of it too
/// or f32, and not transposed.
pub(crate) fn multiply(
    device: &Device,
    c: Matrix,
    keep: f32,
    scale: f32,
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    product(device, true, c, keep, scale, a, b)
}

/// As [`multiply`], but factors of f32 are never rounded to TF32, whatever the process has set.
pub(crate) fn multiply_exactly(
    device: &Device,
    c: Matrix,
    keep: f32,
    scale: f32,
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    product(device, false, c, keep, scale, a, b)
}

#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "a CPU has no TF32"))]
fn product(
    device: &Device,
    tf32: bool,
    c: Matrix,
    keep: f32,
    scale: f32,
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    let ((m, k), (inner, n)) = (a.shape(), b.shape());
    if k != inner || c.shape() != (m, n) || c.transposed {
        bail!("a product of {m}×{k} and {inner}×{n} into {:?}", c.shape());
    }
    if a.dtype != b.dtype || (c.dtype != a.dtype && c.dtype != DType::F32) {
        bail!("a product of {:?} and {:?} into {:?}", a.dtype, b.dtype, c.dtype);
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    // cuBLASLt knows no product of no terms.
    if k == 0 {
        return if keep == 0.0 { clear(device, c) } else { Ok(()) };
    }
    match (device, &c.memory.at) {
        #[cfg(feature = "cuda")]
        (Device::Cuda(device), Place::Device(_)) => super::cuda::multiply(device, tf32, c, keep, scale, a, b),
        #[cfg(any(test, feature = "emulator"))]
        (Device::Cpu, Place::Emulated(_)) => super::emulated::multiply(c, keep, scale, a, b),
        _ => bail!("no product runs on {:?}", device.location()),
    }
}

fn clear(device: &Device, c: Matrix) -> Result<()> {
    match (device, &c.memory.at) {
        #[cfg(feature = "cuda")]
        (Device::Cuda(device), Place::Device(_)) => super::cuda::clear(device, c),
        #[cfg(any(test, feature = "emulator"))]
        (Device::Cpu, Place::Emulated(_)) => {
            super::emulated::clear(c);
            Ok(())
        }
        _ => bail!("no memory is cleared on {:?}", device.location()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TYPES, each_type, numbers, place, placed};

    #[test]
    fn a_product_of_no_terms_is_what_is_kept() {
        for (dtype, _) in TYPES {
            for keep in [0.0, 1.0] {
                let c = each_type(&placed(1, (5, 3)), dtype);
                let mut want = numbers(&c);
                if keep == 0.0 {
                    want[3..12].fill(0.0);
                }
                {
                    let to = Memory::mutable(&c).unwrap();
                    let none = Memory::new(place(), dtype, 0).unwrap();
                    let (a, b) = (Matrix::new(&none, 3, 0, dtype), Matrix::new(&none, 0, 3, dtype));
                    let rows = Matrix::new(&to, 5, 3, dtype).rows(1, 3);
                    multiply(place(), rows, keep, 1.0, a, b).unwrap();
                }
                assert_eq!(numbers(&c), want, "{dtype:?} {keep}");
            }
        }
    }
}
