//! A BEIR folder as training rows: one for each query of the qrels, with all its relevant documents in the
//! order of the qrels.

use std::collections::BTreeMap;
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::beir::{self, BeirFile, Ids, ONE_DOCUMENT, Split};
use super::file::DataFile;
use super::format::Layout;
use super::parser::object;
use super::records::{self, RowError};
use crate::data::row::Row;
use crate::system::heartbeat;
use crate::{Error, Result};

/// The rows of an open BEIR folder.
pub(super) struct BeirRows {
    queries: TextFile,
    corpus: TextFile,
    /// Number of the query, and numbers of the documents that answer it.
    rows: Vec<(u32, Vec<u32>)>,
    digest: u64,
}

impl BeirRows {
    /// Opens a folder and checks that every text of its rows can be used.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let qrels = beir::qrels(folder, Split::Train)?;
        let (queries, query_ids) =
            TextFile::open(&beir::file(folder, BeirFile::Queries)?, BeirFile::Queries)?;
        let (corpus, document_ids) =
            TextFile::open(&beir::file(folder, BeirFile::Corpus)?, BeirFile::Corpus)?;
        if corpus.offsets.len() == 1 {
            return Err(Error::file(&corpus.file.path, ONE_DOCUMENT));
        }
        let mut rows: Vec<(u32, Vec<u32>)> = Vec::new();
        let mut places: BTreeMap<u32, usize> = BTreeMap::new();
        let mut digest = Xxh3::new();
        digest.update(&queries.digest.to_le_bytes());
        digest.update(&corpus.digest.to_le_bytes());
        beir::judgements(&qrels, |judgement| {
            let wrong = |message| RowError { line: judgement.line, message }.at(&qrels);
            for field in [judgement.query, judgement.document, judgement.written_score] {
                digest.update(field.as_bytes());
                digest.update(b"\t");
            }
            if judgement.score > 0.0 {
                let query = query_ids.number(judgement.query).map_err(wrong)?;
                let document = document_ids.number(judgement.document).map_err(wrong)?;
                let place = *places.entry(query).or_insert(rows.len());
                if place == rows.len() {
                    rows.push((query, Vec::new()));
                }
                if !rows[place].1.contains(&document) {
                    rows[place].1.push(document);
                }
            }
            Ok(())
        })?;
        if rows.is_empty() {
            return Err(Error::file(&qrels, "has no relevant document, expected scores above 0"));
        }
        let opened = Self { queries, corpus, rows, digest: digest.digest() };
        for row in 0..opened.len() {
            opened.row(row)?;
            heartbeat::record_work();
        }
        Ok(opened)
    }

    pub(super) fn len(&self) -> u64 {
        self.rows.len() as u64
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn row(&self, row: u64) -> Result<Row> {
        let (query, documents) = &self.rows[row as usize];
        Ok(Row {
            query: self.queries.text(*query)?,
            positives: documents.iter().map(|document| self.corpus.text(*document)).collect::<Result<_>>()?,
            ..Row::default()
        })
    }

    pub(super) fn error(&self, row: u64, message: String) -> Error {
        self.queries.error(self.rows[row as usize].0, message)
    }
}

/// `queries.jsonl` or `corpus.jsonl`: texts by number, which stay on disk.
struct TextFile {
    file: DataFile,
    kind: BeirFile,
    offsets: Vec<u64>,
    digest: u64,
}

impl TextFile {
    /// Opens a file; also returns its ids, which only the qrels need.
    fn open(path: &Path, kind: BeirFile) -> Result<(Self, Ids)> {
        let file = DataFile::open(path)?;
        let (mut offsets, mut ids, mut digest) = (Vec::new(), Ids::new(path), Xxh3::new());
        records::each::<RowError>(Layout::JsonLines, file.stream(), |record| {
            let wrong = |message| RowError { line: record.line, message };
            let (id, _) = beir::text(&object(record.bytes).map_err(wrong)?, kind).map_err(wrong)?;
            ids.add(id).map_err(wrong)?;
            offsets.push(record.offset);
            digest.update(record.bytes);
            Ok(())
        })
        .map_err(|stop| stop.at(path))?;
        Ok((Self { file, kind, offsets, digest: digest.digest() }, ids))
    }

    fn text(&self, number: u32) -> Result<String> {
        let start = self.offsets[number as usize];
        let end = self.offsets.get(number as usize + 1).copied().unwrap_or(self.file.len());
        let bytes = self.file.read(start..end)?;
        let row = object(bytes.trim_ascii_end()).and_then(|row| beir::text(&row, self.kind));
        match row.map_err(|message| self.error(number, message))? {
            (_, text) if text.trim().is_empty() => Err(self.error(number, "`text` is empty".to_owned())),
            (_, text) => Ok(text),
        }
    }

    fn error(&self, number: u32, message: String) -> Error {
        self.file.row_error(self.offsets[number as usize], message)
    }
}
