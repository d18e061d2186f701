//! Download of one file over HTTP. An interrupted download is resumed where it stopped.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::{Hub, Repository, Snapshot, create_dir_all, percent_encode};
use crate::system::progress::Progress;
use crate::system::{atomic, heartbeat};
use crate::{Error, Result};

/// Number of attempts at one file.
const ATTEMPTS: u32 = 4;

impl Hub {
    /// Fetches the file `name` into the snapshot, unless it exists there.
    pub(super) fn file(&self, repository: &Repository, snapshot: &Snapshot, name: &str) -> Result<()> {
        let (id, target) = (&repository.id, snapshot.path.join(name));
        if target.exists() {
            return Ok(());
        }
        let url = format!(
            "{}{}/{}/{}",
            self.endpoint,
            repository.files_path(),
            snapshot.commit,
            percent_encode(name)
        );
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
                    tracing::warn!("{name}: {error}; retrying");
                    std::thread::sleep(self.pause * attempt);
                    heartbeat::record_work();
                }
            }
        }
        atomic::rename(&partial, &target)?;
        // The file may not exist, and it is not needed any more.
        let _ = std::fs::remove_file(etag_of(&partial));
        Ok(())
    }

    /// Makes one attempt, which appends the missing bytes to `partial`.
    fn transfer(&self, id: &str, url: &str, name: &str, partial: &Path) -> std::result::Result<(), Transfer> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(partial)
            .map_err(|error| Transfer::Final(Error::write("open", partial)(error)))?;
        let have = file.metadata().map_or(0, |metadata| metadata.len());
        // Version of the file that `partial` is the beginning of. If the server has another version, it sends
        // the whole file.
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
            // Too many requests, or a failure of the server: another attempt may succeed.
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
            let cut = std::io::Error::new(
                std::io::ErrorKind::UnexpectedEof,
                "the connection was closed before the end of the file",
            );
            return Err(Transfer::Network(ureq::Error::Io(cut)));
        }
        file.sync_all().map_err(|error| Transfer::Final(Error::write("write", partial)(error)))
    }

    /// Sends a GET request. With `resumed`, a number of bytes and an etag, requests the rest of the file if
    /// it still has that etag.
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

    /// Makes an error of a failed request.
    pub(super) fn refusal(&self, id: &str, url: &str, error: &ureq::Error) -> Error {
        let host = &self.endpoint;
        let message = match error {
            // Without a token, the hub also answers 401 for a repository that does not exist.
            ureq::Error::StatusCode(401 | 403) => {
                let known =
                    if self.token.is_some() { "it does not accept HF_TOKEN" } else { "HF_TOKEN is not set" };
                format!(
                    "no such folder, and {host} denies access ({error}; {known})\n\
                     hint: check the spelling; a private or gated \
                     repository needs HF_TOKEN, the token of an account that may read it"
                )
            }
            ureq::Error::StatusCode(404) => {
                format!(
                    "no such folder, and no such repository or file on {host}: {url}\n\
                     hint: check the spelling"
                )
            }
            ureq::Error::StatusCode(_) => format!("{url}: {error}\nhint: try again later"),
            _ => format!(
                "no such folder, and {host} cannot be reached: {error}\n\
                 hint: give the path of a folder, or check the network, \
                 HF_ENDPOINT and HTTPS_PROXY"
            ),
        };
        Error::file(id, message)
    }
}

/// Error of one attempt.
enum Transfer {
    /// Another attempt may succeed.
    Network(ureq::Error),
    /// Another attempt would fail, too.
    Final(Error),
}

/// Path of the file that holds the etag of a partial download.
fn etag_of(partial: &Path) -> PathBuf {
    partial.with_added_extension("etag")
}

/// Formats a number of bytes, such as `90.9 MB`.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
