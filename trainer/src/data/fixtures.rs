//! Data files and a tokenizer for the tests of several modules.

use std::path::Path;

use super::tokenize::Tokenizer;
use crate::config::{Config, DataSet};

/// Writes a tokenizer with one token per letter, ignoring case, and the special tokens `[UNK]`, `[CLS]` (1),
/// `[SEP]` (2).
pub(super) fn write_tokenizer(folder: &Path) {
    let letters: Vec<char> = ('a'..='z').chain('0'..='9').chain(".,:?! ".chars()).collect();
    let mut vocabulary: Vec<String> = ["[UNK]", "[CLS]", "[SEP]"].map(str::to_owned).to_vec();
    vocabulary.extend(letters.iter().map(char::to_string));
    vocabulary.extend(letters.iter().map(|letter| format!("##{letter}")));
    let vocabulary: Vec<String> =
        vocabulary.iter().enumerate().map(|(id, token)| format!("\"{token}\":{id}")).collect();
    let json = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
        "normalizer":{{"type":"Lowercase"}},"pre_tokenizer":{{"type":"Whitespace"}},
        "post_processor":{{"type":"BertProcessing","sep":["[SEP]",2],"cls":["[CLS]",1]}},"decoder":null,
        "model":{{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"{}","max_input_chars_per_word":100,"vocab":{{{}}}}}}}"#,
        "##",
        vocabulary.join(",")
    );
    std::fs::write(folder.join("tokenizer.json"), json).unwrap();
}

pub(super) fn tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    write_tokenizer(folder.path());
    Tokenizer::open(folder.path(), false).unwrap()
}

/// A configuration with data sets of JSON lines, and batches of 4 rows.
pub(super) struct Files {
    folder: tempfile::TempDir,
    pub(super) config: Config,
}

impl Files {
    pub(super) fn new(sets: &[&str]) -> Self {
        let mut files = Self { folder: tempfile::tempdir().unwrap(), config: Config::default() };
        files.config.training.batch_size = 4;
        for text in sets {
            files.add(text);
        }
        files
    }

    pub(super) fn add(&mut self, jsonl: &str) -> &mut DataSet {
        let sets = &mut self.config.data.train;
        let path = self.folder.path().join(format!("set{}.jsonl", sets.len()));
        std::fs::write(&path, jsonl).unwrap();
        sets.push(DataSet { path, ..DataSet::default() });
        sets.last_mut().unwrap()
    }
}
