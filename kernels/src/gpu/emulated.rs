//! Memory and matrix products of the emulator: kernels work on guarded copies of CPU tensors.

use super::product::Matrix;
use crate::matmul;
use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage,
    bail,
};
use half::{bf16, f16};
use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;

// Links the kernels that the crate `emulator` has compiled.
use emulator as _;

unsafe extern "C" {
    fn emulated_allocate(bytes: usize) -> *mut c_void;
    fn emulated_free(buffer: *mut c_void) -> i32;
    fn emulated_error() -> *const c_char;
    #[cfg(test)]
    fn emulated_seed(seed: u64);
}

/// Sets the seed of the order in which the launches of this thread run their blocks and threads.
#[cfg(test)]
pub(crate) fn with_seed(seed: u64) {
    // SAFETY: it sets a thread-local number.
    unsafe { emulated_seed(seed) }
}

/// Converts the status of a launch to a result.
pub(crate) fn check(status: i32) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the string is thread-local and valid until the next launch of this thread.
    bail!("{}", unsafe { CStr::from_ptr(emulated_error()) }.to_string_lossy())
}

/// A buffer between guard pages. If `back` is a tensor, the buffer is copied to it on drop.
pub(super) struct Memory {
    pointer: *mut u8,
    bytes: usize,
    dtype: DType,
    back: Option<Tensor>,
    /// An allocation of the same size that is never accessed. Tests that count allocations see it in place of
    /// the buffer, which does not come from Rust's allocator. It is empty where a GPU would not allocate.
    counted: Vec<u8>,
}

impl Memory {
    pub(super) fn new(dtype: DType, count: usize) -> Self {
        let mut memory = Self::copy(dtype, count);
        memory.counted = Vec::with_capacity(memory.bytes);
        memory
    }

    /// A buffer that stands for memory that is already on the GPU.
    fn copy(dtype: DType, count: usize) -> Self {
        let bytes = count * dtype.size_in_bytes();
        // SAFETY: `drop` frees the buffer.
        let pointer = unsafe { emulated_allocate(bytes) }.cast();
        Self { pointer, bytes, dtype, back: None, counted: Vec::new() }
    }

    pub(super) fn of(tensor: &Tensor, mutable: bool) -> Result<Self> {
        let mut memory = Self::copy(tensor.dtype(), tensor.elem_count());
        let (storage, layout) = tensor.storage_and_layout();
        let range = super::contiguous(layout)?;
        let Storage::Cpu(cpu) = &*storage else { bail!("expected a tensor on the CPU") };
        let from = first(cpu)?;
        // SAFETY: the range lies in the storage, and the buffer has the same size.
        unsafe {
            let from = from.add(range.start * tensor.dtype().size_in_bytes());
            std::ptr::copy_nonoverlapping(from, memory.pointer, memory.bytes);
        }
        memory.back = mutable.then(|| tensor.clone());
        Ok(memory)
    }

    pub(super) fn tensor(mut self, shape: &Shape) -> Result<Tensor> {
        self.counted = Vec::new();
        assert_eq!(
            shape.elem_count() * self.dtype.size_in_bytes(),
            self.bytes,
            "the tensor has the size of its memory"
        );
        // SAFETY: the buffer has `bytes` bytes, which the emulator has initialised with NaNs.
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
            tensor.inplace_op1(&*self).expect("a tensor that was read can be written");
        }
        // SAFETY: `copy` has allocated the buffer, and it is freed only here.
        let changed = unsafe { emulated_free(self.pointer.cast()) };
        assert!(changed == 0 || std::thread::panicking(), "a kernel has written outside of its buffer");
    }
}

impl InplaceOp1 for Memory {
    fn name(&self) -> &'static str {
        "copy back"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = super::contiguous(layout)?;
        let to = first(storage)?.cast_mut();
        // SAFETY: the range lies in the storage, to which this call has exclusive access, and the buffer has
        // the same size.
        unsafe {
            let to = to.add(range.start * storage.dtype().size_in_bytes());
            std::ptr::copy_nonoverlapping(self.pointer, to, self.bytes);
        }
        Ok(())
    }
}

/// [`super::product::multiply`] in f32, block by block: like a GPU it makes no second copy of its factors.
pub(super) fn multiply(c: Matrix, beta: f32, alpha: f32, a: Matrix, b: Matrix) -> Result<()> {
    const BLOCK: usize = 512;
    let blocks =
        |length: usize| (0..length).step_by(BLOCK).map(move |start| start..length.min(start + BLOCK));
    let ((m, k), (_, n)) = (a.shape(), b.shape());
    for (rows, columns) in blocks(m).flat_map(|rows| blocks(n).map(move |columns| (rows.clone(), columns))) {
        let mut sum = match beta {
            0.0 => vec![0.0; rows.len() * columns.len()],
            _ => block(&c, &rows, &columns),
        };
        sum.iter_mut().for_each(|x| *x *= beta);
        for inner in blocks(k) {
            let (a, b) = (block(&a, &rows, &inner), block(&b, &inner, &columns));
            let (a, b) = (
                matmul::Matrix::new(&a, rows.len(), inner.len()),
                matmul::Matrix::new(&b, inner.len(), columns.len()),
            );
            matmul::multiply(&mut sum, columns.len(), 1.0, alpha, a, b, matmul::Threads::One);
        }
        let places = rows.flat_map(|i| columns.clone().map(move |j| (i, j)));
        for ((i, j), x) in places.zip(sum) {
            // SAFETY: callers check that the matrix lies in its memory, and nothing else writes to it.
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

/// Sets all elements of a matrix to 0.
pub(super) fn clear(x: Matrix) {
    // SAFETY: callers check that the matrix lies in its memory, and nothing else writes to it.
    unsafe { std::ptr::write_bytes(x.address().cast::<u8>(), 0, x.bytes()) }
}

enum Element {
    F32(*mut f32),
    Bf16(*mut bf16),
    F16(*mut f16),
}

/// The address of the element in row i and column j of a factor.
fn element(x: &Matrix, i: usize, j: usize) -> Element {
    let at = x.offset + if x.transposed { j * x.columns + i } else { i * x.columns + j };
    match x.dtype {
        DType::BF16 => Element::Bf16(x.memory.pointer::<bf16>().wrapping_add(at)),
        DType::F16 => Element::F16(x.memory.pointer::<f16>().wrapping_add(at)),
        _ => Element::F32(x.memory.pointer::<f32>().wrapping_add(at)),
    }
}

/// Some rows and columns of a factor, in row-major order.
fn block(x: &Matrix, rows: &Range<usize>, columns: &Range<usize>) -> Vec<f32> {
    let places = rows.clone().flat_map(|i| columns.clone().map(move |j| (i, j)));
    // SAFETY: callers check that a matrix lies in its memory.
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
        other => bail!("the kernels do not support {:?}", other.dtype()),
    })
}

#[cfg(test)]
mod tests;
