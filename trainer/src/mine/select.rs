//! Which of the documents found for a query are its hard negatives.
//!
//! As `mine_hard_negatives` of sentence-transformers 6, step by step and in f32 like there. With p the lowest score of the query's
//! positives and s a candidate's, of the `range_max + positives` best candidates
//!
//! ```text
//! positives                          left out, unless asked for
//! absolute margin a:  s + a > p      dropped       max_score:  s > max   dropped
//! relative margin r:  s > p − |p|·r  dropped       min_score:  s < min   dropped       (TopK-PercPos is r = 0.05)
//! ```
//!
//! and of what is left those from `range_min` up to `range_max`: the first of them, or some at random.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use kernels::topk::Hit;

use super::texts::Inputs;
use crate::data::permutation::Permutation;
use crate::{Error, Result};

/// Which of the candidates in range are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sampling {
    /// The best.
    Top,
    /// Any, by the seed.
    Random,
}

/// What a hard negative must be.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    /// Negatives for each query; at least 1.
    pub negatives: usize,
    /// Candidates that are passed over after all others were dropped.
    pub range_min: usize,
    /// The last candidate that counts. Without it: far enough for what the others drop.
    pub range_max: Option<usize>,
    /// How far below the positive, at least.
    pub absolute_margin: Option<f32>,
    /// How far below the positive, as a share of its score's size, at least.
    pub relative_margin: Option<f32>,
    /// The lowest score.
    pub min_score: Option<f32>,
    /// The highest score.
    pub max_score: Option<f32>,
    /// Which are taken.
    pub sampling: Sampling,
    /// What random choices follow from.
    pub seed: u64,
    /// Whether the positives stay in the ranking, which is to measure rerankers with then, and nothing to train on.
    pub include_positives: bool,
}

/// Candidates that were dropped, by the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Dropped {
    /// They are positives of the query.
    pub positive: u64,
    /// Too near the positive.
    pub absolute_margin: u64,
    /// Too near the positive.
    pub relative_margin: u64,
    /// Above the highest score.
    pub max_score: u64,
    /// Below the lowest score.
    pub min_score: u64,
    /// Better than `range_min` or worse than `range_max` among what was left.
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
    /// # Errors
    /// The range is empty for these inputs, or holds fewer candidates than negatives are asked for.
    pub fn check(&self, inputs: &Inputs) -> Result<()> {
        self.range_max(inputs.most).map(drop)
    }

    /// `range_max`, where a query has at most `positives`.
    ///
    /// # Errors
    /// The range is empty, or holds fewer candidates than negatives are asked for.
    pub(super) fn range_max(&self, positives: usize) -> Result<usize> {
        let Self { negatives, range_min, .. } = *self;
        let drops =
            self.absolute_margin.is_some() || self.relative_margin.is_some() || self.max_score.is_some();
        let reach = if drops { 10 * negatives } else { negatives };
        let range_max = self.range_max.unwrap_or(range_min + reach + positives);
        if range_min >= range_max {
            return Err(Error::Usage(format!("--range {range_min}..{range_max} is empty")));
        }
        if negatives > range_max - range_min {
            return Err(Error::Usage(format!(
                "--range {range_min}..{range_max} holds {} candidates, --negatives asks for {negatives}",
                range_max - range_min
            )));
        }
        Ok(range_max)
    }

    /// The negatives of query number `query` among its `hits`, best first. `positives` are its documents, `lowest` their lowest
    /// score.
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
        let mut left = Vec::with_capacity(hits.len());
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
                left.push(hit);
                continue;
            };
            *reason += 1;
        }
        let count = left.len();
        left.truncate(range_max);
        left.drain(..self.range_min.min(left.len()));
        dropped.range += (count - left.len()) as u64;
        if left.len() <= self.negatives {
            return left;
        }
        if self.sampling == Sampling::Random {
            let order =
                Permutation::new(left.len() as u64, xxh3_64_with_seed(b"negatives", self.seed), &[query]);
            let mut taken: Vec<u64> = (0..self.negatives as u64).map(|place| order.at(place)).collect();
            taken.sort_unstable();
            return taken.into_iter().map(|place| left[place as usize]).collect();
        }
        left.truncate(self.negatives);
        left
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
        // Below zero a share of the score lowers the limit too.
        let relative = Filter { relative_margin: Some(0.5), ..filter() };
        assert_eq!(chosen(&relative, &[0.0, -0.5, -0.625, -0.75, -0.875]).0, [3, 4]);
    }

    #[test]
    fn the_range_counts_what_is_left() {
        let scores = [1.0, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3];
        let ranged = Filter { range_min: 1, range_max: Some(4), ..filter() };
        assert_eq!(chosen(&ranged, &scores).0, [2, 3]);
        assert_eq!(chosen(&Filter { max_score: Some(0.65), ..ranged.clone() }, &scores).0, [4, 5]);
        assert!(chosen(&Filter { max_score: Some(0.35), ..ranged.clone() }, &scores).0.is_empty());
        for (filter, expected) in [
            (Filter { range_min: 4, ..ranged.clone() }, "--range 4..4 is empty"),
            (Filter { negatives: 4, ..ranged }, "--range 1..4 holds 3 candidates, --negatives asks for 4"),
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
        // Document 1 is the positive; places 3 to 12 of the others are documents 4 to 13, each 400 times, ± 5 deviations.
        assert!((4..14).all(|document| (310..490).contains(&counts[document])), "{counts:?}");
        assert_eq!(counts.iter().sum::<usize>(), counts[4..14].iter().sum::<usize>());
    }
}
