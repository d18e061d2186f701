//! A data file on disk: opened once, decompressed and converted where necessary, read at any position.
//!
//! A compressed file has no positions to jump to, so it is decompressed once into an unnamed temporary file,
//! which the OS deletes when the program ends. A format that cannot be read row by row (Parquet) is converted
//! to JSON lines likewise.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::format::{self, Format};
use crate::system::heartbeat;
use crate::system::progress::ProgressReader;
use crate::{Error, Result};

/// An open data file.
pub(super) struct DataFile {
    pub(super) path: PathBuf,
    /// The plain text.
    file: File,
    len: u64,
}

const BUFFER: usize = 1 << 20;

impl DataFile {
    /// Opens a file, and decompresses or converts it as its name tells.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::read("open", path))?;
        if !file.metadata().map_err(Error::read("read", path))?.is_file() {
            return Err(Error::file(path, "is not a file"));
        }
        if let Some(text) = format::decompress(path, &file)? {
            file = copy(path, text)?;
        }
        if let Some(convert) = Format::of(path).and_then(|format| format.convert) {
            file = convert(path, file)?;
        }
        let len = file.metadata().map_err(Error::read("read", path))?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    /// Number of bytes of the plain text.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The whole text, from its beginning.
    pub(super) fn stream(&self) -> impl std::io::BufRead + '_ {
        let text = OffsetReader { file: &self.file, offset: 0 };
        BufReader::with_capacity(BUFFER, ProgressReader::new(text, "reading", &self.path, self.len))
    }

    /// The bytes of a range.
    pub(super) fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; range.end.saturating_sub(range.start) as usize];
        self.file.read_exact_at(&mut bytes, range.start).map_err(Error::read("read", &self.path))?;
        Ok(bytes)
    }

    /// An error about the row at `offset`, with its line.
    pub(super) fn row_error(&self, offset: u64, message: impl Into<String>) -> Error {
        match self.line(offset) {
            Ok(line) => Error::Row { path: self.path.clone(), line, message: message.into() },
            Err(error) => error,
        }
    }

    /// The line at `offset`, from 1. Reads everything before it, so it serves error messages only.
    fn line(&self, offset: u64) -> Result<u64> {
        let mut before = OffsetReader { file: &self.file, offset: 0 }.take(offset);
        let mut buffer = vec![0; BUFFER];
        let mut line = 1;
        loop {
            match before.read(&mut buffer).map_err(Error::read("read", &self.path))? {
                0 => return Ok(line),
                count => line += buffer[..count].iter().filter(|byte| **byte == b'\n').count() as u64,
            }
        }
    }
}

/// Copies a stream into an unnamed temporary file.
fn copy(path: &Path, mut text: impl Read) -> Result<File> {
    let mut plain = tempfile::tempfile().map_err(Error::read("unpack", path))?;
    while std::io::copy(&mut (&mut text).take(BUFFER as u64), &mut plain)
        .map_err(Error::read("unpack", path))?
        > 0
    {
        heartbeat::record_work();
    }
    Ok(plain)
}

/// Reads from an offset without moving the file's own position, which other threads share.
struct OffsetReader<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for OffsetReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        heartbeat::record_work();
        self.offset += count as u64;
        Ok(count)
    }
}
