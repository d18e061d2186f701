//! Selects the hard negatives of a query from its search results.
//!
//! The rules are those of `mine_hard_negatives` in sentence-transformers 6, in the same order and in f32. The
//! candidates are the `range_max + positives` best documents. With `p` the lowest score of the query's
//! positives and `s` the score of a candidate, a candidate is dropped
//!
//! ```text
//! if it is a positive, unless include_positives
//! absolute_margin a:  if s + a > p
//! relative_margin r:  if s > p − |p|·r          (r = 0.05: TopK-PercPos of NV-Retriever)
//! max_score:          if s > max_score
//! min_score:          if s < min_score
//! ```
//!
//! Of the remaining candidates those at ranks `range_min` to `range_max` are kept, and of these the first, or
//! some at random.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use kernels::topk::Hit;

use super::texts::Inputs;
use crate::data::permutation::Permutation;
use crate::{Error, Result};

/// Which of the candidates in the range become negatives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sampling {
    /// Those with the highest scores.
    Top,
    /// Uniformly random ones.
    Random,
}

/// Conditions that a hard negative must meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    /// Largest number of negatives per query; at least 1.
    pub negatives: usize,
    /// Number of the best remaining candidates to skip.
    pub range_min: usize,
    /// Rank after the last remaining candidate to use. Default: `range_min` + n + the largest number of
    /// positives of a query, where n is `negatives`, or ten times that if a margin or `max_score` is set.
    pub range_max: Option<usize>,
    /// Smallest difference between the positive's score and a negative's.
    pub absolute_margin: Option<f32>,
    /// Smallest difference between the positive's score and a negative's, as a fraction of the positive's
    /// absolute score.
    pub relative_margin: Option<f32>,
    /// Lowest score of a negative.
    pub min_score: Option<f32>,
    /// Highest score of a negative.
    pub max_score: Option<f32>,
    /// How negatives are chosen from the candidates in the range.
    pub sampling: Sampling,
    /// Seed of random choices.
    pub seed: u64,
    /// Whether positives are candidates too. Such rows are for the evaluation of rerankers, not for training.
    pub include_positives: bool,
}

/// Number of dropped candidates, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Dropped {
    /// The candidate is a positive of the query.
    pub positive: u64,
    /// The score is within the absolute margin of the positive's.
    pub absolute_margin: u64,
    /// The score is within the relative margin of the positive's.
    pub relative_margin: u64,
    /// The score is above `max_score`.
    pub max_score: u64,
    /// The score is below `min_score`.
    pub min_score: u64,
    /// The rank among the remaining candidates is outside the range.
    pub range: u64,
}

impl Dropped {
    pub(super) fn add(&mut self, other: &Self) {
        self.positive += other.positive;
        self.absolute_margin += other.absolute_margin;
        self.relative_margin += other.relative_margin;
        self.max_score += other.max_score;
        self.min_score += other.min_score;
        self.range += other.range;
    }
}

impl Filter {
    /// Checks the range for these inputs.
    ///
    /// # Errors
    /// The range is empty, or has fewer ranks than `negatives`.
    pub fn check(&self, inputs: &Inputs) -> Result<()> {
        self.range_max(inputs.max_positives).map(drop)
    }

    /// Returns `range_max` or its default, for queries with at most `positives` positives.
    ///
    /// # Errors
    /// The range is empty, or has fewer ranks than `negatives`.
    pub(super) fn range_max(&self, positives: usize) -> Result<usize> {
        let Self { negatives, range_min, .. } = *self;
        let drops =
            self.absolute_margin.is_some() || self.relative_margin.is_some() || self.max_score.is_some();
        let window = if drops { 10 * negatives } else { negatives };
        let range_max = self.range_max.unwrap_or(range_min + window + positives);
        if range_min >= range_max {
            return Err(Error::Usage(format!("--range {range_min}..{range_max} is empty")));
        }
        if negatives > range_max - range_min {
            return Err(Error::Usage(format!(
                "--range {range_min}..{range_max} has {} ranks, fewer than --negatives {negatives}",
                range_max - range_min
            )));
        }
        Ok(range_max)
    }

    /// Returns the negatives of query number `query` from its search results `hits`, best first. `positives`
    /// are the numbers of its positives, `lowest` their lowest score.
    pub(super) fn choose(
        &self,
        query: u64,
        hits: &[Hit],
        positives: &[u32],
        lowest: f32,
        range_max: usize,
        dropped: &mut Dropped,
    ) -> Vec<Hit> {
        let relative = self.relative_margin.map(|margin| lowest - lowest.abs() * margin);
        let mut remaining = Vec::with_capacity(hits.len());
        for &hit in hits {
            let reason = if !self.include_positives && positives.contains(&hit.document) {
                &mut dropped.positive
            } else if self.absolute_margin.is_some_and(|margin| hit.score + margin > lowest) {
                &mut dropped.absolute_margin
            } else if relative.is_some_and(|highest| hit.score > highest) {
                &mut dropped.relative_margin
            } else if self.max_score.is_some_and(|highest| hit.score > highest) {
                &mut dropped.max_score
            } else if self.min_score.is_some_and(|least| hit.score < least) {
                &mut dropped.min_score
            } else {
                remaining.push(hit);
                continue;
            };
            *reason += 1;
        }
        let count = remaining.len();
        remaining.truncate(range_max);
        remaining.drain(..self.range_min.min(remaining.len()));
        dropped.range += (count - remaining.len()) as u64;
        if remaining.len() <= self.negatives {
            return remaining;
        }
        if self.sampling == Sampling::Random {
            let order = Permutation::new(
                remaining.len() as u64,
                xxh3_64_with_seed(b"negatives", self.seed),
                &[query],
            );
            let mut ranks: Vec<u64> = (0..self.negatives as u64).map(|place| order.at(place)).collect();
            ranks.sort_unstable();
            return ranks.into_iter().map(|place| remaining[place as usize]).collect();
        }
        remaining.truncate(self.negatives);
        remaining
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter() -> Filter {
        Filter {
            negatives: 2,
            range_min: 0,
            range_max: None,
            absolute_margin: None,
            relative_margin: None,
            min_score: None,
            max_score: None,
            sampling: Sampling::Top,
            seed: 1,
            include_positives: false,
        }
    }

    fn chosen(filter: &Filter, scores: &[f32]) -> (Vec<u32>, Dropped) {
        let hits: Vec<Hit> = (0..).zip(scores).map(|(document, &score)| Hit { score, document }).collect();
        let mut dropped = Dropped::default();
        let range_max = filter.range_max(1).unwrap();
        let hits = filter.choose(0, &hits, &[1], scores[1], range_max, &mut dropped);
        (hits.iter().map(|hit| hit.document).collect(), dropped)
    }

    #[test]
    fn every_reason_counts_once_and_in_its_turn() {
        let scores = [1.0, 0.75, 0.75, 0.5, 0.25, 0.125, -0.5];
        assert_eq!(
            chosen(&filter(), &scores),
            (vec![0, 2], Dropped { positive: 1, range: 3, ..Dropped::default() })
        );
        // A score as high as the limit stays.
        let absolute = Filter { absolute_margin: Some(0.25), ..filter() };
        assert_eq!(chosen(&absolute, &scores).0, [3, 4]);
        let all =
            Filter { relative_margin: Some(0.5), min_score: Some(0.0), max_score: Some(0.2), ..absolute };
        let (found, dropped) = chosen(&all, &scores);
        assert_eq!(found, [5]);
        let expected = Dropped {
            positive: 1,
            absolute_margin: 2,
            relative_margin: 1,
            max_score: 1,
            min_score: 1,
            range: 0,
        };
        assert_eq!(dropped, expected);
        // The relative margin uses |p|, so it lowers the limit for negative scores too.
        let relative = Filter { relative_margin: Some(0.5), ..filter() };
        assert_eq!(chosen(&relative, &[0.0, -0.5, -0.625, -0.75, -0.875]).0, [3, 4]);
    }

    #[test]
    fn the_range_counts_the_remaining_candidates() {
        let scores = [1.0, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3];
        let ranged = Filter { range_min: 1, range_max: Some(4), ..filter() };
        assert_eq!(chosen(&ranged, &scores).0, [2, 3]);
        assert_eq!(chosen(&Filter { max_score: Some(0.65), ..ranged.clone() }, &scores).0, [4, 5]);
        assert!(chosen(&Filter { max_score: Some(0.35), ..ranged.clone() }, &scores).0.is_empty());
        for (filter, expected) in [
            (Filter { range_min: 4, ..ranged.clone() }, "--range 4..4 is empty"),
            (Filter { negatives: 4, ..ranged }, "--range 1..4 has 3 ranks, fewer than --negatives 4"),
        ] {
            assert_eq!(filter.range_max(1).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn random_negatives_are_any_of_the_range_and_follow_the_seed() {
        let scores: Vec<f32> = (0..40).map(|i| 1.0 - i as f32 / 40.0).collect();
        let mut counts = [0; 40];
        for seed in 0..2000 {
            let random =
                Filter { sampling: Sampling::Random, range_min: 3, range_max: Some(13), seed, ..filter() };
            let (found, _) = chosen(&random, &scores);
            assert!(found.len() == 2 && found[0] < found[1], "{found:?}");
            assert_eq!(chosen(&random, &scores).0, found);
            found.iter().for_each(|&document| counts[document as usize] += 1);
        }
        // Document 1 is the positive; ranks 3 to 12 of the others are documents 4 to 13, each about 400
        // times, ± 5 standard deviations.
        assert!((4..14).all(|document| (310..490).contains(&counts[document])), "{counts:?}");
        assert_eq!(counts.iter().sum::<usize>(), counts[4..14].iter().sum::<usize>());
    }
}
