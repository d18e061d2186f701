//! Writing in the background: the step waits for a copy in memory, not for the disk.

use std::thread::{self, JoinHandle};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::{Checkpoints, State};
use crate::model::params::FlatParameters;
use crate::train::optimizer::Optimizer;
use crate::{Error, Result};

/// A run's state after a step, apart from the run, which goes on.
#[derive(Debug)]
pub struct Snapshot {
    /// Where the run stands.
    pub state: State,
    pub(super) flat: FlatParameters, // only its names and places: the values go on
    pub(super) values: Tensor,
    pub(super) first: Tensor,
    pub(super) second: Tensor,
}

impl Snapshot {
    /// Copies parameters and moments, unless the run ends here: then nothing changes them any more.
    pub fn take(state: &State, flat: &FlatParameters, optimizer: &Optimizer, ends: bool) -> Result<Self> {
        let copy = |buffer: &Tensor| match buffer.device() {
            Device::Cpu if ends => Ok(buffer.clone()),
            Device::Cpu => buffer.copy(),
            _ => buffer.to_device(&Device::Cpu),
        };
        Ok(Self {
            state: state.clone(),
            flat: flat.clone(),
            values: copy(flat.values())?,
            first: copy(&optimizer.exp_avg)?,
            second: copy(&optimizer.exp_avg_sq)?,
        })
    }

    /// Bytes of its tensors.
    pub(super) fn bytes(&self) -> u64 {
        3 * (self.flat.len() * DType::F32.size_in_bytes()) as u64
    }
}

/// A digest of the bits of buffers (P), parameters and moments.
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

/// Writes one checkpoint at a time, while the run goes on.
#[derive(Debug)]
pub struct Writer {
    checkpoints: Checkpoints,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Writer {
    /// Into the folder of these checkpoints.
    pub fn new(checkpoints: Checkpoints) -> Self {
        Self { checkpoints, thread: None }
    }

    /// Starts to write, after what is being written; `best` says that it is the best so far.
    ///
    /// # Errors
    /// The one before could not be written.
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

    /// Waits until all is written.
    ///
    /// # Errors
    /// It could not be.
    pub fn finish(&mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(written)) => written,
            Some(Err(_)) => Err(Error::Bug("the thread that writes checkpoints panicked".to_owned())),
        }
    }

    /// Says early if something could not be written.
    pub fn check(&mut self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) { self.finish() } else { Ok(()) }
    }
}

/// A run that fails still ends what it has begun to write.
impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::error!("{error}");
        }
    }
}
