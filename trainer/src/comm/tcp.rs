//! Ranks that are processes, on one host or several, with a socket between any two.
//!
//! A frame is a kind and a length, 8 bytes each, and so many bytes. Besides messages there are signs of life, which a rank sends
//! whether it waits or works: its count of pieces of work done. They stop when the process does, and when a cable is cut.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

use super::Failed;
use super::environment::Place;
use super::mesh::{Arrived, GoOn, LOOK, Life, Line, Mesh, Message, Peer};
use super::rendezvous;
use crate::system::heartbeat;
use crate::{Error, Result};

const DATA: u64 = 0;
const FAILED: u64 = 1;
const BEATS: u64 = 2;

/// Bytes between two signs that a long message still arrives.
const PIECE: usize = 1 << 20;

/// Lets this process, and those that it starts, open as many files as the system permits: a rank has two for each other one, and
/// the usual limit of 1024 is low for the sake of programs that are not this one.
pub fn open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where it may not, it is said once there are too many.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Meets the other ranks where the environment says, and connects to each.
pub(super) fn connect(place: &Place) -> Result<Mesh> {
    let token = place.token()?;
    let (host, port) = place.master.clone().unwrap_or_default();
    // On one host nobody outside is listened to, whatever its name resolves to.
    let host = if place.one_host { "127.0.0.1".to_owned() } else { host };
    if place.rank == 0 && !place.hosted {
        let ip = if place.one_host { "127.0.0.1" } else { "0.0.0.0" };
        rendezvous::host((ip, port), place.size, token.clone()).map_err(|error| failed(place, &format!(
            "cannot listen on {ip}:{port} for the other ranks: {error}\nhint: another MASTER_PORT may be free"
        )))?;
    }
    let addresses: Vec<_> = (host.as_str(), port)
        .to_socket_addrs()
        .map_err(|error| Error::Usage(format!("MASTER_ADDR={host}: {error}")))?
        .collect();
    let deadline = Instant::now() + place.timeout;
    let sockets = rendezvous::join(&addresses, place, &token, deadline)
        .map_err(|message| failed(place, &format!("rendezvous at {host}:{port}: {message}")))?;
    mesh(place.rank, sockets, place.timeout)
        .map_err(|error| failed(place, &format!("cannot talk to the other ranks: {error}")))
}

fn failed(place: &Place, message: &str) -> Error {
    Error::Rank { rank: place.rank, status: 1, message: message.to_owned() }
}

/// The mesh over sockets to the other ranks; none for this one.
pub(super) fn mesh(rank: usize, sockets: Vec<Option<TcpStream>>, patience: Duration) -> io::Result<Mesh> {
    let peers = sockets.into_iter().map(|socket| socket.map(peer).transpose());
    let peers: Vec<Option<Peer>> = peers.collect::<io::Result<_>>()?;
    let lines: Vec<_> = peers.iter().flatten().map(|peer| Arc::downgrade(&peer.line)).collect();
    let pause = (patience / 8).clamp(Duration::from_millis(20), Duration::from_secs(1));
    thread::Builder::new().name("beats".to_owned()).spawn(move || beat(&lines, pause, patience))?;
    Ok(Mesh { rank, peers, patience })
}

fn peer(socket: TcpStream) -> io::Result<Peer> {
    let host = socket.peer_addr()?.ip().to_string();
    socket.set_nodelay(true)?;
    socket.set_read_timeout(None)?;
    // Who sends looks up from it now and then.
    socket.set_write_timeout(Some(LOOK))?;
    let (sender, inbox) = channel();
    let life = Life::new();
    let (reader, known) = (socket.try_clone()?, Arc::clone(&life));
    thread::Builder::new().name("inbox".to_owned()).spawn(move || {
        // An end without a last word is seen by the channel's other side.
        let _ended = read(reader, &sender, &known);
        known.end();
    })?;
    let line = Arc::new(Mutex::new(Socket { socket, torn: false }));
    Ok(Peer { host, line, inbox: Mutex::new(inbox), life: Some(life) })
}

/// Takes in what arrives, for as long as the other side lives.
fn read(mut socket: TcpStream, inbox: &Sender<Arrived>, life: &Life) -> io::Result<()> {
    loop {
        let mut header = [0; 16];
        socket.read_exact(&mut header)?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let (kind, length) = (number(0), number(8));
        if kind == BEATS {
            life.has_done(length);
            continue;
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            let piece = (length - bytes.len() as u64).min(PIECE as u64);
            if (&mut socket).take(piece).read_to_end(&mut bytes)? < piece as usize {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            life.touch();
        }
        let arrived = if kind == DATA {
            Arrived::Data(bytes)
        } else {
            let failed = last_word(&bytes);
            life.has_failed(&failed);
            Arrived::Failed(failed)
        };
        if inbox.send(arrived).is_err() {
            return Ok(());
        }
    }
}

/// Tells the others that this process lives and works.
fn beat(lines: &[Weak<Mutex<dyn Line>>], pause: Duration, patience: Duration) {
    loop {
        let mut any = false;
        for line in lines.iter().filter_map(Weak::upgrade) {
            any = true;
            // A line that is just used shows as much.
            if let Ok(mut line) = line.try_lock() {
                let start = Instant::now();
                // The next one will do; but half a sign would tear the line.
                line.send(&Message::Beats(heartbeat::beats()), &mut |begun| {
                    begun && start.elapsed() < patience
                });
            }
        }
        if !any {
            return;
        }
        thread::sleep(pause);
    }
}

fn last_word(bytes: &[u8]) -> Failed {
    match bytes {
        [a, b, c, d, status, message @ ..] => Failed {
            rank: u32::from_le_bytes([*a, *b, *c, *d]) as usize,
            status: *status,
            message: String::from_utf8_lossy(message).into_owned(),
        },
        _ => Failed { rank: 0, status: 1, message: String::new() },
    }
}

#[derive(Debug)]
struct Socket {
    socket: TcpStream,
    /// A frame was given up in its midst: nothing that follows could be told from the rest of it.
    torn: bool,
}

impl Socket {
    fn frame(&mut self, kind: u64, length: u64, bytes: &[u8], go_on: GoOn) -> bool {
        let mut header = [0; 16];
        header[..8].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&length.to_le_bytes());
        // Small messages leave in one piece.
        if bytes.len() < PIECE {
            return self.put(&[&header, bytes].concat(), false, go_on);
        }
        self.put(&header, false, go_on) && self.put(bytes, true, go_on)
    }

    /// Hands over all of a piece, the first of a frame or not, or says that nobody takes it.
    fn put(&mut self, bytes: &[u8], begun: bool, go_on: GoOn) -> bool {
        let mut left = bytes;
        while !left.is_empty() && !self.torn {
            match self.socket.write(left) {
                Ok(count) if count > 0 => left = &left[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        && go_on(begun || left.len() < bytes.len()) => {}
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

impl Line for Socket {
    fn send(&mut self, message: &Message, go_on: GoOn) -> bool {
        match *message {
            Message::Data(bytes) => self.frame(DATA, bytes.len() as u64, bytes, go_on),
            Message::Beats(beats) => self.frame(BEATS, beats, &[], go_on),
            Message::Failed(Failed { rank, status, message }) => {
                let bytes = [&(*rank as u32).to_le_bytes(), &[*status][..], message.as_bytes()].concat();
                self.frame(FAILED, bytes.len() as u64, &bytes, go_on)
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // The thread that reads has the other handle.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}
