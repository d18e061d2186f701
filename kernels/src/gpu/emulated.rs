//! The emulator's memory: guarded copies of CPU tensors.

use super::product::Matrix;
use crate::matmul;
use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage,
    bail,
};
use std::ffi::{CStr, c_char, c_void};

// Links the compiled kernels.
use emulator as _;

unsafe extern "C" {
    fn emulated_allocate(bytes: usize) -> *mut c_void;
    fn emulated_free(buffer: *mut c_void) -> i32;
    fn emulated_error() -> *const c_char;
    fn emulated_seed(seed: u64);
}

/// Fibers and blocks of this thread's next launches run in another order for each seed.
pub(crate) fn with_seed(seed: u64) {
    // SAFETY: sets a number of this thread.
    unsafe { emulated_seed(seed) }
}

/// What a launch has returned, as a result.
pub(crate) fn check(status: i32) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: a string of this thread, which stays until its next launch.
    bail!("{}", unsafe { CStr::from_ptr(emulated_error()) }.to_string_lossy())
}

/// A buffer between guards; with `back` it is copied back into its tensor in the end.
pub(super) struct Memory {
    pointer: *mut u8,
    bytes: usize,
    dtype: DType,
    back: Option<Tensor>,
}

impl Memory {
    pub(super) fn new(dtype: DType, count: usize) -> Self {
        let bytes = count * dtype.size_in_bytes();
        // SAFETY: allocates; `drop` frees.
        Self { pointer: unsafe { emulated_allocate(bytes) }.cast(), bytes, dtype, back: None }
    }

    pub(super) fn of(tensor: &Tensor, mutable: bool) -> Result<Self> {
        let mut memory = Self::new(tensor.dtype(), tensor.elem_count());
        let (storage, layout) = tensor.storage_and_layout();
        let range = super::contiguous(layout)?;
        let Storage::Cpu(cpu) = &*storage else { bail!("expected a tensor on the CPU") };
        let from = first(cpu)?;
        // SAFETY: the range lies in the storage, and the buffer has its size.
        unsafe {
            let from = from.add(range.start * tensor.dtype().size_in_bytes());
            std::ptr::copy_nonoverlapping(from, memory.pointer, memory.bytes);
        }
        memory.back = mutable.then(|| tensor.clone());
        Ok(memory)
    }

    pub(super) fn tensor(self, shape: &Shape) -> Result<Tensor> {
        assert_eq!(shape.elem_count() * self.dtype.size_in_bytes(), self.bytes, "the size of the new tensor");
        // SAFETY: `bytes` of them, which are initialised: the emulator fills them with NaNs.
        let bytes = unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) };
        if bytes.is_empty() {
            return Tensor::zeros(shape, self.dtype, &Device::Cpu);
        }
        Tensor::from_raw_buffer(bytes, self.dtype, shape.dims(), &Device::Cpu)
    }

    pub(super) fn pointer(&self) -> *mut c_void {
        self.pointer.cast()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(tensor) = self.back.take().filter(|_| self.bytes > 0) {
            tensor.inplace_op1(&*self).expect("a tensor that has been read is written");
        }
        // SAFETY: allocated by `new`, and freed once.
        let changed = unsafe { emulated_free(self.pointer.cast()) };
        assert!(changed == 0 || std::thread::panicking(), "a kernel has written beside a buffer");
    }
}

impl InplaceOp1 for Memory {
    fn name(&self) -> &'static str {
        "copy back"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = super::contiguous(layout)?;
        let to = first(storage)?.cast_mut();
        // SAFETY: the range lies in the storage, which this call has to itself, and the buffer has its size.
        unsafe {
            let to = to.add(range.start * storage.dtype().size_in_bytes());
            std::ptr::copy_nonoverlapping(self.pointer, to, self.bytes);
        }
        Ok(())
    }
}

/// [`super::product::multiply`] in f32.
pub(super) fn multiply(c: Matrix, keep: f32, scale: f32, a: Matrix, b: Matrix) -> Result<()> {
    let numbers = |x: &Matrix| -> Result<Vec<f32>> {
        let bytes = x.dtype.size_in_bytes();
        let (start, count) = (x.memory.pointer::<u8>().wrapping_add(x.offset * bytes), x.rows * x.columns);
        if count == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: callers check that a matrix lies in its memory, and the emulator's guard would tell.
        let bytes = unsafe { std::slice::from_raw_parts(start, count * bytes) };
        Tensor::from_raw_buffer(bytes, x.dtype, &[count], &Device::Cpu)?.to_dtype(DType::F32)?.to_vec1()
    };
    let factor = |x: &Matrix, elements: &[f32]| {
        let mut result = Vec::with_capacity(elements.len());
        let (rows, columns) = if x.transposed { (x.columns, x.rows) } else { (x.rows, x.columns) };
        for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
            result.push(elements[if x.transposed { j * rows + i } else { i * columns + j }]);
        }
        (result, rows, columns)
    };
    let (a, m, k) = factor(&a, &numbers(&a)?);
    let (b, _, n) = factor(&b, &numbers(&b)?);
    let mut result = if keep == 0.0 { vec![0.0; m * n] } else { numbers(&c)? };
    let (a, b) = (matmul::Matrix::new(&a, m, k), matmul::Matrix::new(&b, k, n));
    matmul::multiply(&mut result, n, keep, scale, a, b, matmul::Threads::One);
    let result = Tensor::from_vec(result, m * n, &Device::Cpu)?.to_dtype(c.dtype)?;
    let (storage, _) = result.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else { bail!("expected a tensor on the CPU") };
    let bytes = c.dtype.size_in_bytes();
    // SAFETY: as above, and c's memory is written by this call alone.
    unsafe {
        let to = c.memory.pointer::<u8>().add(c.offset * bytes);
        std::ptr::copy_nonoverlapping(first(cpu)?, to, m * n * bytes);
    }
    Ok(())
}

fn first(storage: &CpuStorage) -> Result<*const u8> {
    Ok(match storage {
        CpuStorage::F32(all) => all.as_ptr().cast(),
        CpuStorage::BF16(all) => all.as_ptr().cast(),
        CpuStorage::F16(all) => all.as_ptr().cast(),
        CpuStorage::U32(all) => all.as_ptr().cast(),
        CpuStorage::F64(all) => all.as_ptr().cast(),
        other => bail!("kernels know no {:?}", other.dtype()),
    })
}

#[cfg(test)]
mod tests;
