//! Forward and backward pass of one sequence and one key-value head, tile by tile.
//!
//! In a tile of scores the rows are keys and the lanes of a vector are queries. So the softmax needs no sum
//! across lanes, k and v are read without a copy, and only q and do are transposed. A lane is one query of
//! one of the H/G heads that share the key-value head. Queries of all these heads are adjacent, so that short
//! sequences fill the vectors too.

use super::scores::{online_softmax, softmax_backward};
use super::{Head, Job, Shared};
use crate::tile::{Product, split, transpose};
use pulp::{Simd, WithSimd};
use std::f32::consts::{LN_2, LOG2_E};

/// The forward pass of one head; writes its rows of `o` and `lse`.
pub(super) struct Forward<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) head: Head,
    pub(super) scratch: &'a mut Vec<f32>,
    pub(super) o: &'a Shared,
    pub(super) lse: &'a Shared,
}

/// The backward pass of one head; writes its rows of `dq`, `dk`, `dv` and `dbias`.
pub(super) struct Backward<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) head: Head,
    pub(super) scratch: &'a mut Vec<f32>,
    pub(super) o: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) d_o: &'a [f32],
    pub(super) dq: &'a Shared,
    pub(super) dk: &'a Shared,
    pub(super) dv: &'a Shared,
    pub(super) dbias: &'a Shared,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { job, head, scratch, o, lse } = self;
        let (width, tile) = (job.attention.head_width, job.tiles);
        let padded = width.next_multiple_of(S::F32_LANES);
        let [line, factor_rows, factors, v_copy, q, scores, sums, row_max, row_sum, rescale] = split(
            scratch,
            [
                job.bias_line_len(head),
                job.dropout_rows_len(),
                job.dropout_factors_len(),
                if padded == width { 0 } else { head.tokens * padded },
                width * tile.queries,
                tile.keys * tile.queries,
                tile.queries * padded,
                tile.queries,
                tile.queries,
                tile.queries,
            ],
        );
        job.fill_bias_line(head, line);
        let k = job.keys(head, job.k);
        let v = job.keys(head, job.v).padded(head.tokens, width, v_copy, padded);
        for block in job.blocks(head) {
            let columns = block.lanes.next_multiple_of(S::F32_LANES);
            let row = |r| &job.q[job.query(head, block.first + r)..];
            transpose(q, tile.queries, (block.lanes, width), S::F32_LANES, job.attention.scale * LOG2_E, row);
            row_max.fill(f32::MIN);
            row_sum.fill(0.0);
            let start = block.keys.start;
            for keys in job.key_tiles(&block) {
                simd.vectorize(Product {
                    m: keys.len(),
                    n: columns,
                    k: width,
                    a: k.from(keys.start),
                    a_row: k.stride,
                    a_column: 1,
                    b: q,
                    b_row: tile.queries,
                    c: scores,
                    c_row: tile.queries,
                    add: false,
                });
                job.add_bias(head, &block, &keys, line, scores);
                job.mask(head, &block, &keys, columns, scores);
                online_softmax(simd, scores, tile.queries, keys.len(), columns, [row_max, row_sum, rescale]);
                if job.dropout_factors(head, &block, &keys, S::F32_LANES, [factor_rows, factors]) {
                    let kept = &factors[..keys.len() * tile.queries];
                    scores.iter_mut().zip(kept).for_each(|(score, factor)| *score *= factor);
                }
                let add = keys.start > start;
                if add {
                    for (row, factor) in sums.chunks_exact_mut(padded).zip(&*rescale).take(block.lanes) {
                        row.iter_mut().for_each(|x| *x *= factor);
                    }
                }
                simd.vectorize(Product {
                    m: block.lanes,
                    n: padded,
                    k: keys.len(),
                    a: scores,
                    a_row: 1,
                    a_column: tile.queries,
                    b: v.from(keys.start),
                    b_row: v.stride,
                    c: sums,
                    c_row: padded,
                    add,
                });
            }
            for r in 0..block.lanes {
                let query = block.first + r;
                // SAFETY: no other task has this sequence and these heads.
                unsafe {
                    o.write(job.query(head, query), &sums[r * padded..][..width], 1.0 / row_sum[r]);
                    lse.write(job.query_lse(head, query), &[(row_max[r] + row_sum[r].log2()) * LN_2], 1.0);
                }
            }
        }
    }
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { job, head, scratch, o, lse, d_o, dq, dk, dv, dbias } = self;
        let (width, tile, scale) = (job.attention.head_width, job.tiles, job.attention.scale);
        let padded = width.next_multiple_of(S::F32_LANES);
        // Rows of q and do are read without a copy if they are whole vectors at equal distances.
        let direct = padded == width && job.group() == 1;
        let block_rows = if direct { 0 } else { tile.queries * padded };
        let [
            line,
            d_line,
            factor_rows,
            factors,
            k_copy,
            q_copy,
            d_o_copy,
            q_transposed,
            d_o_transposed,
            p,
            dp,
            dq_sums,
            dk_sums,
            dv_sums,
            delta,
            lse_log2,
        ] = split(
            scratch,
            [
                job.bias_line_len(head),
                job.bias_line_len(head),
                job.dropout_rows_len(),
                job.dropout_factors_len(),
                if padded == width { 0 } else { head.tokens * padded },
                block_rows,
                block_rows,
                width * tile.queries,
                width * tile.queries,
                tile.keys * tile.queries,
                tile.keys * tile.queries,
                tile.queries * padded,
                head.tokens * padded,
                head.tokens * padded,
                tile.queries,
                tile.queries,
            ],
        );
        let (k, v) = (job.keys(head, job.k), job.keys(head, job.v));
        let k_rows = k.padded(head.tokens, width, k_copy, padded);
        dk_sums.fill(0.0);
        dv_sums.fill(0.0);
        d_line.fill(0.0);
        job.fill_bias_line(head, line);
        for block in job.blocks(head) {
            let columns = block.lanes.next_multiple_of(S::F32_LANES);
            let at = |r| job.query(head, block.first + r);
            let shape = (block.lanes, width);
            transpose(q_transposed, tile.queries, shape, S::F32_LANES, scale * LOG2_E, |r| &job.q[at(r)..]);
            transpose(d_o_transposed, tile.queries, shape, S::F32_LANES, 1.0, |r| &d_o[at(r)..]);
            for r in 0..block.lanes {
                delta[r] = crate::simd::dot(&d_o[at(r)..][..width], &o[at(r)..][..width]);
                lse_log2[r] = lse[job.query_lse(head, block.first + r)] * LOG2_E;
            }
            delta[block.lanes..columns].fill(0.0);
            lse_log2[block.lanes..columns].fill(0.0);
            let (q_rows, d_o_rows) = if direct {
                let stride = job.attention.heads * width;
                (Rows { elements: &job.q[at(0)..], stride }, Rows { elements: &d_o[at(0)..], stride })
            } else {
                for r in 0..block.lanes {
                    q_copy[r * padded..][..width].copy_from_slice(&job.q[at(r)..][..width]);
                    d_o_copy[r * padded..][..width].copy_from_slice(&d_o[at(r)..][..width]);
                }
                (Rows { elements: q_copy, stride: padded }, Rows { elements: d_o_copy, stride: padded })
            };
            let start = block.keys.start;
            for keys in job.key_tiles(&block) {
                for (rows, transposed, product) in
                    [(k, &*q_transposed, &mut *p), (v, &*d_o_transposed, &mut *dp)]
                {
                    simd.vectorize(Product {
                        m: keys.len(),
                        n: columns,
                        k: width,
                        a: rows.from(keys.start),
                        a_row: rows.stride,
                        a_column: 1,
                        b: transposed,
                        b_row: tile.queries,
                        c: product,
                        c_row: tile.queries,
                        add: false,
                    });
                }
                job.add_bias(head, &block, &keys, line, p);
                job.mask(head, &block, &keys, columns, p);
                let factors = job
                    .dropout_factors(head, &block, &keys, S::F32_LANES, [factor_rows, factors])
                    .then_some(&*factors);
                softmax_backward(
                    simd,
                    [p, dp],
                    tile.queries,
                    keys.len(),
                    columns,
                    [delta, lse_log2],
                    factors,
                );
                job.add_to_bias_line(head, &block, &keys, dp, d_line);
                for (weights, rows, sums) in [(&*p, d_o_rows, &mut *dv_sums), (&*dp, q_rows, &mut *dk_sums)] {
                    simd.vectorize(Product {
                        m: keys.len(),
                        n: padded,
                        k: block.lanes,
                        a: weights,
                        a_row: tile.queries,
                        a_column: 1,
                        b: rows.elements,
                        b_row: rows.stride,
                        c: &mut sums[keys.start * padded..],
                        c_row: padded,
                        add: true,
                    });
                }
                simd.vectorize(Product {
                    m: block.lanes,
                    n: padded,
                    k: keys.len(),
                    a: dp,
                    a_row: 1,
                    a_column: tile.queries,
                    b: k_rows.from(keys.start),
                    b_row: k_rows.stride,
                    c: dq_sums,
                    c_row: padded,
                    add: keys.start > start,
                });
            }
            for r in 0..block.lanes {
                // SAFETY: no other task has this sequence and these heads.
                unsafe { dq.write(at(r), &dq_sums[r * padded..][..width], scale) };
            }
        }
        // SAFETY: no other task has this sequence and this head.
        unsafe { job.write_bias_gradient(head, d_line, dbias) };
        for j in 0..head.tokens {
            let at = job.key(head, j);
            // SAFETY: no other task has this sequence and this key-value head.
            unsafe {
                dk.write(at, &dk_sums[j * padded..][..width], scale);
                dv.write(at, &dv_sums[j * padded..][..width], 1.0);
            }
        }
    }
}

/// Rows whose starts are `stride` elements apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    elements: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// The elements from the start of row `row` on.
    #[inline(always)]
    fn from(self, row: usize) -> &'a [f32] {
        &self.elements[row * self.stride..]
    }

    /// The same `rows` rows of `padded` elements. They are copied to `copy` unless `width` is already
    /// `padded`.
    #[inline(always)]
    fn padded<'b>(self, rows: usize, width: usize, copy: &'b mut [f32], padded: usize) -> Rows<'b>
    where
        'a: 'b,
    {
        if padded == width {
            return self;
        }
        for (j, row) in copy.chunks_exact_mut(padded).enumerate().take(rows) {
            row[..width].copy_from_slice(&self.from(j)[..width]);
        }
        Rows { elements: copy, stride: padded }
    }
}

impl Job<'_> {
    /// The rows of k or v of one head.
    #[inline(always)]
    fn keys<'a>(&self, head: Head, elements: &'a [f32]) -> Rows<'a> {
        Rows { elements: &elements[self.key(head, 0)..], stride: self.key_stride() }
    }
}
