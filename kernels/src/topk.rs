//! Exact top-k search by inner product, without storing the matrix of all scores.
//!
//! ```text
//! s_ij = q_i · c_j      order: s descending, then j ascending; NaN comes last
//! ```
//!
//! Scores are computed tile by tile. Most of them are below the k-th best score of their query so far, and a
//! vectorised comparison with that threshold skips them. The others are appended to a list of at most 2k; a
//! full list is reduced to its k best in linear time, which raises the threshold. Memory is O(Q·k). Beside
//! the matrix products, a query takes O(k log C) time for C documents in random order.

use rayon::prelude::*;

use crate::matmul::{Matrix, Threads, multiply};
use crate::simd::vectorised;
use crate::tile::with_scratch;

/// A document among the best ones of a query.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The score q · c; −∞ if that is NaN.
    pub score: f32,
    /// The index of the document.
    pub document: u32,
}

/// The k best documents of each of Q queries among all documents that were pushed so far.
#[derive(Clone, Debug)]
pub struct TopK {
    k: usize,
    lists: Vec<List>,
}

/// The size of a tile of scores. Its 512 KiB are enough for a matrix product to run at nearly full speed on
/// one thread.
const ROWS: usize = 256;
const COLUMNS: usize = 512;

/// The number of scores that are compared with the threshold together.
const LANES: usize = 32;

impl TopK {
    /// Creates an empty result for `queries` queries.
    pub fn new(queries: usize, k: usize) -> Self {
        Self { k, lists: vec![List { threshold: f32::NEG_INFINITY, keys: Vec::new() }; queries] }
    }

    /// Searches more documents `(C, D)` for all queries `(Q, D)`, both row by row. D is `width`.
    ///
    /// The first document has the index `first`. Portions of the documents may be pushed in any order.
    ///
    /// # Panics
    /// If a slice does not consist of whole rows, or `queries` does not have a row for each query.
    pub fn push(&mut self, queries: &[f32], documents: &[f32], width: usize, first: u32) {
        assert_eq!(queries.len(), self.lists.len() * width, "`queries` has one row for each query");
        assert!(width > 0 && documents.len().is_multiple_of(width), "`documents` consists of whole rows");
        if self.k == 0 || documents.is_empty() {
            return;
        }
        let k = self.k;
        // With few queries, each thread still gets some of them.
        let rows = self.lists.len().div_ceil(rayon::current_num_threads()).clamp(1, ROWS);
        self.lists.par_chunks_mut(rows).zip(queries.par_chunks(rows * width)).for_each(|(lists, queries)| {
            let queries = Matrix::new(queries, lists.len(), width);
            with_scratch(|scores| {
                for (tile, documents) in documents.chunks(COLUMNS * width).enumerate() {
                    let columns = documents.len() / width;
                    scores.resize(lists.len() * columns, 0.0);
                    let documents = Matrix::new(documents, columns, width).transposed();
                    multiply(scores, columns, 0.0, 1.0, queries, documents, Threads::One); // (rows, columns)
                    let first = first + (tile * COLUMNS) as u32;
                    vectorised(
                        #[inline(always)]
                        || {
                            for (list, scores) in lists.iter_mut().zip(scores.chunks_exact(columns)) {
                                list.scan(scores, first, k);
                            }
                        },
                    );
                }
            });
        });
    }

    /// Returns the best documents of each query, best first: k of them, or all if there were fewer.
    pub fn finish(self) -> Vec<Vec<Hit>> {
        let k = self.k;
        self.lists
            .into_par_iter()
            .map(|mut list| {
                list.keys.sort_unstable_by(|a, b| b.cmp(a));
                list.keys.truncate(k);
                list.keys.into_iter().map(hit).collect()
            })
            .collect()
    }
}

/// The best documents of a query so far, and candidates that may still turn out to be worse.
#[derive(Clone, Debug)]
struct List {
    /// The k-th best score when the list was last reduced.
    threshold: f32,
    keys: Vec<u64>, // at most 2k
}

impl List {
    #[inline(always)]
    fn scan(&mut self, scores: &[f32], first: u32, k: usize) {
        let (groups, rest) = scores.as_chunks::<LANES>();
        for (group, scores) in groups.iter().enumerate() {
            // Not `score >= threshold`, which is false for NaN.
            let mut below = true;
            for &score in scores {
                below &= score < self.threshold;
            }
            if !below {
                self.take(scores, first + (group * LANES) as u32, k);
            }
        }
        self.take(rest, first + (groups.len() * LANES) as u32, k);
    }

    #[inline(never)]
    fn take(&mut self, scores: &[f32], first: u32, k: usize) {
        for (document, &score) in (first..).zip(scores) {
            if score < self.threshold {
                continue;
            }
            if self.keys.len() == 2 * k {
                self.keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
                self.keys.truncate(k);
                self.threshold = hit(self.keys[k - 1]).score;
                if score < self.threshold {
                    continue;
                }
            }
            self.keys.push(key(score, document));
        }
    }
}

/// An integer that is greater for a better hit.
fn key(score: f32, document: u32) -> u64 {
    // Adding 0 turns −0 into 0, because both are equal scores.
    let bits = if score.is_nan() { f32::NEG_INFINITY.to_bits() } else { (score + 0.0).to_bits() };
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!document)
}

fn hit(key: u64) -> Hit {
    let ordered = (key >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    Hit { score: f32::from_bits(bits), document: !(key as u32) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    fn rows(seed: u64, count: usize, width: usize) -> Vec<f32> {
        random(seed, (count, width)).flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The k best of all scores in f64.
    fn reference(queries: &[f32], documents: &[f32], width: usize, k: usize) -> Vec<Vec<(f64, u32)>> {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        queries
            .chunks(width)
            .map(|query| {
                let mut all: Vec<_> =
                    (0..).zip(documents.chunks(width)).map(|(j, d)| (dot(query, d), j)).collect();
                all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                all.truncate(k);
                all
            })
            .collect()
    }

    #[test]
    fn the_best_are_those_of_all_scores_in_whatever_portions() {
        for (q, c, width, k) in
            [(1, 1, 1, 1), (3, 7, 5, 3), (300, 1201, 7, 10), (2, 40, 3, 100), (5, 1023, 33, 1)]
        {
            let (queries, documents) = (rows(1, q, width), rows(2, c, width));
            let expected = reference(&queries, &documents, width, k);
            for portion in [1, 100, 5000] {
                let mut best = TopK::new(q, k);
                // In reverse, because the order of the portions must not matter.
                for (number, documents) in documents.chunks(portion * width).enumerate().rev() {
                    best.push(&queries, documents, width, (number * portion) as u32);
                }
                for (hits, expected) in best.finish().iter().zip(&expected) {
                    assert_eq!(hits.len(), expected.len());
                    for (hit, (score, document)) in hits.iter().zip(expected) {
                        // Sums of `width` products below 100 in f32.
                        assert!((f64::from(hit.score) - score).abs() < 1e-4, "{hit:?}, expected {score}");
                        assert_eq!(hit.document, *document, "{q} {c} {width} {k} {portion}");
                    }
                }
            }
        }
    }

    #[test]
    fn equal_scores_are_ordered_by_index_and_nan_is_last() {
        let documents: Vec<f32> = (0..1000)
            .map(|j| match j % 4 {
                0 => f32::NAN,
                1 => -0.0,
                2 => 0.0,
                _ => [1.0, -1.0][usize::from(j > 500)],
            })
            .collect();
        let best = |k, portion: usize| {
            let mut best = TopK::new(1, k);
            for (number, documents) in documents.chunks(portion).enumerate() {
                best.push(&[1.0], documents, 1, (number * portion) as u32);
            }
            best.finish().remove(0)
        };
        for portion in [1, 37, 1000] {
            let hits = best(1000, portion);
            let expected: Vec<u32> = [
                (3..500).step_by(4).collect::<Vec<_>>(),
                (0..1000).filter(|j| matches!(j % 4, 1 | 2)).collect(),
                (503..1000).step_by(4).collect(),
                (0..1000).step_by(4).collect(),
            ]
            .concat();
            assert_eq!(hits.iter().map(|hit| hit.document).collect::<Vec<_>>(), expected);
            assert_eq!(hits[999].score, f32::NEG_INFINITY);
            for k in [1, 3, 126, 130, 700, 800] {
                assert_eq!(best(k, portion), hits[..k], "{k} of portions of {portion}");
            }
        }
    }

    #[test]
    fn nothing_is_found_among_nothing() {
        assert_eq!(TopK::new(2, 3).finish(), [[], []]);
        let mut best = TopK::new(1, 0);
        best.push(&[1.0], &[1.0], 1, 0);
        assert_eq!(best.finish(), [[]]);
        TopK::new(0, 4).push(&[], &[1.0], 1, 0);
    }
}
