//! Run-time choice of the vector instructions, division of work among threads, and vectorised functions.
//!
//! Loops are plain Rust that the compiler vectorises. [`vectorised`] compiles a loop for the baseline, for
//! AVX2 and for AVX-512, and runs the best version that the processor supports. Every function and closure
//! that such a loop calls must be `#[inline(always)]`. `mul_add` is one instruction on processors with AVX2;
//! older processors compute the same bits more slowly.

use rayon::prelude::*;
use std::array;
use std::sync::LazyLock;

static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);

/// Runs `f`, compiled for the widest vectors that this processor supports.
#[inline(always)]
pub(crate) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    ARCH.dispatch(f)
}

/// Runs `op`, which is generic over the vector width, with the widest vectors that this processor supports.
#[inline(always)]
pub(crate) fn dispatch<Op: pulp::WithSimd>(op: Op) -> Op::Output {
    ARCH.dispatch(op)
}

/// The number of elements below which a second thread costs more time than it saves.
pub(crate) const GRAIN: usize = 16 * 1024;

/// Returns how many rows of `width` elements one task gets: about a quarter of a thread's part, but at least
/// [`GRAIN`] elements.
pub(crate) fn rows_per_task(rows: usize, width: usize) -> usize {
    let fair = rows.div_ceil(4 * rayon::current_num_threads()).max(1);
    fair.max(GRAIN.div_ceil(width.max(1)))
}

/// Calls `f(row index, row)` for each row of `out`, whose rows have `width` elements, on all threads and
/// vectorised.
pub(crate) fn fill_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if out.is_empty() {
        return;
    }
    let step = rows_per_task(out.len() / width, width);
    out.par_chunks_mut(step * width).enumerate().for_each(|(piece, rows)| {
        vectorised(
            #[inline(always)]
            || {
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    f(piece * step + i, row);
                }
            },
        );
    });
}

/// eˣ within 2 ulp. The result is 0 for x below -87.3, where eˣ is no normal f32; x above 88.7 is replaced by
/// 88.7.
///
/// Range reduction to |r| ≤ ln2/2, then the polynomial of `expf` of Cephes (S. Moshier).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to the nearest integer, in the low bits
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, clamped));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_66);
    let p = p.mul_add(r, 0.5);
    let mantissa = (p * r).mul_add(r, r) + 1.0;
    // 2¹²⁸ is no f32, so 2ⁿ is the product of two powers.
    let bits = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = bits >> 1;
    let power = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let value = mantissa * power(half) * power(bits - half);
    if x < -87.336_54 { 0.0 } else { value }
}

/// Σ aᵢbᵢ.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let [sum] = sums_by(
        [a, b],
        #[inline(always)]
        |[a, b]| [a * b],
    );
    sum
}

/// Σ aᵢ.
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    let [sum] = sums_by(
        [a],
        #[inline(always)]
        |a| a,
    );
    sum
}

/// Computes N sums Σ f(aᵢ, bᵢ, …) over the elements of K rows of the same length. It uses sixteen
/// accumulators on every processor, so the order of the additions does not depend on the processor.
#[inline(always)]
pub(crate) fn sums_by<const K: usize, const N: usize>(
    rows: [&[f32]; K],
    f: impl Fn([f32; K]) -> [f32; N],
) -> [f32; N] {
    let (sixteens, rests): ([_; K], [_; K]) =
        (rows.map(|row| row.as_chunks::<16>().0), rows.map(|row| row.as_chunks::<16>().1));
    let mut lanes = [[0f32; 16]; N];
    for i in 0..sixteens[0].len() {
        let rows = sixteens.map(
            #[inline(always)]
            |row| &row[i],
        );
        for lane in 0..16 {
            let values = f(rows.map(
                #[inline(always)]
                |row| row[lane],
            ));
            for n in 0..N {
                lanes[n][lane] += values[n];
            }
        }
    }
    let mut rest = [0f32; N];
    for i in 0..rests[0].len() {
        let values = f(rests.map(
            #[inline(always)]
            |row| row[i],
        ));
        for n in 0..N {
            rest[n] += values[n];
        }
    }
    array::from_fn(|n| total(lanes[n]) + rest[n])
}

#[inline(always)]
fn total(mut lanes: [f32; 16]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_ulp() {
        for i in -8_800..=8_872 {
            let x = i as f32 / 100.0 + 0.003;
            if !(-87.3..=88.7).contains(&x) {
                continue;
            }
            let (got, want) = (exp(x) as f64, f64::from(x).exp());
            assert!(((got - want) / want).abs() < 2.4e-7, "exp({x}) = {got}, expected {want}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_cover_the_remainder() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(sum(&a), 666.0);
        assert_eq!(dot(&a, &a), (0..37).map(|i| (i * i) as f32).sum::<f32>());
        assert_eq!(sum(&[]), 0.0);
    }
}
