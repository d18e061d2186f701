//! The packing of a chunk as an argument of the kernels.

use super::Packing;
use crate::gpu::{Memory, upload};
use candle_core::{Device, Result, Tensor, bail};

/// The arrays of a [`Packing`] on the device.
pub(crate) struct DevicePacking {
    offsets: Memory,
    numbers: Memory,
    sequences: Memory,
    positions: Memory,
    arguments: (i32, i32, i32),
}

impl DevicePacking {
    /// Copies the arrays of `packing` to `device`, or uses the copies that were made before.
    ///
    /// # Errors
    /// If there are more sequences than a GPU supports in one launch.
    pub(crate) fn of(packing: &Packing, device: &Device) -> Result<Self> {
        let (tokens, count) = (packing.tokens(), packing.sequences());
        if count > 65535 {
            bail!(
                "a chunk has {count} sequences; a GPU supports at most 65535, so lower training.chunk_tokens"
            );
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
            let copy = |elements: &[u32]| upload(elements, device);
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

    /// `(T)` the position of each token in its sequence.
    pub(crate) fn positions(&self) -> *const u32 {
        self.positions.pointer()
    }

    /// The packing as an argument of a kernel.
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

/// The struct `Packing` of common.cuh.
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
