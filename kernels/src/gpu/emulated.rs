//! The emulator's memory: guarded copies of CPU tensors.

use super::product::Matrix;
use crate::matmul;
use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage,
    bail,
};
use half::{bf16, f16};
use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;

// Links the compiled kernels.
use emulator as _;

unsafe extern "C" {
    fn emulated_allocate(bytes: usize) -> *mut c_void;
    fn emulated_free(buffer: *mut c_void) -> i32;
    fn emulated_error() -> *const c_char;
    #[cfg(test)]
    fn emulated_seed(seed: u64);
}

/// Fibers and blocks of this thread's next launches run in another order for each seed.
#[cfg(test)]
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
    /// As much again of Rust's memory, never touched, where a GPU would allocate: tests that count allocations see it.
    counted: Vec<u8>,
}

impl Memory {
    pub(super) fn new(dtype: DType, count: usize) -> Self {
        let mut memory = Self::copy(dtype, count);
        memory.counted = Vec::with_capacity(memory.bytes);
        memory
    }

    /// Of what a GPU has already.
    fn copy(dtype: DType, count: usize) -> Self {
        let bytes = count * dtype.size_in_bytes();
        // SAFETY: allocates; `drop` frees.
        let pointer = unsafe { emulated_allocate(bytes) }.cast();
        Self { pointer, bytes, dtype, back: None, counted: Vec::new() }
    }

    pub(super) fn of(tensor: &Tensor, mutable: bool) -> Result<Self> {
        let mut memory = Self::copy(tensor.dtype(), tensor.elem_count());
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

    pub(super) fn tensor(mut self, shape: &Shape) -> Result<Tensor> {
        self.counted = Vec::new();
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

/// [`super::product::multiply`] in f32, block by block: a GPU has no second copy of what it multiplies, so there is none here.
pub(super) fn multiply(c: Matrix, keep: f32, scale: f32, a: Matrix, b: Matrix) -> Result<()> {
    const BLOCK: usize = 512;
    let blocks =
        |length: usize| (0..length).step_by(BLOCK).map(move |start| start..length.min(start + BLOCK));
    let ((m, k), (_, n)) = (a.shape(), b.shape());
    for (rows, columns) in blocks(m).flat_map(|rows| blocks(n).map(move |columns| (rows.clone(), columns))) {
        let mut sum = match keep {
            0.0 => vec![0.0; rows.len() * columns.len()],
            _ => block(&c, &rows, &columns),
        };
        sum.iter_mut().for_each(|x| *x *= keep);
        for inner in blocks(k) {
            let (a, b) = (block(&a, &rows, &inner), block(&b, &inner, &columns));
            let (a, b) = (
                matmul::Matrix::new(&a, rows.len(), inner.len()),
                matmul::Matrix::new(&b, inner.len(), columns.len()),
            );
            matmul::multiply(&mut sum, columns.len(), 1.0, scale, a, b, matmul::Threads::One);
        }
        let places = rows.flat_map(|i| columns.clone().map(move |j| (i, j)));
        for ((i, j), x) in places.zip(sum) {
            // SAFETY: callers check that a matrix lies in its memory, which this call alone writes to.
            unsafe {
                match element(&c, i, j) {
                    Element::F32(at) => *at = x,
                    Element::Bf16(at) => *at = bf16::from_f32(x),
                    Element::F16(at) => *at = f16::from_f32(x),
                }
            }
        }
    }
    Ok(())
}

/// Makes all elements of a matrix 0.
pub(super) fn clear(x: Matrix) {
    // SAFETY: callers check that a matrix lies in its memory, which this call alone writes to.
    unsafe { std::ptr::write_bytes(x.address().cast::<u8>(), 0, x.bytes()) }
}

enum Element {
    F32(*mut f32),
    Bf16(*mut bf16),
    F16(*mut f16),
}

/// Where the element in row i and column j of a factor lies.
fn element(x: &Matrix, i: usize, j: usize) -> Element {
    let at = x.offset + if x.transposed { j * x.columns + i } else { i * x.columns + j };
    match x.dtype {
        DType::BF16 => Element::Bf16(x.memory.pointer::<bf16>().wrapping_add(at)),
        DType::F16 => Element::F16(x.memory.pointer::<f16>().wrapping_add(at)),
        _ => Element::F32(x.memory.pointer::<f32>().wrapping_add(at)),
    }
}

/// Some rows and columns of a factor, row by row.
fn block(x: &Matrix, rows: &Range<usize>, columns: &Range<usize>) -> Vec<f32> {
    let places = rows.clone().flat_map(|i| columns.clone().map(move |j| (i, j)));
    // SAFETY: callers check that a matrix lies in its memory, and the emulator's guard would tell.
    let number = |(i, j)| unsafe {
        match element(x, i, j) {
            Element::F32(at) => *at,
            Element::Bf16(at) => (*at).to_f32(),
            Element::F16(at) => (*at).to_f32(),
        }
    };
    places.map(number).collect()
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
