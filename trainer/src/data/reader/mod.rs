//! Training rows on disk: a data set is opened and checked once, and then read row by row in any order.
//!
//! Opening checks every row, so that a wrong row is reported at once and not after hours of training. The
//! rows stay in the file; memory holds the offset of one row in every few kilobytes, and the class of each
//! labelled row.

pub(crate) mod beir;
mod beir_rows;
mod check;
mod file;
mod format;
mod index;
mod parquet;
mod parser;
mod records;
mod stream;
mod table;

use std::path::Path;

use super::labels::Labels;
use super::row::{Row, Schema};
use crate::config::{DataSet, LossKind, RowKind};
use crate::{Error, Result};
pub(crate) use format::{DATA_FILE, Format, stem};
pub(crate) use stream::{kind_of, lines, objects, raw, text_of};
pub use table::DroppedNegatives;

/// An open data set.
pub struct Source(Inner);

enum Inner {
    File(Box<table::RecordFile>),
    Beir(beir_rows::BeirRows),
}

impl Source {
    /// Opens a file or folder and checks every row.
    ///
    /// # Errors
    /// The file cannot be read; its ending is unknown; columns are missing or ambiguous; a row is malformed,
    /// is not UTF-8, has no positive, an empty text, or lacks what its kind and loss need (with its line);
    /// there is only one class.
    pub fn open(set: &DataSet) -> Result<Self> {
        Self::with(set, Schema::new(set))
    }

    /// Opens a BEIR folder, or a file of pairs or triplets in which every positive answers its query.
    ///
    /// # Errors
    /// Those of [`Self::open`]; a column of labels or scores may say that a positive does not answer its
    /// query.
    pub fn open_answers(path: &Path, kind: RowKind) -> Result<Self> {
        let set = DataSet { path: path.to_owned(), kind: Some(kind), ..DataSet::default() };
        Self::with(&set, Schema::answers(kind))
    }

    fn with(set: &DataSet, schema: Schema) -> Result<Self> {
        let path: &Path = &set.path;
        if path.is_dir() {
            let kind = set.kind.filter(|kind| *kind != RowKind::Pairs).map(RowKind::name);
            let loss = set.loss.filter(|loss| loss.traits().needs_negatives).map(LossKind::name);
            if let Some(name) = kind.or(loss) {
                let message =
                    format!("`{name}` cannot use a BEIR folder, which has queries and their answers only");
                return Err(Error::file(path, message));
            }
            return Ok(Self(Inner::Beir(beir_rows::BeirRows::open(path)?)));
        }
        let format = Format::of(path)
            .ok_or_else(|| Error::file(path, format!("expected a {DATA_FILE} or a BEIR folder")))?;
        Ok(Self(Inner::File(Box::new(table::RecordFile::open(path, format, schema)?))))
    }

    /// The kind of all rows.
    pub fn kind(&self) -> RowKind {
        match &self.0 {
            Inner::File(table) => table.kind(),
            Inner::Beir(_) => RowKind::Pairs,
        }
    }

    /// Whether any row has columns for negatives.
    pub fn negatives(&self) -> bool {
        match &self.0 {
            Inner::File(table) => table.negatives(),
            Inner::Beir(_) => false,
        }
    }

    /// The classes, where the rows are labelled.
    pub fn labels(&self) -> Option<&Labels> {
        match &self.0 {
            Inner::File(table) => table.labels(),
            Inner::Beir(_) => None,
        }
    }

    /// Negatives that are left out because they are also positives of their row.
    pub fn dropped_negatives(&self) -> DroppedNegatives {
        match &self.0 {
            Inner::File(table) => table.dropped_negatives(),
            Inner::Beir(_) => DroppedNegatives::default(),
        }
    }

    /// Number of rows.
    pub fn len(&self) -> u64 {
        match &self.0 {
            Inner::File(table) => table.len(),
            Inner::Beir(beir) => beir.len(),
        }
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A hash of the rows: another value means that the data have changed.
    pub fn digest(&self) -> u64 {
        match &self.0 {
            Inner::File(table) => table.digest(),
            Inner::Beir(beir) => beir.digest(),
        }
    }

    /// Reads one row.
    ///
    /// # Errors
    /// The file cannot be read, or has changed since it was opened.
    pub fn row(&self, row: u64) -> Result<Row> {
        match &self.0 {
            Inner::File(table) => table.row(row),
            Inner::Beir(beir) => beir.row(row),
        }
    }

    /// An error about one row, with its file and line.
    pub fn error(&self, row: u64, message: impl Into<String>) -> Error {
        match &self.0 {
            Inner::File(table) => table.error(row, message.into()),
            Inner::Beir(beir) => beir.error(row, message.into()),
        }
    }
}

#[cfg(test)]
mod tests;
