//! Ranks that mpirun has started, over the system's MPI.
//!
//! MPI waits forever for a rank that hangs, and cannot say for which. So each collective begins with a word from everyone to
//! everyone, the length of what follows, and who does not say it in time is named.

use std::thread;
use std::time::{Duration, Instant};

use ::mpi::Threading;
use ::mpi::datatype::{Partition, PartitionMut};
use ::mpi::environment::{Universe, initialize_with_threading, processor_name};
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, CommunicatorCollectives, Destination, Source};

use super::{Failed, Place, Transport};
use crate::{Error, Result};

/// MPI, from its start to its end.
pub(super) struct Mpi {
    _universe: Universe,
    rank: usize,
    hosts: Vec<String>,
    patience: Duration,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("hosts", &self.hosts).finish()
    }
}

/// So long a rank waits without giving its core away: messages between ranks that are at the same place take less.
const EAGER: Duration = Duration::from_micros(200);

impl Mpi {
    pub(super) fn start(place: &Place) -> Result<Self> {
        let failed = |message: String| Error::Rank { rank: place.rank, status: 1, message };
        let (universe, _) = initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("MPI is started already".to_owned()))?;
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        if (rank, size) != (place.rank, place.size) {
            return Err(failed(format!(
                "MPI calls it rank {rank} of {size}, its environment {} of {}",
                place.rank, place.size
            )));
        }
        let host = processor_name().unwrap_or_default();
        let mut mpi =
            Self { _universe: universe, rank, hosts: vec![String::new(); size], patience: place.timeout };
        mpi.hosts = mpi
            .gather(host.as_bytes())?
            .into_iter()
            .map(|name| String::from_utf8_lossy(&name).into_owned())
            .collect();
        Ok(mpi)
    }

    /// Tells each rank how much it gets; how much this one gets of each.
    fn announce(&self, lengths: &[usize]) -> Result<Vec<usize>> {
        let world = SimpleCommunicator::world();
        for (to, &length) in lengths.iter().enumerate().filter(|(to, _)| *to != self.rank) {
            world.process_at_rank(to as i32).send(&(length as u64));
        }
        let start = Instant::now();
        let mut announced = Vec::with_capacity(lengths.len());
        for from in 0..lengths.len() {
            if from == self.rank {
                announced.push(lengths[from]);
                continue;
            }
            let process = world.process_at_rank(from as i32);
            while process.immediate_probe().is_none() {
                if start.elapsed() > self.patience {
                    let (host, waited) = (&self.hosts[from], self.patience.as_secs());
                    let message = format!(
                        "on {host} has said nothing for {waited} s: it hangs, or its host cannot be reached"
                    );
                    return Err(Error::Rank { rank: from, status: 1, message });
                }
                if start.elapsed() > EAGER {
                    thread::sleep(EAGER / 4);
                }
            }
            announced.push(process.receive::<u64>().0 as usize);
        }
        Ok(announced)
    }

    fn cut(bytes: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
        let mut rest = bytes;
        let mut piece = |&length: &usize| {
            let (piece, after) = rest.split_at(length);
            rest = after;
            piece.to_vec()
        };
        lengths.iter().map(&mut piece).collect()
    }
}

/// For messages of these lengths, and one byte: the address of an empty vector is 1, and that is Open MPI's `MPI_IN_PLACE`.
fn room(lengths: &[usize]) -> Vec<u8> {
    vec![0; lengths.iter().sum::<usize>() + 1]
}

/// Counts and places as MPI wants them.
fn layout(lengths: &[usize]) -> Result<(Vec<i32>, Vec<i32>)> {
    let all: usize = lengths.iter().sum();
    if i32::try_from(all).is_err() {
        return Err(Error::Usage(format!(
            "a message of {all} bytes is more than MPI takes at once\nhint: `launch` has no such limit"
        )));
    }
    let counts: Vec<i32> = lengths.iter().map(|&length| length as i32).collect();
    let places = counts.iter().scan(0, |end, count| {
        *end += count;
        Some(*end - count)
    });
    let places = places.collect();
    Ok((counts, places))
}

impl Transport for Mpi {
    fn exchange(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let lengths: Vec<usize> = messages.iter().map(|message| message.len()).collect();
        let (counts, places) = layout(&lengths)?;
        let expected = self.announce(&lengths)?;
        let (counts_in, places_in) = layout(&expected)?;
        let outgoing = [messages.concat(), vec![0]].concat();
        let mut incoming = room(&expected);
        SimpleCommunicator::world().all_to_all_varcount_into(
            &Partition::new(&outgoing[..], counts, places),
            &mut PartitionMut::new(&mut incoming[..], counts_in, places_in),
        );
        Ok(Self::cut(&incoming, &expected))
    }

    fn gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        let expected = self.announce(&vec![message.len(); self.hosts.len()])?;
        let (counts, places) = layout(&expected)?;
        let mut incoming = room(&expected);
        let message = if message.is_empty() { &[0][..0] } else { message };
        SimpleCommunicator::world()
            .all_gather_varcount_into(message, &mut PartitionMut::new(&mut incoming[..], counts, places));
        Ok(Self::cut(&incoming, &expected))
    }

    fn abandon(&self, failed: &Failed) {
        // mpirun ends the others; each has its own log.
        SimpleCommunicator::world().abort(i32::from(failed.status));
    }

    /// MPI does not say which rank is missing; mpirun ends all when one has ended.
    #[cfg(feature = "cuda")]
    fn lost(&self, start: Instant) -> Option<Error> {
        let waited = self.patience.as_secs();
        let message =
            format!("has waited {waited} s for the others: one hangs, or its host cannot be reached");
        (start.elapsed() > self.patience).then_some(Error::Rank { rank: self.rank, status: 1, message })
    }
}
