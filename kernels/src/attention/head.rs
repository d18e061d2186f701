//! One sequence and one key-value head: tiles of scores, forward and backward.
//!
//! In a tile the lanes of a vector are queries and the rows are keys. So the softmax needs no sum across lanes, k and
//! v are read where they lie, and only q and do are transposed. A lane is one query of one of the H/G heads that
//! share the key-value head: these are beside each other, which fills the vectors of short texts too.

use super::scores::{differentiate, weigh};
use super::{Head, Job, Shared};
use crate::tile::{Product, split, transpose};
use pulp::{Simd, WithSimd};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

pub(super) struct Forward<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) head: Head,
    pub(super) scratch: &'a mut Vec<f32>,
    pub(super) o: &'a Shared,
    pub(super) lse: &'a Shared,
}

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
        let [line, factor_rows, factors, v_copy, q, scores, sums, top, total, shrink] = split(
            scratch,
            [
                job.line(head),
                job.factor_rows(),
                job.factors(),
                if padded == width { 0 } else { head.tokens * padded },
                width * tile.queries,
                tile.keys * tile.queries,
                tile.queries * padded,
                tile.queries,
                tile.queries,
                tile.queries,
            ],
        );
        job.fill_line(head, line);
        let k = job.keys(head, job.k);
        let v = job.keys(head, job.v).padded(head.tokens, width, v_copy, padded);
        for block in job.blocks(head) {
            let columns = block.lanes.next_multiple_of(S::F32_LANES);
            let row = |r| &job.q[job.query(head, block.first + r)..];
            transpose(q, tile.queries, (block.lanes, width), S::F32_LANES, job.attention.scale * LOG2_E, row);
            top.fill(f32::MIN);
            total.fill(0.0);
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
                job.hide(head, &block, &keys, columns, scores);
                weigh(simd, scores, tile.queries, keys.len(), columns, [top, total, shrink]);
                if job.draw(head, &block, &keys, S::F32_LANES, [factor_rows, factors]) {
                    let drawn = &factors[..keys.len() * tile.queries];
                    scores.iter_mut().zip(drawn).for_each(|(score, factor)| *score *= factor);
                }
                let add = keys.start > start;
                if add {
                    for (row, factor) in sums.chunks_exact_mut(padded).zip(&*shrink).take(block.lanes) {
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
                // SAFETY: this task alone has this sequence and these heads.
                unsafe {
                    o.write(job.query(head, query), &sums[r * padded..][..width], 1.0 / total[r]);
                    lse.write(job.query_sum(head, query), &[(top[r] + total[r].log2()) * LN_2], 1.0);
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
        // Rows of q and do are read where they lie if they are whole vectors at equal distances.
        let direct = padded == width && job.group() == 1;
        let block_rows = if direct { 0 } else { tile.queries * padded };
        let [
            line,
            dline,
            factor_rows,
            factors,
            k_copy,
            q_copy,
            d_o_copy,
            q_across,
            d_o_across,
            p,
            dp,
            dq_sums,
            dk_sums,
            dv_sums,
            own,
            base,
        ] = split(
            scratch,
            [
                job.line(head),
                job.line(head),
                job.factor_rows(),
                job.factors(),
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
        dline.fill(0.0);
        job.fill_line(head, line);
        for block in job.blocks(head) {
            let columns = block.lanes.next_multiple_of(S::F32_LANES);
            let at = |r| job.query(head, block.first + r);
            let shape = (block.lanes, width);
            transpose(q_across, tile.queries, shape, S::F32_LANES, scale * LOG2_E, |r| &job.q[at(r)..]);
            transpose(d_o_across, tile.queries, shape, S::F32_LANES, 1.0, |r| &d_o[at(r)..]);
            for r in 0..block.lanes {
                own[r] = crate::simd::dot(&d_o[at(r)..][..width], &o[at(r)..][..width]);
                base[r] = lse[job.query_sum(head, block.first + r)] * LOG2_E;
            }
            own[block.lanes..columns].fill(0.0);
            base[block.lanes..columns].fill(0.0);
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
                for (rows, across, tile_of) in [(k, &*q_across, &mut *p), (v, &*d_o_across, &mut *dp)] {
                    simd.vectorize(Product {
                        m: keys.len(),
                        n: columns,
                        k: width,
                        a: rows.from(keys.start),
                        a_row: rows.stride,
                        a_column: 1,
                        b: across,
                        b_row: tile.queries,
                        c: tile_of,
                        c_row: tile.queries,
                        add: false,
                    });
                }
                job.add_bias(head, &block, &keys, line, p);
                job.hide(head, &block, &keys, columns, p);
                let factors =
                    job.draw(head, &block, &keys, S::F32_LANES, [factor_rows, factors]).then_some(&*factors);
                differentiate(simd, [p, dp], tile.queries, keys.len(), columns, [own, base], factors);
                job.add_to_line(head, &block, &keys, dp, dline);
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
                // SAFETY: this task alone has this sequence and these heads.
                unsafe { dq.write(at(r), &dq_sums[r * padded..][..width], scale) };
            }
        }
        // SAFETY: this task alone has this sequence and this head.
        unsafe { job.write_bias(head, dline, dbias) };
        for j in 0..head.tokens {
            let at = job.key(head, j);
            // SAFETY: this task alone has this sequence and this key-value head.
            unsafe {
                dk.write(at, &dk_sums[j * padded..][..width], scale);
                dv.write(at, &dv_sums[j * padded..][..width], 1.0);
            }
        }
    }
}

/// Rows that start at equal distances.
#[derive(Clone, Copy)]
struct Rows<'a> {
    elements: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn from(self, row: usize) -> &'a [f32] {
        &self.elements[row * self.stride..]
    }

    /// The same `rows` rows as whole vectors: in `copy` if `width` is none.
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

/// Queries that make the lanes of a tile, and the keys that any of them sees.
pub(super) struct Block {
    pub(super) first: usize,
    pub(super) lanes: usize,
    pub(super) keys: Range<usize>,
}

impl Job<'_> {
    /// The rows of k or v of one head.
    #[inline(always)]
    fn keys<'a>(&self, head: Head, elements: &'a [f32]) -> Rows<'a> {
        Rows { elements: &elements[self.key(head, 0)..], stride: self.key_stride() }
    }

    #[inline(always)]
    fn blocks(&self, head: Head) -> impl Iterator<Item = Block> {
        let rows = head.tokens * self.group();
        (0..rows).step_by(self.tiles.queries).map(move |first| {
            let lanes = self.tiles.queries.min(rows - first);
            let visible = |r| self.attention.visible(self.token_and_member(r).0, head.tokens);
            Block { first, lanes, keys: visible(first).start..visible(first + lanes - 1).end }
        })
    }

    #[inline(always)]
    fn key_tiles(&self, block: &Block) -> impl Iterator<Item = Range<usize>> + use<> {
        let (end, step) = (block.keys.end, self.tiles.keys);
        block.keys.clone().step_by(step).map(move |start| start..end.min(start + step))
    }
}
