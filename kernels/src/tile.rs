//! Operations on tiles that are in the cache: small matrix products, transposes, exp2, scratch memory.
//!
//! Packing factors into panels, as `matmul` does, pays off from a few hundred rows on. Attention multiplies
//! tiles that are already in the cache and often have about ten rows, so [`Product`] reads them in place.

use crate::block::{Block, MOST_ROWS, RawStart, rows_of_pair};
use pulp::{Simd, WithSimd};
use std::cell::RefCell;
use std::f32::consts::LN_2;

/// C (m, n) = A (m, k) · B (k, n), or C += A · B if `add`. Rows of B and C are contiguous; A has any strides.
pub(crate) struct Product<'a> {
    pub(crate) m: usize,
    /// A multiple of the lanes of a vector.
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: &'a [f32],
    pub(crate) a_row: usize,
    pub(crate) a_column: usize,
    pub(crate) b: &'a [f32],
    pub(crate) b_row: usize,
    pub(crate) c: &'a mut [f32],
    pub(crate) c_row: usize,
    pub(crate) add: bool,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { m, n, k, a_row, a_column, b_row, c_row, add, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        // The unsafe code below relies on these assertions.
        assert!(n.is_multiple_of(S::F32_LANES), "{n} columns are not whole vectors");
        assert!((m - 1) * c_row + n <= self.c.len());
        assert!(k == 0 || (m - 1) * a_row + (k - 1) * a_column < self.a.len());
        assert!(k == 0 || (k - 1) * b_row + n <= self.b.len());

        let vectors = n / S::F32_LANES;
        let mut column = 0;
        while column < vectors {
            let pair = column + 1 < vectors;
            // Blocks of equal height, because a last block of two rows would leave the multipliers idle.
            let blocks = m.div_ceil(if pair { rows_of_pair::<S>() } else { MOST_ROWS });
            let mut row = 0;
            for block in 0..blocks {
                let height = (m - row).div_ceil(blocks - block);
                let (a, b, c) = (
                    self.a.as_ptr().wrapping_add(row * a_row),
                    self.b.as_ptr().wrapping_add(column * S::F32_LANES),
                    self.c.as_mut_ptr().wrapping_add(row * c_row + column * S::F32_LANES),
                );
                let start = RawStart::Beta(if add { 1.0 } else { 0.0 });
                let block = Block { k, a, a_row, a_column, b, b_row, c, c_row, start, alpha: 1.0 };
                // SAFETY: the assertions above have checked that rows row..row+height of A and C and the
                // columns of this block in B and C lie inside their slices.
                unsafe {
                    if pair {
                        block.compute::<S, 2>(simd, height)
                    } else {
                        block.compute::<S, 1>(simd, height)
                    }
                }
                row += height;
            }
            column += if pair { 2 } else { 1 };
        }
    }
}

/// Writes the transpose of `rows` rows of `width` elements, multiplied by `scale`, to `out` (width, rows).
/// `row(r)` returns row r.
///
/// The rows of `out` are `stride` apart. Its columns are padded with zeros to a multiple of `lanes`, which
/// must be a multiple of four.
#[inline(always)]
pub(crate) fn transpose<'a>(
    out: &mut [f32],
    stride: usize,
    (rows, width): (usize, usize),
    lanes: usize,
    scale: f32,
    row: impl Fn(usize) -> &'a [f32],
) {
    for r in (0..rows.next_multiple_of(lanes)).step_by(4) {
        let out = &mut out[r..];
        match rows.saturating_sub(r) {
            0 => (0..width).for_each(|x| out[x * stride..][..4].copy_from_slice(&[0.0; 4])),
            1 => transpose_four(out, stride, scale, [&row(r)[..width], &[], &[], &[]]),
            2 => transpose_four(out, stride, scale, [&row(r)[..width], &row(r + 1)[..width], &[], &[]]),
            3 => {
                let rows = [&row(r)[..width], &row(r + 1)[..width], &row(r + 2)[..width], &[]];
                transpose_four(out, stride, scale, rows);
            }
            _ => {
                let rows =
                    [&row(r)[..width], &row(r + 1)[..width], &row(r + 2)[..width], &row(r + 3)[..width]];
                transpose_four(out, stride, scale, rows);
            }
        }
    }
}

/// Transposes four rows of the same width; an empty row stands for zeros.
#[inline(always)]
pub(crate) fn transpose_four(out: &mut [f32], stride: usize, scale: f32, rows: [&[f32]; 4]) {
    let width = rows[0].len();
    let piece = |row: &[f32], x: usize| {
        if row.is_empty() { [0.0; 4] } else { [row[x], row[x + 1], row[x + 2], row[x + 3]] }
    };
    let whole = width / 4 * 4;
    for x in (0..whole).step_by(4) {
        let [a, b, c, d] = rows;
        let columns = transpose4([piece(a, x), piece(b, x), piece(c, x), piece(d, x)], scale);
        for (y, column) in columns.iter().enumerate() {
            out[(x + y) * stride..][..4].copy_from_slice(column);
        }
    }
    for x in whole..width {
        out[x * stride..][..4]
            .copy_from_slice(&rows.map(|row| row.get(x).map_or(0.0, |value| value * scale)));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose4(rows: [[f32; 4]; 4], scale: f32) -> [[f32; 4]; 4] {
    use core::arch::x86_64::*;
    // The compiler moves single elements, which is three times slower. Every x86-64 processor has SSE.
    // SAFETY: an array of four f32 and a vector of four f32 have the same representation.
    unsafe {
        let scale = _mm_set1_ps(scale);
        let [a, b, c, d]: [__m128; 4] = core::mem::transmute(rows);
        let (a, b) = (_mm_mul_ps(a, scale), _mm_mul_ps(b, scale));
        let (c, d) = (_mm_mul_ps(c, scale), _mm_mul_ps(d, scale));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        core::mem::transmute([
            _mm_movelh_ps(ab, cd),
            _mm_movehl_ps(cd, ab),
            _mm_movelh_ps(ab_high, cd_high),
            _mm_movehl_ps(cd_high, ab_high),
        ])
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose4(rows: [[f32; 4]; 4], scale: f32) -> [[f32; 4]; 4] {
    std::array::from_fn(|y| std::array::from_fn(|r| rows[r][y] * scale))
}

/// 2ˣ within 2 ulp for x ≤ 127. The result is 0 below −126, where 2ˣ is no normal f32. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5·2²³ rounds to the nearest integer, in the low bits; adding 127 makes it a biased exponent.
    let shift = simd.splat_f32s(12_582_912.0 + 127.0);
    let shifted = simd.add_f32s(x, shift);
    let r = simd.sub_f32s(x, simd.sub_f32s(shifted, shift));
    // 2ʳ for |r| ≤ 1/2 by the polynomial of `exp2f` of Cephes (S. Moshier).
    let mut power = simd.splat_f32s(1.535_336_2e-4);
    for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 0.240_226_48, LN_2, 1.0] {
        power = simd.mul_add_e_f32s(power, r, simd.splat_f32s(c));
    }
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let value = simd.mul_f32s(power, simd.transmute_f32s_u32s(exponent));
    let vanishes = simd.less_than_f32s(x, simd.splat_f32s(-126.0));
    simd.select_f32s(vanishes, simd.splat_f32s(0.0), value)
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with a buffer of this thread that stays allocated between calls. Its contents are arbitrary, and
/// `f` may resize it.
///
/// A nested call gets another buffer.
pub(crate) fn with_scratch<R>(f: impl FnOnce(&mut Vec<f32>) -> R) -> R {
    let mut scratch = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    let result = f(&mut scratch);
    SCRATCH.with_borrow_mut(|all| all.push(scratch));
    result
}

/// Divides the scratch buffer into pieces of `sizes` elements, which start on different cache lines.
pub(crate) fn split<const N: usize>(scratch: &mut Vec<f32>, sizes: [usize; N]) -> [&mut [f32]; N] {
    const LINE: usize = 64 / size_of::<f32>();
    let total = sizes.iter().map(|size| size.next_multiple_of(LINE)).sum::<usize>() + LINE;
    if scratch.len() < total {
        // Allocates no more than needed, and does not copy the old contents.
        scratch.clear();
        scratch.reserve_exact(total);
        scratch.resize(total, 0.0);
    }
    let start = scratch.as_ptr().align_offset(64).min(LINE);
    let mut rest = &mut scratch[start..];
    sizes.map(|size| {
        let (piece, tail) = std::mem::take(&mut rest).split_at_mut(size.next_multiple_of(LINE));
        rest = tail;
        &mut piece[..size]
    })
}
