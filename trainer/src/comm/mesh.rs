//! The transport in which every rank has a link to every other one: a channel between threads, or a socket
//! between processes.
//!
//! A rank sends all its messages of a collective before it waits for one. So if a rank hangs, all others wait
//! for that rank and not for each other, and each can name it. Sending does not wait for the receiver to call
//! the collective: a thread of the receiver takes in what arrives.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Failure, Transport};
use crate::{Error, Result};

/// The sending end of a connection to another rank.
pub(super) trait Link: std::fmt::Debug + Send {
    /// Sends a message. While the receiver accepts nothing, it calls `keep_waiting` with whether a part of
    /// the message is sent. Returns false if it gave up or the connection is closed.
    fn send(&mut self, message: &Message, keep_waiting: KeepWaiting) -> bool;
}

/// Decides whether to wait any longer.
pub(super) type KeepWaiting<'a> = &'a mut dyn FnMut(bool) -> bool;

/// A message to another rank.
#[derive(Clone, Debug)]
pub(super) enum Message<'a> {
    /// Data of a collective.
    Data(&'a [u8]),
    /// The last message: why this rank ends.
    Failure(&'a Failure),
    /// The number of units of work that this rank has done.
    Heartbeat(u64),
}

/// A message from another rank. `Failure` is the last one.
#[derive(Debug)]
pub(super) enum Received {
    Data(Vec<u8>),
    Failure(Failure),
}

/// Records when another rank last made progress, and whether it has ended.
#[derive(Debug)]
pub(super) struct PeerLiveness {
    work_count: AtomicU64,
    since: Mutex<Instant>,
    failure: Mutex<Option<Failure>>,
    ended: AtomicBool,
}

impl PeerLiveness {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            work_count: AtomicU64::new(u64::MAX),
            since: Mutex::new(Instant::now()),
            failure: Mutex::new(None),
            ended: AtomicBool::new(false),
        })
    }

    /// Records that the connection is closed.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Records that the rank has failed. Then a send that waits for any rank to accept its message ends with
    /// this failure.
    pub(super) fn set_failed(&self, failure: &Failure) {
        *lock(&self.failure) = Some(failure.clone());
    }

    /// Records that the rank makes progress.
    pub(super) fn touch(&self) {
        *lock(&self.since) = Instant::now();
    }

    /// Records the number of units of work that the rank has done; a new number is progress.
    pub(super) fn set_work_count(&self, work_count: u64) {
        if self.work_count.swap(work_count, Ordering::Relaxed) != work_count {
            self.touch();
        }
    }

    /// Time without progress, counted from `start` at the earliest.
    fn idle(&self, start: Instant) -> Duration {
        (*lock(&self.since)).max(start).elapsed()
    }
}

/// The connection to another rank.
#[derive(Debug)]
pub(super) struct Peer {
    /// Address of its host, for error messages; empty for a thread.
    pub(super) host: String,
    pub(super) link: Arc<Mutex<dyn Link>>,
    pub(super) inbox: Mutex<Receiver<Received>>,
    /// `None` for a thread of this process, which cannot hang unnoticed.
    pub(super) liveness: Option<Arc<PeerLiveness>>,
}

/// The connections of one rank to all others.
#[derive(Debug)]
pub(super) struct Mesh {
    pub(super) rank: usize,
    /// One for each rank; `None` for this one.
    pub(super) peers: Vec<Option<Peer>>,
    /// Time without progress after which a rank that this one waits for counts as hanging.
    pub(super) timeout: Duration,
}

/// Time between two checks of the other ranks' liveness.
pub(super) const POLL: Duration = Duration::from_millis(200);
/// How long the failure message to one rank may delay those to the next.
const FAILURE_TIMEOUT: Duration = Duration::from_secs(1);

impl Transport for Mesh {
    fn all_to_all(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let size = self.peers.len();
        // Each rank begins with the next one, so that the messages spread evenly.
        for to in (1..size).map(|distance| (self.rank + distance) % size) {
            if let Some(peer) = &self.peers[to] {
                self.send(to, peer, messages[to])?;
            }
        }
        let receive = |(from, peer): (usize, &Option<Peer>)| match peer {
            Some(peer) => self.receive(from, peer),
            None => Ok(messages[from].to_vec()),
        };
        self.peers.iter().enumerate().map(receive).collect()
    }

    fn all_gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.all_to_all(&vec![message; self.peers.len()])
    }

    fn abort(&self, failure: &Failure) {
        for peer in self.peers.iter().flatten() {
            let start = Instant::now();
            lock(&peer.link).send(&Message::Failure(failure), &mut |_| start.elapsed() < FAILURE_TIMEOUT);
        }
    }

    #[cfg(feature = "cuda")]
    fn lost_peer(&self, start: Instant) -> Option<Error> {
        let mut peers = self.peers.iter().enumerate().filter_map(|(rank, peer)| Some((rank, peer.as_ref()?)));
        peers.find_map(|(rank, peer)| {
            let ended = peer.liveness.as_ref().is_some_and(|liveness| liveness.ended.load(Ordering::Relaxed));
            if ended { Some(self.ended(rank, peer)) } else { self.hanging(rank, peer, start) }
        })
    }
}

impl Mesh {
    /// The connections of `size` ranks that are threads of this process: one [`Mesh`] for each rank.
    pub(super) fn threads(size: usize) -> Vec<Self> {
        let mut ends: Vec<Vec<Option<Receiver<Received>>>> = (0..size).map(|_| Vec::new()).collect();
        let mut links: Vec<Vec<Option<Sender<Received>>>> = (0..size).map(|_| Vec::new()).collect();
        for from in 0..size {
            for to in 0..size {
                let (sender, receiver) = channel();
                links[from].push((from != to).then_some(sender));
                ends[to].push((from != to).then_some(receiver));
            }
        }
        let peer = |(link, end): (Option<Sender<Received>>, Option<Receiver<Received>>)| {
            let link: Arc<Mutex<dyn Link>> = Arc::new(Mutex::new(link?));
            Some(Peer { host: String::new(), link, inbox: Mutex::new(end?), liveness: None })
        };
        let mesh = |(rank, (links, ends)): (usize, (Vec<_>, Vec<_>))| Self {
            rank,
            peers: links.into_iter().zip(ends).map(peer).collect(),
            timeout: Duration::MAX,
        };
        links.into_iter().zip(ends).enumerate().map(mesh).collect()
    }

    fn send(&self, to: usize, peer: &Peer, message: &[u8]) -> Result<()> {
        let (mut start, mut polled, mut lost) = (Instant::now(), Instant::now(), None);
        let sent = lock(&peer.link).send(&Message::Data(message), &mut |_| {
            // This process itself was suspended and received nothing meanwhile, so the timeout starts anew.
            if polled.elapsed() > 5 * POLL {
                start = Instant::now();
            }
            polled = Instant::now();
            lost = self.failure().or_else(|| self.hanging(to, peer, start));
            lost.is_none()
        });
        if sent { Ok(()) } else { Err(lost.unwrap_or_else(|| self.ended(to, peer))) }
    }

    /// The error of the first rank that has reported a failure.
    fn failure(&self) -> Option<Error> {
        let mut peers = self.peers.iter().flatten().filter_map(|peer| peer.liveness.as_ref());
        peers.find_map(|liveness| lock(&liveness.failure).clone()).map(Error::from)
    }

    fn receive(&self, from: usize, peer: &Peer) -> Result<Vec<u8>> {
        let mut start = Instant::now();
        let inbox = lock(&peer.inbox);
        loop {
            let polled = Instant::now();
            match inbox.recv_timeout(POLL) {
                Ok(Received::Data(bytes)) => return Ok(bytes),
                Ok(Received::Failure(failure)) => return Err(failure.into()),
                Err(RecvTimeoutError::Disconnected) => return Err(self.disconnected(from, peer)),
                // This process itself was suspended and received nothing meanwhile, so the timeout starts
                // anew.
                Err(RecvTimeoutError::Timeout) if polled.elapsed() > 5 * POLL => start = Instant::now(),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(error) = self.hanging(from, peer, start) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// The error for a rank that has made no progress for longer than the timeout, counted from `start` at
    /// the earliest.
    fn hanging(&self, rank: usize, peer: &Peer, start: Instant) -> Option<Error> {
        peer.liveness.as_ref().filter(|liveness| liveness.idle(start) > self.timeout)?;
        let (host, waited) = (at(&peer.host), self.timeout.as_secs());
        let message =
            format!("{host}has made no progress for {waited} s: it hangs, or its host cannot be reached");
        Some(Error::Rank { rank, status: 1, message })
    }

    /// The error for a rank that accepts no messages any more: the failure that it reported, if any.
    fn ended(&self, rank: usize, peer: &Peer) -> Error {
        let inbox = lock(&peer.inbox);
        while let Ok(received) = inbox.recv_timeout(POLL) {
            if let Received::Failure(failure) = received {
                return failure.into();
            }
        }
        self.disconnected(rank, peer)
    }

    fn disconnected(&self, rank: usize, peer: &Peer) -> Error {
        Error::Rank {
            rank,
            status: 1,
            message: format!("{}has ended without reporting an error", at(&peer.host)),
        }
    }
}

fn at(host: &str) -> String {
    if host.is_empty() { String::new() } else { format!("on {host} ") }
}

/// A link to another thread.
impl Link for Sender<Received> {
    fn send(&mut self, message: &Message, _: KeepWaiting) -> bool {
        let received = match *message {
            Message::Data(bytes) => Received::Data(bytes.to_vec()),
            Message::Failure(failure) => Received::Failure(failure.clone()),
            Message::Heartbeat(_) => return true,
        };
        Self::send(self, received).is_ok()
    }
}

/// Locks a mutex. It ignores poisoning, because a panic leaves these values consistent.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
