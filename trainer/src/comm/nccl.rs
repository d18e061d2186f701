//! Ranks with a GPU each: what is long goes over NCCL, between the GPUs; what is short over the sockets or the MPI that the ranks
//! have anyway.
//!
//! Lengths come first, the short way, with messages that are short; so a rank that ends or hangs before a collective is named
//! there. While NCCL works, its errors and the others' ends are looked for, and the communicator is aborted then: else it would
//! wait forever.

use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::raw::c_void;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use cudarc::nccl::{result, sys};

use super::mesh::lock;
use super::{Failed, Place, Transport};
use crate::system::device;
use crate::{Error, Result};

/// Bytes that sockets carry faster than a GPU is woken.
const SHORT: usize = 16 << 10;
/// Between two looks at a collective under way.
const LOOK: Duration = Duration::from_micros(50);

/// The short way, and the GPU's side.
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

/// NCCL's communicator; gone after an abort.
struct Group(sys::ncclComm_t);

// SAFETY: NCCL takes a communicator from any thread, one at a time; the mutex around it sees to that.
unsafe impl Send for Group {}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: it was made by ncclCommInitRank, and is dropped once.
        let _ended = unsafe { result::comm_abort(self.0) };
    }
}

impl Drop for Nccl {
    /// A run that is done: what was sent last may still be on its way, and an abort would lose it.
    fn drop(&mut self) {
        if !thread::panicking()
            && let Some(group) = lock(&self.group).take().map(ManuallyDrop::new)
        {
            // SAFETY: it was made by ncclCommInitRank, and is not dropped besides.
            let _ended = unsafe { result::comm_destroy(group.0) };
        }
    }
}

impl Nccl {
    /// Makes the communicator of the ranks that `control` connects.
    pub(super) fn start(control: Box<dyn Transport>, place: &Place) -> Result<Self> {
        let unusable = |error: candle_core::Error| {
            Error::Usage(format!("ranks with GPUs talk over NCCL: {}", device::plain(&error)))
        };
        kernels::open_nccl().map_err(unusable)?;
        let ordinal = device::ordinal().map_err(unusable)?;
        let (rank, size) = (place.rank, place.size);
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
        let first = control.gather(&id)?.swap_remove(0);
        let Ok(internal) = <[u8; 128]>::try_from(first.as_slice()) else {
            return Err(failed(0, "sent no id of NCCL"));
        };
        let id = sys::ncclUniqueId { internal: internal.map(|byte| byte as std::os::raw::c_char) };
        // Waits for all ranks, and takes no heed of one that does not come: so on a thread that this one may leave behind.
        let making = thread::spawn(move || -> Result<Group> {
            context.bind_to_thread().map_err(refused)?;
            let mut group = MaybeUninit::uninit();
            // SAFETY: the pointer is to a place for the communicator, which is read only after success.
            unsafe {
                result::comm_init_rank(group.as_mut_ptr(), size as i32, id, rank as i32)
                    .map_err(|error| nccl(rank, &error))?;
                Ok(Group(group.assume_init()))
            }
        });
        let start = Instant::now();
        while !making.is_finished() {
            if let Some(error) = control.lost(start) {
                return Err(error);
            }
            thread::sleep(LOOK);
        }
        let group = making.join().map_err(|_| failed(rank, "NCCL's start panicked"))??;
        Ok(Self { control, rank, size, stream, group: Mutex::new(Some(group)) })
    }

    /// Sends long messages to their ranks and receives those of `lengths`, GPU to GPU.
    fn carry(&self, messages: &[&[u8]], lengths: &[usize]) -> Result<Vec<Option<Vec<u8>>>> {
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
                // SAFETY: the slice is that long, and lives until the stream has been waited for.
                unsafe {
                    result::send(source as *const c_void, message.len(), BYTES, to as i32, group, stream)?
                };
            }
            for (from, message) in incoming.iter_mut().enumerate() {
                let Some(message) = message else { continue };
                let length = message.len();
                let (target, _read) = message.device_ptr_mut(&self.stream);
                // SAFETY: as above, and nobody else writes to it.
                unsafe { result::recv(target as *mut c_void, length, BYTES, from as i32, group, stream)? };
            }
            result::group_end().map(drop)
        };
        let done = queue().map_err(|error| nccl(rank, &error)).and_then(|()| self.wait(group));
        if let Err(error) = done {
            // The buffers are freed after this: nothing writes to them any more.
            *guard = None;
            return Err(error);
        }
        let download =
            |message: Option<CudaSlice<u8>>| message.map(|m| self.stream.clone_dtoh(&m)).transpose();
        incoming.into_iter().map(download).collect::<std::result::Result<_, _>>().map_err(refused)
    }

    /// Until the GPU has done what was queued, or somebody is lost.
    fn wait(&self, group: sys::ncclComm_t) -> Result<()> {
        let rank = self.rank;
        let refused = |error: DriverError| failed(rank, &error.to_string());
        let event = self.stream.record_event(None).map_err(refused)?;
        let start = Instant::now();
        while !event.try_is_complete().map_err(refused)? {
            let mut state = MaybeUninit::uninit();
            // SAFETY: the communicator is not aborted yet, and the place is for its state.
            let state = unsafe {
                let asked = sys::ncclCommGetAsyncError(group, state.as_mut_ptr());
                if asked == sys::ncclResult_t::ncclSuccess { state.assume_init() } else { asked }
            };
            if state != sys::ncclResult_t::ncclSuccess && state != sys::ncclResult_t::ncclInProgress {
                return Err(nccl(rank, &result::NcclError(state)));
            }
            if let Some(error) = self.control.lost(start) {
                return Err(error);
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

const BYTES: sys::ncclDataType_t = sys::ncclDataType_t::ncclUint8;

fn failed(rank: usize, message: &str) -> Error {
    Error::Rank { rank, status: 1, message: message.to_owned() }
}

fn nccl(rank: usize, error: &result::NcclError) -> Error {
    failed(rank, &format!("NCCL says {:?}\nhint: NCCL_DEBUG=INFO tells more", error.0))
}

impl Transport for Nccl {
    fn exchange(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        // A length, and the message if it is short.
        let note = |message: &&[u8]| {
            let short: &[u8] = if message.len() > SHORT { &[] } else { message };
            [&(message.len() as u64).to_le_bytes(), short].concat()
        };
        let notes: Vec<Vec<u8>> = messages.iter().map(note).collect();
        let notes: Vec<&[u8]> = notes.iter().map(Vec::as_slice).collect();
        let notes = self.control.exchange(&notes)?;
        let open = |(from, note): (usize, &Vec<u8>)| match note.split_first_chunk::<8>() {
            Some((length, _)) => Ok(u64::from_le_bytes(*length) as usize),
            None => Err(failed(from, "does not speak of NCCL\nhint: all ranks must be of the same build")),
        };
        let lengths: Vec<usize> = notes.iter().enumerate().map(open).collect::<Result<_>>()?;
        let long = self.carry(messages, &lengths)?;
        let own = self.rank;
        let whole = |(from, (note, long)): (usize, (Vec<u8>, Option<Vec<u8>>))| match long {
            Some(message) => message,
            None if from == own => messages[own].to_vec(),
            None => note[8..].to_vec(),
        };
        Ok(notes.into_iter().zip(long).enumerate().map(whole).collect())
    }

    fn gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.exchange(&vec![message; self.size])
    }

    fn abandon(&self, failed: &Failed) {
        self.control.abandon(failed);
        drop(lock(&self.group).take());
    }

    fn lost(&self, start: Instant) -> Option<Error> {
        self.control.lost(start)
    }
}
