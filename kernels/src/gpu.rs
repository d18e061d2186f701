//! Calls of the kernels in the .cu files, on a GPU (feature `cuda`) or on the emulator (tests, and feature
//! `emulator`).
//!
//! The `gpu` file of an op is the same for both. The emulator runs on CPU tensors. An entry function of a .cu
//! file takes a stream and a pointer to a struct of pointers and sizes, which the .cu file and the `gpu` file
//! both declare.

use candle_core::{DType, Device, Layout, Result, Shape, Tensor, bail};
use std::ffi::c_void;

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(test, feature = "emulator"))]
pub(crate) mod emulated;
#[cfg(feature = "cuda")]
pub(crate) mod libraries;
pub(crate) mod product;

/// Declares entry functions: `name(Arguments)` becomes a function that runs the kernel on the device
/// `device`.
macro_rules! entries {
    ($($name:ident($arguments:ty);)*) => {
        #[cfg(feature = "cuda")]
        mod on_device {
            use super::*;
            unsafe extern "C" {
                $(#[link_name = concat!("lodestone_", stringify!($name))]
                pub(super) fn $name(arguments: *const $arguments, stream: *mut std::ffi::c_void) -> i32;)*
            }
        }
        #[cfg(any(test, feature = "emulator"))]
        mod on_emulator {
            use super::*;
            unsafe extern "C" {
                $(#[link_name = concat!("emulated_", stringify!($name))]
                pub(super) fn $name(arguments: *const $arguments, stream: *mut std::ffi::c_void) -> i32;)*
            }
        }
        $(
        /// Runs the kernel of the same name.
        ///
        /// # Safety
        /// Every pointer in `arguments` must be null, where the kernel allows it, or point to memory of the
        /// device `device` of the size that the kernel expects.
        unsafe fn $name(device: &candle_core::Device, arguments: &$arguments) -> candle_core::Result<()> {
            match device {
                #[cfg(feature = "cuda")]
                candle_core::Device::Cuda(device) => {
                    let stream = $crate::gpu::cuda::stream(device)?;
                    // SAFETY: the caller guarantees that the arguments are valid.
                    $crate::gpu::cuda::check(unsafe { on_device::$name(arguments, stream) })
                }
                #[cfg(any(test, feature = "emulator"))]
                candle_core::Device::Cpu => {
                    // SAFETY: the caller guarantees that the arguments are valid.
                    $crate::gpu::emulated::check(unsafe { on_emulator::$name(arguments, std::ptr::null_mut()) })
                }
                other => candle_core::bail!("no kernel runs on {:?}", other.location()),
            }
        }
        )*
    };
}
pub(crate) use entries;

/// Whether ops on tensors of `device` run as kernels.
#[cfg(gpu)]
pub(crate) fn runs(device: &Device) -> bool {
    #[cfg(feature = "emulator")]
    if EMULATED.load(std::sync::atomic::Ordering::Relaxed) {
        return true;
    }
    device.is_cuda()
}

#[cfg(feature = "emulator")]
static EMULATED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// Makes every op of this process run its GPU kernel on the emulator, for tests.
#[cfg(feature = "emulator")]
pub fn use_emulator() {
    EMULATED.store(true, std::sync::atomic::Ordering::Relaxed);
}

/// The number of a tensor's element type in the arguments of a kernel: `Type` of common.cuh.
pub(crate) fn dtype_code_of(tensor: &Tensor) -> Result<i32> {
    dtype_code(tensor.dtype())
}

/// The number of an element type in the arguments of a kernel.
pub(crate) fn dtype_code(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F16 => Ok(2),
        other => bail!("the kernels support F32, BF16 and F16, not {other:?}"),
    }
}

/// Memory that a kernel reads or writes. It stays allocated as long as this value exists.
pub(crate) struct Memory {
    backend: Backend,
}

enum Backend {
    #[cfg(feature = "cuda")]
    Device(cuda::Memory),
    #[cfg(any(test, feature = "emulator"))]
    Emulated(emulated::Memory),
}

impl Memory {
    /// The memory of a contiguous tensor, for reading; on a GPU a kernel may also write to it.
    pub(crate) fn of(tensor: &Tensor) -> Result<Self> {
        let backend = match tensor.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Backend::Device(cuda::Memory::of(tensor)?),
            #[cfg(any(test, feature = "emulator"))]
            Device::Cpu => Backend::Emulated(emulated::Memory::of(tensor, false)?),
            other => bail!("no kernel runs on {:?}", other.location()),
        };
        Ok(Self { backend })
    }

    /// The memory of a contiguous tensor, for reading and writing. Every view of the same storage sees the
    /// change.
    pub(crate) fn mutable(tensor: &Tensor) -> Result<Self> {
        #[cfg(any(test, feature = "emulator"))]
        if tensor.device().is_cpu() {
            return Ok(Self { backend: Backend::Emulated(emulated::Memory::of(tensor, true)?) });
        }
        Self::of(tensor)
    }

    /// Allocates uninitialised memory for `count` elements.
    pub(crate) fn new(device: &Device, dtype: DType, count: usize) -> Result<Self> {
        let backend = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Backend::Device(cuda::Memory::new(device, dtype, count)?),
            #[cfg(any(test, feature = "emulator"))]
            Device::Cpu => Backend::Emulated(emulated::Memory::new(dtype, count)),
            other => bail!("no kernel runs on {:?}", other.location()),
        };
        Ok(Self { backend })
    }

    /// A copy of `elements` on the device, for reading.
    pub(crate) fn upload(device: &Device, elements: &[u32]) -> Result<Self> {
        Self::of(&upload(elements, device)?)
    }

    /// Turns memory of [`Memory::new`], which a kernel has written, into a tensor.
    pub(crate) fn tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        match self.backend {
            #[cfg(feature = "cuda")]
            Backend::Device(memory) => memory.tensor(shape.into()),
            #[cfg(any(test, feature = "emulator"))]
            Backend::Emulated(memory) => memory.tensor(&shape.into()),
        }
    }

    /// The address of the first element.
    pub(crate) fn pointer<T>(&self) -> *mut T {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Device(memory) => memory.pointer().cast(),
            #[cfg(any(test, feature = "emulator"))]
            Backend::Emulated(memory) => memory.pointer().cast(),
        }
    }
}

/// A tensor of zeros. Unlike `Tensor::zeros` it can also create an empty tensor on a GPU.
pub(crate) fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    if shape.elem_count() == 0 {
        Memory::new(device, dtype, 0)?.tensor(shape)
    } else {
        Tensor::zeros(shape, dtype, device)
    }
}

/// Copies integers to a new tensor `(elements.len())` on `device`: see [`crate::upload`].
pub(crate) fn upload(elements: &[u32], device: &Device) -> Result<Tensor> {
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

/// The address of an optional [`Memory`]; null without one.
pub(crate) fn pointer<T>(memory: Option<&Memory>) -> *mut T {
    memory.map_or(std::ptr::null_mut(), Memory::pointer)
}

/// [`Memory::of`] of an optional tensor.
pub(crate) fn optional(tensor: Option<&Tensor>) -> Result<Option<Memory>> {
    tensor.map(Memory::of).transpose()
}

/// [`Memory::mutable`] of an optional tensor.
pub(crate) fn optional_mutable(tensor: Option<&Tensor>) -> Result<Option<Memory>> {
    tensor.map(Memory::mutable).transpose()
}

/// The range of a contiguous tensor in its storage; an error if it is not contiguous.
fn contiguous(layout: &Layout) -> Result<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

/// A field with GPU copies of other fields of the same struct, which are created on first use.
///
/// Two values always compare equal, so that only the other fields decide whether two such structs are equal.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug)]
pub(crate) struct Copies<const N: usize>(std::sync::OnceLock<[Tensor; N]>);

#[cfg(feature = "cuda")]
impl<const N: usize> Default for Copies<N> {
    fn default() -> Self {
        Self(std::sync::OnceLock::new())
    }
}

#[cfg(feature = "cuda")]
impl<const N: usize> PartialEq for Copies<N> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

#[cfg(feature = "cuda")]
impl<const N: usize> Eq for Copies<N> {}

#[cfg(feature = "cuda")]
impl<const N: usize> Copies<N> {
    /// Returns the copies on `device`, and calls `make` to create them if there are none.
    pub(crate) fn on(
        &self,
        device: &Device,
        make: impl FnOnce() -> Result<[Tensor; N]>,
    ) -> Result<[Tensor; N]> {
        match self.0.get() {
            Some(all) if all.iter().all(|copy| copy.device().same_device(device)) => Ok(all.clone()),
            _ => {
                let all = make()?;
                Ok(if device.is_cuda() { self.0.get_or_init(|| all.clone()).clone() } else { all })
            }
        }
    }
}

#[cfg(test)]
pub(crate) use emulated::with_seed;

/// A `const void*` argument of a kernel.
pub(crate) type VoidPointer = *const c_void;
/// A `void*` argument of a kernel, which writes to it.
pub(crate) type VoidPointerMut = *mut c_void;
