//! The BEIR layout: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, whose scores above 0 say what
//! answers what.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{format, stream};
use crate::{Error, Result};

/// Why a corpus of one document is refused: every model would find it.
pub(crate) const ONE_DOCUMENT: &str = "has only one document, expected two or more to choose from";

/// One of the two files of texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BeirFile {
    /// `queries.jsonl`: a query is its `text`.
    Queries,
    /// `corpus.jsonl`: a document is its `title` and its `text`, joined by a space as in
    /// sentence-transformers.
    Corpus,
}

/// Which `qrels/SPLIT.tsv` is read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Split<'a> {
    /// `train.tsv`, else the only file.
    Train,
    /// `test.tsv`, else `dev.tsv`, else the only file.
    Evaluation,
    /// The split of this name.
    Named(&'a str),
}

/// One line of `qrels/SPLIT.tsv`.
pub(crate) struct Judgement<'a> {
    /// Line number, from 1.
    pub(crate) line: u64,
    /// `_id` of the query.
    pub(crate) query: &'a str,
    /// `_id` of the document.
    pub(crate) document: &'a str,
    /// How relevant the document is: above 0, it answers the query.
    pub(crate) score: f64,
    /// The score as it is written in the file.
    pub(crate) written_score: &'a str,
}

/// Finds a file of texts in a folder, plain or compressed.
///
/// # Errors
/// There is no such file.
pub(crate) fn file(folder: &Path, file: BeirFile) -> Result<PathBuf> {
    let name = match file {
        BeirFile::Queries => "queries.jsonl",
        BeirFile::Corpus => "corpus.jsonl",
    };
    format::find(folder, name)
        .ok_or_else(|| Error::file(folder, format!("expected a BEIR folder, found no {name}")))
}

/// The splits that a folder has qrels for, in alphabetical order.
pub(crate) fn splits(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder.join("qrels")).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut names: Vec<String> = paths
        .filter(|path| path.extension().is_some_and(|ending| ending == "tsv"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

/// Finds the qrels of a split.
///
/// # Errors
/// There are no qrels; the named split is missing; several splits could be meant.
pub(crate) fn qrels(folder: &Path, split: Split<'_>) -> Result<PathBuf> {
    let path = |name: &str| folder.join("qrels").join(format!("{name}.tsv"));
    let found = splits(folder);
    let preferred: &[&str] = match split {
        Split::Named(name) if path(name).is_file() => return Ok(path(name)),
        Split::Named(name) => return Err(Error::file(path(name), "no such file")),
        Split::Train => &["train"],
        Split::Evaluation => &["test", "dev"],
    };
    if let Some(name) = preferred.iter().find(|name| found.iter().any(|other| other == *name)) {
        return Ok(path(name));
    }
    match found.as_slice() {
        [] => Err(Error::file(
            folder,
            "expected a BEIR folder with queries.jsonl, corpus.jsonl and qrels/SPLIT.tsv, found no qrels/*.tsv",
        )),
        [only] => Ok(path(only)),
        several => {
            let mut message =
                format!("has no {}.tsv, only {}", preferred.join(".tsv or "), several.join(", "));
            if matches!(split, Split::Evaluation) {
                message +=
                    "\nhint: choose one with `split` of the evaluation set, or --split on the command line";
            }
            Err(Error::file(folder.join("qrels"), message))
        }
    }
}

/// Calls `f` with each line of a qrels file. A header is left out; TREC's form, with a second column of
/// zeros, is understood.
///
/// # Errors
/// A line has not three or four columns, or its score is not a number.
pub(crate) fn judgements(qrels: &Path, mut f: impl FnMut(Judgement<'_>) -> Result<()>) -> Result<()> {
    let mut first = true;
    stream::lines(qrels, |line, text| {
        let wrong = |message: String| Error::Row { path: qrels.to_owned(), line, message };
        let fields: Vec<&str> = text.split('\t').map(str::trim).collect();
        let ([query, document, written_score] | [query, _, document, written_score]) = fields[..] else {
            return Err(wrong("expected query-id, corpus-id and score, separated by tabs".to_owned()));
        };
        let header = std::mem::take(&mut first);
        match written_score.parse::<f64>() {
            Ok(score) if score.is_finite() => f(Judgement { line, query, document, score, written_score }),
            Err(_) if header => Ok(()),
            _ => Err(wrong(format!("the score is `{written_score}`, expected a finite number"))),
        }
    })
}

/// The `_id` and the text of a row of `queries.jsonl` or `corpus.jsonl`.
///
/// # Errors
/// The row has no `_id` or no `text`.
pub(crate) fn text(
    row: &Map<String, Value>,
    file: BeirFile,
) -> std::result::Result<(String, String), String> {
    let id = match row.get("_id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => return Err("has no `_id`".to_owned()),
    };
    let text = stream::text_of(row)?;
    let title = row.get("title").and_then(Value::as_str).filter(|title| !title.is_empty());
    Ok(match title.filter(|_| file == BeirFile::Corpus) {
        Some(title) => (id, format!("{title} {text}").trim().to_owned()),
        None => (id, text.to_owned()),
    })
}

/// The ids of a file of texts, numbered in the order of the file.
pub(crate) struct Ids {
    file: PathBuf,
    numbers: HashMap<String, u32>,
}

impl Ids {
    /// No ids yet of the texts in `file`.
    pub(crate) fn new(file: &Path) -> Self {
        Self { file: file.to_owned(), numbers: HashMap::new() }
    }

    /// Gives the next number to `id`.
    ///
    /// # Errors
    /// An earlier text has the same id.
    pub(crate) fn add(&mut self, id: String) -> std::result::Result<u32, String> {
        let next = u32::try_from(self.numbers.len()).map_err(|_| "has more than 2³² texts".to_owned())?;
        match self.numbers.insert(id, next) {
            None => Ok(next),
            Some(first) => Err(format!("has the `_id` of text {}", first + 1)),
        }
    }

    /// The number of the text that a line of the qrels names.
    ///
    /// # Errors
    /// There is no such text.
    pub(crate) fn number(&self, id: &str) -> std::result::Result<u32, String> {
        let name = self.file.file_name().unwrap_or_default().to_string_lossy();
        self.numbers.get(id).copied().ok_or_else(|| format!("`{id}` is not in {name}"))
    }

    /// All ids, in the order of the file.
    #[expect(
        clippy::iter_over_hash_type,
        reason = "each id goes to its own place, so the order does not matter"
    )]
    pub(crate) fn in_order(self) -> Vec<String> {
        let mut ids = vec![String::new(); self.numbers.len()];
        for (id, number) in self.numbers {
            ids[number as usize] = id;
        }
        ids
    }
}
