//! Access to the memory of CPU tensors as slices, and checks of shapes.

use crate::Packing;
use candle_core::{
    CpuStorage, Device, InplaceOp1, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType,
    backend::BackendStorage, bail,
};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, Range};

/// Read access to the elements of a contiguous CPU tensor. It holds the lock of the tensor's storage.
pub(crate) struct Elements<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    element: PhantomData<T>,
}

/// Gives read access to a contiguous CPU tensor of element type `T`.
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
            // `read` has checked the device and the type.
            Storage::Cpu(cpu) => cpu.as_slice::<T>().map_or(&[], |all| &all[self.range.clone()]),
            _ => &[],
        }
    }
}

/// Calls `write` with the elements of a contiguous f32 CPU tensor, to change them in place.
///
/// Every view of the same storage sees the change. This is how the views of one flat buffer hold all
/// parameters, or all gradients. The storage is locked meanwhile, so `write` must not access another view of
/// it.
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

/// Creates a CPU tensor that owns `elements`.
pub(crate) fn tensor<T: WithDType>(elements: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(elements, shape.into(), &Device::Cpu)
}

/// Returns the two dimensions of the matrix called `name` in error messages.
pub(crate) fn matrix(name: &str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.dims() {
        [rows, columns] => Ok((rows, columns)),
        _ => bail!("`{name}` has the shape {:?}, expected two dimensions", tensor.dims()),
    }
}

/// Fails unless the tensor called `name` has the shape `shape`.
pub(crate) fn expect_shape(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.dims() != shape {
        bail!("`{name}` has the shape {:?}, expected {shape:?}", tensor.dims());
    }
    Ok(())
}

/// Returns the shape (T, width) of the packed tensor called `name`; fails if T is not that of `packing`.
pub(crate) fn packed(name: &str, tensor: &Tensor, packing: &Packing) -> Result<(usize, usize)> {
    let (rows, width) = matrix(name, tensor)?;
    if rows != packing.tokens() {
        bail!("`{name}` has {rows} rows, but its sequences have {} tokens", packing.tokens());
    }
    Ok((rows, width))
}
