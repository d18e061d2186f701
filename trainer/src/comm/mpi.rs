//! Ranks that mpirun started, over the system's MPI.
//!
//! MPI waits forever for a rank that hangs, and does not say which one. So each collective begins by sending
//! the length of the message to every rank; a rank whose length does not arrive in time is named.

use std::thread;
use std::time::{Duration, Instant};

use ::mpi::Threading;
use ::mpi::environment::{Universe, initialize_with_threading, processor_name};
use ::mpi::request::StaticScope;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, Destination, Source};

use super::{Failure, RankEnv, Transport};
use crate::{Error, Result};

/// How long a rank that fails waits before it aborts all ranks, so that error messages reach the terminal.
const ABORT_DELAY: Duration = Duration::from_secs(1);

/// The MPI library, from its initialization to its finalization.
pub(super) struct Mpi {
    _universe: Universe,
    rank: usize,
    hosts: Vec<String>,
    timeout: Duration,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("hosts", &self.hosts).finish()
    }
}

/// How long a rank polls before it yields its core. Messages between ranks that call the same collective
/// usually take less.
const EAGER: Duration = Duration::from_micros(200);

impl Mpi {
    pub(super) fn start(env: &RankEnv) -> Result<Self> {
        let failed = |message: String| Error::Rank { rank: env.rank, status: 1, message };
        let (universe, _) = initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("MPI is already initialized".to_owned()))?;
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        if (rank, size) != (env.rank, env.size) {
            return Err(failed(format!(
                "MPI calls it rank {rank} of {size}, its environment {} of {}",
                env.rank, env.size
            )));
        }
        let host = processor_name().unwrap_or_default();
        let mut mpi =
            Self { _universe: universe, rank, hosts: vec![String::new(); size], timeout: env.timeout };
        mpi.hosts = mpi
            .all_gather(host.as_bytes())?
            .into_iter()
            .map(|name| String::from_utf8_lossy(&name).into_owned())
            .collect();
        Ok(mpi)
    }

    /// Sends each rank the length of the message to it; returns the length of each rank's message to this
    /// one.
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

    /// Sends `messages[of(k)]` to each rank k and receives `expected` bytes from each, all at the same time.
    /// It uses no MPI collective, because that would wait forever for a host that is cut off in the middle,
    /// and could not name it.
    fn transfer(
        &self,
        messages: Vec<Box<[u8]>>,
        of: impl Fn(usize) -> usize,
        expected: &[usize],
    ) -> Result<Vec<Vec<u8>>> {
        let world = SimpleCommunicator::world();
        let lengths = messages.iter().map(|message| message.len()).chain(expected.iter().copied());
        if let Some(length) = lengths.max().filter(|&length| i32::try_from(length).is_err()) {
            return Err(Error::Failed(format!(
                "a message of {length} bytes is too long for MPI\nhint: `launch` has no such limit"
            )));
        }
        // MPI may access the buffers as long as a request exists. So after an error they are leaked.
        let messages: Vec<*mut [u8]> = messages.into_iter().map(Box::into_raw).collect();
        // SAFETY: the message is freed below, after all requests are complete.
        let outgoing = |rank: usize| -> &'static [u8] { unsafe { &*messages[of(rank)] } };
        let others = |length: &(usize, usize)| length.0 != self.rank && length.1 > 0;
        let mut buffers: Vec<Option<*mut [u8]>> = vec![None; expected.len()];
        let mut requests = Vec::new();
        for (from, length) in expected.iter().copied().enumerate().filter(others) {
            let buffer = Box::into_raw(vec![0; length].into_boxed_slice());
            buffers[from] = Some(buffer);
            // SAFETY: nothing else accesses the buffer until all requests are complete; it is freed below.
            let buffer: &'static mut [u8] = unsafe { &mut *buffer };
            let request = world.process_at_rank(from as i32).immediate_receive_into(StaticScope, buffer);
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
        // SAFETY: the pointers come from `Box::into_raw` above, and all requests are complete.
        let free = |buffer: *mut [u8]| unsafe { Box::from_raw(buffer) };
        messages.into_iter().for_each(|message| drop(free(message)));
        let mut received: Vec<Vec<u8>> =
            buffers.into_iter().map(|buffer| buffer.map(free).map(Vec::from).unwrap_or_default()).collect();
        received[self.rank] = local;
        Ok(received)
    }

    /// Waits a moment for `rank`; an error if the timeout since `start` is over.
    fn wait(&self, start: Instant, rank: usize) -> Result<()> {
        if start.elapsed() > self.timeout {
            let (host, waited) = (&self.hosts[rank], self.timeout.as_secs());
            let message =
                format!("on {host} has sent nothing for {waited} s: it hangs, or its host cannot be reached");
            return Err(Error::Rank { rank, status: 1, message });
        }
        if start.elapsed() > EAGER {
            thread::sleep(EAGER / 4);
        }
        Ok(())
    }
}

impl Transport for Mpi {
    fn all_to_all(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let lengths: Vec<usize> = messages.iter().map(|message| message.len()).collect();
        let expected = self.announce(&lengths)?;
        self.transfer(messages.iter().map(|message| Box::from(*message)).collect(), |rank| rank, &expected)
    }

    fn all_gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        let expected = self.announce(&vec![message.len(); self.hosts.len()])?;
        self.transfer(vec![Box::from(message)], |_| 0, &expected)
    }

    fn abort(&self, failure: &Failure) {
        // mpirun ends the other ranks at once and discards output that it has not forwarded by then. Rank 0,
        // whose output the user sees, may be about to report the same error.
        thread::sleep(ABORT_DELAY);
        SimpleCommunicator::world().abort(i32::from(failure.status));
    }

    /// MPI does not say which rank is missing; when a rank ends, mpirun ends all others.
    #[cfg(feature = "cuda")]
    fn lost_peer(&self, start: Instant) -> Option<Error> {
        let waited = self.timeout.as_secs();
        let message =
            format!("has waited {waited} s for the other ranks: one hangs, or its host cannot be reached");
        (start.elapsed() > self.timeout).then_some(Error::Rank { rank: self.rank, status: 1, message })
    }
}
