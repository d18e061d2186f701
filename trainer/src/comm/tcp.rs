//! Ranks that are processes, on one host or several, with a socket between any two.
//!
//! A frame is a kind and a length of 8 bytes each, and that many bytes. Besides messages a rank sends
//! heartbeats, whether it waits or works: the number of units of work that it has done. They stop when the
//! process stops or the network fails.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

use super::Failure;
use super::environment::RankEnv;
use super::mesh::{KeepWaiting, Link, Mesh, Message, POLL, Peer, PeerLiveness, Received};
use super::rendezvous;
use crate::system::heartbeat;
use crate::{Error, Result};

const DATA: u64 = 0;
const FAILED: u64 = 1;
const HEARTBEAT: u64 = 2;

/// Number of bytes of a long message after which the sender counts as alive.
const PIECE: usize = 1 << 20;

/// Raises the limit of open files of this process and its children to the maximum: a rank needs two for each
/// other rank, and the default of 1024 allows only 500 ranks.
pub fn raise_open_files_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If this fails, opening a file too many reports it.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Joins the rendezvous that the environment names and connects to all other ranks.
pub(super) fn connect(env: &RankEnv) -> Result<Mesh> {
    let token = env.token()?;
    let (host, port) = env.master.clone().unwrap_or_default();
    // Ranks on one host accept no connections from outside, whatever the host's name resolves to.
    let host = if env.one_host { "127.0.0.1".to_owned() } else { host };
    if env.rank == 0 && !env.hosted {
        let ip = if env.one_host { "127.0.0.1" } else { "0.0.0.0" };
        rendezvous::host((ip, port), env.size, token.clone()).map_err(|error| failed(env, &format!(
            "cannot listen on {ip}:{port} for the other ranks: {error}\nhint: another MASTER_PORT may be free"
        )))?;
    }
    let addresses: Vec<_> = (host.as_str(), port)
        .to_socket_addrs()
        .map_err(|error| Error::Usage(format!("MASTER_ADDR={host}: {error}")))?
        .collect();
    let deadline = Instant::now() + env.timeout;
    let sockets = rendezvous::join(&addresses, env, &token, deadline)
        .map_err(|message| failed(env, &format!("rendezvous at {host}:{port}: {message}")))?;
    mesh(env.rank, sockets, env.timeout)
        .map_err(|error| failed(env, &format!("cannot talk to the other ranks: {error}")))
}

fn failed(env: &RankEnv, message: &str) -> Error {
    Error::Rank { rank: env.rank, status: 1, message: message.to_owned() }
}

/// A mesh over `sockets` to the other ranks, with `None` for this one.
pub(super) fn mesh(rank: usize, sockets: Vec<Option<TcpStream>>, timeout: Duration) -> io::Result<Mesh> {
    let peers = sockets.into_iter().map(|socket| socket.map(peer).transpose());
    let peers: Vec<Option<Peer>> = peers.collect::<io::Result<_>>()?;
    let links: Vec<_> = peers.iter().flatten().map(|peer| Arc::downgrade(&peer.link)).collect();
    let pause = (timeout / 8).clamp(Duration::from_millis(20), Duration::from_secs(1));
    thread::Builder::new()
        .name("heartbeat".to_owned())
        .spawn(move || send_heartbeats(&links, pause, timeout))?;
    Ok(Mesh { rank, peers, timeout })
}

fn peer(socket: TcpStream) -> io::Result<Peer> {
    let host = socket.peer_addr()?.ip().to_string();
    socket.set_nodelay(true)?;
    socket.set_read_timeout(None)?;
    // A blocked sender must check for failures of other ranks from time to time.
    socket.set_write_timeout(Some(POLL))?;
    let (sender, inbox) = channel();
    let liveness = PeerLiveness::new();
    let (reader, peer) = (socket.try_clone()?, Arc::clone(&liveness));
    thread::Builder::new().name("inbox".to_owned()).spawn(move || {
        // If the connection closes without a failure message, the receiver of the channel sees it
        // disconnected.
        let _closed = read(reader, &sender, &peer);
        peer.end();
    })?;
    let link = Arc::new(Mutex::new(Socket { socket, torn: false }));
    Ok(Peer { host, link, inbox: Mutex::new(inbox), liveness: Some(liveness) })
}

/// Reads frames until the connection is closed.
fn read(mut socket: TcpStream, inbox: &Sender<Received>, liveness: &PeerLiveness) -> io::Result<()> {
    loop {
        let mut header = [0; 16];
        socket.read_exact(&mut header)?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let (kind, length) = (number(0), number(8));
        if kind == HEARTBEAT {
            liveness.set_work_count(length);
            continue;
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            let piece = (length - bytes.len() as u64).min(PIECE as u64);
            if (&mut socket).take(piece).read_to_end(&mut bytes)? < piece as usize {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            liveness.touch();
        }
        let received = if kind == DATA {
            Received::Data(bytes)
        } else {
            let failure = decode_failure(&bytes);
            liveness.set_failed(&failure);
            Received::Failure(failure)
        };
        if inbox.send(received).is_err() {
            return Ok(());
        }
    }
}

/// Sends heartbeats on all links until they are gone.
fn send_heartbeats(links: &[Weak<Mutex<dyn Link>>], pause: Duration, timeout: Duration) {
    loop {
        let mut any = false;
        for link in links.iter().filter_map(Weak::upgrade) {
            any = true;
            // A link that is in use shows by itself that this process lives.
            if let Ok(mut link) = link.try_lock() {
                let start = Instant::now();
                // A heartbeat may be dropped, but not half of one: that would corrupt the stream.
                link.send(&Message::Heartbeat(heartbeat::work_count()), &mut |begun| {
                    begun && start.elapsed() < timeout
                });
            }
        }
        if !any {
            return;
        }
        thread::sleep(pause);
    }
}

fn decode_failure(bytes: &[u8]) -> Failure {
    match bytes {
        [a, b, c, d, status, message @ ..] => Failure {
            rank: u32::from_le_bytes([*a, *b, *c, *d]) as usize,
            status: *status,
            message: String::from_utf8_lossy(message).into_owned(),
        },
        _ => Failure { rank: 0, status: 1, message: String::new() },
    }
}

#[derive(Debug)]
struct Socket {
    socket: TcpStream,
    /// Whether a frame was abandoned in the middle. Nothing can be sent after it, because the receiver would
    /// take it for the rest.
    torn: bool,
}

impl Socket {
    fn frame(&mut self, kind: u64, length: u64, bytes: &[u8], keep_waiting: KeepWaiting) -> bool {
        let mut header = [0; 16];
        header[..8].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&length.to_le_bytes());
        // A small message goes in one write.
        if bytes.len() < PIECE {
            return self.put(&[&header, bytes].concat(), false, keep_waiting);
        }
        self.put(&header, false, keep_waiting) && self.put(bytes, true, keep_waiting)
    }

    /// Writes all bytes. `begun`: a part of the frame is already written. Returns false if it gave up or the
    /// socket is closed.
    fn put(&mut self, bytes: &[u8], begun: bool, keep_waiting: KeepWaiting) -> bool {
        let mut left = bytes;
        while !left.is_empty() && !self.torn {
            match self.socket.write(left) {
                Ok(count) if count > 0 => left = &left[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        && keep_waiting(begun || left.len() < bytes.len()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.torn = begun || left.len() < bytes.len();
                    return false;
                }
                _ => self.torn = true,
            }
        }
        !self.torn
    }
}

impl Link for Socket {
    fn send(&mut self, message: &Message, keep_waiting: KeepWaiting) -> bool {
        match *message {
            Message::Data(bytes) => self.frame(DATA, bytes.len() as u64, bytes, keep_waiting),
            Message::Heartbeat(work_count) => self.frame(HEARTBEAT, work_count, &[], keep_waiting),
            Message::Failure(Failure { rank, status, message }) => {
                let bytes = [&(*rank as u32).to_le_bytes(), &[*status][..], message.as_bytes()].concat();
                self.frame(FAILED, bytes.len() as u64, &bytes, keep_waiting)
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // The reading thread holds another handle of the socket, so dropping this one would not close it.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}
