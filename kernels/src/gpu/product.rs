//! Matrix products on the device of the kernels: cuBLASLt on a GPU, `matmul` on the emulator.

#[cfg(any(test, gpu))]
use super::Backend;
use super::Memory;
use candle_core::{DType, Device, Result, bail};
use std::ffi::c_void;

/// A row-major matrix without gaps that starts at element `offset` of its memory.
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

    /// The `rows` rows from row `first` on.
    pub(crate) fn rows(self, first: usize, rows: usize) -> Self {
        Self { offset: self.offset + first * self.columns, rows, ..self }
    }

    /// The transpose, without a copy.
    pub(crate) fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// The rows and columns of the matrix, or of its transpose if it is `transposed`.
    pub(super) fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }

    /// The address of the first element.
    pub(super) fn address(&self) -> *mut c_void {
        self.memory.pointer::<u8>().wrapping_add(self.offset * self.dtype.size_in_bytes()).cast()
    }

    /// The size in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.rows * self.columns * self.dtype.size_in_bytes()
    }
}

/// Computes `c = beta·c + alpha·a·b` with sums in f32. `beta` is 1, or 0, in which case `c` is not read.
///
/// `a` and `b` must have the same type; `c` must have that type or f32 and must not be transposed. On a GPU,
/// f32 factors are rounded to TF32 if candle's `set_gemm_reduced_precision_f32` allows it.
pub(crate) fn multiply(
    device: &Device,
    c: Matrix,
    beta: f32,
    alpha: f32,
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    product(device, true, c, beta, alpha, a, b)
}

/// Like [`multiply`], but never rounds f32 factors to TF32.
pub(crate) fn multiply_exactly(
    device: &Device,
    c: Matrix,
    beta: f32,
    alpha: f32,
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    product(device, false, c, beta, alpha, a, b)
}

#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "a CPU has no TF32"))]
fn product(
    device: &Device,
    tf32: bool,
    c: Matrix,
    beta: f32,
    alpha: f32,
    a: Matrix,
    b: Matrix,
) -> Result<()> {
    let ((m, k), (inner, n)) = (a.shape(), b.shape());
    if k != inner || c.shape() != (m, n) || c.transposed {
        bail!("cannot multiply {m}×{k} by {inner}×{n} into {:?}", c.shape());
    }
    if a.dtype != b.dtype || (c.dtype != a.dtype && c.dtype != DType::F32) {
        bail!("cannot multiply {:?} by {:?} into {:?}", a.dtype, b.dtype, c.dtype);
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    // cuBLASLt rejects an inner dimension of 0.
    if k == 0 {
        return if beta == 0.0 { clear(device, c) } else { Ok(()) };
    }
    match (device, &c.memory.backend) {
        #[cfg(feature = "cuda")]
        (Device::Cuda(device), Backend::Device(_)) => {
            super::cuda::multiply(device, tf32, c, beta, alpha, a, b)
        }
        #[cfg(any(test, feature = "emulator"))]
        (Device::Cpu, Backend::Emulated(_)) => super::emulated::multiply(c, beta, alpha, a, b),
        _ => bail!("there is no matrix product on {:?}", device.location()),
    }
}

/// Sets all elements of a matrix to 0.
fn clear(device: &Device, c: Matrix) -> Result<()> {
    match (device, &c.memory.backend) {
        #[cfg(feature = "cuda")]
        (Device::Cuda(device), Backend::Device(_)) => super::cuda::clear(device, c),
        #[cfg(any(test, feature = "emulator"))]
        (Device::Cpu, Backend::Emulated(_)) => {
            super::emulated::clear(c);
            Ok(())
        }
        _ => bail!("memory cannot be cleared on {:?}", device.location()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TYPES, cast, numbers, random_on_device, test_device};

    #[test]
    fn a_product_without_terms_is_beta_times_c() {
        for (dtype, _) in TYPES {
            for beta in [0.0, 1.0] {
                let c = cast(&random_on_device(1, (5, 3)), dtype);
                let mut want = numbers(&c);
                if beta == 0.0 {
                    want[3..12].fill(0.0);
                }
                {
                    let to = Memory::mutable(&c).unwrap();
                    let none = Memory::new(test_device(), dtype, 0).unwrap();
                    let (a, b) = (Matrix::new(&none, 3, 0, dtype), Matrix::new(&none, 0, 3, dtype));
                    let rows = Matrix::new(&to, 5, 3, dtype).rows(1, 3);
                    multiply(test_device(), rows, beta, 1.0, a, b).unwrap();
                }
                assert_eq!(numbers(&c), want, "{dtype:?} {beta}");
            }
        }
    }
}
