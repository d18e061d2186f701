//! Where the kernels of the .cu files run: on a GPU (feature `cuda`), or on the emulator (tests, and feature `emulator`), of which
//! CPU tensors are the memory. An op's `gpu` file calls them once for both.
//!
//! An entry takes a struct of pointers and sizes, which its .cu file declares once more, and a stream.

use candle_core::{DType, Device, Layout, Result, Shape, Tensor, bail};
use std::ffi::c_void;

use crate::dropout;

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(test, feature = "emulator"))]
pub(crate) mod emulated;
#[cfg(feature = "cuda")]
pub(crate) mod libraries;
pub(crate) mod product;

/// Declares entries: `name(Arguments)` becomes a function that runs the kernel where `at` says.
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
        /// # Safety
        /// Every pointer in `arguments` is null where the kernel allows it, or of the size that it says, in the memory of `at`.
        unsafe fn $name(at: &candle_core::Device, arguments: &$arguments) -> candle_core::Result<()> {
            match at {
                #[cfg(feature = "cuda")]
                candle_core::Device::Cuda(device) => {
                    let stream = $crate::gpu::cuda::stream(device)?;
                    // SAFETY: the caller vouches for the arguments.
                    $crate::gpu::cuda::check(unsafe { on_device::$name(arguments, stream) })
                }
                #[cfg(any(test, feature = "emulator"))]
                candle_core::Device::Cpu => {
                    // SAFETY: the caller vouches for the arguments.
                    $crate::gpu::emulated::check(unsafe { on_emulator::$name(arguments, std::ptr::null_mut()) })
                }
                other => candle_core::bail!("no kernel runs on {:?}", other.location()),
            }
        }
        )*
    };
}
pub(crate) use entries;

/// Whether ops on tensors of `device` are kernels.
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

/// From now on every op of this process runs as the kernel that a GPU would run, on the emulator: for tests.
#[cfg(feature = "emulator")]
pub fn emulate() {
    EMULATED.store(true, std::sync::atomic::Ordering::Relaxed);
}

/// An element type, as kernels number it.
pub(crate) fn type_of(tensor: &Tensor) -> Result<i32> {
    number_of(tensor.dtype())
}

/// As [`type_of`].
pub(crate) fn number_of(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F16 => Ok(2),
        other => bail!("kernels know f32, bf16 and f16, not {other:?}"),
    }
}

/// Memory that a kernel reads or changes, alive as long as this is.
pub(crate) struct Memory {
    at: Place,
}

enum Place {
    #[cfg(feature = "cuda")]
    Device(cuda::Memory),
    #[cfg(any(test, feature = "emulator"))]
    Emulated(emulated::Memory),
}

impl Memory {
    /// The elements of a contiguous tensor, to be read, or on a GPU also changed.
    pub(crate) fn of(tensor: &Tensor) -> Result<Self> {
        let at = match tensor.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Place::Device(cuda::Memory::of(tensor)?),
            #[cfg(any(test, feature = "emulator"))]
            Device::Cpu => Place::Emulated(emulated::Memory::of(tensor, false)?),
            other => bail!("no kernel runs on {:?}", other.location()),
        };
        Ok(Self { at })
    }

    /// The elements of a contiguous tensor, to be changed; every view of the same storage sees that.
    pub(crate) fn mutable(tensor: &Tensor) -> Result<Self> {
        #[cfg(any(test, feature = "emulator"))]
        if tensor.device().is_cpu() {
            return Ok(Self { at: Place::Emulated(emulated::Memory::of(tensor, true)?) });
        }
        Self::of(tensor)
    }

    /// New, unwritten elements.
    pub(crate) fn new(device: &Device, dtype: DType, count: usize) -> Result<Self> {
        let at = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Place::Device(cuda::Memory::new(device, dtype, count)?),
            #[cfg(any(test, feature = "emulator"))]
            Device::Cpu => Place::Emulated(emulated::Memory::new(dtype, count)),
            other => bail!("no kernel runs on {:?}", other.location()),
        };
        Ok(Self { at })
    }

    /// A copy of `elements`, which a kernel reads.
    pub(crate) fn upload(device: &Device, elements: &[u32]) -> Result<Self> {
        Self::of(&crate::upload(elements, device)?)
    }

    /// The tensor that owns what [`Memory::new`] made and a kernel has written.
    pub(crate) fn tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        match self.at {
            #[cfg(feature = "cuda")]
            Place::Device(memory) => memory.tensor(shape.into()),
            #[cfg(any(test, feature = "emulator"))]
            Place::Emulated(memory) => memory.tensor(&shape.into()),
        }
    }

    /// The first element.
    pub(crate) fn pointer<T>(&self) -> *mut T {
        match &self.at {
            #[cfg(feature = "cuda")]
            Place::Device(memory) => memory.pointer().cast(),
            #[cfg(any(test, feature = "emulator"))]
            Place::Emulated(memory) => memory.pointer().cast(),
        }
    }
}

/// Zeros: as `Tensor::zeros`, which cannot make an empty tensor on a GPU.
pub(crate) fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    if shape.elem_count() == 0 {
        Memory::new(device, dtype, 0)?.tensor(shape)
    } else {
        Tensor::zeros(shape, dtype, device)
    }
}

/// The pointer of an optional [`Memory`], null without.
pub(crate) fn pointer<T>(memory: Option<&Memory>) -> *mut T {
    memory.map_or(std::ptr::null_mut(), Memory::pointer)
}

/// [`Memory::of`] an optional tensor.
pub(crate) fn optional(tensor: Option<&Tensor>) -> Result<Option<Memory>> {
    tensor.map(Memory::of).transpose()
}

/// [`Memory::mutable`] of an optional tensor.
pub(crate) fn optional_mutable(tensor: Option<&Tensor>) -> Result<Option<Memory>> {
    tensor.map(Memory::mutable).transpose()
}

/// The range of a contiguous tensor in its storage.
fn contiguous(layout: &Layout) -> Result<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

/// Copies of small tables on a GPU, made when they are first used. All are equal: they follow from what they stand beside.
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
    /// The copies on `device`; `make` makes them.
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

/// A [`crate::Packing`] where the kernels are.
pub(crate) struct Packing {
    offsets: Memory,
    numbers: Memory,
    sequences: Memory,
    positions: Memory,
    arguments: (i32, i32, i32),
}

impl Packing {
    pub(crate) fn of(packing: &crate::Packing, device: &Device) -> Result<Self> {
        let (tokens, count) = (packing.tokens(), packing.sequences());
        if count > 65535 {
            bail!("a chunk of {count} sequences; a GPU takes at most 65535, so lower training.chunk_tokens");
        }
        let make = || -> Result<[Tensor; 4]> {
            let mut offsets = vec![0u32];
            let (mut sequences, mut positions) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens));
            for (n, range) in packing.ranges().enumerate() {
                offsets.push(range.end as u32);
                sequences.extend(range.clone().map(|_| n as u32));
                positions.extend(0..range.len() as u32);
            }
            let numbers: Vec<u32> = (0..count).map(|n| packing.number(n)).collect();
            let copy = |elements: &[u32]| crate::upload(elements, device);
            Ok([copy(&offsets)?, copy(&numbers)?, copy(&sequences)?, copy(&positions)?])
        };
        #[cfg(feature = "cuda")]
        let [offsets, numbers, sequences, positions] = packing.copies().on(device, make)?;
        #[cfg(not(feature = "cuda"))]
        let [offsets, numbers, sequences, positions] = make()?;
        Ok(Self {
            offsets: Memory::of(&offsets)?,
            numbers: Memory::of(&numbers)?,
            sequences: Memory::of(&sequences)?,
            positions: Memory::of(&positions)?,
            arguments: (tokens as i32, count as i32, packing.longest() as i32),
        })
    }

    /// (T) of each token.
    pub(crate) fn positions(&self) -> *const u32 {
        self.positions.pointer()
    }

    /// As a kernel's argument.
    pub(crate) fn arguments(&self) -> PackingArguments {
        let (tokens, count, longest) = self.arguments;
        PackingArguments {
            offsets: self.offsets.pointer(),
            numbers: self.numbers.pointer(),
            sequences: self.sequences.pointer(),
            positions: self.positions.pointer(),
            tokens,
            count,
            longest,
        }
    }
}

/// `Packing` of common.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PackingArguments {
    offsets: *const u32,
    numbers: *const u32,
    sequences: *const u32,
    positions: *const u32,
    tokens: i32,
    count: i32,
    longest: i32,
}

/// `Dropout` of common.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DropoutArguments {
    seed: [u32; 2],
    step: u32,
    site: u32,
    threshold: u32,
    kept: f32,
}

impl DropoutArguments {
    /// Without dropout everything is kept.
    pub(crate) fn of(dropout: Option<dropout::Dropout>) -> Self {
        let d = dropout.unwrap_or(dropout::Dropout { p: 0.0, seed: 0, step: 0, site: 0 });
        Self {
            seed: [d.seed as u32, (d.seed >> 32) as u32],
            step: d.step,
            site: d.site,
            threshold: d.threshold(),
            kept: 1.0 / (1.0 - d.p),
        }
    }
}

#[cfg(test)]
pub(crate) use emulated::with_seed;

/// A pointer without a type.
pub(crate) type Any = *const c_void;
/// As [`Any`], to what a kernel writes.
pub(crate) type AnyMut = *mut c_void;
