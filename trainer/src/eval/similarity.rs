//! Scored pairs: how well the cosine of two texts follows their score.
//!
//! As `EmbeddingSimilarityEvaluator` in sentence-transformers 6: Pearson's and Spearman's correlation.

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use super::embed::{Embedder, Role};
use super::examples::{Candidate, Example, shortened};
use super::item_scores::ranks;
use super::{CsvFile, EvalOutput, EvalSpec, Examples, ItemScores, Task};
use crate::config::EvaluationKind;
use crate::data::reader;
use crate::data::row::similarity_columns;
use crate::{Error, Result};

/// Rows that are embedded at once.
const PORTION: usize = 1 << 14;

pub(super) static KIND: EvalSpec = EvalSpec {
    items: "pairs",
    primary_metric: "spearman_cosine",
    metric_names: || metric_names().into(),
    csv: Some(CsvFile { prefix: "similarity_evaluation", columns: csv_columns }),
    open: |path, _, _| Ok(Box::new(Similarity::open(path)?)),
};

/// Rows of two texts and a score.
#[derive(Debug, Default)]
pub(super) struct Similarity {
    first: Vec<String>,
    second: Vec<String>,
    scores: Vec<f64>,
}

fn metric_names() -> [String; 2] {
    ["pearson_cosine", "spearman_cosine"].map(str::to_owned)
}

fn csv_columns() -> Vec<(String, String)> {
    ["pearson", "spearman"].iter().map(|name| (format!("cosine_{name}"), format!("{name}_cosine"))).collect()
}

impl Similarity {
    /// Reads a file of two texts and a score a row. The columns have the same names as in training.
    fn open(path: &Path) -> Result<Self> {
        super::expect_file(path, EvaluationKind::Similarity)?;
        let mut set = Self::default();
        reader::objects(path, |line, row| {
            let wrong = |message: String| Error::Row { path: path.to_owned(), line, message };
            let names: Vec<&str> = row.keys().map(String::as_str).collect();
            let [first, second, score] =
                similarity_columns(&names).map_err(&wrong)?.map(|column| names[column]);
            let text = |name: &str| match &row[name] {
                Value::String(text) => Ok(text.clone()),
                other => Err(wrong(format!("`{name}` is {other}, expected a text"))),
            };
            set.first.push(text(first)?);
            set.second.push(text(second)?);
            let number = |value: &Value| value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
            let value = &row[score];
            set.scores.push(
                number(value)
                    .filter(|number| number.is_finite())
                    .ok_or_else(|| wrong(format!("`{score}` is {value}, expected a number")))?,
            );
            Ok(())
        })?;
        if set.scores.len() < 2 {
            return Err(Error::file(path, "has fewer than two rows, which have no correlation"));
        }
        Ok(set)
    }

    /// The correlations. `encode` embeds texts: (N, D).
    fn evaluate_with(&self, mut encode: impl FnMut(&[String], Role) -> Result<Tensor>) -> Result<EvalOutput> {
        let mut cosines = Vec::with_capacity(self.scores.len());
        for start in (0..self.scores.len()).step_by(PORTION) {
            let rows = start..self.scores.len().min(start + PORTION);
            let first = encode(&self.first[rows.clone()], Role::Text)?.to_vec2::<f32>()?;
            let second = encode(&self.second[rows], Role::Text)?.to_vec2::<f32>()?;
            cosines.extend(first.iter().zip(&second).map(|(a, b)| cosine(a, b)));
        }
        let (by_score, by_cosine) = (ranks(&self.scores), ranks(&cosines));
        let example = |n: usize| Example {
            text: shortened(&self.first[n]),
            value: (by_cosine[n] - by_score[n]).abs() / cosines.len() as f64,
            note: format!(
                "score {}: rank {} of {}, by cosine {}",
                self.scores[n],
                by_score[n],
                cosines.len(),
                by_cosine[n]
            ),
            candidates: vec![Candidate::new(&self.second[n], cosines[n], false)],
        };
        let examples = Examples::new("error of the rank", true, cosines.len(), example);
        let items = ItemScores::correlations(metric_names(), self.scores.clone(), cosines.clone());
        Ok(EvalOutput::new(items, examples))
    }
}

impl Task for Similarity {
    fn evaluate(&self, embedder: &Embedder) -> Result<EvalOutput> {
        self.evaluate_with(|texts, role| embedder.encode(texts, role))
    }
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

pub(super) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: &[f32]| dot(x, x).sqrt().max(1e-12);
    dot(a, b) / (norm(a) * norm(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::golden;

    #[test]
    fn correlations_are_those_of_sentence_transformers() {
        let golden = &golden::read()["similarity"];
        let matrices =
            [("a", "first"), ("b", "second")].map(|(letter, name)| (letter, golden::matrix(&golden[name])));
        let scores: Vec<f64> = serde_json::from_value(golden["gold"].clone()).unwrap();
        let texts = |letter| golden::texts(letter, scores.len());
        let set = Similarity { first: texts("a"), second: texts("b"), scores: scores.clone() };
        let output = set.evaluate_with(|texts, _| golden::rows(&matrices, texts)).unwrap();
        golden::assert_scores(&output.scores, golden);
        assert_eq!(golden::csv_header(csv_columns()), golden["csv_header"]);
        assert!(output.examples.lower_is_better && output.examples.items.len() == scores.len());
        assert!(output.examples.items.iter().all(|example| (0.0..1.0).contains(&example.value)));
    }

    #[test]
    fn scored_pairs_are_read_by_the_names_of_their_columns() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            Similarity::open(&path)
        };
        let set = open("s.csv", "Sentence_1,sentence2,score\na,b,4.5\nc,d,0\n").unwrap();
        assert_eq!((set.first[1].as_str(), set.second[0].as_str(), set.scores), ("c", "b", vec![4.5, 0.0]));
        for (name, text, expected) in [
            (
                "a.jsonl",
                r#"{"s1": "a", "s2": "b", "score": "x"}"#,
                "a.jsonl:1: `score` is \"x\", expected a number",
            ),
            ("b.jsonl", r#"{"s1": 3, "s2": "b", "score": 1}"#, "b.jsonl:1: `s1` is 3, expected a text"),
            ("c.jsonl", r#"{"s1": "a", "s2": "b"}"#, "c.jsonl:1: has no column for the score"),
            ("d.jsonl", r#"{"s1": "a", "s2": "b", "score": 1}"#, "has fewer than two rows"),
        ] {
            let error = open(name, text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
