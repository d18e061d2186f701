//! The ranks of a run, as the step sees them: what it calls is the same for one rank and for many.
//!
//! Models, losses and kernels know nothing of ranks. A rank holds some of the batch's sequences and some of its rows; it
//! returns the *sum* of its rows' losses over the *global* row count, so gradients are summed over ranks and nothing is
//! scaled by their number.
//!
//! Every sum runs over the ranks in their order, and every rank gets the bits that one of them computed: ranks cannot drift apart,
//! and a run gives the same bits each time, whatever carries the messages. Nothing is padded: ranks may hold different
//! numbers of sequences, or none.
//!
//! Collectives are called by the step, the training around it, and evaluation; by all ranks in the same order.

mod environment;
mod mesh;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
pub mod rendezvous;
mod tcp;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::time::Instant;

use bytemuck::Pod;
use candle_core::{DType, Device, Shape, Tensor};

pub use self::environment::{
    LONGEST_TIMEOUT, Place, VARIABLE_NCCL, VARIABLE_RENDEZVOUS, VARIABLE_TIMEOUT, VARIABLE_TOKEN,
    is_loopback, place, slurm_master,
};
pub use self::tcp::open_files;
use crate::data::batch::Sequence;
use crate::data::builder::Part;
use crate::data::share::Share;
use crate::model::params::Gradients;
use crate::system::device;
use crate::system::heartbeat;
use crate::{Error, Result};

/// What carries messages between ranks.
trait Transport: Debug + Send + Sync {
    /// One message for each rank, this one included → what each rank had for this one.
    fn exchange(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>>;

    /// One message for all → what each rank had for all.
    fn gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Lets the others know that this rank ends, and why.
    fn abandon(&self, failed: &Failed);

    /// Why there is no sense in waiting any longer, where something else has waited for all ranks since `start`.
    #[cfg(feature = "cuda")]
    fn lost(&self, start: Instant) -> Option<Error>;
}

/// Why a rank ended.
#[derive(Clone, Debug)]
struct Failed {
    rank: usize,
    status: u8,
    message: String,
}

impl From<Failed> for Error {
    fn from(Failed { rank, status, message }: Failed) -> Self {
        Self::Rank { rank, status, message }
    }
}

/// The ranks of a run. This process is one of them.
#[derive(Clone, Debug)]
pub struct World {
    rank: usize,
    size: usize,
    transport: Option<Arc<dyn Transport>>, // none: there is nobody else
}

/// Elements that are summed at once: what is in memory twice.
const SEGMENT: usize = 1 << 24;

impl World {
    /// One rank: what is gathered or summed is already whole.
    pub fn solo() -> Self {
        Self { rank: 0, size: 1, transport: None }
    }

    /// Ranks that are threads of this process.
    pub fn threads(size: usize) -> Vec<Self> {
        let worlds = mesh::Mesh::threads(size).into_iter().enumerate();
        worlds.map(|(rank, mesh)| Self { rank, size, transport: Some(Arc::new(mesh)) }).collect()
    }

    /// The ranks that this process was started among: by `launch`, torchrun, srun or mpirun; or nobody else.
    ///
    /// # Errors
    /// The environment contradicts itself; the others do not come in time; this build cannot talk to them.
    pub fn connect() -> Result<Self> {
        let Some(place) = place()? else { return Ok(Self::solo()) };
        if place.rank == 0
            && let Some(detour) = place.detour(device::current().is_ok_and(|device| !device.is_cpu()))
        {
            tracing::warn!("{detour}");
        }
        #[cfg(feature = "mpi")]
        if place.master.is_none() {
            return Self::over(heartbeat::waiting(|| mpi::Mpi::start(&place))?, &place);
        }
        // Those who meet give up by themselves, and know better who is missing.
        Self::over(heartbeat::waiting(|| tcp::connect(&place))?, &place)
    }

    fn over(transport: impl Transport + 'static, place: &Place) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let transport: Arc<dyn Transport> = match place.gpu {
            true => Arc::new(nccl::Nccl::start(Box::new(transport), place)?),
            false => Arc::new(transport),
        };
        #[cfg(not(feature = "cuda"))]
        let transport: Arc<dyn Transport> = Arc::new(transport);
        Ok(Self { rank: place.rank, size: place.size, transport: Some(transport) })
    }

    /// This process's number among the ranks.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether this is the rank that writes and speaks for all.
    pub fn first(&self) -> bool {
        self.rank == 0
    }

    /// This rank as one that shares work without talking to the others.
    pub fn part(&self) -> Part {
        Part { rank: self.rank, ranks: self.size }
    }

    /// Which rank encodes which sequence of a batch, by their numbers of tokens.
    pub fn share(&self, sequences: &[Sequence]) -> Share {
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.ids.len()).collect();
        Share::deal(&lengths, self.size)
    }

    /// This rank's part of `count` rows, which stand in the order of the ranks.
    pub fn rows(&self, count: usize) -> Range<usize> {
        count * self.rank / self.size..count * (self.rank + 1) / self.size
    }

    /// (N of this rank, D) → (N, D) in the order of the batch, on every rank.
    pub fn gather(&self, embeddings: Tensor, share: &Share) -> Result<Tensor> {
        if self.size == 1 {
            return Ok(embeddings);
        }
        let (_, width) = embeddings.dims2()?;
        let of_ranks = self.all(&values(&embeddings)?)?;
        let mut rows = vec![0f32; share.count() * width];
        for ((rank, of_rank), pieces) in of_ranks.iter().enumerate().zip(share.ranks()) {
            self.expect(rank, of_rank.len(), pieces.len() * width)?;
            for (row, &piece) in of_rank.chunks_exact(width).zip(pieces) {
                rows[piece * width..][..width].copy_from_slice(row);
            }
        }
        placed(rows, (share.count(), width), embeddings.device())
    }

    /// (N, D) on every rank → the sum over ranks of the rows that this rank has encoded.
    pub fn scatter(&self, gradient: Tensor, share: &Share) -> Result<Tensor> {
        if self.size == 1 {
            return Ok(gradient);
        }
        let (_, width) = gradient.dims2()?;
        let all = values(&gradient)?;
        let rows_of = |pieces: &[usize]| -> Vec<f32> {
            pieces.iter().flat_map(|&piece| &all[piece * width..][..width]).copied().collect()
        };
        let parts: Vec<Vec<f32>> = share.ranks().map(rows_of).collect();
        let sum = self.total(&parts)?;
        let rows = share.of(self.rank).len();
        placed(sum, (rows, width), gradient.device())
    }

    /// The sum over ranks, in place.
    pub fn sum(&self, gradients: &Gradients) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let flat = gradients.flat();
        let elements = flat.elem_count();
        for start in (0..elements).step_by(SEGMENT) {
            let segment = values(&flat.narrow(0, start, SEGMENT.min(elements - start))?)?;
            // Each rank adds up its part of the elements, and all put the parts together.
            let bounds = |rank: usize| segment.len() * rank / self.size;
            let parts: Vec<&[f32]> =
                (0..self.size).map(|rank| &segment[bounds(rank)..bounds(rank + 1)]).collect();
            let whole = self.all(&self.total(&parts)?)?.concat();
            let whole = Tensor::from_vec(whole, segment.len(), &Device::Cpu)?.to_device(flat.device())?;
            flat.slice_set(&whole, 0, start)?;
        }
        Ok(())
    }

    /// What each rank has for each row of its [`World::rows`] → the same for all rows, on every rank.
    pub fn collect(&self, local: Tensor) -> Result<Tensor> {
        if self.size == 1 {
            return Ok(local);
        }
        let all = self.all(&values(&local)?)?.concat();
        let rows = all.len();
        placed(all, rows, local.device())
    }

    /// The sequences that each rank has of `share` → all of them in order, on every rank.
    pub fn sequences(&self, local: Vec<Sequence>, share: &Share) -> Result<Vec<Sequence>> {
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
        for ((rank, numbers), pieces) in self.all(&numbers)?.iter().enumerate().zip(share.ranks()) {
            let mut rest = numbers.as_slice();
            for &piece in pieces {
                let [skip, length, after @ ..] = rest else { return Err(self.unlike(rank)) };
                let Some((ids, after)) = after.split_at_checked(*length as usize) else {
                    return Err(self.unlike(rank));
                };
                all[piece] = Sequence { ids: ids.to_vec(), skip: *skip };
                rest = after;
            }
        }
        Ok(all)
    }

    /// The signal that any rank was asked to stop by, for all to stop together.
    pub fn agree(&self, signal: Option<i32>) -> Result<Option<i32>> {
        if self.size == 1 {
            return Ok(signal);
        }
        let signals = self.all(&[signal.unwrap_or(0)])?;
        Ok(signals.into_iter().flatten().max().filter(|&signal| signal != 0))
    }

    /// Whether all ranks hold the same `what`, by its digest: none may train on with another model or other rows.
    pub fn same(&self, what: &str, digest: u64) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let digests = self.all(&[digest])?.concat();
        match digests.iter().position(|&other| other != digests[0]) {
            Some(rank) => {
                Err(Error::Rank { rank, status: 1, message: format!("has another {what} than rank 0") })
            }
            None => Ok(()),
        }
    }

    /// What the first rank has, on every rank. The others' bytes are not looked at.
    pub fn of_first(&self, local: Vec<u8>) -> Result<Vec<u8>> {
        if self.size == 1 {
            return Ok(local);
        }
        let message = if self.first() { local.as_slice() } else { &[] };
        Ok(self.carry(|transport| transport.gather(message))?.swap_remove(0))
    }

    /// The first rank's values (P), on every rank, in place.
    pub fn spread(&self, buffer: &Tensor) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let elements = buffer.elem_count();
        for start in (0..elements).step_by(SEGMENT) {
            let length = SEGMENT.min(elements - start);
            let local = if self.first() { values(&buffer.narrow(0, start, length)?)? } else { Vec::new() };
            let first = self.all(&local)?.swap_remove(0);
            self.expect(0, first.len(), length)?;
            buffer.slice_set(
                &Tensor::from_vec(first, length, &Device::Cpu)?.to_device(buffer.device())?,
                0,
                start,
            )?;
        }
        Ok(())
    }

    /// Waits until every rank is here.
    pub fn barrier(&self) -> Result<()> {
        self.all::<u8>(&[]).map(drop)
    }

    /// What each rank has, in their order, on every rank.
    pub fn all<T: Pod>(&self, local: &[T]) -> Result<Vec<Vec<T>>> {
        if self.size == 1 {
            return Ok(vec![local.to_vec()]);
        }
        let messages = self.carry(|transport| transport.gather(bytemuck::cast_slice(local)))?;
        self.open(messages)
    }

    /// Lets the others know that this rank ends with `status` because of `error`: they end too, and say why.
    pub fn abandon(&self, error: &Error, status: u8) {
        if let Some(transport) = &self.transport {
            let failed = match error {
                Error::Rank { rank, status, message } => {
                    Failed { rank: *rank, status: *status, message: message.clone() }
                }
                _ => Failed { rank: self.rank, status, message: error.to_string() },
            };
            transport.abandon(&failed);
        }
    }

    /// Parts for each rank → the sum over ranks, in their order, of the parts for this one.
    fn total<P: AsRef<[f32]>>(&self, parts: &[P]) -> Result<Vec<f32>> {
        let length = parts[self.rank].as_ref().len();
        let messages: Vec<&[u8]> = parts.iter().map(|part| bytemuck::cast_slice(part.as_ref())).collect();
        let received: Vec<Vec<f32>> = self.open(self.carry(|transport| transport.exchange(&messages))?)?;
        let mut sum = vec![0f32; length];
        for (rank, of_rank) in received.iter().enumerate() {
            self.expect(rank, of_rank.len(), length)?;
            if rank == 0 {
                sum.copy_from_slice(of_rank);
            } else {
                sum.iter_mut().zip(of_rank).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(sum)
    }

    /// A collective; meanwhile this rank waits, and that is nobody's fault here.
    fn carry(&self, collective: impl FnOnce(&dyn Transport) -> Result<Vec<Vec<u8>>>) -> Result<Vec<Vec<u8>>> {
        match &self.transport {
            Some(transport) => heartbeat::waiting(|| collective(transport.as_ref())),
            None => Ok(Vec::new()),
        }
    }

    fn open<T: Pod>(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<T>>> {
        let open = |(rank, bytes): (usize, Vec<u8>)| match bytes.len() % size_of::<T>().max(1) {
            0 => Ok(bytemuck::pod_collect_to_vec(&bytes)),
            _ => Err(self.unlike(rank)),
        };
        messages.into_iter().enumerate().map(open).collect()
    }

    fn expect(&self, rank: usize, found: usize, expected: usize) -> Result<()> {
        if found == expected { Ok(()) } else { Err(self.unlike(rank)) }
    }

    fn unlike(&self, rank: usize) -> Error {
        let message = format!(
            "does something else than rank {}\nhint: all ranks must be of the same build and configuration",
            self.rank
        );
        Error::Rank { rank, status: 1, message }
    }
}

/// Elements on `device`, where there may be none.
fn placed(elements: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    if elements.is_empty() {
        return Ok(kernels::zeros(shape, DType::F32, device)?);
    }
    Ok(Tensor::from_vec(elements, shape.into(), &Device::Cpu)?.to_device(device)?)
}

/// The elements, as f32 in memory of the processor.
fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

#[cfg(test)]
mod tests;
