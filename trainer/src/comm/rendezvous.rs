//! The rendezvous, at which ranks exchange their addresses: each tells where it listens, and once all have
//! come, each learns where all others listen. Torch calls this a TCP store.
//!
//! Server and ranks prove to each other that they hold the run's token ([`Token`]). A process that does not
//! is rejected and disturbs nobody. Then each rank connects to all ranks of a lower number, with the same
//! proof.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::environment::RankEnv;
use super::mesh::lock;
use super::token::{HANDSHAKE_TIMEOUT, Role, Token};

/// Time between two attempts to accept a connection.
const POLL: Duration = Duration::from_millis(10);
/// Time between two messages to ranks that wait for others.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// Kinds of messages to a rank. The text that follows names the ranks that are missing, ...
const WAIT: u8 = 0;
/// ... is the address of each rank, ...
const READY: u8 = 1;
/// ... or says why the rank is rejected.
const REFUSED: u8 = 2;

/// For each rank that has come its connection and the address where it listens.
type Joined = Vec<Option<(TcpStream, SocketAddr)>>;

/// Starts a rendezvous server for `size` ranks in the background and returns its address. It serves the ranks
/// again each time that they restart.
///
/// # Errors
/// The address is in use, or does not belong to this host.
pub fn host(address: impl ToSocketAddrs, size: usize, token: Token) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    let joined: Arc<Mutex<Joined>> = Arc::new(Mutex::new((0..size).map(|_| None).collect()));
    let waiting = Arc::clone(&joined);
    thread::Builder::new().name("rendezvous".to_owned()).spawn(move || {
        loop {
            notify_ranks(&mut lock(&waiting));
            thread::sleep(STATUS_INTERVAL);
        }
    })?;
    thread::Builder::new().name("rendezvous".to_owned()).spawn(move || {
        for socket in listener.incoming() {
            let socket = match socket {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!("the rendezvous cannot accept a connection: {error}");
                    // Too many open files, perhaps: trying again at once would not help.
                    thread::sleep(STATUS_INTERVAL);
                    continue;
                }
            };
            let (joined, token) = (Arc::clone(&joined), token.clone());
            // A thread for each connection, so that a silent stranger does not delay the ranks.
            let admit = move || {
                let from = socket.peer_addr();
                if let Err(error) = admit(socket, size, &token, &joined) {
                    tracing::warn!("the rendezvous rejected {from:?}: {error}");
                }
            };
            let _ = thread::Builder::new().name("rendezvous".to_owned()).spawn(admit);
        }
    })?;
    Ok(address)
}

/// Authenticates a connection and registers its rank.
fn admit(mut socket: TcpStream, size: usize, token: &Token, joined: &Mutex<Joined>) -> io::Result<()> {
    token.prove(&mut socket, Role::Server)?;
    let [rank, ranks, port] = numbers(&mut socket)?;
    if ranks as usize != size || rank as usize >= size {
        let message = format!("this is rank {rank} of {ranks}, but {size} ranks are expected");
        return send_message(&mut socket, REFUSED, message.as_bytes());
    }
    let address = SocketAddr::new(socket.peer_addr()?.ip(), port as u16);
    let mut joined = lock(joined);
    // A rank that comes twice was restarted.
    joined[rank as usize] = Some((socket, address));
    notify_ranks(&mut joined);
    Ok(())
}

/// Sends the addresses to all ranks if all have come; otherwise tells those that wait which ranks are
/// missing.
fn notify_ranks(joined: &mut Joined) {
    // A rank that has disconnected meanwhile is missing again.
    for slot in joined.iter_mut() {
        if slot.as_ref().is_some_and(|(socket, _)| is_closed(socket)) {
            *slot = None;
        }
    }
    let missing: Vec<String> =
        (0..joined.len()).filter(|&rank| joined[rank].is_none()).map(|rank| rank.to_string()).collect();
    let (kind, text) = match missing.is_empty() {
        true => {
            let addresses: Vec<String> =
                joined.iter().flatten().map(|(_, address)| address.to_string()).collect();
            (READY, addresses.join(" "))
        }
        false => (WAIT, missing.join(", ")),
    };
    for slot in joined.iter_mut() {
        if let Some((socket, _)) = slot
            && send_message(socket, kind, text.as_bytes()).is_err()
        {
            *slot = None;
        }
    }
    if kind == READY {
        joined.iter_mut().for_each(|slot| *slot = None);
    }
}

/// Whether a rank has closed its connection. It sends nothing while it waits.
fn is_closed(socket: &TcpStream) -> bool {
    let closed = socket.set_nonblocking(true).and_then(|()| socket.peek(&mut [0]));
    let closed = !matches!(closed, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
    closed || socket.set_nonblocking(false).is_err()
}

fn send_message(socket: &mut TcpStream, kind: u8, text: &[u8]) -> io::Result<()> {
    socket.write_all(&[&[kind][..], &(text.len() as u32).to_le_bytes(), text].concat())
}

fn numbers<const N: usize>(socket: &mut TcpStream) -> io::Result<[u32; N]> {
    let mut bytes = vec![0; 4 * N];
    socket.read_exact(&mut bytes)?;
    Ok(std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|k| bytes[4 * i + k]))))
}

/// Joins the rendezvous at one of `addresses` and connects to all other ranks. Returns a socket for each
/// rank; `None` for this one. The error is a message for the user.
pub(super) fn join(
    addresses: &[SocketAddr],
    env: &RankEnv,
    token: &Token,
    deadline: Instant,
) -> Result<Vec<Option<TcpStream>>, String> {
    let mut host = connect(addresses, deadline)?;
    token.prove(&mut host, Role::Client).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            format!("LODESTONE_TOKEN differs between the hosts ({error})")
        }
        _ => error.to_string(),
    })?;
    let text = |error: io::Error| error.to_string();
    let here = host.local_addr().map_err(text)?.ip();
    let there = host.peer_addr().map_err(text)?.ip();
    let listener = TcpListener::bind((interface(here, env.one_host), 0)).map_err(text)?;
    let port = listener.local_addr().map_err(text)?.port();
    let about = [env.rank as u32, env.size as u32, u32::from(port)];
    host.write_all(&about.map(u32::to_le_bytes).concat()).map_err(text)?;

    let mut missing = String::new();
    let table = loop {
        let (kind, message) = read_message(&mut host, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut if missing.is_empty() => "no answer".to_owned(),
            io::ErrorKind::TimedOut => {
                format!("rank {missing} did not come within {} s", env.timeout.as_secs())
            }
            _ => format!("the connection was lost ({error})"),
        })?;
        match kind {
            READY => break message,
            WAIT => missing = message,
            _ => return Err(message),
        }
    };
    // All ranks have come, so one that does not connect soon has ended meanwhile.
    let deadline = deadline.min(Instant::now() + 6 * HANDSHAKE_TIMEOUT);
    let mut sockets: Vec<Option<TcpStream>> = (0..env.size).map(|_| None).collect();
    for (rank, address) in table.split(' ').enumerate().take(env.rank) {
        let mut address: SocketAddr = address.parse().map_err(|_| format!("`{address}` is no address"))?;
        if address.ip().is_loopback() {
            // This rank runs on the host of the rendezvous and connected to it there.
            address.set_ip(there);
        }
        let mut socket = connect(&[address], deadline).map_err(|error| format!("rank {rank}: {error}"))?;
        token
            .prove(&mut socket, Role::Client)
            .map_err(|error| format!("rank {rank} at {address}: {error}"))?;
        socket.write_all(&(env.rank as u32).to_le_bytes()).map_err(text)?;
        sockets[rank] = Some(socket);
    }
    listener.set_nonblocking(true).map_err(text)?;
    while let Some(missing) = (env.rank + 1..env.size).find(|&rank| sockets[rank].is_none()) {
        match listener.accept() {
            Ok((mut socket, _)) => {
                let proven =
                    socket.set_nonblocking(false).and_then(|()| token.prove(&mut socket, Role::Server));
                let rank = proven.and_then(|()| numbers(&mut socket));
                // Other connections are not from ranks of this run.
                if let Ok([rank]) = rank
                    && (env.rank + 1..env.size).contains(&(rank as usize))
                {
                    sockets[rank as usize] = Some(socket);
                }
            }
            Err(error) if Instant::now() > deadline => {
                return Err(match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        format!("rank {missing} joined the rendezvous but did not connect")
                    }
                    _ => format!("rank {missing} joined the rendezvous but cannot connect: {error}"),
                });
            }
            Err(_) => thread::sleep(POLL),
        }
    }
    Ok(sockets)
}

/// The address to listen on for a rank whose connection to the rendezvous has the local address `here`.
fn interface(here: IpAddr, one_host: bool) -> IpAddr {
    match (here.is_loopback(), one_host) {
        (false, _) | (true, true) => here,
        // The other ranks are on other hosts.
        (true, false) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    }
}

/// Connects to the first of `addresses` that accepts, trying again until `deadline`.
fn connect(addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream, String> {
    let mut error = "the host name has no address".to_owned();
    loop {
        for address in addresses {
            match TcpStream::connect_timeout(address, HANDSHAKE_TIMEOUT) {
                Ok(socket) => return Ok(socket),
                Err(refused) => error = format!("cannot reach {address}: {refused}"),
            }
        }
        if Instant::now() > deadline || addresses.is_empty() {
            return Err(error);
        }
        thread::sleep(5 * POLL);
    }
}

/// Reads the next message of the rendezvous: its kind and text.
fn read_message(host: &mut TcpStream, deadline: Instant) -> io::Result<(u8, String)> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // A cut cable closes no socket: after several missing messages the host counts as lost.
    host.set_read_timeout(Some(left.min(10 * STATUS_INTERVAL)))?;
    let timed_out = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::from(io::ErrorKind::TimedOut),
        _ => error,
    };
    let mut header = [0; 5];
    host.read_exact(&mut header).map_err(timed_out)?;
    let [kind, length @ ..] = header;
    let mut text = vec![0; u32::from_le_bytes(length) as usize];
    host.read_exact(&mut text).map_err(timed_out)?;
    Ok((kind, String::from_utf8_lossy(&text).into_owned()))
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
