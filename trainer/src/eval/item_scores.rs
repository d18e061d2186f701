//! The scores of single queries, triplets, pairs and rows, from which the metrics of any resample of a set
//! are computed.

use super::Scores;

/// The scores of a set's items, and how metrics follow from them.
#[derive(Clone, Debug)]
pub struct ItemScores {
    names: Vec<String>,
    count: usize,
    values: Aggregate,
}

#[derive(Clone, Debug)]
enum Aggregate {
    /// (items, metrics). Every metric is the mean of its column.
    Mean(Vec<f64>),
    /// (items, metrics − 1). As `Mean`, and the last metric is the largest of the others.
    MeanAndMax(Vec<f64>),
    /// Pearson's and Spearman's correlation of two columns (items).
    Correlation([SortedValues; 2]),
}

/// Values, and their indices in ascending order of the values.
#[derive(Clone, Debug)]
struct SortedValues {
    values: Vec<f64>,
    order: Vec<u32>,
}

impl ItemScores {
    /// Metrics that are means over the items. `values`: (items, names).
    pub(super) fn means(names: Vec<String>, values: Vec<f64>) -> Self {
        let count = values.len() / names.len();
        Self { names, count, values: Aggregate::Mean(values) }
    }

    /// As [`means`](Self::means), with one more name, that of the largest metric. `values`: (items, names −
    /// 1).
    pub(super) fn with_largest(names: Vec<String>, values: Vec<f64>) -> Self {
        let count = values.len() / (names.len() - 1);
        Self { names, count, values: Aggregate::MeanAndMax(values) }
    }

    /// Pearson's and Spearman's correlation of two columns (items).
    pub(super) fn correlations(names: [String; 2], expected: Vec<f64>, computed: Vec<f64>) -> Self {
        let count = computed.len();
        let values = Aggregate::Correlation([SortedValues::new(expected), SortedValues::new(computed)]);
        Self { names: names.into(), count, values }
    }

    /// The number of items.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The names of the metrics, without the set's name.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The metrics in order, of a resample that has item i `counts[i]` times.
    pub fn metrics(&self, counts: &[u32]) -> Vec<f64> {
        match &self.values {
            Aggregate::Mean(values) => means(values, counts),
            Aggregate::MeanAndMax(values) => {
                let mut metrics = means(values, counts);
                metrics.push(metrics.iter().copied().fold(0.0, f64::max));
                metrics
            }
            Aggregate::Correlation([x, y]) => {
                vec![
                    pearson(&x.values, &y.values, counts),
                    pearson(&x.ranks(counts), &y.ranks(counts), counts),
                ]
            }
        }
    }

    /// The metrics of the whole set by name.
    pub(super) fn scores(&self) -> Scores {
        self.names.iter().cloned().zip(self.metrics(&vec![1; self.count])).collect()
    }
}

/// The rank of each value, from 1. Equal values share the mean of their ranks; NaN anywhere makes every rank
/// NaN.
pub(super) fn ranks(values: &[f64]) -> Vec<f64> {
    SortedValues::new(values.to_vec()).ranks(&vec![1; values.len()])
}

/// The means of the columns of `values` (items, metrics).
fn means(values: &[f64], counts: &[u32]) -> Vec<f64> {
    let mut sums = vec![0.0; values.len() / counts.len()];
    for (row, &count) in values.chunks_exact(sums.len()).zip(counts).filter(|(_, count)| **count > 0) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(count) * value);
    }
    let all = total(counts);
    sums.iter().map(|sum| sum / all).collect()
}

fn total(counts: &[u32]) -> f64 {
    counts.iter().map(|&count| f64::from(count)).sum()
}

/// Pearson's correlation Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²); NaN if either is constant.
fn pearson(x: &[f64], y: &[f64], counts: &[u32]) -> f64 {
    let all = total(counts);
    let mean = |x: &[f64]| x.iter().zip(counts).map(|(x, &count)| f64::from(count) * x).sum::<f64>() / all;
    let (mx, my) = (mean(x), mean(y));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for ((x, y), &count) in x.iter().zip(y).zip(counts) {
        let (dx, dy, count) = (x - mx, y - my, f64::from(count));
        xx += count * dx * dx;
        yy += count * dy * dy;
        xy += count * dx * dy;
    }
    xy / (xx * yy).sqrt()
}

impl SortedValues {
    fn new(values: Vec<f64>) -> Self {
        let mut order: Vec<u32> = (0..values.len() as u32).collect();
        order.sort_by(|&a, &b| values[a as usize].total_cmp(&values[b as usize]));
        Self { values, order }
    }

    /// As [`ranks`], if value i occurs `counts[i]` times.
    fn ranks(&self, counts: &[u32]) -> Vec<f64> {
        let value = |index: u32| self.values[index as usize];
        if self.values.iter().any(|value| value.is_nan()) {
            return vec![f64::NAN; self.values.len()];
        }
        let mut ranks = vec![0.0; self.values.len()];
        let mut before = 0.0;
        for equal in self.order.chunk_by(|&a, &b| value(a) == value(b)) {
            let many: f64 = equal.iter().map(|&index| f64::from(counts[index as usize])).sum();
            let rank = before + (many + 1.0) / 2.0;
            equal.iter().for_each(|&index| ranks[index as usize] = rank);
            before += many;
        }
        ranks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names<const N: usize>(names: [&str; N]) -> [String; N] {
        names.map(str::to_owned)
    }

    #[test]
    fn equal_values_share_their_mean_rank() {
        let ranks = |values: &[f64], counts: &[u32]| SortedValues::new(values.to_vec()).ranks(counts);
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0, 3.0], &[1; 5]), [4.0, 1.0, 4.0, 2.0, 4.0]);
        // Twice the same item is a tie with itself: 1, 3, 3.
        assert_eq!(ranks(&[3.0, 1.0], &[2, 1]), [2.5, 1.0]);
        assert!(ranks(&[], &[]).is_empty());
        assert!(ranks(&[1.0, f64::NAN], &[1, 1]).iter().all(|rank| rank.is_nan()));
    }

    #[test]
    fn a_constant_has_no_correlation() {
        assert!(pearson(&[1.0, 2.0], &[5.0, 5.0], &[1, 1]).is_nan());
        assert!((pearson(&[1.0, 2.0, 3.0], &[-2.0, -4.0, -6.0], &[1; 3]) + 1.0).abs() < 1e-12);
    }

    #[test]
    fn counting_an_item_twice_is_writing_it_twice() {
        let counts = [2, 0, 1, 3, 1];
        let repeat = |values: &[f64], width: usize| -> Vec<f64> {
            values.chunks(width).zip(counts).flat_map(|(row, count)| row.repeat(count as usize)).collect()
        };
        let (x, y) = ([1.0, 9.0, 2.0, 2.0, 5.0], [0.3, 0.1, 0.2, 0.4, 0.2]);
        let wide = [0.0, 1.0, 0.5, 1.0, 1.0, 0.25, 0.0, 0.0, 1.0, 0.5];
        let both = |values: &[f64], make: &dyn Fn(Vec<f64>, Vec<f64>) -> ItemScores, width| {
            let counted = make(values.to_vec(), y.to_vec()).metrics(&counts);
            let written = make(repeat(values, width), repeat(&y, 1)).metrics(&[1; 7]);
            for (one, other) in counted.iter().zip(&written) {
                assert!((one - other).abs() < 1e-12, "{counted:?} {written:?}");
            }
            assert_eq!(counted.len(), written.len());
        };
        both(&x, &|x, y| ItemScores::correlations(names(["p", "s"]), x, y), 1);
        both(&wide, &|values, _| ItemScores::means(names(["a", "b"]).into(), values), 2);
        both(&wide, &|values, _| ItemScores::with_largest(names(["a", "b", "max"]).into(), values), 2);
    }

    #[test]
    fn the_largest_is_that_of_the_means() {
        let items =
            ItemScores::with_largest(names(["a", "b", "max"]).into(), vec![1.0, 0.0, 0.0, 1.0, 0.0, 1.0]);
        assert_eq!(items.count(), 3);
        assert_eq!(items.metrics(&[1, 1, 1]), [1.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0]);
        assert_eq!(items.metrics(&[3, 0, 0]), [1.0, 0.0, 1.0]);
    }
}
