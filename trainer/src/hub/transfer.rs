//! One file over HTTP: an attempt that breaks is followed by one that goes on where it stopped.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::{Hub, Repository, Snapshot, create_dir_all, encoded};
use crate::system::progress::Progress;
use crate::system::{atomic, heartbeat};
use crate::{Error, Result};

/// Attempts at one file.
const ATTEMPTS: u32 = 4;

impl Hub {
    /// Fetches one file into the snapshot, unless it is there.
    pub(super) fn file(&self, repository: &Repository, snapshot: &Snapshot, name: &str) -> Result<()> {
        let (id, target) = (&repository.id, snapshot.path.join(name));
        if target.exists() {
            return Ok(());
        }
        let url = format!("{}{}/{}/{}", self.endpoint, repository.files(), snapshot.commit, encoded(name));
        let partial = snapshot.path.join(format!("{name}.incomplete"));
        if let Some(parent) = target.parent() {
            create_dir_all(parent)?;
        }
        for attempt in 1.. {
            match self.transfer(id, &url, name, &partial) {
                Ok(()) => break,
                Err(Transfer::Final(error)) => return Err(error),
                Err(Transfer::Network(error)) if attempt == ATTEMPTS => {
                    return Err(self.refusal(id, &url, &error));
                }
                Err(Transfer::Network(error)) => {
                    tracing::warn!("{name}: {error}; trying again");
                    std::thread::sleep(self.pause * attempt);
                    heartbeat::record_work();
                }
            }
        }
        atomic::rename(&partial, &target)?;
        // Whether there is one or not, nobody asks for it again.
        let _ = std::fs::remove_file(etag_of(&partial));
        Ok(())
    }

    /// One attempt: appends to `partial` what it lacks.
    fn transfer(&self, id: &str, url: &str, name: &str, partial: &Path) -> std::result::Result<(), Transfer> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(partial)
            .map_err(|error| Transfer::Final(Error::write("open", partial)(error)))?;
        let have = file.metadata().map_or(0, |metadata| metadata.len());
        // Which file the beginning is of. A server that has another one by now sends it whole.
        let etag = std::fs::read_to_string(etag_of(partial)).unwrap_or_default();
        let resumed = (have > 0 && !etag.is_empty()).then_some((have, etag.as_str()));
        let restart = |file: &File| {
            file.set_len(0).map_err(|error| Transfer::Final(Error::write("truncate", partial)(error)))
        };
        let mut response = match self.get(url, resumed) {
            Ok(response) => response,
            Err(ureq::Error::StatusCode(416)) if have > 0 => {
                restart(&file)?;
                self.get(url, None).map_err(Transfer::Network)?
            }
            // Too many requests, or trouble at the other end: it may pass.
            Err(error @ ureq::Error::StatusCode(429 | 500..)) => return Err(Transfer::Network(error)),
            Err(error @ ureq::Error::StatusCode(_)) => {
                return Err(Transfer::Final(self.refusal(id, url, &error)));
            }
            Err(error) => return Err(Transfer::Network(error)),
        };
        let partly = response.status() == 206;
        if have > 0 && !partly {
            restart(&file)?;
        }
        if let Some(etag) = response.headers().get("etag").and_then(|etag| etag.to_str().ok()) {
            std::fs::write(etag_of(partial), etag)
                .map_err(|error| Transfer::Final(Error::write("write", partial)(error)))?;
        }
        let mut done = if partly { have } else { 0 };
        let total = response.body().content_length().map(|length| done + length);

        tracing::info!(
            "fetching {id}/{name}{}",
            total.map_or_else(String::new, |total| format!(", {}", size(total)))
        );
        let megabytes = |bytes: u64| bytes / 1_000_000;
        let mut progress = total
            .filter(|total| megabytes(*total) > 0)
            .map(|total| Progress::new(&format!("{name}, MB"), megabytes(total), megabytes(done)));
        let mut reader = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count =
                reader.read(&mut buffer).map_err(|error| Transfer::Network(ureq::Error::Io(error)))?;
            heartbeat::record_work();
            if count == 0 {
                break;
            }
            file.write_all(&buffer[..count])
                .map_err(|error| Transfer::Final(Error::write("write", partial)(error)))?;
            let before = megabytes(done);
            done += count as u64;
            if let Some(progress) = &mut progress {
                progress.advance(megabytes(done) - before);
            }
        }
        if total.is_some_and(|total| total != done) {
            let cut = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the answer was cut short");
            return Err(Transfer::Network(ureq::Error::Io(cut)));
        }
        file.sync_all().map_err(|error| Transfer::Final(Error::write("write", partial)(error)))
    }

    /// GET, all of it or, of the file with this etag, what follows so many bytes.
    pub(super) fn get(
        &self,
        url: &str,
        resumed: Option<(u64, &str)>,
    ) -> std::result::Result<ureq::http::Response<ureq::Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if let Some((start, etag)) = resumed {
            request = request.header("Range", format!("bytes={start}-")).header("If-Range", etag);
        }
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        request.call()
    }

    /// What to tell the user of a failed request.
    pub(super) fn refusal(&self, id: &str, url: &str, error: &ureq::Error) -> Error {
        let host = &self.endpoint;
        let message = match error {
            // To somebody without a name the hub answers 401 also for what does not exist.
            ureq::Error::StatusCode(401 | 403) => {
                let known =
                    if self.token.is_some() { "it does not accept HF_TOKEN" } else { "HF_TOKEN is not set" };
                format!(
                    "no such folder, and {host} does not give it out ({error}; {known})\nhint: check the spelling; a private \
                     or gated one needs the token of an account that may read it, in HF_TOKEN"
                )
            }
            ureq::Error::StatusCode(404) => {
                format!(
                    "no such folder, and no such repository or file on {host}: {url}\nhint: check the spelling"
                )
            }
            ureq::Error::StatusCode(_) => format!("{url}: {error}\nhint: try again later"),
            _ => format!(
                "no such folder, and {host} cannot be reached: {error}\nhint: give the path of a folder, or check the network, \
                 HF_ENDPOINT and HTTPS_PROXY"
            ),
        };
        Error::file(id, message)
    }
}

/// Why an attempt failed.
enum Transfer {
    /// Another attempt may succeed.
    Network(ureq::Error),
    Final(Error),
}

/// Beside the beginning of a file: what the server calls this version of it.
fn etag_of(partial: &Path) -> PathBuf {
    partial.with_added_extension("etag")
}

/// `90.9 MB`.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
