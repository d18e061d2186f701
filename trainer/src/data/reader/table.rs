//! The rows of one data file, checked once and then read by number.

use std::path::Path;

use super::check::Checker;
use super::file::DataFile;
use super::format::{Format, Layout};
use super::index::Index;
use super::parser::Parser;
use super::records::{self, Record, RowError, Stop};
use crate::config::RowKind;
use crate::data::labels::Labels;
use crate::data::row::{Row, Schema};
use crate::{Error, Result};

/// An open data file whose rows have all been checked.
pub(super) struct RecordFile {
    file: DataFile,
    index: Index,
    digest: u64,
    parser: Parser,
    negatives: bool,
    dropped: DroppedNegatives,
    labels: Option<Labels>,
}

/// Negatives that are left out because they are also positives of their row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DroppedNegatives {
    /// Number of negatives left out.
    pub negatives: usize,
    /// The first row with such a negative.
    pub first: u64,
}

impl RecordFile {
    /// Opens a file and checks every row of it.
    pub(super) fn open(path: &Path, format: &Format, schema: Schema) -> Result<Self> {
        let file = DataFile::open(path)?;
        let (mut checker, mut parser) = (Checker::default(), None);
        records::each(format.layout, file.stream(), |record| {
            let parser = match &mut parser {
                Some(parser) => parser,
                none => {
                    let first = Parser::new(format.layout, &schema, record.bytes);
                    let first =
                        none.insert(first.map_err(|message| RowError { line: record.line, message })?);
                    if first.has_header() {
                        return Ok(());
                    }
                    first
                }
            };
            checker.add(&record, parser)
        })
        .map_err(|stop| stop.at(path))?;
        let parser = parser.ok_or_else(|| match format.layout {
            Layout::JsonLines => Error::file(path, "has no rows"),
            Layout::Csv(_) => Error::file(path, "is empty, expected a header and rows"),
        })?;
        checker.check_pending(&parser).map_err(|wrong| Stop::Caller(wrong).at(path))?;
        let Checker { mut index, digest, found, .. } = checker;
        if index.rows() == 0 {
            return Err(Error::file(path, "has no rows"));
        }
        index.finish(file.len());
        if !parser.has_header() && !found.negatives {
            schema.without_negatives().map_err(|message| Error::file(path, message))?;
        }
        let labels = (parser.kind() == RowKind::Labelled)
            .then(|| Labels::new(found.labels, found.classes))
            .transpose()
            .map_err(|message| Error::file(path, message))?;
        Ok(Self {
            file,
            index,
            digest: digest.digest(),
            parser,
            negatives: found.negatives,
            dropped: found.dropped,
            labels,
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.index.rows()
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn kind(&self) -> RowKind {
        self.parser.kind()
    }

    pub(super) fn negatives(&self) -> bool {
        self.negatives
    }

    pub(super) fn labels(&self) -> Option<&Labels> {
        self.labels.as_ref()
    }

    pub(super) fn dropped_negatives(&self) -> DroppedNegatives {
        self.dropped
    }

    pub(super) fn row(&self, row: u64) -> Result<Row> {
        let changed = |message: String| {
            self.error(
                row,
                format!("{message} (the file was correct when the run began: do not change it during a run)"),
            )
        };
        let (_, bytes) = self.record(row)?.ok_or_else(|| changed("the row is missing".to_owned()))?;
        self.parser.parse(&bytes, &mut None).map(|(row, _)| row).map_err(changed)
    }

    pub(super) fn error(&self, row: u64, message: String) -> Error {
        match self.record(row) {
            Ok(Some((offset, _))) => self.file.row_error(offset, message),
            // The file has changed since: point near where the row was.
            Ok(None) => self.file.row_error(self.index.find(row).0.start, message),
            Err(error) => error,
        }
    }

    /// The offset and text of a row; none if the file no longer has it.
    fn record(&self, row: u64) -> Result<Option<(u64, Vec<u8>)>> {
        let (part, mut before) = self.index.find(row);
        let start = part.start;
        let bytes = self.file.read(part)?;
        let take = |record: Record<'_>| {
            if before == 0 {
                return Err((record.offset, record.bytes.to_vec()));
            }
            before -= 1;
            Ok(())
        };
        let stopped = records::each_from(start, self.parser.layout(), bytes.as_slice(), take);
        Ok(match stopped {
            Err(Stop::Caller(record)) => Some(record),
            _ => None,
        })
    }
}
