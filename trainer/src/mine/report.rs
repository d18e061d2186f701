//! What mining found, and what it dropped and why.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::select::Dropped;

/// Counts of some of the queries; those of all are their sums.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Queries that were searched for.
    pub queries: u64,
    /// Rows that were written: pairs of a query and a positive.
    pub rows: u64,
    /// Negatives in them.
    pub negatives: u64,
    /// Rows that were written with fewer negatives than asked for.
    pub rows_with_fewer: u64,
    /// Pairs that were not written, because no negative is left.
    pub pairs_without: u64,
    /// Documents that were looked at.
    pub candidates: u64,
    /// Those of them that were dropped.
    pub dropped: Dropped,
    /// Of the positives.
    pub positive_scores: Scores,
    /// Of the negatives.
    pub negative_scores: Scores,
    /// Positive − negative.
    pub differences: Scores,
}

/// Scores in a few numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    count: u64,
    sum: f64,
    extremes: Option<(f32, f32)>,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        self.queries += other.queries;
        self.rows += other.rows;
        self.negatives += other.negatives;
        self.rows_with_fewer += other.rows_with_fewer;
        self.pairs_without += other.pairs_without;
        self.candidates += other.candidates;
        self.dropped.add(&other.dropped);
        self.positive_scores.merge(&other.positive_scores);
        self.negative_scores.merge(&other.negative_scores);
        self.differences.merge(&other.differences);
    }

    /// As one object.
    pub fn json(&self) -> Value {
        json!({
            "queries": self.queries,
            "rows": self.rows,
            "negatives": self.negatives,
            "rows_with_fewer": self.rows_with_fewer,
            "pairs_without": self.pairs_without,
            "candidates": self.candidates,
            "dropped": self.dropped,
            "positive_scores": self.positive_scores.json(),
            "negative_scores": self.negative_scores.json(),
            "differences": self.differences.json(),
        })
    }
}

impl Scores {
    pub(super) fn push(&mut self, score: f32) {
        self.merge(&Self { count: 1, sum: f64::from(score), extremes: Some((score, score)) });
    }

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.extremes = match (self.extremes, other.extremes) {
            (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
            (one, other) => one.or(other),
        };
    }

    fn json(&self) -> Value {
        let Some((min, max)) = self.extremes else { return Value::Null };
        json!({"mean": self.sum / self.count as f64, "min": min, "max": max})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_parts_add_up() {
        let part = |scores: &[f32]| {
            let mut counts = Counts { rows: 1, ..Counts::default() };
            counts.dropped.range = 2;
            scores.iter().for_each(|&score| counts.negative_scores.push(score));
            counts
        };
        let mut all = part(&[0.5, 0.25]);
        all.add(&part(&[]));
        all.add(&part(&[-0.75]));
        let json = all.json();
        assert_eq!(json["negative_scores"], json!({"mean": 0.0, "min": -0.75, "max": 0.5}));
        assert_eq!((&json["rows"], &json["dropped"]["range"]), (&json!(3), &json!(6)));
        assert_eq!(json["positive_scores"], Value::Null);
    }
}
