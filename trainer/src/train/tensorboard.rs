//! OUTPUT/tensorboard: the numbers of metrics.jsonl as TensorBoard's event files.
//!
//! A file is TFRecords (length, its checksum, data, its checksum; CRC-32C, masked) of `Event` messages in protocol
//! buffers: wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5; a summary's value = 1; a value's
//! tag = 1 (string) and simple_value = 2 (float). A resumed run creates another file, as TensorBoard expects.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// An event file, open for writing.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Creates a new file in OUTPUT/tensorboard.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(output: &Path) -> Result<Self> {
        let folder = output.join("tensorboard");
        fs::create_dir_all(&folder).map_err(Error::write("create", &folder))?;
        let path = folder.join(format!("events.out.tfevents.{:.6}.{}", now(), std::process::id()));
        let file = File::create(&path).map_err(Error::write("create", &path))?;
        let mut events = Self { path, file };
        events.write(&event(None, 3, b"brain.Event:2"))?;
        Ok(events)
    }

    /// Appends scalars of one step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars<'a>(
        &mut self,
        step: u64,
        scalars: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut message = Vec::new();
            bytes(&mut message, 1, tag.as_bytes());
            key(&mut message, 2, 5);
            message.extend((value as f32).to_le_bytes());
            bytes(&mut summary, 1, &message);
        }
        self.write(&event(Some(step), 5, &summary))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend(length);
        record.extend(masked(&length));
        record.extend(event);
        record.extend(masked(event));
        self.file.write_all(&record).map_err(Error::write("write", &self.path))
    }
}

fn event(step: Option<u64>, field: u64, content: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    key(&mut message, 1, 1);
    message.extend(now().to_le_bytes());
    if let Some(step) = step {
        key(&mut message, 2, 0);
        varint(&mut message, step);
    }
    bytes(&mut message, field, content);
    message
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn masked(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn key(to: &mut Vec<u8>, field: u64, kind: u64) {
    varint(to, field << 3 | kind);
}

fn bytes(to: &mut Vec<u8>, field: u64, content: &[u8]) {
    key(to, field, 2);
    varint(to, content.len() as u64);
    to.extend(content);
}

fn varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_the_lengths_and_checksums_that_readers_check() {
        let output = tempfile::tempdir().unwrap();
        let mut events = Events::create(output.path()).unwrap();
        events.scalars(300, [("loss", 0.5), ("set/ndcg", -2.0)]).unwrap();
        let all = fs::read(&events.path).unwrap();
        let mut rest = &all[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked(&rest[..8]));
            let data = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], masked(data));
            records.push(data.to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // step 300 as a varint; the summary; "loss" with 0.5f32
        assert_eq!(records[1][9..12], [0x10, 0xac, 0x02]);
        assert!(records[1].windows(11).any(|w| w == b"\x0a\x04loss\x15\0\0\0\x3f"));
    }

    #[test]
    fn the_checksum_is_castagnoli_masked_as_in_tfrecord() {
        // RFC 3720 B.4: CRC-32C of 32 zeros is 0x8a9136aa
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
