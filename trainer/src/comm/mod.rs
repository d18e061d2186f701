//! Collectives between the ranks of a run: the same calls for one rank and for many.
//!
//! Models, losses and kernels know nothing of ranks. A rank holds some of the batch's sequences and some of
//! its rows; it returns the *sum* of its rows' losses divided by the *global* number of rows. So gradients
//! are summed over ranks, and nothing is scaled by the number of ranks.
//!
//! Every sum adds the ranks in their order, and every rank gets the bits that one of them computed. So ranks
//! cannot drift apart, and a run gives the same bits each time, whatever carries the messages. Nothing is
//! padded: ranks may hold different numbers of sequences, or none.
//!
//! All ranks must call the same collectives in the same order.

mod environment;
mod mesh;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
pub mod rendezvous;
mod tcp;
mod token;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::time::Instant;

use bytemuck::Pod;
use candle_core::{DType, Device, Shape, Tensor};

pub use self::environment::{
    LONGEST_TIMEOUT, RankEnv, VARIABLE_NCCL, VARIABLE_RENDEZVOUS, VARIABLE_TIMEOUT, VARIABLE_TOKEN,
    is_loopback, slurm_master,
};
pub use self::tcp::raise_open_files_limit;
pub use self::token::Token;
use crate::data::batch::Sequence;
use crate::data::partition::{Partition, Shard};
use crate::model::params::Gradients;
use crate::system::device;
use crate::system::heartbeat;
use crate::{Error, Result};

/// Carries messages between ranks.
trait Transport: Debug + Send + Sync {
    /// Sends one message to each rank, this one included; returns the message of each rank to this one.
    fn all_to_all(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>>;

    /// Sends the same message to all ranks; returns the message of each rank.
    fn all_gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Tells the other ranks that this one ends, and why.
    fn abort(&self, failure: &Failure);

    /// The error of a rank that has ended or hangs, for a caller that has waited for all ranks since `start`.
    #[cfg(feature = "cuda")]
    fn lost_peer(&self, start: Instant) -> Option<Error>;
}

/// The reason why a rank ended, and its exit status.
#[derive(Clone, Debug)]
struct Failure {
    rank: usize,
    status: u8,
    message: String,
}

impl From<Failure> for Error {
    fn from(Failure { rank, status, message }: Failure) -> Self {
        Self::Rank { rank, status, message }
    }
}

/// The group of all ranks of a run, as seen by one of them.
///
/// A collective returns [`Error::Rank`] if another rank has failed, hangs, or calls another collective.
#[derive(Clone, Debug)]
pub struct World {
    rank: usize,
    size: usize,
    transport: Option<Arc<dyn Transport>>, // `None`: this is the only rank
}

/// Number of elements that are exchanged at once. It bounds the memory for copies.
const SEGMENT: usize = 1 << 24;

impl World {
    /// A single rank, for which every collective returns its input.
    pub fn solo() -> Self {
        Self { rank: 0, size: 1, transport: None }
    }

    /// `size` ranks that are threads of this process.
    pub fn threads(size: usize) -> Vec<Self> {
        let worlds = mesh::Mesh::threads(size).into_iter().enumerate();
        worlds.map(|(rank, mesh)| Self { rank, size, transport: Some(Arc::new(mesh)) }).collect()
    }

    /// Joins the ranks that `launch`, torchrun, srun or mpirun started; a single rank where none of them did.
    ///
    /// # Errors
    /// The environment contradicts itself, other ranks do not arrive in time, or this build lacks the
    /// transport.
    pub fn connect() -> Result<Self> {
        let Some(env) = RankEnv::from_env()? else { return Ok(Self::solo()) };
        if env.rank == 0
            && let Some(warning) =
                env.slow_path_warning(device::current().is_ok_and(|device| !device.is_cpu()))
        {
            tracing::warn!("{warning}");
        }
        #[cfg(feature = "mpi")]
        if env.master.is_none() {
            return Self::over(heartbeat::while_waiting(|| mpi::Mpi::start(&env))?, &env);
        }
        // The rendezvous has its own timeout and names the rank that is missing, so the launcher need not
        // watch this wait.
        Self::over(heartbeat::while_waiting(|| tcp::connect(&env))?, &env)
    }

    fn over(transport: impl Transport + 'static, env: &RankEnv) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let transport: Arc<dyn Transport> = match env.gpu {
            true => Arc::new(nccl::Nccl::start(Box::new(transport), env)?),
            false => Arc::new(transport),
        };
        #[cfg(not(feature = "cuda"))]
        let transport: Arc<dyn Transport> = Arc::new(transport);
        Ok(Self { rank: env.rank, size: env.size, transport: Some(transport) })
    }

    /// This process's rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether this is rank 0, which alone writes files and reports results.
    pub fn is_rank_zero(&self) -> bool {
        self.rank == 0
    }

    /// This rank and the number of ranks, for work that the ranks divide without communication.
    pub fn shard(&self) -> Shard {
        Shard { rank: self.rank, ranks: self.size }
    }

    /// Assigns the sequences of a batch to ranks, balanced by their number of tokens.
    pub fn partition(&self, sequences: &[Sequence]) -> Partition {
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.ids.len()).collect();
        Partition::balance(&lengths, self.size)
    }

    /// This rank's contiguous range of `count` rows. The ranges of all ranks follow each other in the order
    /// of the ranks.
    pub fn local_rows(&self, count: usize) -> Range<usize> {
        count * self.rank / self.size..count * (self.rank + 1) / self.size
    }

    /// Gathers the embeddings of all ranks, (n, D) on each → (N, D) in the order of the batch on every rank.
    pub fn all_gather_rows(&self, embeddings: Tensor, share: &Partition) -> Result<Tensor> {
        if self.size == 1 {
            return Ok(embeddings);
        }
        let (_, width) = embeddings.dims2()?;
        let by_rank = self.all_gather(&values(&embeddings)?)?;
        let mut rows = vec![0f32; share.count() * width];
        for ((rank, part), members) in by_rank.iter().enumerate().zip(share.ranks()) {
            self.check_length(rank, part.len(), members.len() * width)?;
            for (row, &member) in part.chunks_exact(width).zip(members) {
                rows[member * width..][..width].copy_from_slice(row);
            }
        }
        tensor_on(rows, (share.count(), width), embeddings.device())
    }

    /// Sums a gradient over ranks, (N, D) on each → (n, D), the rows of the sequences that this rank encoded.
    pub fn reduce_scatter_rows(&self, gradient: Tensor, share: &Partition) -> Result<Tensor> {
        if self.size == 1 {
            return Ok(gradient);
        }
        let (_, width) = gradient.dims2()?;
        let all = values(&gradient)?;
        let rows_of = |members: &[usize]| -> Vec<f32> {
            members.iter().flat_map(|&member| &all[member * width..][..width]).copied().collect()
        };
        let parts: Vec<Vec<f32>> = share.ranks().map(rows_of).collect();
        let sum = self.reduce_scatter(&parts)?;
        let rows = share.of(self.rank).len();
        tensor_on(sum, (rows, width), gradient.device())
    }

    /// Sums the gradients over ranks, in place.
    pub fn all_reduce(&self, gradients: &Gradients) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let flat = gradients.flat();
        let elements = flat.elem_count();
        for start in (0..elements).step_by(SEGMENT) {
            let segment = values(&flat.narrow(0, start, SEGMENT.min(elements - start))?)?;
            // Reduce-scatter, then all-gather: each rank sums its part of the elements.
            let bounds = |rank: usize| segment.len() * rank / self.size;
            let parts: Vec<&[f32]> =
                (0..self.size).map(|rank| &segment[bounds(rank)..bounds(rank + 1)]).collect();
            let whole = self.all_gather(&self.reduce_scatter(&parts)?)?.concat();
            let whole = Tensor::from_vec(whole, segment.len(), &Device::Cpu)?.to_device(flat.device())?;
            flat.slice_set(&whole, 0, start)?;
        }
        Ok(())
    }

    /// Concatenates vectors in the order of the ranks: (b) for this rank's [`World::local_rows`] → (B) on
    /// every rank.
    pub fn all_gather_tensor(&self, local: Tensor) -> Result<Tensor> {
        if self.size == 1 {
            return Ok(local);
        }
        let all = self.all_gather(&values(&local)?)?.concat();
        let rows = all.len();
        tensor_on(all, rows, local.device())
    }

    /// Gathers the sequences that each rank has tokenized → all of them in the order of the batch on every
    /// rank.
    pub fn all_gather_sequences(&self, local: Vec<Sequence>, share: &Partition) -> Result<Vec<Sequence>> {
        if self.size == 1 {
            return Ok(local);
        }
        let numbers: Vec<u32> = local
            .iter()
            .flat_map(|sequence| {
                [sequence.skip, sequence.ids.len() as u32].into_iter().chain(sequence.ids.iter().copied())
            })
            .collect();
        let mut all = vec![Sequence { ids: Vec::new(), skip: 0 }; share.count()];
        for ((rank, numbers), members) in self.all_gather(&numbers)?.iter().enumerate().zip(share.ranks()) {
            let mut rest = numbers.as_slice();
            for &member in members {
                let [skip, length, after @ ..] = rest else { return Err(self.mismatch(rank)) };
                let Some((ids, after)) = after.split_at_checked(*length as usize) else {
                    return Err(self.mismatch(rank));
                };
                all[member] = Sequence { ids: ids.to_vec(), skip: *skip };
                rest = after;
            }
        }
        Ok(all)
    }

    /// The stop signal that any rank has received, so that all ranks stop at the same step.
    pub fn any_signal(&self, signal: Option<i32>) -> Result<Option<i32>> {
        if self.size == 1 {
            return Ok(signal);
        }
        let signals = self.all_gather(&[signal.unwrap_or(0)])?;
        Ok(signals.into_iter().flatten().max().filter(|&signal| signal != 0))
    }

    /// Checks by a digest that all ranks hold the same `what`: the same model, rows or configuration.
    ///
    /// # Errors
    /// A rank's digest differs from that of rank 0.
    pub fn assert_same(&self, what: &str, digest: u64) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let digests = self.all_gather(&[digest])?.concat();
        match digests.iter().position(|&other| other != digests[0]) {
            Some(rank) => {
                Err(Error::Rank { rank, status: 1, message: format!("has another {what} than rank 0") })
            }
            None => Ok(()),
        }
    }

    /// Sends rank 0's bytes to all ranks. The bytes of the others are ignored.
    pub fn broadcast_bytes(&self, local: Vec<u8>) -> Result<Vec<u8>> {
        if self.size == 1 {
            return Ok(local);
        }
        let message = if self.is_rank_zero() { local.as_slice() } else { &[] };
        Ok(self.collective(|transport| transport.all_gather(message))?.swap_remove(0))
    }

    /// Sends the values (P) of rank 0 to all ranks, in place.
    pub fn broadcast(&self, buffer: &Tensor) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let elements = buffer.elem_count();
        for start in (0..elements).step_by(SEGMENT) {
            let length = SEGMENT.min(elements - start);
            let local =
                if self.is_rank_zero() { values(&buffer.narrow(0, start, length)?)? } else { Vec::new() };
            let first = self.all_gather(&local)?.swap_remove(0);
            self.check_length(0, first.len(), length)?;
            buffer.slice_set(
                &Tensor::from_vec(first, length, &Device::Cpu)?.to_device(buffer.device())?,
                0,
                start,
            )?;
        }
        Ok(())
    }

    /// Waits until every rank has called this.
    pub fn barrier(&self) -> Result<()> {
        self.all_gather::<u8>(&[]).map(drop)
    }

    /// Gathers the values of each rank, in the order of the ranks, on every rank. Lengths may differ.
    pub fn all_gather<T: Pod>(&self, local: &[T]) -> Result<Vec<Vec<T>>> {
        if self.size == 1 {
            return Ok(vec![local.to_vec()]);
        }
        let messages = self.collective(|transport| transport.all_gather(bytemuck::cast_slice(local)))?;
        self.decode(messages)
    }

    /// Tells the other ranks that this one ends with `status` because of `error`, so that they end too and
    /// report it.
    pub fn abort(&self, error: &Error, status: u8) {
        if let Some(transport) = &self.transport {
            let failure = match error {
                Error::Rank { rank, status, message } => {
                    Failure { rank: *rank, status: *status, message: message.clone() }
                }
                _ => Failure { rank: self.rank, status, message: error.to_string() },
            };
            transport.abort(&failure);
        }
    }

    /// Sums over ranks, in their order, the parts that each rank has for this one.
    fn reduce_scatter<P: AsRef<[f32]>>(&self, parts: &[P]) -> Result<Vec<f32>> {
        let length = parts[self.rank].as_ref().len();
        let messages: Vec<&[u8]> = parts.iter().map(|part| bytemuck::cast_slice(part.as_ref())).collect();
        let received: Vec<Vec<f32>> =
            self.decode(self.collective(|transport| transport.all_to_all(&messages))?)?;
        let mut sum = vec![0f32; length];
        for (rank, part) in received.iter().enumerate() {
            self.check_length(rank, part.len(), length)?;
            if rank == 0 {
                sum.copy_from_slice(part);
            } else {
                sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(sum)
    }

    /// Runs a collective, during which this rank counts as waiting.
    fn collective(&self, call: impl FnOnce(&dyn Transport) -> Result<Vec<Vec<u8>>>) -> Result<Vec<Vec<u8>>> {
        match &self.transport {
            Some(transport) => heartbeat::while_waiting(|| call(transport.as_ref())),
            None => Ok(Vec::new()),
        }
    }

    fn decode<T: Pod>(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<T>>> {
        let decode = |(rank, bytes): (usize, Vec<u8>)| match bytes.len() % size_of::<T>().max(1) {
            0 => Ok(bytemuck::pod_collect_to_vec(&bytes)),
            _ => Err(self.mismatch(rank)),
        };
        messages.into_iter().enumerate().map(decode).collect()
    }

    fn check_length(&self, rank: usize, found: usize, expected: usize) -> Result<()> {
        if found == expected { Ok(()) } else { Err(self.mismatch(rank)) }
    }

    fn mismatch(&self, rank: usize) -> Error {
        let message = format!(
            "called another collective than rank {}\nhint: all ranks must run the same build with the same configuration",
            self.rank
        );
        Error::Rank { rank, status: 1, message }
    }
}

/// A tensor of `elements`, which may be empty, on `device`.
fn tensor_on(elements: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    if elements.is_empty() {
        return Ok(kernels::zeros(shape, DType::F32, device)?);
    }
    Ok(Tensor::from_vec(elements, shape.into(), &Device::Cpu)?.to_device(device)?)
}

/// The elements as f32 in host memory.
fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

#[cfg(test)]
mod tests;
