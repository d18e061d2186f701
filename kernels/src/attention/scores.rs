//! Operations on a tile of scores between its matrix products: mask, bias, dropout, softmax and their
//! gradients.

use super::{Block, Head, Job, Shared};
use crate::rows::add;
use crate::tile::{exp2, transpose};
use pulp::Simd;
use std::f32::consts::LOG2_E;
use std::ops::Range;

impl Job<'_> {
    /// Sets the scores of keys that are not visible to a query to −∞.
    #[inline(always)]
    pub(super) fn mask(
        &self,
        head: Head,
        block: &Block,
        keys: &Range<usize>,
        columns: usize,
        scores: &mut [f32],
    ) {
        let visible = |r| self.attention.visible(self.token_and_member(r).0, head.tokens);
        let (first, last) = (visible(block.first), visible(block.first + block.lanes - 1));
        if last.start <= keys.start && keys.end <= first.end {
            return;
        }
        let group = self.group();
        for (row, j) in scores.chunks_exact_mut(self.tiles.queries).zip(keys.clone()) {
            // Key j is visible to the queries from j − right to j + left.
            let start = self.attention.right.map_or(0, |right| j.saturating_sub(right) * group);
            let end = self.attention.left.map_or(usize::MAX, |left| (j + left.min(head.tokens) + 1) * group);
            row[..columns.min(start.saturating_sub(block.first))].fill(f32::NEG_INFINITY);
            row[columns.min(end.saturating_sub(block.first))..columns].fill(f32::NEG_INFINITY);
        }
    }
}

/// The relative position bias.
///
/// A bias line holds the bias of one head for all distances in a sequence of S tokens in descending order:
/// element x belongs to the distance S − 1 − x. A row of scores, the queries of one key, then adds a
/// contiguous piece of the line.
impl Job<'_> {
    /// The number of elements of a bias line; 0 without a bias.
    pub(super) fn bias_line_len(&self, head: Head) -> usize {
        if self.columns == 0 { 0 } else { 2 * head.tokens - 1 }
    }

    /// The column of the bias for element `x` of a bias line.
    #[inline(always)]
    fn column(&self, head: Head, x: usize) -> usize {
        let max_distance = self.columns / 2;
        (head.tokens - 1 + max_distance).saturating_sub(x).min(2 * max_distance)
    }

    /// Fills the bias line of a head, in units of log₂.
    pub(super) fn fill_bias_line(&self, head: Head, line: &mut [f32]) {
        for (x, element) in line.iter_mut().enumerate() {
            *element = self.bias[head.g * self.columns + self.column(head, x)] * LOG2_E;
        }
    }

    /// Adds the bias to the scores of a tile.
    #[inline(always)]
    pub(super) fn add_bias(
        &self,
        head: Head,
        block: &Block,
        keys: &Range<usize>,
        line: &[f32],
        scores: &mut [f32],
    ) {
        if self.columns == 0 {
            return;
        }
        for (row, j) in scores.chunks_exact_mut(self.tiles.queries).zip(keys.clone()) {
            add(&mut row[..block.lanes], &line[head.tokens - 1 + block.first - j..]);
        }
    }

    /// Adds dL/d(scores) of a tile to the gradient of the bias line.
    #[inline(always)]
    pub(super) fn add_to_bias_line(
        &self,
        head: Head,
        block: &Block,
        keys: &Range<usize>,
        ds: &[f32],
        d_line: &mut [f32],
    ) {
        if self.columns == 0 {
            return;
        }
        for (row, j) in ds.chunks_exact(self.tiles.queries).zip(keys.clone()) {
            add(&mut d_line[head.tokens - 1 + block.first - j..], &row[..block.lanes]);
        }
    }

    /// Writes the gradient of the bias of one head for one sequence.
    ///
    /// # Safety
    /// No other thread may read or write that row of `dbias`.
    pub(super) unsafe fn write_bias_gradient(&self, head: Head, d_line: &[f32], dbias: &Shared) {
        if self.columns == 0 {
            return;
        }
        let mut row = vec![0f32; self.columns];
        for (x, d) in d_line.iter().enumerate() {
            row[self.column(head, x)] += d;
        }
        // SAFETY: the caller guarantees it.
        unsafe { dbias.write((head.n * self.attention.heads + head.g) * self.columns, &row, 1.0) };
    }
}

/// Dropout of the probabilities.
impl Job<'_> {
    /// Length of the first scratch of [`Self::dropout_factors`]: a row for each query of a block. The rows of
    /// a token are computed for all heads of the group, even if the block has only some of them, which can be
    /// so for its first and its last token.
    pub(super) fn dropout_rows_len(&self) -> usize {
        let rows = self.tiles.queries + 2 * self.group();
        if self.attention.dropout.is_some() { rows * self.tiles.keys } else { 0 }
    }

    /// Length of the second scratch of [`Self::dropout_factors`]: the factors of a tile.
    pub(super) fn dropout_factors_len(&self) -> usize {
        if self.attention.dropout.is_some() { self.tiles.queries * self.tiles.keys } else { 0 }
    }

    /// Computes the dropout factors of a tile, 0 or 1/(1 − p), in `factors`; returns false without dropout.
    #[inline(always)]
    pub(super) fn dropout_factors(
        &self,
        head: Head,
        block: &Block,
        keys: &Range<usize>,
        lanes: usize,
        [rows, factors]: [&mut [f32]; 2],
    ) -> bool {
        let Some(dropout) = self.attention.dropout else { return false };
        let (number, group, width) = (self.packing.number(head.n), self.group(), keys.len());
        let first = self.token_and_member(block.first).0;
        let tokens = self.token_and_member(block.first + block.lanes - 1).0 + 1 - first;
        for member in 0..group {
            let h = head.g * group + member;
            let element =
                |i: usize| (h * head.tokens + first + i) as u64 * head.tokens as u64 + keys.start as u64;
            let rows = &mut rows[member * tokens * width..][..tokens * width];
            // Rows of all keys are one run of elements, which wastes fewer words of Philox than many short
            // runs.
            let (runs, run) = if width == head.tokens { (1, tokens * width) } else { (tokens, width) };
            for i in 0..runs {
                let rows = &mut rows[i * run..][..run];
                dropout.factors(
                    number,
                    element(i),
                    run,
                    #[inline(always)]
                    |range, factors| rows[range].copy_from_slice(factors),
                );
            }
        }
        transpose(
            factors,
            self.tiles.queries,
            (block.lanes, width),
            lanes,
            1.0,
            #[inline(always)]
            |r| {
                let (token, member) = self.token_and_member(block.first + r);
                &rows[(member * tokens + token - first) * width..]
            },
        );
        true
    }
}

/// One step of the online softmax: replaces the scores s of a tile, in units of log₂, by 2^(s − maximum so
/// far).
///
/// `row_max` and `row_sum` are updated; `rescale` receives the factor for the sums of the tiles before.
#[inline(always)]
pub(super) fn online_softmax<S: Simd>(
    simd: S,
    scores: &mut [f32],
    stride: usize,
    keys: usize,
    columns: usize,
    [row_max, row_sum, rescale]: [&mut [f32]; 3],
) {
    let scores = S::as_mut_simd_f32s(scores).0;
    let (row_max, row_sum) = (S::as_mut_simd_f32s(row_max).0, S::as_mut_simd_f32s(row_sum).0);
    let rescale = S::as_mut_simd_f32s(rescale).0;
    let (stride, vectors) = (stride / S::F32_LANES, columns / S::F32_LANES);
    let scores = &mut scores[..keys * stride];
    for w in 0..vectors {
        // Four independent chains hide the latency of the maximum.
        let mut maxima = [row_max[w]; 4];
        let mut rows = scores.chunks_exact(4 * stride);
        for four in &mut rows {
            for (i, max) in maxima.iter_mut().enumerate() {
                *max = simd.max_f32s(*max, four[i * stride + w]);
            }
        }
        for row in rows.remainder().chunks_exact(stride) {
            maxima[0] = simd.max_f32s(maxima[0], row[w]);
        }
        let [a, b, c, d] = maxima;
        let new_max = simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d));
        rescale[w] = exp2(simd, simd.sub_f32s(row_max[w], new_max));
        row_max[w] = new_max;
        let mut sum = simd.mul_f32s(row_sum[w], rescale[w]);
        for row in scores.chunks_exact_mut(stride) {
            row[w] = exp2(simd, simd.sub_f32s(row[w], new_max));
            sum = simd.add_f32s(sum, row[w]);
        }
        row_sum[w] = sum;
    }
}

/// Replaces the scores of a tile (in units of log₂) in `p` by the probabilities, and dL/dp in `dp` by
/// dL/d(scores).
///
/// `delta` is rowsum(do ∘ o) and `lse_log2` the log-sum-exp in units of log₂. With dropout, `factors` are
/// multiplied into the probabilities, and `dp` is the gradient of the product.
#[inline(always)]
pub(super) fn softmax_backward<S: Simd>(
    simd: S,
    [p, dp]: [&mut [f32]; 2],
    stride: usize,
    keys: usize,
    columns: usize,
    [delta, lse_log2]: [&[f32]; 2],
    factors: Option<&[f32]>,
) {
    let (p, dp) = (S::as_mut_simd_f32s(p).0, S::as_mut_simd_f32s(dp).0);
    let (delta, lse_log2) = (S::as_simd_f32s(delta).0, S::as_simd_f32s(lse_log2).0);
    let (stride, vectors) = (stride / S::F32_LANES, columns / S::F32_LANES);
    let rows = p.chunks_exact_mut(stride).zip(dp.chunks_exact_mut(stride)).take(keys);
    let Some(factors) = factors else {
        for (p, dp) in rows {
            for w in 0..vectors {
                p[w] = exp2(simd, simd.sub_f32s(p[w], lse_log2[w]));
                dp[w] = simd.mul_f32s(p[w], simd.sub_f32s(dp[w], delta[w]));
            }
        }
        return;
    };
    for ((p, dp), factors) in rows.zip(S::as_simd_f32s(factors).0.chunks_exact(stride)) {
        for w in 0..vectors {
            let (probability, factor) = (exp2(simd, simd.sub_f32s(p[w], lse_log2[w])), factors[w]);
            p[w] = simd.mul_f32s(probability, factor);
            dp[w] = simd.mul_f32s(probability, simd.sub_f32s(simd.mul_f32s(dp[w], factor), delta[w]));
        }
    }
}
