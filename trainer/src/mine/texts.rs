//! The inputs of mining: queries, documents and which documents are positives of which query.
//!
//! Texts are deduplicated and numbered in the order in which they first occur. They are stored in an unnamed
//! temporary file; memory holds 8 bytes per text, and a hash of each while they are read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::config::RowKind;
use crate::data::reader::beir::{self, BeirFile};
use crate::data::reader::{self, Format, Source};
use crate::{Error, Result};

/// Distinct texts in a temporary file, by number.
pub(super) struct Texts {
    folder: PathBuf,
    file: File,
    /// End of each text in the file.
    ends: Vec<u64>,
    /// Hash of all texts in their order.
    digest: u64,
}

impl Texts {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn get(&self, number: u32) -> Result<String> {
        let number = number as usize;
        let start = if number == 0 { 0 } else { self.ends[number - 1] };
        let mut bytes = vec![0; (self.ends[number] - start) as usize];
        self.file.read_exact_at(&mut bytes, start).map_err(Error::read("read", &self.folder))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(super) fn range(&self, range: Range<usize>) -> Result<Vec<String>> {
        range.map(|number| self.get(number as u32)).collect()
    }
}

/// Writes distinct texts to a temporary file and numbers them.
struct Collector {
    folder: PathBuf,
    file: BufWriter<File>,
    ends: Vec<u64>,
    numbers: HashMap<u128, u32>,
    digest: Xxh3,
}

impl Collector {
    fn new(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(Error::write("create a file in", folder))?;
        Ok(Self {
            folder: folder.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            ends: Vec::new(),
            numbers: HashMap::new(),
            digest: Xxh3::new(),
        })
    }

    /// Returns the number of a text; writes the text if it is new.
    fn intern(&mut self, text: &str) -> Result<u32> {
        let next = self.ends.len() as u32;
        let hash = xxh3_128(text.as_bytes());
        let number = *self.numbers.entry(hash).or_insert(next);
        if number == next {
            self.file.write_all(text.as_bytes()).map_err(Error::write("write to", &self.folder))?;
            self.ends.push(self.ends.last().unwrap_or(&0) + text.len() as u64);
            self.digest.update(&hash.to_le_bytes());
        }
        Ok(number)
    }

    fn finish(self) -> Result<Texts> {
        let Self { folder, file, ends, digest, .. } = self;
        let file =
            file.into_inner().map_err(|error| Error::write("write to", &folder)(error.into_error()))?;
        Ok(Texts { folder, file, ends, digest: digest.digest() })
    }
}

/// Queries, documents, and the positives of each query.
pub struct Inputs {
    pub(super) queries: Texts,
    pub(super) documents: Texts,
    /// Distinct positives of each query, in the order in which they occur.
    pub(super) positives: Vec<Vec<u32>>,
    /// Largest number of positives of a query, counting repeated ones.
    pub(super) max_positives: usize,
    /// Number of blank texts of the corpus, which are skipped.
    pub(super) blank: u64,
    /// Hash of `positives`.
    pub(super) digest: u64,
}

impl Inputs {
    /// Reads `pairs`, which are training rows or a BEIR folder. The documents are the texts of `corpus` and
    /// all positives. The default corpus of a BEIR folder is its own. Temporary files are created in
    /// `folder`.
    ///
    /// # Errors
    /// A file cannot be read or has a malformed row; there is only one document.
    pub fn read(pairs: &Path, corpus: Option<&Path>, folder: &Path) -> Result<Self> {
        let source = Source::open_answers(pairs, RowKind::Pairs)?;
        let (mut queries, mut documents) = (Collector::new(folder)?, Collector::new(folder)?);
        let mut blank = 0;
        let own = beir::file(pairs, BeirFile::Corpus).ok();
        if let Some(corpus) = corpus.or(own.as_deref()) {
            corpus_texts(corpus, |text| {
                if text.trim().is_empty() {
                    blank += 1;
                    return Ok(());
                }
                documents.intern(text).map(drop)
            })?;
        }
        let (mut positives, mut counts) = (Vec::<Vec<u32>>::new(), Vec::<usize>::new());
        for index in 0..source.len() {
            let row = source.row(index)?;
            let query = queries.intern(&row.query)? as usize;
            if query == positives.len() {
                positives.push(Vec::new());
                counts.push(0);
            }
            counts[query] += row.positives.len();
            for text in &row.positives {
                let document = documents.intern(text)?;
                if !positives[query].contains(&document) {
                    positives[query].push(document);
                }
            }
        }
        let mut digest = Xxh3::new();
        for of_query in &positives {
            digest.update(&(of_query.len() as u64).to_le_bytes());
            of_query.iter().for_each(|document| digest.update(&document.to_le_bytes()));
        }
        let inputs = Self {
            queries: queries.finish()?,
            documents: documents.finish()?,
            max_positives: counts.into_iter().max().unwrap_or(0),
            positives,
            blank,
            digest: digest.digest(),
        };
        if inputs.documents.len() < 2 {
            let message = "there is only one document, the positive, so there are no negatives\n\
                           hint: give more texts to search with --corpus FILE";
            return Err(Error::file(pairs, message));
        }
        Ok(inputs)
    }
}

/// Calls `each` with the texts of a corpus file: rows with `text` (and `title`, which is put before it, as in
/// BEIR), or one text per line.
fn corpus_texts(path: &Path, mut each: impl FnMut(&str) -> Result<()>) -> Result<()> {
    if Format::of(path).is_none() {
        return reader::lines(path, |_, text| each(text));
    }
    reader::objects(path, |line, row| {
        let wrong = |message| Error::Row { path: path.to_owned(), line, message };
        let text = reader::text_of(&row).map_err(wrong)?;
        match row.get("title").and_then(Value::as_str).filter(|title| !title.is_empty()) {
            Some(title) => each(format!("{title} {text}").trim()),
            None => each(text),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(
        files: &[(&str, &str)],
        pairs: &str,
        corpus: Option<&str>,
    ) -> Result<(Inputs, tempfile::TempDir)> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let corpus = corpus.map(|name| folder.path().join(name));
        let inputs = Inputs::read(&folder.path().join(pairs), corpus.as_deref(), folder.path())?;
        Ok((inputs, folder))
    }

    const PAIRS: &str = r#"{"query": "a", "positive": "x"}
{"query": "b", "positive": ["y", "ü", "x"]}
{"query": "a", "positive": "x"}
{"query": "a", "positive": "z", "negatives": ["not read"]}
"#;

    #[test]
    fn texts_are_numbered_once_the_corpus_first() {
        let (inputs, _folder) =
            read(&[("p.jsonl", PAIRS), ("c.txt", "w\nü\n\nw\n")], "p.jsonl", Some("c.txt")).unwrap();
        assert_eq!(inputs.queries.range(0..2).unwrap(), ["a", "b"]);
        assert_eq!(inputs.documents.range(0..inputs.documents.len()).unwrap(), ["w", "ü", "x", "y", "z"]);
        assert_eq!(inputs.positives, [vec![2, 4], vec![3, 1, 2]]);
        assert_eq!((inputs.max_positives, inputs.blank), (3, 0));
        let (alone, _folder) = read(&[("p.jsonl", PAIRS)], "p.jsonl", None).unwrap();
        assert_eq!(alone.documents.range(0..4).unwrap(), ["x", "y", "ü", "z"]);
        assert!(alone.documents.digest() != inputs.documents.digest());
        assert_eq!(alone.queries.digest(), inputs.queries.digest());
    }

    #[test]
    fn the_default_corpus_of_a_beir_folder_is_its_own() {
        let corpus = r#"{"_id": "1", "title": "T", "text": "one"}
{"_id": "2", "text": "two"}
{"_id": "3", "text": " "}
"#;
        let files = [
            ("corpus.jsonl", corpus),
            ("queries.jsonl", "{\"_id\": \"q\", \"text\": \"ask\"}\n"),
            ("qrels/train.tsv", "q\t1\t1\n"),
        ];
        let (inputs, _folder) = read(&files, "", None).unwrap();
        assert_eq!(inputs.documents.range(0..2).unwrap(), ["T one", "two"]);
        assert_eq!((inputs.positives, inputs.blank), (vec![vec![0]], 1));
    }

    #[test]
    fn errors_name_file_and_line() {
        let one = "{\"query\": \"a\", \"positive\": \"x\"}\n";
        for (files, expected) in [
            (vec![("p.jsonl", one)], "p.jsonl: there is only one document"),
            (vec![("p.jsonl", "{\"query\": \"a\"}\n")], "p.jsonl:1: has no column for the positive"),
            (
                vec![("p.jsonl", one), ("c.jsonl", "{\"text\": \"y\"}\n{\"txt\": \"z\"}")],
                "c.jsonl:2: has no `text`",
            ),
            (
                vec![("p.jsonl", one), ("c.jsonl", "{\"text\": 3}")],
                "c.jsonl:1: `text` is the number 3, expected a text",
            ),
        ] {
            let corpus = files.get(1).map(|(name, _)| *name);
            let error = read(&files, "p.jsonl", corpus).err().unwrap().to_string();
            assert!(error.contains(expected), "expected {expected:?} in {error:?}");
        }
    }
}
