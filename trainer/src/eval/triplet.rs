//! Triplets: how often the positive is more similar to the anchor than the negative.
//!
//! As `TripletEvaluator` in sentence-transformers 6: by cosine, by dot product, and by negated Manhattan and
//! Euclidean distance.

use std::path::Path;

use candle_core::Tensor;

use super::embed::{Embedder, Role};
use super::examples::{Candidate, Example, shortened};
use super::similarity::{cosine, dot};
use super::{CsvFile, EvalOutput, EvalSpec, Examples, ItemScores, Task};
use crate::Result;
use crate::config::{EvaluationKind, RowKind};
use crate::data::reader::Source;

/// Rows that are embedded at once.
const PORTION: usize = 1 << 14;

pub(super) static KIND: EvalSpec = EvalSpec {
    items: "triplets",
    primary_metric: "max_accuracy",
    metric_names,
    csv: Some(CsvFile { prefix: "triplet_evaluation", columns: csv_columns }),
    open: |path, _, _| Ok(Box::new(Triplets::open(path)?)),
};

/// Rows of an anchor, a positive and a negative.
#[derive(Debug, Default)]
pub(super) struct Triplets {
    anchors: Vec<String>,
    positives: Vec<String>,
    negatives: Vec<String>,
}

type Measure = fn(&[f32], &[f32]) -> f64;
const MEASURES: [(&str, Measure); 4] =
    [("cosine", cosine), ("dot", dot), ("manhattan", manhattan), ("euclidean", euclidean)];

fn metric_names() -> Vec<String> {
    MEASURES.iter().map(|(name, _)| *name).chain(["max"]).map(|name| format!("{name}_accuracy")).collect()
}

fn csv_columns() -> Vec<(String, String)> {
    MEASURES.iter().map(|(name, _)| (format!("accuracy_{name}"), format!("{name}_accuracy"))).collect()
}

impl Triplets {
    /// Reads a file of triplets. A row with several positives or negatives gives each combination.
    fn open(path: &Path) -> Result<Self> {
        super::expect_file(path, EvaluationKind::Triplet)?;
        let source = Source::open_answers(path, RowKind::Triplets)?;
        let mut set = Self::default();
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

    /// The accuracies. `encode` embeds texts: (N, D).
    fn evaluate_with(&self, mut encode: impl FnMut(&[String], Role) -> Result<Tensor>) -> Result<EvalOutput> {
        let mut correct = Vec::with_capacity(self.anchors.len() * MEASURES.len());
        let mut cosines = Vec::with_capacity(self.anchors.len());
        for start in (0..self.anchors.len()).step_by(PORTION) {
            let rows = start..self.anchors.len().min(start + PORTION);
            let anchors = encode(&self.anchors[rows.clone()], Role::Query)?.to_vec2::<f32>()?;
            let positives = encode(&self.positives[rows.clone()], Role::Document)?.to_vec2::<f32>()?;
            let negatives = encode(&self.negatives[rows], Role::Document)?.to_vec2::<f32>()?;
            for (a, (p, n)) in anchors.iter().zip(positives.iter().zip(&negatives)) {
                correct
                    .extend(MEASURES.map(|(_, measure)| f64::from(u8::from(measure(a, p) > measure(a, n)))));
                cosines.push((cosine(a, p), cosine(a, n)));
            }
        }
        let items = ItemScores::with_largest(metric_names(), correct);
        let example = |n: usize| {
            let (positive, negative) = cosines[n];
            Example {
                text: shortened(&self.anchors[n]),
                value: positive - negative,
                note: if positive > negative { "right" } else { "wrong" }.to_owned(),
                candidates: vec![
                    Candidate::new(&self.positives[n], positive, true),
                    Candidate::new(&self.negatives[n], negative, false),
                ],
            }
        };
        let measure = "cosine margin";
        Ok(EvalOutput::new(items, Examples::new(measure, false, cosines.len(), example)))
    }
}

impl Task for Triplets {
    fn evaluate(&self, embedder: &Embedder) -> Result<EvalOutput> {
        self.evaluate_with(|texts, role| embedder.encode(texts, role))
    }
}

fn manhattan(a: &[f32], b: &[f32]) -> f64 {
    -a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).sum::<f64>()
}

fn euclidean(a: &[f32], b: &[f32]) -> f64 {
    -a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::golden;

    #[test]
    fn accuracies_are_those_of_sentence_transformers() {
        let golden = &golden::read()["triplet"];
        let matrices = [("a", "anchors"), ("p", "positives"), ("n", "negatives")]
            .map(|(letter, name)| (letter, golden::matrix(&golden[name])));
        let count = matrices[0].1.len();
        let texts = |letter| golden::texts(letter, count);
        let set = Triplets { anchors: texts("a"), positives: texts("p"), negatives: texts("n") };
        let output = set.evaluate_with(|texts, _| golden::rows(&matrices, texts)).unwrap();
        golden::assert_scores(&output.scores, golden);
        assert_eq!(golden::csv_header(csv_columns()), golden["csv_header"]);

        let examples = output.examples.items;
        assert_eq!(examples.len(), count);
        let right = examples.iter().filter(|example| example.note == "right").count();
        let accuracy = output.scores.get("cosine_accuracy").unwrap();
        assert!((right as f64 / count as f64 - accuracy).abs() < 1e-12);
        let first = &examples[0];
        let [positive, negative] = &first.candidates[..] else { panic!("{first:?}") };
        assert_eq!((first.text.as_str(), positive.text.as_str(), negative.text.as_str()), ("a0", "p0", "n0"));
        assert_eq!(first.value, positive.cosine - negative.cosine);
    }

    #[test]
    fn a_row_gives_every_combination_and_needs_a_negative() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            Triplets::open(&path)
        };
        let set = open("t.jsonl", r#"{"anchor": "a", "positive": "p", "negatives": ["m", "n"]}"#).unwrap();
        assert_eq!((set.anchors, set.negatives), (vec!["a".to_owned(); 2], vec!["m".to_owned(), "n".into()]));
        let error = open("none.jsonl", r#"{"anchor": "a", "positive": "p", "negatives": []}"#).unwrap_err();
        assert!(error.to_string().contains("none.jsonl:1: has no negative"), "{error}");
    }
}
