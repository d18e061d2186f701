//! Reads retrieval sets: BEIR folders and files of pairs.

use std::collections::HashMap;
use std::path::Path;

use super::Retrieval;
use crate::config::RowKind;
use crate::data::reader::beir::{self, BeirFile, Ids, ONE_DOCUMENT, Split};
use crate::data::reader::{self, Source};
use crate::{Error, Result};

/// Reads a BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`. A score above 0 makes a document relevant.
pub(super) fn beir(folder: &Path, split: Option<&str>) -> Result<Retrieval> {
    let qrels = beir::qrels(folder, split.map_or(Split::Evaluation, Split::Named))?;
    let (queries, query_ids) = texts(&beir::file(folder, BeirFile::Queries)?, BeirFile::Queries)?;
    let corpus = beir::file(folder, BeirFile::Corpus)?;
    let (documents, document_ids) = texts(&corpus, BeirFile::Corpus)?;
    if documents.len() == 1 {
        return Err(Error::file(corpus, ONE_DOCUMENT));
    }
    let mut relevant = vec![Vec::new(); queries.len()];
    beir::judgements(&qrels, |judgement| {
        let wrong = |message| Error::Row { path: qrels.clone(), line: judgement.line, message };
        let query = query_ids.number(judgement.query).map_err(wrong)?;
        let document = document_ids.number(judgement.document).map_err(wrong)?;
        if judgement.score > 0.0 {
            relevant[query as usize].push(document);
        }
        Ok(())
    })?;
    let set = Retrieval::new(queries, documents, &document_ids.in_order(), relevant);
    if set.queries() == 0 {
        return Err(Error::file(qrels, "has no relevant document, expected scores above 0"));
    }
    Ok(set)
}

/// Reads a file of pairs: its distinct queries are the queries, its distinct positives the documents.
pub(super) fn pairs(path: &Path) -> Result<Retrieval> {
    let source = Source::open_answers(path, RowKind::Pairs)?;
    let (mut queries, mut documents) = (Numbered::default(), Numbered::default());
    let mut relevant: Vec<Vec<u32>> = Vec::new();
    for index in 0..source.len() {
        let row = source.row(index)?;
        let query = queries.number(row.query) as usize;
        if query == relevant.len() {
            relevant.push(Vec::new());
        }
        relevant[query].extend(row.positives.into_iter().map(|text| documents.number(text)));
    }
    if documents.texts.len() == 1 {
        return Err(Error::file(path, ONE_DOCUMENT));
    }
    // Ids whose order as strings is that of the file.
    let ids: Vec<_> = (0..documents.texts.len()).map(|number| format!("{number:010}")).collect();
    Ok(Retrieval::new(queries.texts, documents.texts, &ids, relevant))
}

/// Texts, each once, in the order in which they first came.
#[derive(Default)]
struct Numbered {
    texts: Vec<String>,
    numbers: HashMap<String, u32>,
}

impl Numbered {
    fn number(&mut self, text: String) -> u32 {
        let Self { texts, numbers } = self;
        *numbers.entry(text).or_insert_with_key(|text| {
            texts.push(text.clone());
            texts.len() as u32 - 1
        })
    }
}

/// Reads the texts of `queries.jsonl` or `corpus.jsonl` and their ids.
fn texts(path: &Path, file: BeirFile) -> Result<(Vec<String>, Ids)> {
    let (mut texts, mut ids) = (Vec::new(), Ids::new(path));
    reader::objects(path, |line, row| {
        let wrong = |message| Error::Row { path: path.to_owned(), line, message };
        let (id, text) = beir::text(&row, file).map_err(wrong)?;
        ids.add(id).map_err(wrong)?;
        texts.push(text);
        Ok(())
    })?;
    if texts.is_empty() {
        return Err(Error::file(path, "has no texts"));
    }
    Ok((texts, ids))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    const CORPUS: &str = r#"{"_id": "a", "title": "T", "text": " one "}
{"_id": "b", "text": "two"}
{"_id": 7, "title": "", "text": ""}
"#;
    const QUERIES: &str = r#"{"_id": "q1", "text": "first"}
{"_id": "q2", "title": "not read", "text": "second"}
{"_id": "q3", "text": "third"}
"#;

    /// All that reach the encoder: queries, then documents in the order of their ids.
    fn asked(set: &Retrieval) -> Vec<Vec<String>> {
        let mut seen = Vec::new();
        set.evaluate_with(|texts, _| {
            seen.push(texts.to_vec());
            Ok(Tensor::ones((texts.len(), 2), candle_core::DType::F32, &Device::Cpu)?)
        })
        .unwrap();
        seen
    }

    #[test]
    fn beir_folders_are_read_as_sentence_transformers_users_do() {
        let folder = folder(&[
            ("corpus.jsonl", CORPUS),
            ("queries.jsonl", QUERIES),
            ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq2\ta\t2\nq2\t7\t0\nq3\tb\t0\n"),
            ("qrels/train.tsv", "q1\t0\tb\t1\n"),
        ]);
        let set = beir(folder.path(), None).unwrap();
        assert_eq!(
            asked(&set),
            [vec!["second".to_owned()], vec![String::new(), "T  one".into(), "two".into()]]
        );
        // All scores are equal: 7, a, b by their ids.
        let scores = set.evaluate_with(|texts, _| {
            Ok(Tensor::ones((texts.len(), 2), candle_core::DType::F32, &Device::Cpu)?)
        });
        let scores = scores.unwrap().scores;
        assert_eq!(scores.iter().find(|(name, _)| *name == "cosine_mrr@10").unwrap().1, 0.5);
        assert_eq!(asked(&beir(folder.path(), Some("train")).unwrap())[0], ["first"]);
    }

    #[test]
    fn what_is_wrong_with_a_beir_folder_is_named() {
        let cases: &[(&[(&str, &str)], &str)] = &[
            (&[("qrels/test.tsv", "q1\ta\t1\nq1\tz\t1\n")], "test.tsv:2: `z` is not in corpus.jsonl"),
            (&[("qrels/test.tsv", "q9\ta\t1\n")], "test.tsv:1: `q9` is not in queries.jsonl"),
            (&[("qrels/test.tsv", "q1 a 1\n")], "test.tsv:1: expected query-id"),
            (&[("qrels/test.tsv", "q\tc\tscore\nq1\ta\tx\n")], "test.tsv:2: the score is `x`, expected"),
            (&[("qrels/test.tsv", "q\tc\tscore\nq1\ta\tNaN\n")], "test.tsv:2: the score is `NaN`, expected"),
            (&[("qrels/test.tsv", "q1\ta\tinf\n")], "test.tsv:1: the score is `inf`, expected"),
            (&[("qrels/test.tsv", "q\tc\tscore\n")], "has no relevant document"),
            (
                &[("corpus.jsonl", "{\"_id\": \"a\", \"text\": \"x\"}\n")],
                "corpus.jsonl: has only one document, expected two or more",
            ),
            (&[("qrels/x.tsv", ""), ("qrels/y.tsv", "")], "has no test.tsv or dev.tsv, only x, y\nhint: "),
            (&[], "found no qrels"),
            (
                &[("corpus.jsonl", "{\"_id\": \"a\", \"text\": \"x\"}\n{\"_id\": \"a\", \"text\": \"y\"}")],
                ":2: has the `_id` of text 1",
            ),
            (&[("corpus.jsonl", "{\"_id\": \"a\"}")], ":1: has no `text`"),
            (&[("queries.jsonl", "{\"text\": \"a\"}")], ":1: has no `_id`"),
        ];
        for (files, expected) in cases {
            let mut all = vec![("corpus.jsonl", CORPUS), ("queries.jsonl", QUERIES)];
            if !files.iter().any(|(name, _)| name.starts_with("qrels")) && !files.is_empty() {
                all.push(("qrels/test.tsv", "q1\ta\t1\n"));
            }
            all.extend_from_slice(files);
            let folder = folder(&all);
            let error = beir(folder.path(), None).unwrap_err().to_string();
            assert!(error.contains(expected), "expected {expected:?} in {error:?}");
        }
    }

    #[test]
    fn pairs_make_a_set_of_distinct_texts() {
        let rows = [("q", "x"), ("r", "y"), ("q", "y"), ("s", "x")].map(|(query, positive)| {
            format!("{{\"query\": \"{query}\", \"positive\": \"{positive}\", \"score\": 1}}\n")
        });
        let folder = folder(&[("pairs.en.jsonl", &rows.concat())]);
        let set = pairs(&folder.path().join("pairs.en.jsonl")).unwrap();
        assert_eq!(asked(&set), [vec!["q", "r", "s"], vec!["x", "y"]]);
        let one = folder.path().join("one.jsonl");
        std::fs::write(&one, [&rows[0], &rows[3]].map(String::as_str).concat()).unwrap();
        let error = pairs(&one).unwrap_err().to_string();
        assert!(error.contains("one.jsonl: has only one document, expected two or more"), "{error}");
    }

    #[test]
    fn rows_that_may_be_no_answers_are_refused() {
        let folder = folder(&[
            ("label.jsonl", "{\"question\": \"a\", \"answer\": \"b\", \"label\": 0}\n"),
            ("score.csv", "sentence1,sentence2,score\na,b,0.1\n"),
        ]);
        for (name, column) in [("label.jsonl", "label"), ("score.csv", "score")] {
            let error = pairs(&folder.path().join(name)).unwrap_err().to_string();
            assert!(error.contains(&format!("has a column `{column}` beside two texts")), "{error}");
            assert!(error.contains("keep the positive rows"), "{error}");
        }
    }
}
