//! Training rows on disk: a data set is opened once, gone through once, and then read row by row at any place.
//!
//! Opening checks every row, so that nothing is wrong with a row when its turn comes after hours of training. In memory
//! stays one offset a row; the rows stay in the file.

mod beir;
mod file;
mod records;
mod stream;
mod table;

use std::path::Path;

use super::row::{Row, Schema};
use crate::config::DataSet;
use crate::{Error, Result};
use file::Format;
pub(crate) use stream::{lines, objects, raw};

/// An open data set.
pub struct Source(Inner);

enum Inner {
    Table(table::Table),
    Beir(beir::Beir),
}

impl Source {
    /// Opens a file or folder and checks every row of it.
    ///
    /// # Errors
    /// It cannot be read; its name does not say what it is; columns are missing or ambiguous; a row is malformed, is not
    /// UTF-8, has no positive or an empty text (with its line).
    pub fn open(set: &DataSet) -> Result<Self> {
        let path: &Path = &set.path;
        if path.is_dir() {
            return Ok(Self(Inner::Beir(beir::Beir::open(path)?)));
        }
        let format = Format::of(path).ok_or_else(|| {
            Error::file(path, "expected a .jsonl, .csv or .tsv file, each also .gz or .zst, or a BEIR folder")
        })?;
        let schema = Schema::new(&set.columns, set.kind);
        Ok(Self(Inner::Table(table::Table::open(path, format, schema)?)))
    }

    /// Rows.
    pub fn len(&self) -> u64 {
        match &self.0 {
            Inner::Table(table) => table.len(),
            Inner::Beir(beir) => beir.len(),
        }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A number that follows from the text of the rows: another one means that the data have changed.
    pub fn digest(&self) -> u64 {
        match &self.0 {
            Inner::Table(table) => table.digest(),
            Inner::Beir(beir) => beir.digest(),
        }
    }

    /// Reads one row.
    ///
    /// # Errors
    /// The file cannot be read, or was changed since it was opened.
    pub fn row(&self, row: u64) -> Result<Row> {
        match &self.0 {
            Inner::Table(table) => table.row(row),
            Inner::Beir(beir) => beir.row(row),
        }
    }

    /// An error about one row, with its file and line.
    pub fn error(&self, row: u64, message: impl Into<String>) -> Error {
        match &self.0 {
            Inner::Table(table) => table.error(row, message.into()),
            Inner::Beir(beir) => beir.error(row, message.into()),
        }
    }
}

#[cfg(test)]
mod tests;
