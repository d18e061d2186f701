//! A tensor's memory on the CPU: read as a slice, written as a slice.

use crate::Packing;
use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType,
    backend::BackendStorage, bail,
};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, Range};

/// The elements of a contiguous CPU tensor, readable while this lives.
pub(crate) struct Elements<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    element: PhantomData<T>,
}

/// Reads a contiguous CPU tensor of element type `T`.
pub(crate) fn read<T: WithDType>(tensor: &Tensor) -> Result<Elements<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = contiguous(layout)?;
    match &*storage {
        Storage::Cpu(cpu) => drop(cpu.as_slice::<T>()?),
        _ => bail!("this op has no kernel for {:?}", tensor.device().location()),
    }
    Ok(Elements { storage, range, element: PhantomData })
}

impl<T: WithDType> Deref for Elements<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            // `read` has checked both device and type.
            Storage::Cpu(cpu) => cpu.as_slice::<T>().map_or(&[], |all| &all[self.range.clone()]),
            _ => &[],
        }
    }
}

/// Lets `write` change the elements of a contiguous f32 CPU tensor where they lie. Every view of the same
/// storage sees the change: that is how parameters and gradients live in one flat buffer.
pub(crate) fn write<F: FnOnce(&mut [f32])>(tensor: &Tensor, write: F) -> Result<()> {
    tensor.inplace_op1(&Write(RefCell::new(Some(write))))
}

struct Write<F>(RefCell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = contiguous(layout)?;
        let CpuStorage::F32(all) = storage else {
            bail!("expected an f32 tensor, got {:?}", storage.dtype());
        };
        if let Some(write) = self.0.take() {
            write(&mut all[range]);
        }
        Ok(())
    }
}

fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

/// A new CPU tensor that owns `elements`.
pub(crate) fn tensor<T: WithDType>(elements: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(elements, shape.into(), &Device::Cpu)
}

/// Zeros on `device`: as `Tensor::zeros`, which cannot make an empty tensor on a GPU.
pub fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    #[cfg(gpu)]
    if !device.is_cpu() {
        return crate::gpu::zeros(shape, dtype, device);
    }
    Tensor::zeros(shape, dtype, device)
}

/// Whole numbers on `device`. A GPU that is at work is not waited for: copies of up to 64 KiB are queued, so longer lists go in
/// pieces.
pub fn upload(elements: &[u32], device: &Device) -> Result<Tensor> {
    const PIECE: usize = (64 << 10) / size_of::<u32>();
    match elements.len() {
        0 => zeros(0, DType::U32, device),
        count if count <= PIECE || device.is_cpu() => Tensor::from_slice(elements, count, device),
        _ => {
            let pieces = elements.chunks(PIECE).map(|piece| Tensor::new(piece, device));
            Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 0)
        }
    }
}

/// The two dimensions of a matrix called `name`.
pub(crate) fn matrix(name: &str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.dims() {
        [rows, columns] => Ok((rows, columns)),
        _ => bail!("`{name}` has the shape {:?}, expected two dimensions", tensor.dims()),
    }
}

/// Fails unless the tensor called `name` has this shape.
pub(crate) fn expect_shape(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.dims() != shape {
        bail!("`{name}` has the shape {:?}, expected {shape:?}", tensor.dims());
    }
    Ok(())
}

/// The two dimensions (T, width) of a packed tensor called `name`.
pub(crate) fn packed(name: &str, tensor: &Tensor, packing: &Packing) -> Result<(usize, usize)> {
    let (rows, width) = matrix(name, tensor)?;
    if rows != packing.tokens() {
        bail!("`{name}` has {rows} rows, but its sequences have {} tokens", packing.tokens());
    }
    Ok((rows, width))
}
