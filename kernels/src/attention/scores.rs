//! What happens to a tile of scores between its products: hiding, the bias by distance, dropout, softmax and its gradient.

use super::head::Block;
use super::{Head, Job, Shared};
use crate::rows::add;
use crate::tile::{exp2, transpose};
use pulp::Simd;
use std::f32::consts::LOG2_E;
use std::ops::Range;

impl Job<'_> {
    /// Sets the scores that a query must not see to -∞.
    #[inline(always)]
    pub(super) fn hide(
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
            // Key j is seen by the queries from j − right to j + left.
            let start = self.attention.right.map_or(0, |right| j.saturating_sub(right) * group);
            let end = self.attention.left.map_or(usize::MAX, |left| (j + left.min(head.tokens) + 1) * group);
            row[..columns.min(start.saturating_sub(block.first))].fill(f32::NEG_INFINITY);
            row[columns.min(end.saturating_sub(block.first))..columns].fill(f32::NEG_INFINITY);
        }
    }
}

/// The bias by distance. A line holds one head's bias for all distances inside one text, the farthest key ahead first:
/// element x at the distance S − 1 − x, so that a row of scores, the queries of one key, is a piece of it.
impl Job<'_> {
    /// Elements of a line; 0 without a bias.
    pub(super) fn line(&self, head: Head) -> usize {
        if self.columns == 0 { 0 } else { 2 * head.tokens - 1 }
    }

    /// The column of element `x` of a line.
    #[inline(always)]
    fn column(&self, head: Head, x: usize) -> usize {
        let reach = self.columns / 2;
        (head.tokens - 1 + reach).saturating_sub(x).min(2 * reach)
    }

    pub(super) fn fill_line(&self, head: Head, line: &mut [f32]) {
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

    /// Adds dL/d(scores) of a tile to the gradient of a line.
    #[inline(always)]
    pub(super) fn add_to_line(
        &self,
        head: Head,
        block: &Block,
        keys: &Range<usize>,
        ds: &[f32],
        dline: &mut [f32],
    ) {
        if self.columns == 0 {
            return;
        }
        for (row, j) in ds.chunks_exact(self.tiles.queries).zip(keys.clone()) {
            add(&mut dline[head.tokens - 1 + block.first - j..], &row[..block.lanes]);
        }
    }

    /// Writes the gradient of one head's bias in one text.
    ///
    /// # Safety
    /// No other thread reads or writes that row of `dbias`.
    pub(super) unsafe fn write_bias(&self, head: Head, dline: &[f32], dbias: &Shared) {
        if self.columns == 0 {
            return;
        }
        let mut row = vec![0f32; self.columns];
        for (x, d) in dline.iter().enumerate() {
            row[self.column(head, x)] += d;
        }
        // SAFETY: the caller's word.
        unsafe { dbias.write((head.n * self.attention.heads + head.g) * self.columns, &row, 1.0) };
    }
}

/// Dropout of the probabilities.
impl Job<'_> {
    /// Scratch for [`Self::draw`]: a row of factors for each query, and for those of the tokens that a block cuts.
    pub(super) fn factor_rows(&self) -> usize {
        let rows = self.tiles.queries + 2 * self.group();
        if self.attention.dropout.is_some() { rows * self.tiles.keys } else { 0 }
    }

    /// Scratch for [`Self::draw`]: the factors of a tile.
    pub(super) fn factors(&self) -> usize {
        if self.attention.dropout.is_some() { self.tiles.queries * self.tiles.keys } else { 0 }
    }

    /// Draws the factors of a tile, 0 or 1/(1 − p); false without dropout.
    #[inline(always)]
    pub(super) fn draw(
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
            // Rows of all keys are one run of elements: few of them make a block of Philox each.
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

/// Online softmax of a tile of scores (in powers of two), which become weights relative to the highest score so far.
/// `shrink` is by how much what was summed before the tile has to shrink.
#[inline(always)]
pub(super) fn weigh<S: Simd>(
    simd: S,
    scores: &mut [f32],
    stride: usize,
    keys: usize,
    columns: usize,
    [top, total, shrink]: [&mut [f32]; 3],
) {
    let scores = S::as_mut_simd_f32s(scores).0;
    let (top, total) = (S::as_mut_simd_f32s(top).0, S::as_mut_simd_f32s(total).0);
    let shrink = S::as_mut_simd_f32s(shrink).0;
    let (stride, vectors) = (stride / S::F32_LANES, columns / S::F32_LANES);
    let scores = &mut scores[..keys * stride];
    for w in 0..vectors {
        // Four chains: one alone would wait for each maximum.
        let mut tops = [top[w]; 4];
        let mut rows = scores.chunks_exact(4 * stride);
        for four in &mut rows {
            for (i, top) in tops.iter_mut().enumerate() {
                *top = simd.max_f32s(*top, four[i * stride + w]);
            }
        }
        for row in rows.remainder().chunks_exact(stride) {
            tops[0] = simd.max_f32s(tops[0], row[w]);
        }
        let [a, b, c, d] = tops;
        let highest = simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d));
        shrink[w] = exp2(simd, simd.sub_f32s(top[w], highest));
        top[w] = highest;
        let mut sum = simd.mul_f32s(total[w], shrink[w]);
        for row in scores.chunks_exact_mut(stride) {
            row[w] = exp2(simd, simd.sub_f32s(row[w], highest));
            sum = simd.add_f32s(sum, row[w]);
        }
        total[w] = sum;
    }
}

/// From scores (in powers of two) and dL/dp: the probabilities, and dL/d(scores). With dropout the probabilities are
/// those that it leaves, and so was the p of dL/dp.
#[inline(always)]
pub(super) fn differentiate<S: Simd>(
    simd: S,
    [p, dp]: [&mut [f32]; 2],
    stride: usize,
    keys: usize,
    columns: usize,
    [own, base]: [&[f32]; 2],
    factors: Option<&[f32]>,
) {
    let (p, dp) = (S::as_mut_simd_f32s(p).0, S::as_mut_simd_f32s(dp).0);
    let (own, base) = (S::as_simd_f32s(own).0, S::as_simd_f32s(base).0);
    let (stride, vectors) = (stride / S::F32_LANES, columns / S::F32_LANES);
    let rows = p.chunks_exact_mut(stride).zip(dp.chunks_exact_mut(stride)).take(keys);
    let Some(factors) = factors else {
        for (p, dp) in rows {
            for w in 0..vectors {
                p[w] = exp2(simd, simd.sub_f32s(p[w], base[w]));
                dp[w] = simd.mul_f32s(p[w], simd.sub_f32s(dp[w], own[w]));
            }
        }
        return;
    };
    for ((p, dp), factors) in rows.zip(S::as_simd_f32s(factors).0.chunks_exact(stride)) {
        for w in 0..vectors {
            let (probability, factor) = (exp2(simd, simd.sub_f32s(p[w], base[w])), factors[w]);
            p[w] = simd.mul_f32s(probability, factor);
            dp[w] = simd.mul_f32s(probability, simd.sub_f32s(simd.mul_f32s(dp[w], factor), own[w]));
        }
    }
}
