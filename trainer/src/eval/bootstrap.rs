//! Confidence interval of the difference between two models, by the paired bootstrap (Efron & Tibshirani
//! 1993, chapter 13).
//!
//! The items of a set (queries, triplets, pairs) are resampled with replacement, and the metrics of both
//! models are computed on the same resample. The interval holds the middle 95 % of the differences over many
//! resamples.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::ItemScores;

/// Fraction of the differences that the confidence interval holds.
pub const CONFIDENCE: f64 = 0.95;

/// Resamples between two updates of the progress.
const PORTION: usize = 500;

/// How many resamples are drawn, and from which seed.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap {
    /// The number of resamples.
    pub resamples: usize,
    /// Resample n of set s is a pure function of the seed, s and n.
    pub seed: u64,
}

impl Bootstrap {
    /// tuned − base of every metric in every resample: (metrics, resamples). `set` is the number of the set
    /// among those that are compared. `done` is called with the number of resamples since its last call.
    pub fn differences(
        &self,
        set: usize,
        base: &ItemScores,
        tuned: &ItemScores,
        mut done: impl FnMut(u64),
    ) -> Vec<Vec<f64>> {
        let count = base.count();
        let resample = |counts: &mut Vec<u32>, number: usize| {
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream((set as u64) << 32 | number as u64);
            counts.clear();
            counts.resize(count, 0);
            for _ in 0..count {
                counts[random.random_range(0..count as u32) as usize] += 1;
            }
            let (base, tuned) = (base.metrics(counts), tuned.metrics(counts));
            tuned.iter().zip(base).map(|(tuned, base)| tuned - base).collect::<Vec<f64>>()
        };
        let mut metrics = vec![Vec::with_capacity(self.resamples); base.names().len()];
        for start in (0..self.resamples).step_by(PORTION) {
            let end = self.resamples.min(start + PORTION);
            let portion: Vec<Vec<f64>> = (start..end).into_par_iter().map_init(Vec::new, resample).collect();
            for differences in portion {
                metrics.iter_mut().zip(differences).for_each(|(metric, difference)| metric.push(difference));
            }
            done((end - start) as u64);
        }
        metrics
    }
}

/// The lower and the upper end of the middle [`CONFIDENCE`] of the differences, by linear interpolation
/// between quantiles. Resamples in which a metric is undefined do not count; NaN if it always is.
pub fn confidence_interval(differences: &[f64]) -> (f64, f64) {
    let mut sorted: Vec<f64> =
        differences.iter().copied().filter(|difference| difference.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let quantile = |fraction: f64| {
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        let index = fraction * last as f64;
        let (low, high) = (sorted[index.floor() as usize], sorted[index.ceil() as usize]);
        low + (high - low) * index.fract()
    };
    let tail = (1.0 - CONFIDENCE) / 2.0;
    (quantile(tail), quantile(1.0 - tail))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: Bootstrap = Bootstrap { resamples: 10_000, seed: 42 };

    fn means(values: Vec<f64>) -> ItemScores {
        ItemScores::means(vec!["m".to_owned()], values)
    }

    fn differences(base: &[f64], tuned: &[f64]) -> Vec<f64> {
        MANY.differences(0, &means(base.to_vec()), &means(tuned.to_vec()), |_| {}).remove(0)
    }

    #[test]
    fn queries_are_paired() {
        // Each query gains 0.1, so that the difference is the same in every resample.
        let base: Vec<f64> = (0..50).map(|i| f64::from(i % 9) / 10.0).collect();
        let tuned: Vec<f64> = base.iter().map(|score| score + 0.1).collect();
        let (low, high) = confidence_interval(&differences(&base, &tuned));
        assert!((low - 0.1).abs() < 1e-12 && (high - 0.1).abs() < 1e-12, "{low} {high}");
    }

    #[test]
    fn the_interval_is_that_of_the_normal_distribution_where_there_are_many() {
        // Differences of ±1 and 0 in thirds: mean 0, variance 2/3.
        let tuned: Vec<f64> = (0..3000).map(|i| f64::from(i % 3) - 1.0).collect();
        let (low, high) = confidence_interval(&differences(&[0.0; 3000], &tuned));
        let expected = 1.959_964 * (2.0 / 3.0 / 3000.0_f64).sqrt();
        // The quantile of 10,000 resamples has a standard error of 2.7 % of a standard deviation here.
        assert!(
            (high - expected).abs() < 0.06 * expected && (low + expected).abs() < 0.06 * expected,
            "{low} {high}"
        );
    }

    #[test]
    fn resamples_follow_from_the_seed_and_the_set() {
        let (base, tuned) = (means(vec![0.0; 9]), means((0..9).map(f64::from).collect()));
        let of = |bootstrap: Bootstrap, set| bootstrap.differences(set, &base, &tuned, |_| {});
        let few = Bootstrap { resamples: 700, seed: 7 };
        assert_eq!(of(few, 0), of(few, 0));
        assert_ne!(of(few, 0), of(few, 1));
        assert_ne!(of(few, 0), of(Bootstrap { seed: 8, ..few }, 0));
        // More resamples begin with the same ones, and all are reported.
        let mut reported = 0;
        let more =
            Bootstrap { resamples: 1100, ..few }.differences(0, &base, &tuned, |done| reported += done);
        assert_eq!(more[0][..700], of(few, 0)[0]);
        assert_eq!((more[0].len(), reported), (1100, 1100));
    }

    #[test]
    fn the_ends_are_quantiles_and_undefined_differences_do_not_count() {
        let mut values: Vec<f64> = (0..=1000).rev().map(f64::from).collect();
        values.push(f64::NAN);
        let (low, high) = confidence_interval(&values);
        assert!((low - 25.0).abs() < 1e-9 && (high - 975.0).abs() < 1e-9, "{low} {high}");
        assert_eq!(confidence_interval(&[0.5]), (0.5, 0.5));
        assert!(confidence_interval(&[f64::NAN]).0.is_nan());
    }
}
