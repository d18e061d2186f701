//! Ranks that mpirun has started, over the system's MPI.
//!
//! MPI waits forever for a rank that hangs, and cannot say for which. So each collective begins with a word from everyone to
//! everyone, the length of what follows, and who does not say it in time is named.

use std::thread;
use std::time::{Duration, Instant};

use ::mpi::Threading;
use ::mpi::environment::{Universe, initialize_with_threading, processor_name};
use ::mpi::request::StaticScope;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, Destination, Source};

use super::{Failed, Place, Transport};
use crate::{Error, Result};

/// How long a rank that ends leaves to its own words and to those of the first.
const LAST_WORDS: Duration = Duration::from_secs(1);

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
                self.wait(start, from)?;
            }
            announced.push(process.receive::<u64>().0 as usize);
        }
        Ok(announced)
    }

    /// Sends `messages[of(k)]` to each rank k and receives `expected` bytes of each, all at once. No collective: there a host that is
    /// cut off in the midst of one would be waited for without end, and none could be named.
    fn trade(
        &self,
        messages: Vec<Box<[u8]>>,
        of: impl Fn(usize) -> usize,
        expected: &[usize],
    ) -> Result<Vec<Vec<u8>>> {
        let world = SimpleCommunicator::world();
        let lengths = messages.iter().map(|message| message.len()).chain(expected.iter().copied());
        if let Some(length) = lengths.max().filter(|&length| i32::try_from(length).is_err()) {
            return Err(Error::Usage(format!(
                "a message of {length} bytes is more than MPI takes at once\nhint: `launch` has no such limit"
            )));
        }
        // MPI may look at buffers for as long as a request lives: after an error they stay for ever.
        let messages: Vec<*mut [u8]> = messages.into_iter().map(Box::into_raw).collect();
        // SAFETY: freed below, when all is sent.
        let outgoing = |rank: usize| -> &'static [u8] { unsafe { &*messages[of(rank)] } };
        let others = |length: &(usize, usize)| length.0 != self.rank && length.1 > 0;
        let mut places: Vec<Option<*mut [u8]>> = vec![None; expected.len()];
        let mut requests = Vec::new();
        for (from, length) in expected.iter().copied().enumerate().filter(others) {
            let place = Box::into_raw(vec![0; length].into_boxed_slice());
            places[from] = Some(place);
            // SAFETY: looked at again, and freed, when all is received.
            let place: &'static mut [u8] = unsafe { &mut *place };
            let request = world.process_at_rank(from as i32).immediate_receive_into(StaticScope, place);
            requests.push((from, request));
        }
        let lengths = (0..expected.len()).map(|to| outgoing(to).len());
        for (to, _) in lengths.enumerate().filter(others) {
            let process = world.process_at_rank(to as i32);
            requests.push((to, process.immediate_send(StaticScope, outgoing(to))));
        }
        let start = Instant::now();
        while !requests.is_empty() {
            let tested = requests.into_iter().map(|(rank, request)| (rank, request.test()));
            requests = tested.filter_map(|(rank, done)| Some((rank, done.err()?))).collect();
            let Some((rank, _)) = requests.first() else { break };
            if let Err(error) = self.wait(start, *rank) {
                requests.into_iter().for_each(std::mem::forget);
                return Err(error);
            }
        }
        let local = outgoing(self.rank).to_vec();
        // SAFETY: leaked above, and all is sent and received.
        let free = |place: *mut [u8]| unsafe { Box::from_raw(place) };
        messages.into_iter().for_each(|message| drop(free(message)));
        let mut received: Vec<Vec<u8>> =
            places.into_iter().map(|place| place.map(free).map(Vec::from).unwrap_or_default()).collect();
        received[self.rank] = local;
        Ok(received)
    }

    /// A moment's wait for `rank`, if that has not been too long since `start`.
    fn wait(&self, start: Instant, rank: usize) -> Result<()> {
        if start.elapsed() > self.patience {
            let (host, waited) = (&self.hosts[rank], self.patience.as_secs());
            let message =
                format!("on {host} has said nothing for {waited} s: it hangs, or its host cannot be reached");
            return Err(Error::Rank { rank, status: 1, message });
        }
        if start.elapsed() > EAGER {
            thread::sleep(EAGER / 4);
        }
        Ok(())
    }
}

impl Transport for Mpi {
    fn exchange(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let lengths: Vec<usize> = messages.iter().map(|message| message.len()).collect();
        let expected = self.announce(&lengths)?;
        self.trade(messages.iter().map(|message| Box::from(*message)).collect(), |rank| rank, &expected)
    }

    fn gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        let expected = self.announce(&vec![message.len(); self.hosts.len()])?;
        self.trade(vec![Box::from(message)], |_| 0, &expected)
    }

    fn abandon(&self, failed: &Failed) {
        // mpirun ends the others at once. What it has not forwarded by then is lost, and the first rank, whose voice it is, may be
        // about to say the same.
        thread::sleep(LAST_WORDS);
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
