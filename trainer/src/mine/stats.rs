//! Statistics of mining: rows, negatives, scores, and candidates dropped by reason.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::select::Dropped;

/// Statistics of mining, of one block of queries or of all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MiningStats {
    /// Number of queries.
    pub queries: u64,
    /// Number of written rows, one for each pair of a query and a positive.
    pub rows: u64,
    /// Number of negatives in all rows.
    pub negatives: u64,
    /// Number of rows with fewer negatives than requested.
    pub rows_with_fewer: u64,
    /// Number of pairs without any negative, which are not written.
    pub pairs_without: u64,
    /// Number of candidates: search results of all queries.
    pub candidates: u64,
    /// Number of dropped candidates, by reason.
    pub dropped: Dropped,
    /// Scores of positives.
    pub positive_scores: ScoreStats,
    /// Scores of negatives.
    pub negative_scores: ScoreStats,
    /// Score of the positive minus score of the negative.
    pub differences: ScoreStats,
}

/// Count, sum, minimum and maximum of scores.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ScoreStats {
    count: u64,
    sum: f64,
    extremes: Option<(f32, f32)>,
}

impl MiningStats {
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

    /// Returns the statistics as a JSON object.
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

impl ScoreStats {
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
    fn statistics_of_blocks_add_up() {
        let part = |scores: &[f32]| {
            let mut counts = MiningStats { rows: 1, ..MiningStats::default() };
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
