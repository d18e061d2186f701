//! Server on a local port that stands for the hub in tests.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Hub;

/// Answer of the server to requests for one path.
#[derive(Clone)]
pub(crate) enum Answer {
    Body(Vec<u8>),
    Redirect(String),
    Status(u16),
    /// Announces the whole length, sends this many bytes and closes the connection; answers the next request
    /// in full.
    CutOnce(usize, Vec<u8>),
    /// Announces the whole length, sends this many bytes and then nothing; answers the next request in full.
    StallOnce(usize, Vec<u8>),
    /// As [`Self::CutOnce`], but the next request gets another file.
    CutThenChanged(usize, Vec<u8>, Vec<u8>),
}

/// Server on a local port, and the requests that it got, in order.
pub(crate) struct Server {
    pub(crate) endpoint: String,
    /// Path, `Range` and `Authorization` of each request.
    pub(crate) seen: Arc<Mutex<Vec<(String, String, String)>>>,
}

impl Server {
    /// Starts the server with an answer for each path; other paths get status 404.
    pub(crate) fn start(routes: &[(&str, Answer)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let mut routes: BTreeMap<_, _> =
            routes.iter().map(|(path, answer)| ((*path).to_string(), answer.clone())).collect();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        std::thread::spawn(move || {
            let mut stalled = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let [mut path, mut range, mut token, mut wanted] = [const { String::new() }; 4];
                for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                    let line = line.unwrap();
                    if line.is_empty() {
                        break;
                    }
                    if let Some(rest) = line.strip_prefix("GET ") {
                        path = rest.split(' ').next().unwrap().into();
                    } else if let Some((name, value)) = line.split_once(": ") {
                        match name.to_lowercase().as_str() {
                            "range" => range = value.into(),
                            "authorization" => token = value.into(),
                            "if-range" => wanted = value.into(),
                            _ => (),
                        }
                    }
                }
                log.lock().unwrap().push((path.clone(), range.clone(), token));
                let start: usize = range
                    .strip_prefix("bytes=")
                    .map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
                let answer = routes.get(&path).cloned().unwrap_or(Answer::Status(404));
                let (head, body) = match answer {
                    Answer::Body(body) if start > 0 && wanted == etag(&body) => (
                        format!(
                            "206 Partial Content\r\nETag: {wanted}\r\nContent-Range: bytes {start}-{}/{}",
                            body.len() - 1,
                            body.len()
                        ),
                        body[start..].to_vec(),
                    ),
                    Answer::Body(body) => (format!("200 OK\r\nETag: {}", etag(&body)), body),
                    Answer::Redirect(to) => (format!("302 Found\r\nLocation: {to}"), vec![]),
                    Answer::Status(status) => (format!("{status} Refused"), b"no".to_vec()),
                    Answer::CutOnce(count, body) => {
                        cut(&mut stream, count, &body);
                        routes.insert(path, Answer::Body(body));
                        continue;
                    }
                    Answer::StallOnce(count, body) => {
                        cut(&mut stream, count, &body);
                        stalled.push(stream);
                        routes.insert(path, Answer::Body(body));
                        continue;
                    }
                    Answer::CutThenChanged(count, body, other) => {
                        cut(&mut stream, count, &body);
                        routes.insert(path, Answer::Body(other));
                        continue;
                    }
                };
                let length = body.len();
                let head =
                    format!("HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
                stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).ok();
            }
        });
        Self { endpoint, seen }
    }

    /// Paths of all requests, in order.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|(path, ..)| path.clone()).collect()
    }
}

/// Makes a client of `endpoint` with its cache in `home` and `more` environment variables.
pub(crate) fn hub(endpoint: &str, home: &Path, more: &[(&str, &str)]) -> Hub {
    let more: BTreeMap<_, _> = more.iter().copied().collect();
    let hub = Hub::from_env(|name| match name {
        "HF_HOME" => Some(home.display().to_string()),
        "HF_ENDPOINT" => Some(endpoint.into()),
        _ => more.get(name).map(|value| (*value).to_string()),
    });
    Hub { pause: Duration::ZERO, ..hub.unwrap() }
}

pub(crate) fn body(text: &str) -> Answer {
    Answer::Body(text.into())
}

/// Answer to a request for a repository's information.
pub(crate) fn listing(names: &[&str]) -> Answer {
    let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({"rfilename": name})).collect();
    body(&serde_json::json!({"id": "org/name", "sha": "abc123", "siblings": siblings}).to_string())
}

/// Announces `body`, but sends only `count` bytes of it.
fn cut(stream: &mut TcpStream, count: usize, body: &[u8]) {
    let head = format!(
        "HTTP/1.1 200 OK\r\nConnection: close\r\nETag: {}\r\nContent-Length: {}\r\n\r\n",
        etag(body),
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&body[..count]).unwrap();
}

fn etag(body: &[u8]) -> String {
    format!("\"{:016x}\"", xxhash_rust::xxh3::xxh3_64(body))
}
