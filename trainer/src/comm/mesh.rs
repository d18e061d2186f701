//! Every rank has a line to every other one: channels between threads, or sockets between processes.
//!
//! A rank sends all its messages of a collective before it waits for one, so that whoever hangs is missed by everybody, and
//! everybody can name it. Sending never waits for the other side to listen: what arrives is taken in by a thread of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Failed, Transport};
use crate::{Error, Result};

/// How a message leaves.
pub(super) trait Line: std::fmt::Debug + Send {
    /// Hands over a message; false if nobody takes it. As long as that is so `go_on` is asked, with whether a part of it has gone.
    fn send(&mut self, message: &Message, go_on: GoOn) -> bool;
}

/// Whether to wait any longer.
pub(super) type GoOn<'a> = &'a mut dyn FnMut(bool) -> bool;

/// What goes over a line.
#[derive(Clone, Debug)]
pub(super) enum Message<'a> {
    /// Of a collective.
    Data(&'a [u8]),
    /// The last one.
    Failed(&'a Failed),
    /// So many pieces of work are done.
    Beats(u64),
}

/// What has arrived. After the last message there is nothing more.
#[derive(Debug)]
pub(super) enum Arrived {
    Data(Vec<u8>),
    Failed(Failed),
}

/// When another rank has last shown that it is at work.
#[derive(Debug)]
pub(super) struct Life {
    beats: AtomicU64,
    since: Mutex<Instant>,
    failed: Mutex<Option<Failed>>,
    ended: AtomicBool,
}

impl Life {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            beats: AtomicU64::new(u64::MAX),
            since: Mutex::new(Instant::now()),
            failed: Mutex::new(None),
            ended: AtomicBool::new(false),
        })
    }

    /// Nothing more will come of it.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Its last word, which is to be heard before it is its turn.
    pub(super) fn has_failed(&self, failed: &Failed) {
        *lock(&self.failed) = Some(failed.clone());
    }

    /// Its work goes on.
    pub(super) fn touch(&self) {
        *lock(&self.since) = Instant::now();
    }

    /// It has done so many pieces of work.
    pub(super) fn has_done(&self, beats: u64) {
        if self.beats.swap(beats, Ordering::Relaxed) != beats {
            self.touch();
        }
    }

    /// How long it has shown nothing, but not longer than since `start`.
    fn silent(&self, start: Instant) -> Duration {
        (*lock(&self.since)).max(start).elapsed()
    }
}

/// Another rank.
#[derive(Debug)]
pub(super) struct Peer {
    /// Where it is, for messages; empty for a thread.
    pub(super) host: String,
    pub(super) line: Arc<Mutex<dyn Line>>,
    pub(super) inbox: Mutex<Receiver<Arrived>>,
    /// None: a thread of this process, which ends or goes on.
    pub(super) life: Option<Arc<Life>>,
}

/// All ranks.
#[derive(Debug)]
pub(super) struct Mesh {
    pub(super) rank: usize,
    /// None: this rank.
    pub(super) peers: Vec<Option<Peer>>,
    /// How long another rank may show no sign of work while this one waits for it.
    pub(super) patience: Duration,
}

/// Between two looks at the others' signs of life.
pub(super) const LOOK: Duration = Duration::from_millis(200);
/// How long a rank that takes nothing may hold up the last word to those after it.
const LAST_WORD: Duration = Duration::from_secs(1);

impl Transport for Mesh {
    fn exchange(&self, messages: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let size = self.peers.len();
        // Everybody begins with the next rank, so that nobody is overrun.
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

    fn gather(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.exchange(&vec![message; self.peers.len()])
    }

    fn abandon(&self, failed: &Failed) {
        for peer in self.peers.iter().flatten() {
            let start = Instant::now();
            lock(&peer.line).send(&Message::Failed(failed), &mut |_| start.elapsed() < LAST_WORD);
        }
    }

    /// A rank that has ended or hangs.
    #[cfg(feature = "cuda")]
    fn lost(&self, start: Instant) -> Option<Error> {
        let mut peers = self.peers.iter().enumerate().filter_map(|(rank, peer)| Some((rank, peer.as_ref()?)));
        peers.find_map(|(rank, peer)| {
            let ended = peer.life.as_ref().is_some_and(|life| life.ended.load(Ordering::Relaxed));
            if ended { Some(self.ended(rank, peer)) } else { self.silent(rank, peer, start) }
        })
    }
}

impl Mesh {
    /// The ranks' ends of a mesh between threads.
    pub(super) fn threads(size: usize) -> Vec<Self> {
        let mut ends: Vec<Vec<Option<Receiver<Arrived>>>> = (0..size).map(|_| Vec::new()).collect();
        let mut lines: Vec<Vec<Option<Sender<Arrived>>>> = (0..size).map(|_| Vec::new()).collect();
        for from in 0..size {
            for to in 0..size {
                let (sender, receiver) = channel();
                lines[from].push((from != to).then_some(sender));
                ends[to].push((from != to).then_some(receiver));
            }
        }
        let peer = |(line, end): (Option<Sender<Arrived>>, Option<Receiver<Arrived>>)| {
            let line: Arc<Mutex<dyn Line>> = Arc::new(Mutex::new(line?));
            Some(Peer { host: String::new(), line, inbox: Mutex::new(end?), life: None })
        };
        let mesh = |(rank, (lines, ends)): (usize, (Vec<_>, Vec<_>))| Self {
            rank,
            peers: lines.into_iter().zip(ends).map(peer).collect(),
            patience: Duration::MAX,
        };
        lines.into_iter().zip(ends).enumerate().map(mesh).collect()
    }

    fn send(&self, to: usize, peer: &Peer, message: &[u8]) -> Result<()> {
        let (mut start, mut looked, mut lost) = (Instant::now(), Instant::now(), None);
        let sent = lock(&peer.line).send(&Message::Data(message), &mut |_| {
            // This process was stopped for a while itself, and heard nobody.
            if looked.elapsed() > 5 * LOOK {
                start = Instant::now();
            }
            looked = Instant::now();
            lost = self.failed().or_else(|| self.silent(to, peer, start));
            lost.is_none()
        });
        if sent { Ok(()) } else { Err(lost.unwrap_or_else(|| self.ended(to, peer))) }
    }

    /// The last word of any rank.
    fn failed(&self) -> Option<Error> {
        let mut lives = self.peers.iter().flatten().filter_map(|peer| peer.life.as_ref());
        lives.find_map(|life| lock(&life.failed).clone()).map(Error::from)
    }

    fn receive(&self, from: usize, peer: &Peer) -> Result<Vec<u8>> {
        let mut start = Instant::now();
        let inbox = lock(&peer.inbox);
        loop {
            let looked = Instant::now();
            match inbox.recv_timeout(LOOK) {
                Ok(Arrived::Data(bytes)) => return Ok(bytes),
                Ok(Arrived::Failed(failed)) => return Err(failed.into()),
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone(from, peer)),
                // This process was stopped for a while itself, and heard nobody.
                Err(RecvTimeoutError::Timeout) if looked.elapsed() > 5 * LOOK => start = Instant::now(),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(error) = self.silent(from, peer, start) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Whether a rank has shown no sign of work for too long since `start`.
    fn silent(&self, rank: usize, peer: &Peer, start: Instant) -> Option<Error> {
        peer.life.as_ref().filter(|life| life.silent(start) > self.patience)?;
        let (host, waited) = (at(&peer.host), self.patience.as_secs());
        let message =
            format!("{host}shows no sign of work for {waited} s: it hangs, or its host cannot be reached");
        Some(Error::Rank { rank, status: 1, message })
    }

    /// Why a rank takes no messages any more: its last word, if it left one.
    fn ended(&self, rank: usize, peer: &Peer) -> Error {
        let inbox = lock(&peer.inbox);
        while let Ok(arrived) = inbox.recv_timeout(LOOK) {
            if let Arrived::Failed(failed) = arrived {
                return failed.into();
            }
        }
        self.gone(rank, peer)
    }

    fn gone(&self, rank: usize, peer: &Peer) -> Error {
        Error::Rank { rank, status: 1, message: format!("{}has ended without a word", at(&peer.host)) }
    }
}

fn at(host: &str) -> String {
    if host.is_empty() { String::new() } else { format!("on {host} ") }
}

/// A channel to another thread.
impl Line for Sender<Arrived> {
    fn send(&mut self, message: &Message, _: GoOn) -> bool {
        let arrived = match *message {
            Message::Data(bytes) => Arrived::Data(bytes.to_vec()),
            Message::Failed(failed) => Arrived::Failed(failed.clone()),
            Message::Beats(_) => return true,
        };
        Self::send(self, arrived).is_ok()
    }
}

/// A panic elsewhere leaves nothing half done in these.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
