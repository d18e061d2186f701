//! A data file on disk: opened once, unpacked where it is compressed, read at any place.
//!
//! A compressed file has no places to go to, so it is unpacked once into a temporary file without a name, which is gone when the
//! program is. So is Parquet, column by column as it is: its rows become lines of JSON.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::parquet;
use crate::system::heartbeat;
use crate::system::progress::ProgressReader;
use crate::{Error, Result};

/// How a file's text is cut into rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// One JSON object a line.
    Jsonl,
    /// Records with this delimiter after a header.
    Csv(u8),
}

impl Format {
    /// The endings of their files.
    pub(super) const NAMES: &str = ".jsonl, .csv, .tsv or .parquet";

    /// By the name's ending, that of the compression left aside.
    pub(super) fn of(path: &Path) -> Option<Self> {
        match ending(path)?.as_str() {
            // Parquet becomes that, too.
            "jsonl" | "ndjson" | "parquet" => Some(Self::Jsonl),
            "csv" => Some(Self::Csv(b',')),
            "tsv" => Some(Self::Csv(b'\t')),
            _ => None,
        }
    }
}

/// The ending of a file's name, that of the compression left aside.
fn ending(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    Some(Path::new(name).extension()?.to_str()?.to_owned())
}

/// An open data file.
pub(super) struct DataFile {
    pub(super) path: PathBuf,
    /// The text itself, unpacked.
    file: File,
    len: u64,
}

const BUFFER: usize = 1 << 20;

impl DataFile {
    /// # Errors
    /// The file cannot be read, or what it was packed into is damaged.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::read("open", path))?;
        let metadata = file.metadata().map_err(Error::read("read", path))?;
        if !metadata.is_file() {
            return Err(Error::file(path, "is not a file"));
        }
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("gz" | "GZ") => {
                let packed = ProgressReader::new(file, "unpacking", path, metadata.len());
                file = unpack(path, flate2::read::MultiGzDecoder::new(BufReader::new(packed)))?;
            }
            Some("zst" | "ZST") => {
                let packed = ProgressReader::new(file, "unpacking", path, metadata.len());
                let packed = zstd::Decoder::new(packed).map_err(Error::read("unpack", path))?;
                file = unpack(path, packed)?;
            }
            _ => {}
        }
        if ending(path).as_deref() == Some("parquet") {
            file = parquet::unpack(path, file)?;
        }
        let len = file.metadata().map_err(Error::read("read", path))?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    /// Bytes of the text.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The text from its beginning.
    pub(super) fn stream(&self) -> impl std::io::BufRead + '_ {
        let text = At { file: &self.file, offset: 0 };
        BufReader::with_capacity(BUFFER, ProgressReader::new(text, "reading", &self.path, self.len))
    }

    /// Some of the text.
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

    /// The line at `offset`, from 1. Reads everything before it: for errors only.
    pub(super) fn line(&self, offset: u64) -> Result<u64> {
        let mut before = At { file: &self.file, offset: 0 }.take(offset);
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

fn unpack(path: &Path, mut packed: impl Read) -> Result<File> {
    let mut plain = tempfile::tempfile().map_err(Error::read("unpack", path))?;
    while std::io::copy(&mut (&mut packed).take(BUFFER as u64), &mut plain)
        .map_err(Error::read("unpack", path))?
        > 0
    {
        heartbeat::record_work();
    }
    Ok(plain)
}

/// Reads on from an offset without moving the file's own position, which others share.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        heartbeat::record_work();
        self.offset += count as u64;
        Ok(count)
    }
}
