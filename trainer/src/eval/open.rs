//! Reading evaluation sets: BEIR folders, and files of pairs, triplets and scored pairs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::pairwise::{Similarity, Triplets};
use super::retrieval::Retrieval;
use crate::config::RowKind;
use crate::data::reader::{self, Source};
use crate::{Error, Result};

/// Whatever the model, that one would be found.
const ONE_DOCUMENT: &str = "has one document only, expected two or more: there is nothing to tell it from";

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

/// A file of pairs as a set of its own: every distinct query is asked, every distinct positive is a document.
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

/// A file of triplets; a row with several positives or negatives gives each combination.
pub(super) fn triplets(path: &Path) -> Result<Triplets> {
    let source = Source::answers(path, RowKind::Triplets)?;
    let mut set = Triplets::default();
    for index in 0..source.len() {
        let row = source.row(index)?;
        if row.negatives.is_empty() {
            return Err(source.error(index, "has no negative"));
        }
        for positive in &row.positives {
            for negative in &row.negatives {
                set.anchors.push(row.query.clone());
                set.positives.push(positive.clone());
                set.negatives.push(negative.clone());
            }
        }
    }
    Ok(set)
}

/// A file of `sentence1`, `sentence2`, `score`.
pub(super) fn similarity(path: &Path) -> Result<Similarity> {
    let mut set = Similarity::default();
    reader::objects(path, |line, row| {
        let wrong = |message: String| Error::Row { path: path.to_owned(), line, message };
        let text = |names: [&str; 2]| match field(&row, &names) {
            Some((_, Value::String(text))) => Ok(text.clone()),
            Some((name, _)) => Err(wrong(format!("`{name}` is no text"))),
            None => Err(wrong(format!("has no `{}`", names[0]))),
        };
        let (first, second) = (text(["sentence1", "s1"])?, text(["sentence2", "s2"])?);
        let score = match field(&row, &["score", "similarity"]) {
            None => return Err(wrong("has no `score`".into())),
            Some((name, value)) => value
                .as_f64()
                .or_else(|| value.as_str()?.trim().parse().ok())
                .filter(|score| score.is_finite())
                .ok_or_else(|| wrong(format!("`{name}` is {value}, expected a number")))?,
        };
        set.first.push(first);
        set.second.push(second);
        set.scores.push(score);
        Ok(())
    })?;
    if set.scores.len() < 2 {
        return Err(Error::file(path, "has fewer than two rows: no correlation"));
    }
    Ok(set)
}

/// The first field with one of these names, in any case, `_` and `-` left aside.
fn field<'a>(row: &'a Map<String, Value>, names: &[&str]) -> Option<(&'a str, &'a Value)> {
    let bare = |name: &str| name.to_ascii_lowercase().replace(['_', '-', ' '], "");
    names
        .iter()
        .find_map(|wanted| row.iter().find(|(name, _)| bare(name) == *wanted))
        .map(|(n, v)| (n.as_str(), v))
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
        set.evaluate(|texts, _| {
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
        let scores = set
            .evaluate(|texts, _| Ok(Tensor::ones((texts.len(), 2), candle_core::DType::F32, &Device::Cpu)?));
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

    #[test]
    fn triplets_and_scored_pairs_are_read() {
        let folder = folder(&[
            ("t.jsonl", r#"{"anchor": "a", "positive": "p", "negatives": ["m", "n"]}"#),
            ("none.jsonl", r#"{"anchor": "a", "positive": "p", "negatives": []}"#),
            ("s.csv", "Sentence_1,sentence2,score\na,b,4.5\nc,d,0\n"),
            ("bad.jsonl", "{\"s1\": \"a\", \"s2\": \"b\", \"score\": \"x\"}\n"),
        ]);
        let at = |name: &str| folder.path().join(name);
        let set = triplets(&at("t.jsonl")).unwrap();
        assert_eq!((set.anchors, set.negatives), (vec!["a".to_owned(); 2], vec!["m".to_owned(), "n".into()]));
        assert!(
            triplets(&at("none.jsonl")).unwrap_err().to_string().contains("none.jsonl:1: has no negative")
        );
        let set = similarity(&at("s.csv")).unwrap();
        assert_eq!((set.first[1].as_str(), set.second[0].as_str(), set.scores), ("c", "b", vec![4.5, 0.0]));
        let error = similarity(&at("bad.jsonl")).unwrap_err().to_string();
        assert!(error.contains("bad.jsonl:1: `score` is \"x\", expected a number"), "{error}");
    }
}
