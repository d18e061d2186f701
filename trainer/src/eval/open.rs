//! Reads retrieval sets: BEIR folders and files of pairs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::retrieval::Retrieval;
use crate::config::RowKind;
use crate::data::reader::{self, Source};
use crate::{Error, Result};

/// Any model finds the only document.
const ONE_DOCUMENT: &str = "has one document only, expected two or more: every query would find it";

/// A BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`. What has a score above 0 is relevant.
pub(super) fn beir(folder: &Path, split: Option<&str>) -> Result<Retrieval> {
    let qrels = qrels(folder, split)?;
    let (queries, query_numbers) = texts(&find(folder, "queries.jsonl")?, false)?;
    let corpus = find(folder, "corpus.jsonl")?;
    let (documents, document_numbers) = texts(&corpus, true)?;
    if documents.len() == 1 {
        return Err(Error::file(corpus, ONE_DOCUMENT));
    }
    let mut relevant = vec![Vec::new(); queries.len()];
    judgements(&qrels, |line, query, document, score, _| {
        let wrong = |message: String| Error::Row { path: qrels.clone(), line, message };
        let number = |numbers: &HashMap<String, u32>, id: &str, file: &str| {
            numbers.get(id).copied().ok_or_else(|| wrong(format!("`{id}` is not in {file}")))
        };
        let query = number(&query_numbers, query, "queries.jsonl")?;
        let document = number(&document_numbers, document, "corpus.jsonl")?;
        if score > 0.0 {
            relevant[query as usize].push(document);
        }
        Ok(())
    })?;
    let mut ids = vec![String::new(); documents.len()];
    for_each_id(document_numbers, |id, number| ids[number as usize] = id);
    let set = Retrieval::new(queries, documents, &ids, relevant);
    if set.queries() == 0 {
        return Err(Error::file(qrels, "has no relevant document, expected scores above 0"));
    }
    Ok(set)
}

/// Calls `each` with line, query, document, score and the score's text of the lines of `qrels/SPLIT.tsv`.
pub(crate) fn judgements(
    qrels: &Path,
    mut each: impl FnMut(u64, &str, &str, f64, &str) -> Result<()>,
) -> Result<()> {
    let mut first = true;
    reader::lines(qrels, |line, text| {
        let wrong = |message: String| Error::Row { path: qrels.to_owned(), line, message };
        let fields: Vec<&str> = text.split('\t').map(str::trim).collect();
        // TREC's form has a column more, always 0.
        let ([query, document, score] | [query, _, document, score]) = fields[..] else {
            return Err(wrong("expected query-id, corpus-id and score, with tabs between".into()));
        };
        let header = std::mem::take(&mut first);
        match score.parse::<f64>() {
            Ok(number) if number.is_finite() => each(line, query, document, number, score),
            Err(_) if header => Ok(()),
            _ => Err(wrong(format!("the score `{score}` is no number"))),
        }
    })
}

#[expect(
    clippy::iter_over_hash_type,
    reason = "every id goes to a place of its own: the order does not matter"
)]
fn for_each_id(numbers: HashMap<String, u32>, mut each: impl FnMut(String, u32)) {
    for (id, number) in numbers {
        each(id, number);
    }
}

/// Reads a file of pairs: its distinct queries are the queries, its distinct positives the documents.
pub(super) fn pairs(path: &Path) -> Result<Retrieval> {
    let source = Source::answers(path, RowKind::Pairs)?;
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

/// The texts of `queries.jsonl` or `corpus.jsonl`, and each id's number. A title stands before its text.
fn texts(path: &Path, titled: bool) -> Result<(Vec<String>, HashMap<String, u32>)> {
    let (mut texts, mut numbers) = (Vec::new(), HashMap::new());
    reader::objects(path, |line, row| {
        let wrong = |message: String| Error::Row { path: path.to_owned(), line, message };
        let (id, text) = self::text(&row, titled).map_err(&wrong)?;
        if let Some(first) = numbers.insert(id, texts.len() as u32) {
            return Err(wrong(format!("has the `_id` of text {}", first + 1)));
        }
        texts.push(text);
        Ok(())
    })?;
    if texts.is_empty() {
        return Err(Error::file(path, "has no texts"));
    }
    Ok((texts, numbers))
}

/// The identifier of a row of `queries.jsonl` or `corpus.jsonl`, and its text after its title.
pub(crate) fn text(row: &Map<String, Value>, titled: bool) -> std::result::Result<(String, String), String> {
    let id = match row.get("_id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => return Err("has no `_id`".into()),
    };
    let part = |name: &str| row.get(name).and_then(Value::as_str);
    let Some(text) = part("text") else { return Err("has no `text`".into()) };
    Ok(match part("title").filter(|title| titled && !title.is_empty()) {
        Some(title) => (id, format!("{title} {text}").trim().to_owned()),
        None => (id, text.to_owned()),
    })
}

/// `qrels/SPLIT.tsv`; where no split is named, test's, else dev's, else the only one.
pub(crate) fn qrels(folder: &Path, split: Option<&str>) -> Result<PathBuf> {
    let place = folder.join("qrels");
    if let Some(split) = split {
        let path = place.join(format!("{split}.tsv"));
        return if path.is_file() { Ok(path) } else { Err(Error::file(path, "no such file")) };
    }
    if let Some(path) =
        ["test.tsv", "dev.tsv"].iter().map(|name| place.join(name)).find(|path| path.is_file())
    {
        return Ok(path);
    }
    let wrong = || {
        Error::file(
            folder,
            "expected a BEIR folder: corpus.jsonl, queries.jsonl and qrels/*.tsv, found no qrels/*.tsv",
        )
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&place)
        .map_err(|_| wrong())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "tsv"))
        .collect();
    files.sort();
    match files.len() {
        0 => Err(wrong()),
        1 => Ok(files.remove(0)),
        _ => {
            let names: Vec<_> = files.iter().filter_map(|path| path.file_stem()?.to_str()).collect();
            Err(Error::file(
                place,
                format!("has neither test.tsv nor dev.tsv\nhint: name a split: {}", names.join(", ")),
            ))
        }
    }
}

/// A file of the folder, packed or not.
pub(crate) fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    ["", ".gz", ".zst"]
        .iter()
        .map(|ending| folder.join(format!("{name}{ending}")))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::file(folder, format!("expected a BEIR folder, found no {name}")))
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
            (&[("qrels/test.tsv", "q\tc\tscore\nq1\ta\tx\n")], "test.tsv:2: the score `x` is no number"),
            (&[("qrels/test.tsv", "q\tc\tscore\nq1\ta\tNaN\n")], "test.tsv:2: the score `NaN` is no number"),
            (&[("qrels/test.tsv", "q1\ta\tinf\n")], "test.tsv:1: the score `inf` is no number"),
            (&[("qrels/test.tsv", "q\tc\tscore\n")], "has no relevant document"),
            (
                &[("corpus.jsonl", "{\"_id\": \"a\", \"text\": \"x\"}\n")],
                "corpus.jsonl: has one document only, expected two or more",
            ),
            (&[("qrels/x.tsv", ""), ("qrels/y.tsv", "")], "name a split: x, y"),
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
        assert!(error.contains("one.jsonl: has one document only, expected two or more"), "{error}");
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
            assert!(error.contains("keep the rows that do"), "{error}");
        }
    }
}
