//! Where ranks find each other: each tells the host of the rendezvous where it listens, and once all have come, all learn it.
//!
//! Host and ranks prove to each other that they hold the run's token, by HMAC-SHA256 over what the other side has drawn at random;
//! the token itself is never sent. Whoever does not hold it is turned away and disturbs nobody. The rank of the higher number
//! connects to the one of the lower, with the same proof.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use super::environment::Place;
use super::mesh::lock;

/// What only the ranks of a run know.
#[derive(Clone)]
pub struct Token(hmac::Key);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// From the run's secret.
    pub fn new(secret: &str) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()))
    }

    /// A secret that nobody can guess, in hexadecimal.
    pub fn draw() -> io::Result<String> {
        let drawn: [u8; 16] = random()?;
        Ok(drawn.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Shows the other side that this one holds the token, and looks whether it does too.
    fn prove(&self, socket: &mut TcpStream, local: Side) -> io::Result<()> {
        socket.set_read_timeout(Some(POLITE))?;
        socket.set_write_timeout(Some(POLITE))?;
        let drawn: [u8; 32] = random()?;
        socket.write_all(&drawn)?;
        let mut theirs = [0; 32];
        socket.read_exact(&mut theirs)?;
        let proof = hmac::sign(&self.0, &[&[local as u8][..], &theirs, &drawn].concat());
        socket.write_all(proof.as_ref())?;
        let mut proof = [0; 32];
        socket.read_exact(&mut proof)?;
        hmac::verify(&self.0, &[&[local.other() as u8][..], &drawn, &theirs].concat(), &proof)
            .map_err(|_| io::Error::new(io::ErrorKind::PermissionDenied, "does not hold the run's token"))
    }
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut drawn = [0; N];
    SystemRandom::new()
        .fill(&mut drawn)
        .map_err(|_| io::Error::other("the system gives no random numbers"))?;
    Ok(drawn)
}

/// Who connects and who is connected to prove different things, so that a proof cannot be sent back.
#[derive(Clone, Copy)]
enum Side {
    Guest = 1,
    Host = 2,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Guest => Self::Host,
            Self::Host => Self::Guest,
        }
    }
}

/// How long the other side of a handshake may take.
const POLITE: Duration = Duration::from_secs(10);
/// Between two looks at who has come.
const LOOK: Duration = Duration::from_millis(10);
/// Between two words to those who wait.
const WORD: Duration = Duration::from_secs(2);

const WAIT: u8 = 0;
const READY: u8 = 1;
const REFUSED: u8 = 2;

/// Who has come: the rank's socket, and where it listens.
type Came = Vec<Option<(TcpStream, SocketAddr)>>;

/// Hosts the rendezvous of `size` ranks in the background, as often as they come: all may fail and start anew. Returns where.
///
/// # Errors
/// The address is taken, or is none of this host's.
pub fn host(address: impl ToSocketAddrs, size: usize, token: Token) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    let came: Arc<Mutex<Came>> = Arc::new(Mutex::new((0..size).map(|_| None).collect()));
    let waiting = Arc::clone(&came);
    thread::Builder::new().name("rendezvous".to_owned()).spawn(move || {
        loop {
            settle(&mut lock(&waiting));
            thread::sleep(WORD);
        }
    })?;
    thread::Builder::new().name("rendezvous".to_owned()).spawn(move || {
        for socket in listener.incoming() {
            let socket = match socket {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!("the rendezvous cannot let anybody in: {error}");
                    // It may have too many files open, and does not come to have less by asking again at once.
                    thread::sleep(WORD);
                    continue;
                }
            };
            let (came, token) = (Arc::clone(&came), token.clone());
            // Each in a thread of its own: a stranger who says nothing must not hold up the others.
            let welcome = move || {
                let from = socket.peer_addr();
                if let Err(error) = welcome(socket, size, &token, &came) {
                    tracing::warn!("the rendezvous turned {from:?} away: {error}");
                }
            };
            let _ = thread::Builder::new().name("rendezvous".to_owned()).spawn(welcome);
        }
    })?;
    Ok(address)
}

fn welcome(mut socket: TcpStream, size: usize, token: &Token, came: &Mutex<Came>) -> io::Result<()> {
    token.prove(&mut socket, Side::Host)?;
    let [rank, ranks, port] = numbers(&mut socket)?;
    if ranks as usize != size || rank as usize >= size {
        let message = format!("this is rank {rank} of {ranks}, but {size} are expected");
        return say(&mut socket, REFUSED, message.as_bytes());
    }
    let address = SocketAddr::new(socket.peer_addr()?.ip(), port as u16);
    let mut came = lock(came);
    // Who comes twice has started anew.
    came[rank as usize] = Some((socket, address));
    settle(&mut came);
    Ok(())
}

/// Tells all where all are, or those who wait for whom.
fn settle(came: &mut Came) {
    // Who has gone away meanwhile is missing again.
    for place in came.iter_mut() {
        if place.as_ref().is_some_and(|(socket, _)| gone(socket)) {
            *place = None;
        }
    }
    let missing: Vec<String> =
        (0..came.len()).filter(|&rank| came[rank].is_none()).map(|rank| rank.to_string()).collect();
    let (kind, word) = match missing.is_empty() {
        true => {
            let addresses: Vec<String> =
                came.iter().flatten().map(|(_, address)| address.to_string()).collect();
            (READY, addresses.join(" "))
        }
        false => (WAIT, missing.join(", ")),
    };
    for place in came.iter_mut() {
        if let Some((socket, _)) = place
            && say(socket, kind, word.as_bytes()).is_err()
        {
            *place = None;
        }
    }
    if kind == READY {
        came.iter_mut().for_each(|place| *place = None);
    }
}

/// Whether the other side has closed. It says nothing while it waits.
fn gone(socket: &TcpStream) -> bool {
    let closed = socket.set_nonblocking(true).and_then(|()| socket.peek(&mut [0]));
    let closed = !matches!(closed, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
    closed || socket.set_nonblocking(false).is_err()
}

fn say(socket: &mut TcpStream, kind: u8, word: &[u8]) -> io::Result<()> {
    socket.write_all(&[&[kind][..], &(word.len() as u32).to_le_bytes(), word].concat())
}

fn numbers<const N: usize>(socket: &mut TcpStream) -> io::Result<[u32; N]> {
    let mut bytes = vec![0; 4 * N];
    socket.read_exact(&mut bytes)?;
    Ok(std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|k| bytes[4 * i + k]))))
}

/// Sockets to all other ranks, from the rendezvous at one of `addresses`. The error is for a person.
pub(super) fn join(
    addresses: &[SocketAddr],
    place: &Place,
    token: &Token,
    deadline: Instant,
) -> Result<Vec<Option<TcpStream>>, String> {
    let mut host = reach(addresses, deadline)?;
    token.prove(&mut host, Side::Guest).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            format!("not of this run: LODESTONE_TOKEN differs here and there ({error})")
        }
        _ => error.to_string(),
    })?;
    let text = |error: io::Error| error.to_string();
    let here = host.local_addr().map_err(text)?.ip();
    let there = host.peer_addr().map_err(text)?.ip();
    let listener = TcpListener::bind((interface(here, place.one_host), 0)).map_err(text)?;
    let port = listener.local_addr().map_err(text)?.port();
    let about = [place.rank as u32, place.size as u32, u32::from(port)];
    host.write_all(&about.map(u32::to_le_bytes).concat()).map_err(text)?;

    let mut missing = String::new();
    let table = loop {
        let (kind, word) = hear(&mut host, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut if missing.is_empty() => "no answer".to_owned(),
            io::ErrorKind::TimedOut => {
                format!("rank {missing} did not come within {} s", place.timeout.as_secs())
            }
            _ => format!("its host has gone away ({error})"),
        })?;
        match kind {
            READY => break word,
            WAIT => missing = word,
            _ => return Err(word),
        }
    };
    // All are there: who does not connect now has ended meanwhile.
    let deadline = deadline.min(Instant::now() + 6 * POLITE);
    let mut sockets: Vec<Option<TcpStream>> = (0..place.size).map(|_| None).collect();
    for (rank, address) in table.split(' ').enumerate().take(place.rank) {
        let mut address: SocketAddr = address.parse().map_err(|_| format!("`{address}` is no address"))?;
        if address.ip().is_loopback() {
            // It is on the rendezvous' own host, wherever that is from here.
            address.set_ip(there);
        }
        let mut socket = reach(&[address], deadline).map_err(|error| format!("rank {rank}: {error}"))?;
        token
            .prove(&mut socket, Side::Guest)
            .map_err(|error| format!("rank {rank} at {address}: {error}"))?;
        socket.write_all(&(place.rank as u32).to_le_bytes()).map_err(text)?;
        sockets[rank] = Some(socket);
    }
    listener.set_nonblocking(true).map_err(text)?;
    while let Some(missing) = (place.rank + 1..place.size).find(|&rank| sockets[rank].is_none()) {
        match listener.accept() {
            Ok((mut socket, _)) => {
                let proven =
                    socket.set_nonblocking(false).and_then(|()| token.prove(&mut socket, Side::Host));
                let rank = proven.and_then(|()| numbers(&mut socket));
                // Whoever else comes is no rank of this run.
                if let Ok([rank]) = rank
                    && (place.rank + 1..place.size).contains(&(rank as usize))
                {
                    sockets[rank as usize] = Some(socket);
                }
            }
            Err(error) if Instant::now() > deadline => {
                return Err(match error.kind() {
                    io::ErrorKind::WouldBlock => format!("rank {missing} came, but did not connect"),
                    _ => format!("rank {missing} came, but cannot be let in: {error}"),
                });
            }
            Err(_) => thread::sleep(LOOK),
        }
    }
    Ok(sockets)
}

/// Where the other ranks reach one that reaches the rendezvous from `here`.
fn interface(here: IpAddr, one_host: bool) -> IpAddr {
    match (here.is_loopback(), one_host) {
        (false, _) | (true, true) => here,
        // The others come from elsewhere.
        (true, false) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    }
}

/// Connects, as soon as somebody listens.
fn reach(addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream, String> {
    let mut error = "it has no address".to_owned();
    loop {
        for address in addresses {
            match TcpStream::connect_timeout(address, POLITE) {
                Ok(socket) => return Ok(socket),
                Err(refused) => error = format!("cannot reach {address}: {refused}"),
            }
        }
        if Instant::now() > deadline || addresses.is_empty() {
            return Err(error);
        }
        thread::sleep(5 * LOOK);
    }
}

/// The host's next word.
fn hear(host: &mut TcpStream, deadline: Instant) -> io::Result<(u8, String)> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // Without a sign for some of its words, the host is gone: a cut cable closes no socket.
    host.set_read_timeout(Some(left.min(10 * WORD)))?;
    let timed_out = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::from(io::ErrorKind::TimedOut),
        _ => error,
    };
    let mut header = [0; 5];
    host.read_exact(&mut header).map_err(timed_out)?;
    let [kind, length @ ..] = header;
    let mut word = vec![0; u32::from_le_bytes(length) as usize];
    host.read_exact(&mut word).map_err(timed_out)?;
    Ok((kind, String::from_utf8_lossy(&word).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_one_host_listen_to_nobody_outside() {
        let [inside, outside] = ["127.0.0.1", "10.0.0.7"].map(|address| address.parse::<IpAddr>().unwrap());
        assert_eq!(interface(inside, true), inside);
        assert!(interface(inside, false).is_unspecified());
        assert_eq!(interface(outside, false), outside);
    }
}
