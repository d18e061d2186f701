//! Comparisons of texts two by two: triplets, and pairs with a score.
//!
//! As sentence-transformers 6. `TripletEvaluator`: the share of triplets whose positive is more similar to the anchor than
//! the negative, by cosine, dot product, and negated Manhattan and Euclidean distance. `EmbeddingSimilarityEvaluator`: how
//! well the cosine of a pair follows its score, by Pearson's and Spearman's correlation.

use candle_core::Tensor;

use crate::Result;
use crate::embed::Role;

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
    /// The metrics by name, without the set's. `encode` embeds texts: (N, D).
    pub(super) fn evaluate(
        &self,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<Vec<(String, f64)>> {
        let anchors = encode(&self.anchors, Role::Query)?.to_vec2::<f32>()?;
        let positives = encode(&self.positives, Role::Document)?.to_vec2::<f32>()?;
        let negatives = encode(&self.negatives, Role::Document)?.to_vec2::<f32>()?;
        let mut scores: Vec<_> = MEASURES
            .iter()
            .map(|(name, measure)| {
                let right = anchors.iter().zip(positives.iter().zip(&negatives));
                let right = right.filter(|(a, (p, n))| measure(a, p) > measure(a, n)).count();
                (format!("{name}_accuracy"), right as f64 / anchors.len() as f64)
            })
            .collect();
        let best = scores.iter().map(|(_, score)| *score).fold(0.0, f64::max);
        scores.push(("max_accuracy".into(), best));
        Ok(scores)
    }

    /// The columns of the CSV: a heading, and the metric below it.
    pub(super) fn columns() -> Vec<(String, String)> {
        MEASURES.iter().map(|(name, _)| (format!("accuracy_{name}"), format!("{name}_accuracy"))).collect()
    }
}

impl Similarity {
    /// The metrics by name, without the set's. `encode` embeds texts: (N, D).
    pub(super) fn evaluate(
        &self,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<Vec<(String, f64)>> {
        let first = encode(&self.first, Role::Text)?.to_vec2::<f32>()?;
        let second = encode(&self.second, Role::Text)?.to_vec2::<f32>()?;
        let found: Vec<f64> = first.iter().zip(&second).map(|(a, b)| cosine(a, b)).collect();
        Ok(vec![
            ("pearson_cosine".into(), pearson(&self.scores, &found)),
            ("spearman_cosine".into(), pearson(&ranks(&self.scores), &ranks(&found))),
        ])
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

/// Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²); not a number where either is constant.
fn pearson(x: &[f64], y: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mx, my) = (mean(x), mean(y));
    let sum = |of: &dyn Fn(f64, f64) -> f64| x.iter().zip(y).map(|(x, y)| of(x - mx, y - my)).sum::<f64>();
    sum(&|x, y| x * y) / (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt()
}

/// The place of each value among all, from 1; equal values share the mean of their places.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for equal in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = start as f64 + (equal.len() + 1) as f64 / 2.0;
        equal.iter().for_each(|&index| ranks[index] = rank);
        start += equal.len();
    }
    ranks
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
        golden::assert_scores(&set.evaluate(|texts, _| encode(&matrices, texts)).unwrap(), golden);
        assert_eq!(header(Triplets::columns()), golden["csv_header"]);
    }

    #[test]
    fn correlations_are_those_of_sentence_transformers() {
        let golden = &golden::read()["similarity"];
        let matrices =
            [("a", "first"), ("b", "second")].map(|(letter, name)| (letter, golden::matrix(&golden[name])));
        let scores: Vec<f64> = serde_json::from_value(golden["gold"].clone()).unwrap();
        let set = Similarity { first: texts("a", scores.len()), second: texts("b", scores.len()), scores };
        golden::assert_scores(&set.evaluate(|texts, _| encode(&matrices, texts)).unwrap(), golden);
        assert_eq!(header(Similarity::columns()), golden["csv_header"]);
    }

    #[test]
    fn equal_values_share_their_mean_rank() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0, 3.0]), [4.0, 1.0, 4.0, 2.0, 4.0]);
        assert!(ranks(&[]).is_empty());
    }

    #[test]
    fn a_constant_has_no_correlation() {
        assert!(pearson(&[1.0, 2.0], &[5.0, 5.0]).is_nan());
        assert!((pearson(&[1.0, 2.0, 3.0], &[-2.0, -4.0, -6.0]) + 1.0).abs() < 1e-12);
    }
}
