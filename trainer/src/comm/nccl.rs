//! Ranks with a GPU each: long messages go over NCCL between the GPUs, short ones over the sockets or the MPI
//! of the ranks.
//!
//! A collective begins by exchanging the lengths, together with short messages, over the control transport.
//! So a rank that ends or hangs before a collective is named there. While NCCL works, its own errors and the
//! failures of other ranks are polled, and the communicator is aborted on one; otherwise it would wait
//! forever.

use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::raw::c_void;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use cudarc::nccl::{result, sys};

use super::mesh::lock;
use super::{Failure, RankEnv, Transport};
use crate::system::device;
use crate::{Error, Result};

/// Longest message in bytes that goes over the control transport, which has the lower latency.
const SHORT: usize = 16 << 10;
/// Time between two checks of a collective in progress.
const POLL: Duration = Duration::from_micros(50);

/// The control transport, and the NCCL communicator of the same ranks.
pub(super) struct Nccl {
    control: Box<dyn Transport>,
    rank: usize,
    size: usize,
    stream: Arc<CudaStream>,
    group: Mutex<Option<Group>>,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nccl").field("control", &self.control).finish()
    }
}

/// NCCL's communicator. Dropping it aborts it.
struct Group(sys::ncclComm_t);

// SAFETY: NCCL accepts a communicator from any thread, one at a time, which the mutex around it ensures.
unsafe impl Send for Group {}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: ncclCommInitRank made it, and it is dropped once.
        let _ended = unsafe { result::comm_abort(self.0) };
    }
}

impl Drop for Nccl {
    /// Destroys the communicator instead of aborting it, because the last message may still be in flight.
    fn drop(&mut self) {
        if !thread::panicking()
            && let Some(group) = lock(&self.group).take().map(ManuallyDrop::new)
        {
            // SAFETY: ncclCommInitRank made it, and `ManuallyDrop` keeps it from being aborted.
            let _ended = unsafe { result::comm_destroy(group.0) };
        }
    }
}

impl Nccl {
    /// Creates the communicator of the ranks that `control` connects.
    pub(super) fn start(control: Box<dyn Transport>, env: &RankEnv) -> Result<Self> {
        let unusable = |error: candle_core::Error| {
            Error::Usage(format!("NCCL cannot be used: {}", device::without_backtrace(&error)))
        };
        kernels::open_nccl().map_err(unusable)?;
        let ordinal = device::ordinal().map_err(unusable)?;
        let (rank, size) = (env.rank, env.size);
        let refused = move |error: DriverError| failed(rank, &error.to_string());
        let context = CudaContext::new(ordinal).map_err(refused)?;
        let stream = context.new_stream().map_err(refused)?;

        let id = match rank {
            0 => result::get_uniqueid()
                .map_err(|error| nccl(rank, &error))?
                .internal
                .map(|byte| byte as u8)
                .to_vec(),
            _ => Vec::new(),
        };
        let first = control.all_gather(&id)?.swap_remove(0);
        let Ok(internal) = <[u8; 128]>::try_from(first.as_slice()) else {
            return Err(failed(0, "sent no NCCL id"));
        };
        let id = sys::ncclUniqueId { internal: internal.map(|byte| byte as std::os::raw::c_char) };
        // ncclCommInitRank waits for all ranks and does not notice one that fails. So it runs on a thread
        // that can be left behind.
        let init = thread::spawn(move || -> Result<Group> {
            context.bind_to_thread().map_err(refused)?;
            let mut group = MaybeUninit::uninit();
            // SAFETY: the pointer is valid for writes, and the communicator is read only after success.
            unsafe {
                result::comm_init_rank(group.as_mut_ptr(), size as i32, id, rank as i32)
                    .map_err(|error| nccl(rank, &error))?;
                Ok(Group(group.assume_init()))
            }
        });
        let start = Instant::now();
        while !init.is_finished() {
            if let Some(error) = control.lost_peer(start) {
                return Err(error);
            }
            thread::sleep(POLL);
        }
        let group = init.join().map_err(|_| failed(rank, "NCCL's initialization panicked"))??;
        Ok(Self { control, rank, size, stream, group: Mutex::new(Some(group)) })
    }

    /// Sends the long messages to their ranks and receives those of the other ranks, whose lengths are
    /// `lengths`, from GPU to GPU.
    fn send_receive(&self, messages: &[&[u8]], lengths: &[usize]) -> Result<Vec<Option<Vec<u8>>>> {
        let rank = self.rank;
        let refused = |error: DriverError| failed(rank, &error.to_string());
        let long = |other: usize, length: usize| other != rank && length > SHORT;
        let upload = |(to, message): (usize, &&[u8])| {
            long(to, message.len()).then(|| self.stream.clone_htod(*message)).transpose()
        };
        let outgoing: Vec<Option<CudaSlice<u8>>> = messages
            .iter()
            .enumerate()
            .map(upload)
            .collect::<std::result::Result<_, _>>()
            .map_err(refused)?;
        let make = |(from, &length): (usize, &usize)| {
            long(from, length).then(|| self.stream.alloc_zeros::<u8>(length)).transpose()
        };
        let mut incoming: Vec<Option<CudaSlice<u8>>> =
            lengths.iter().enumerate().map(make).collect::<std::result::Result<_, _>>().map_err(refused)?;
        if outgoing.iter().chain(&incoming).all(Option::is_none) {
            return Ok(vec![None; lengths.len()]);
        }

        let mut guard = lock(&self.group);
        let Some(Group(group)) = &*guard else { return Err(failed(rank, "NCCL was aborted")) };
        let group = *group;
        let mut queue = || -> std::result::Result<(), result::NcclError> {
            let stream = self.stream.cu_stream().cast();
            result::group_start()?;
            for (to, message) in outgoing.iter().enumerate() {
                let Some(message) = message else { continue };
                let (source, _written) = message.device_ptr(&self.stream);
                // SAFETY: the slice has that length and lives until the stream is synchronized.
                unsafe {
                    result::send(source as *const c_void, message.len(), BYTES, to as i32, group, stream)?
                };
            }
            for (from, message) in incoming.iter_mut().enumerate() {
                let Some(message) = message else { continue };
                let length = message.len();
                let (target, _read) = message.device_ptr_mut(&self.stream);
                // SAFETY: as above, and nothing else writes to it.
                unsafe { result::recv(target as *mut c_void, length, BYTES, from as i32, group, stream)? };
            }
            result::group_end().map(drop)
        };
        let done = queue().map_err(|error| nccl(rank, &error)).and_then(|()| self.wait(group));
        if let Err(error) = done {
            // Abort the communicator before the buffers are freed, so that nothing writes to them any more.
            *guard = None;
            return Err(error);
        }
        let download =
            |message: Option<CudaSlice<u8>>| message.map(|m| self.stream.clone_dtoh(&m)).transpose();
        incoming.into_iter().map(download).collect::<std::result::Result<_, _>>().map_err(refused)
    }

    /// Waits until the GPU has finished what was queued, or a rank is lost.
    fn wait(&self, group: sys::ncclComm_t) -> Result<()> {
        let rank = self.rank;
        let refused = |error: DriverError| failed(rank, &error.to_string());
        let event = self.stream.record_event(None).map_err(refused)?;
        let start = Instant::now();
        while !event.try_is_complete().map_err(refused)? {
            let mut state = MaybeUninit::uninit();
            // SAFETY: the communicator is not aborted yet, and the pointer is valid for writes.
            let state = unsafe {
                let asked = sys::ncclCommGetAsyncError(group, state.as_mut_ptr());
                if asked == sys::ncclResult_t::ncclSuccess { state.assume_init() } else { asked }
            };
            if state != sys::ncclResult_t::ncclSuccess && state != sys::ncclResult_t::ncclInProgress {
                return Err(nccl(rank, &result::NcclError(state)));
            }
            if let Some(error) = self.control.lost_peer(start) {
                return Err(error);
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

const BYTES: sys::ncclDataType_t = sys::ncclDataType_t::ncclUint8;

fn failed(rank: usize, message: &str) -> Error {
    Error::Rank { rank, status: 1, message: message.to_owned() }
}

fn nccl(rank: usize, error: &result::NcclError) -> Error {
    failed(rank, &format!("NCCL failed with {:?}\nhint: set NCCL_DEBUG=INFO for details", error.0))
}

impl Transport for Nccl {
    fn all_to_all(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        // The length, followed by the message if it is short.
        let note = |message: &&[u8]| {
            let short: &[u8] = if message.len() > SHORT { &[] } else { message };
            [&(message.len() as u64).to_le_bytes(), short].concat()
        };
        let notes: Vec<Vec<u8>> = messages.iter().map(note).collect();
        let notes: Vec<&[u8]> = notes.iter().map(Vec::as_slice).collect();
        let notes = self.control.all_to_all(&notes)?;
        let open = |(from, note): (usize, &Vec<u8>)| match note.split_first_chunk::<8>() {
            Some((length, _)) => Ok(u64::from_le_bytes(*length) as usize),
            None => Err(failed(from, "does not use NCCL\nhint: all ranks must run the same build")),
        };
        let lengths: Vec<usize> = notes.iter().enumerate().map(open).collect::<Result<_>>()?;
        let long = self.send_receive(messages, &lengths)?;
        let own = self.rank;
        let whole = |(from, (note, long)): (usize, (Vec<u8>, Option<Vec<u8>>))| match long {
            Some(message) => message,
            None if from == own => messages[own].to_vec(),
            None => note[8..].to_vec(),
        };
        Ok(notes.into_iter().zip(long).enumerate().map(whole).collect())
    }

    fn all_gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.all_to_all(&vec![message; self.size])
    }

    fn abort(&self, failure: &Failure) {
        self.control.abort(failure);
        drop(lock(&self.group).take());
    }

    fn lost_peer(&self, start: Instant) -> Option<Error> {
        self.control.lost_peer(start)
    }
}
