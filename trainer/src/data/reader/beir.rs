//! A BEIR folder as training data: `queries.jsonl`, `corpus.jsonl`, and `qrels/train.tsv`, which says what answers what.
//!
//! A row is a query with all its relevant documents (a score above 0), in the order of the qrels. A document's text is its
//! title and its text in one, as sentence-transformers has it.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use super::file::DataFile;
use super::{records, table};
use crate::data::row::Row;
use crate::system::heartbeat;
use crate::{Error, Result};

/// An open folder.
pub(super) struct Beir {
    queries: Texts,
    corpus: Texts,
    /// A query and the documents that answer it, by their numbers.
    rows: Vec<(u32, Vec<u32>)>,
    digest: u64,
}

impl Beir {
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let split = split(folder)?;
        let (queries, query_numbers) = Texts::open(&find(folder, "queries.jsonl")?)?;
        let (corpus, document_numbers) = Texts::open(&find(folder, "corpus.jsonl")?)?;
        if corpus.offsets.len() == 1 {
            let message = "has one document only, expected two or more: there is nothing to tell it from";
            return Err(Error::file(&corpus.file.path, message));
        }
        let mut answers: Vec<(u32, Vec<u32>)> = Vec::new();
        let mut places: BTreeMap<u32, usize> = BTreeMap::new();
        let mut digest = Xxh3::new();
        digest.update(&queries.digest.to_le_bytes());
        digest.update(&corpus.digest.to_le_bytes());
        let file = DataFile::open(&split)?;
        let mut header = true;
        records::lines(file.stream(), |record| {
            let number = record.line;
            digest.update(record.bytes);
            let text = table::utf8(record.bytes).map_err(|m| (number, m))?;
            let fields: Vec<&str> = text.split('\t').map(str::trim).collect();
            // query-id, corpus-id, score; TREC's form has a column more: query, 0, document, score.
            let (query, document, score) = match fields.as_slice() {
                [query, document, score] | [query, _, document, score] => (*query, *document, *score),
                _ => {
                    return Err((
                        number,
                        "expected query-id, corpus-id and score, with tabs between".to_owned(),
                    ));
                }
            };
            let first = std::mem::take(&mut header);
            let score = match score.parse::<f64>() {
                Ok(score) if score.is_finite() => score,
                Err(_) if first => return Ok(()),
                _ => return Err((number, format!("the score `{score}` is no number"))),
            };
            if score > 0.0 {
                let number_of = |numbers: &HashMap<String, u32>, id: &str, file: &Path| {
                    numbers
                        .get(id)
                        .copied()
                        .ok_or_else(|| (number, format!("`{id}` is not in {}", file.display())))
                };
                let query = number_of(&query_numbers, query, &queries.file.path)?;
                let document = number_of(&document_numbers, document, &corpus.file.path)?;
                let place = *places.entry(query).or_insert(answers.len());
                if place == answers.len() {
                    answers.push((query, Vec::new()));
                }
                if !answers[place].1.contains(&document) {
                    answers[place].1.push(document);
                }
            }
            Ok(())
        })
        .map_err(|stop| table::explain(&split, stop))?;
        if answers.is_empty() {
            return Err(Error::file(&split, "has no relevant document, expected scores above 0"));
        }
        let beir = Self { queries, corpus, rows: answers, digest: digest.digest() };
        for (query, documents) in &beir.rows {
            beir.queries.text(*query)?;
            for document in documents {
                beir.corpus.text(*document)?;
            }
            heartbeat::record_work();
        }
        Ok(beir)
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

/// `qrels/train.tsv`, or the only file there.
fn split(folder: &Path) -> Result<PathBuf> {
    let qrels = folder.join("qrels");
    let train = qrels.join("train.tsv");
    if train.is_file() {
        return Ok(train);
    }
    let wrong = || {
        Error::file(
            folder,
            "expected a BEIR folder: queries.jsonl, corpus.jsonl and qrels/train.tsv, found no qrels/*.tsv",
        )
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&qrels)
        .map_err(|_| wrong())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "tsv"))
        .collect();
    files.sort();
    match files.as_slice() {
        [] => Err(wrong()),
        [one] => Ok(one.clone()),
        several => {
            let names: Vec<_> = several.iter().filter_map(|path| path.file_name()?.to_str()).collect();
            Err(Error::file(&qrels, format!("has no train.tsv to train on, only {}", names.join(", "))))
        }
    }
}

fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    let packed = [name.to_owned(), format!("{name}.gz"), format!("{name}.zst")];
    packed
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::file(folder, format!("expected a BEIR folder, found no {name}")))
}

/// `queries.jsonl` or `corpus.jsonl`: texts by their number.
struct Texts {
    file: DataFile,
    offsets: Vec<u64>,
    digest: u64,
}

impl Texts {
    /// Also gives each id's number, which is needed only until the qrels are read.
    fn open(path: &Path) -> Result<(Self, HashMap<String, u32>)> {
        let file = DataFile::open(path)?;
        let (mut offsets, mut numbers, mut digest) = (Vec::new(), HashMap::new(), Xxh3::new());
        records::lines(file.stream(), |record| {
            let wrong = |message: String| (record.line, message);
            let mut object = table::object(record.bytes).map_err(wrong)?;
            let id = match object.get_mut("_id").map(Value::take) {
                Some(Value::String(id)) => id,
                Some(Value::Number(id)) => id.to_string(),
                _ => return Err(wrong("has no `_id`".to_owned())),
            };
            if !object.get("text").is_some_and(Value::is_string) {
                return Err(wrong("has no `text`".to_owned()));
            }
            let number = u32::try_from(offsets.len()).map_err(|_| wrong("more than 2³² texts".to_owned()))?;
            if numbers.insert(id, number).is_some() {
                return Err(wrong("has the `_id` of an earlier line".to_owned()));
            }
            offsets.push(record.offset);
            digest.update(record.bytes);
            Ok(())
        })
        .map_err(|stop| table::explain(path, stop))?;
        Ok((Self { file, offsets, digest: digest.digest() }, numbers))
    }

    fn text(&self, number: u32) -> Result<String> {
        let start = self.offsets[number as usize];
        let end = self.offsets.get(number as usize + 1).copied().unwrap_or(self.file.len());
        let bytes = self.file.read(start..end)?;
        let object = table::object(bytes.trim_ascii_end()).map_err(|message| self.error(number, message))?;
        let part = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
        let text = match (part("title"), part("text")) {
            ("", text) => text.to_owned(),
            (title, text) => format!("{title} {text}").trim().to_owned(),
        };
        if text.trim().is_empty() {
            return Err(self.error(number, "`text` is empty".to_owned()));
        }
        Ok(text)
    }

    fn error(&self, number: u32, message: String) -> Error {
        self.file.row_error(self.offsets[number as usize], message)
    }
}
