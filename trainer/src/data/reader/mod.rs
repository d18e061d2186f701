//! Training rows on disk: a data set is opened once, gone through once, and then read row by row at any place.
//!
//! Opening checks every row, so that nothing is wrong with a row when its turn comes after hours of training. The rows stay in
//! the file; in memory stays the place of one in every few kilobytes, and the class of each where they have one.

mod beir;
mod check;
mod file;
mod index;
mod parquet;
mod records;
mod stream;
mod table;

use std::path::Path;

use super::labels::Labels;
use super::row::{Row, Schema};
use crate::config::{DataSet, LossKind, RowKind};
use crate::{Error, Result};
use file::Format;
pub(crate) use stream::{kind_of, lines, objects, raw};
pub use table::Dropped;

/// An open data set.
pub struct Source(Inner);

enum Inner {
    Table(Box<table::Table>),
    Beir(beir::Beir),
}

impl Source {
    /// Opens a file or folder and checks every row of it.
    ///
    /// # Errors
    /// It cannot be read; its name does not say what it is; columns are missing or ambiguous; a row is malformed, is not
    /// UTF-8, has no positive, an empty text, or not what its kind and loss need (with its line); there is one class only.
    pub fn open(set: &DataSet) -> Result<Self> {
        Self::with(set, Schema::new(set))
    }

    /// Opens a file of pairs or triplets whose every row is an answer to its query, or a BEIR folder.
    ///
    /// # Errors
    /// As [`Self::open`]; there is a column that may say otherwise of a row.
    pub fn answers(path: &Path, kind: RowKind) -> Result<Self> {
        let set = DataSet { path: path.to_owned(), kind: Some(kind), ..DataSet::default() };
        Self::with(&set, Schema::answers(kind))
    }

    fn with(set: &DataSet, schema: Schema) -> Result<Self> {
        let path: &Path = &set.path;
        if path.is_dir() {
            let beir = beir::Beir::open(path)?;
            let kind = set.kind.filter(|kind| *kind != RowKind::Pairs).map(RowKind::name);
            let loss = set.loss.filter(|loss| loss.needs_negatives()).map(LossKind::name);
            return match kind.or(loss) {
                Some(name) => {
                    let message = "a BEIR folder has queries and what answers them, not what";
                    Err(Error::file(path, format!("{message} `{name}` needs")))
                }
                None => Ok(Self(Inner::Beir(beir))),
            };
        }
        let format = Format::of(path).ok_or_else(|| {
            Error::file(
                path,
                format!("expected a {} file, each also .gz or .zst, or a BEIR folder", Format::NAMES),
            )
        })?;
        Ok(Self(Inner::Table(Box::new(table::Table::open(path, format, schema)?))))
    }

    /// What the rows are.
    pub fn kind(&self) -> RowKind {
        match &self.0 {
            Inner::Table(table) => table.kind(),
            Inner::Beir(_) => RowKind::Pairs,
        }
    }

    /// Whether any row has columns of negatives.
    pub fn negatives(&self) -> bool {
        match &self.0 {
            Inner::Table(table) => table.negatives(),
            Inner::Beir(_) => false,
        }
    }

    /// The classes of labelled rows.
    pub fn labels(&self) -> Option<&Labels> {
        match &self.0 {
            Inner::Table(table) => table.labels(),
            Inner::Beir(_) => None,
        }
    }

    /// Negatives that are left out.
    pub fn dropped(&self) -> Dropped {
        match &self.0 {
            Inner::Table(table) => table.dropped(),
            Inner::Beir(_) => Dropped::default(),
        }
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
