//! Comparisons of texts two by two: triplets, and pairs with a score.
//!
//! As sentence-transformers 6. `TripletEvaluator`: the share of triplets whose positive is more similar to the anchor than
//! the negative, by cosine, dot product, and negated Manhattan and Euclidean distance. `EmbeddingSimilarityEvaluator`: how
//! well the cosine of a pair follows its score, by Pearson's and Spearman's correlation.

use candle_core::Tensor;

use super::{EvalOutput, ItemScores};
use crate::Result;
use crate::eval::embed::Role;

/// Rows that are embedded at once.
const PORTION: usize = 1 << 14;

/// Three texts a row.
#[derive(Debug, Default)]
pub(super) struct Triplets {
    pub(super) anchors: Vec<String>,
    pub(super) positives: Vec<String>,
    pub(super) negatives: Vec<String>,
}

/// Two texts a row, and how similar they are.
#[derive(Debug, Default)]
pub(super) struct Similarity {
    pub(super) first: Vec<String>,
    pub(super) second: Vec<String>,
    pub(super) scores: Vec<f64>,
}

type Measure = fn(&[f32], &[f32]) -> f64;
const MEASURES: [(&str, Measure); 4] =
    [("cosine", cosine), ("dot", dot), ("manhattan", manhattan), ("euclidean", euclidean)];

impl Triplets {
    /// What is judged how. `encode` embeds texts: (N, D).
    pub(super) fn evaluate(
        &self,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<EvalOutput> {
        let mut right = Vec::with_capacity(self.anchors.len() * MEASURES.len());
        for (start, anchors) in portions(&self.anchors) {
            let rows = start..start + anchors.len();
            let anchors = encode(anchors, Role::Query)?.to_vec2::<f32>()?;
            let positives = encode(&self.positives[rows.clone()], Role::Document)?.to_vec2::<f32>()?;
            let negatives = encode(&self.negatives[rows], Role::Document)?.to_vec2::<f32>()?;
            for (a, (p, n)) in anchors.iter().zip(positives.iter().zip(&negatives)) {
                right.extend(MEASURES.map(|(_, measure)| f64::from(u8::from(measure(a, p) > measure(a, n)))));
            }
        }
        Ok(EvalOutput::new(ItemScores::with_largest(Self::names(), right), Vec::new()))
    }

    /// What the metrics are called.
    pub(super) fn names() -> Vec<String> {
        let measures = MEASURES.iter().map(|(name, _)| *name).chain(["max"]);
        measures.map(|name| format!("{name}_accuracy")).collect()
    }

    /// The columns of the CSV: a heading, and the metric below it.
    pub(super) fn columns() -> Vec<(String, String)> {
        MEASURES.iter().map(|(name, _)| (format!("accuracy_{name}"), format!("{name}_accuracy"))).collect()
    }
}

impl Similarity {
    /// What is found how similar. `encode` embeds texts: (N, D).
    pub(super) fn evaluate(
        &self,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<EvalOutput> {
        let mut found = Vec::with_capacity(self.scores.len());
        for (start, first) in portions(&self.first) {
            let rows = start..start + first.len();
            let first = encode(first, Role::Text)?.to_vec2::<f32>()?;
            let second = encode(&self.second[rows], Role::Text)?.to_vec2::<f32>()?;
            found.extend(first.iter().zip(&second).map(|(a, b)| cosine(a, b)));
        }
        let items = ItemScores::correlations(Self::names(), self.scores.clone(), found);
        Ok(EvalOutput::new(items, Vec::new()))
    }

    /// What the metrics are called.
    pub(super) fn names() -> [String; 2] {
        ["pearson_cosine", "spearman_cosine"].map(str::to_owned)
    }

    /// The columns of the CSV: a heading, and the metric below it.
    pub(super) fn columns() -> Vec<(String, String)> {
        ["pearson", "spearman"]
            .iter()
            .map(|name| (format!("cosine_{name}"), format!("{name}_cosine")))
            .collect()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: &[f32]| dot(x, x).sqrt().max(1e-12);
    dot(a, b) / (norm(a) * norm(b))
}

fn manhattan(a: &[f32], b: &[f32]) -> f64 {
    -a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).sum::<f64>()
}

fn euclidean(a: &[f32], b: &[f32]) -> f64 {
    -a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

/// Texts that are embedded at once, each portion with the number of its first.
fn portions(texts: &[String]) -> impl Iterator<Item = (usize, &[String])> {
    texts.chunks(PORTION).enumerate().map(|(number, texts)| (number * PORTION, texts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::golden;

    /// Three texts a row of each matrix: `a0`, `a1`, … stand for its rows.
    fn encode(matrices: &[(&str, Vec<Vec<f32>>)], texts: &[String]) -> Result<Tensor> {
        let row = |text: &String| {
            let (_, matrix) = matrices.iter().find(|(name, _)| text.starts_with(name)).unwrap();
            matrix[text[1..].parse::<usize>().unwrap()].clone()
        };
        let rows: Vec<_> = texts.iter().map(row).collect();
        Ok(Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &candle_core::Device::Cpu)?)
    }

    fn texts(letter: &str, count: usize) -> Vec<String> {
        (0..count).map(|i| format!("{letter}{i}")).collect()
    }

    fn header(columns: Vec<(String, String)>) -> String {
        let headings: Vec<_> = columns.into_iter().map(|(heading, _)| heading).collect();
        format!("epoch,steps,{}", headings.join(","))
    }

    #[test]
    fn triplets_are_judged_as_in_sentence_transformers() {
        let golden = &golden::read()["triplet"];
        let matrices = [("a", "anchors"), ("p", "positives"), ("n", "negatives")]
            .map(|(letter, name)| (letter, golden::matrix(&golden[name])));
        let count = matrices[0].1.len();
        let set = Triplets {
            anchors: texts("a", count),
            positives: texts("p", count),
            negatives: texts("n", count),
        };
        let found = set.evaluate(|texts, _| encode(&matrices, texts)).unwrap();
        golden::assert_scores(&found.scores, golden);
        assert_eq!(header(Triplets::columns()), golden["csv_header"]);
    }

    #[test]
    fn correlations_are_those_of_sentence_transformers() {
        let golden = &golden::read()["similarity"];
        let matrices =
            [("a", "first"), ("b", "second")].map(|(letter, name)| (letter, golden::matrix(&golden[name])));
        let scores: Vec<f64> = serde_json::from_value(golden["gold"].clone()).unwrap();
        let set = Similarity { first: texts("a", scores.len()), second: texts("b", scores.len()), scores };
        let found = set.evaluate(|texts, _| encode(&matrices, texts)).unwrap();
        golden::assert_scores(&found.scores, golden);
        assert_eq!(header(Similarity::columns()), golden["csv_header"]);
    }
}
