//! Checkpoints are written in the background: training waits for a copy in memory, not for the disk.

use std::thread::{self, JoinHandle};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::{Checkpoints, State};
use crate::model::params::FlatParameters;
use crate::train::optimizer::Optimizer;
use crate::{Error, Result};

/// A copy of the state, parameters and moments of a run after a step. The run may continue while it is written.
#[derive(Debug)]
pub struct Snapshot {
    /// The state of the run.
    pub state: State,
    pub(super) flat: FlatParameters, // for names and offsets; its values change while the run continues
    pub(super) values: Tensor,
    pub(super) exp_avg: Tensor,
    pub(super) exp_avg_sq: Tensor,
}

impl Snapshot {
    /// Copies parameters and moments. With `last`, no step follows and nothing is copied on a CPU.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn take(state: &State, flat: &FlatParameters, optimizer: &Optimizer, last: bool) -> Result<Self> {
        let copy = |buffer: &Tensor| match buffer.device() {
            Device::Cpu if last => Ok(buffer.clone()),
            Device::Cpu => buffer.copy(),
            _ => buffer.to_device(&Device::Cpu),
        };
        Ok(Self {
            state: state.clone(),
            flat: flat.clone(),
            values: copy(flat.values())?,
            exp_avg: copy(&optimizer.exp_avg)?,
            exp_avg_sq: copy(&optimizer.exp_avg_sq)?,
        })
    }

    /// Bytes of the tensors.
    pub(super) fn bytes(&self) -> u64 {
        3 * (self.flat.len() * DType::F32.size_in_bytes()) as u64
    }
}

/// Digest of the bits of some buffers (P).
///
/// # Errors
/// A buffer cannot be copied from the GPU.
pub fn digest(buffers: &[&Tensor]) -> Result<u64> {
    const BLOCK: usize = 1 << 20;
    let blocks: Vec<(&Tensor, usize)> = buffers
        .iter()
        .flat_map(|buffer| (0..buffer.elem_count()).step_by(BLOCK).map(move |start| (*buffer, start)))
        .collect();
    let of_block = |(buffer, start): (&Tensor, usize)| -> Result<[u8; 8]> {
        let values = buffer.narrow(0, start, BLOCK.min(buffer.elem_count() - start))?.to_vec1::<f32>()?;
        Ok(xxh3_64(bytemuck::cast_slice(&values)).to_le_bytes())
    };
    let digests: Vec<[u8; 8]> = blocks.into_par_iter().map(of_block).collect::<Result<_>>()?;
    Ok(xxh3_64(&digests.concat()))
}

/// Writes one checkpoint at a time on a thread, while training continues.
#[derive(Debug)]
pub struct Writer {
    checkpoints: Checkpoints,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Writer {
    /// A writer into the folder of `checkpoints`.
    pub fn new(checkpoints: Checkpoints) -> Self {
        Self { checkpoints, thread: None }
    }

    /// Starts to write a snapshot once the one before is written. `best`: OUTPUT/best will point to it.
    ///
    /// # Errors
    /// The checkpoint before could not be written.
    pub fn save(&mut self, snapshot: Snapshot, best: bool) -> Result<()> {
        self.finish()?;
        let checkpoints = self.checkpoints.clone();
        let write = move || {
            checkpoints.save(&snapshot)?;
            if best { checkpoints.mark_best(snapshot.state.step) } else { Ok(()) }
        };
        let thread = thread::Builder::new().name("checkpoint".to_owned()).spawn(write);
        self.thread = Some(thread.map_err(Error::system("start a thread for the checkpoint"))?);
        Ok(())
    }

    /// Waits until the checkpoint is written.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(&mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(written)) => written,
            Some(Err(_)) => Err(Error::Bug("the thread that writes checkpoints panicked".to_owned())),
        }
    }

    /// Returns the error of a checkpoint that could not be written, without waiting for one that is being written.
    ///
    /// # Errors
    /// See [`Self::finish`].
    pub fn check(&mut self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) { self.finish() } else { Ok(()) }
    }
}

/// A run that fails still completes the checkpoint that is being written.
impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::error!("{error}");
        }
    }
}
