//! The secret of a run, by which its processes recognise each other.
//!
//! Two processes prove to each other that they hold the secret by HMAC-SHA256 over random bytes that the
//! other one has drawn. The secret itself is never sent. Messages are not encrypted.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

/// How long the other process may take for each message of a handshake.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A key made from the run's secret.
#[derive(Clone)]
pub struct Token(hmac::Key);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

/// The end of a connection. Each proves something else, so that a proof cannot be sent back.
#[derive(Clone, Copy)]
pub(super) enum Role {
    /// The process that connects.
    Client = 1,
    /// The process that listens.
    Server = 2,
}

impl Role {
    fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

impl Token {
    /// A token for the run's secret.
    pub fn new(secret: &str) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()))
    }

    /// A random secret of 128 bits, in hexadecimal.
    ///
    /// # Errors
    /// The operating system gives no random numbers.
    pub fn draw() -> io::Result<String> {
        let drawn: [u8; 16] = random()?;
        Ok(drawn.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Runs the handshake: proves that this process holds the token, and checks the proof of the other one.
    ///
    /// # Errors
    /// `PermissionDenied` where the other process does not hold the token; those of the socket.
    pub(super) fn prove(&self, socket: &mut TcpStream, role: Role) -> io::Result<()> {
        socket.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        socket.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
        let drawn: [u8; 32] = random()?;
        socket.write_all(&drawn)?;
        let mut received = [0; 32];
        socket.read_exact(&mut received)?;
        let proof = hmac::sign(&self.0, &[&[role as u8][..], &received, &drawn].concat());
        socket.write_all(proof.as_ref())?;
        let mut proof = [0; 32];
        socket.read_exact(&mut proof)?;
        hmac::verify(&self.0, &[&[role.other() as u8][..], &drawn, &received].concat(), &proof)
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
