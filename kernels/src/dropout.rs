//! Dropout as a pure function of the element: kept elements are multiplied by 1/(1 − p), dropped elements by
//! 0.
//!
//! The mask comes from the counter-based generator Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel
//! random numbers: as easy as 1, 2, 3"). The key is `seed`; the counter is (element/4, site, index of the
//! sequence in the global batch, step). A counter gives four words, one for each of four consecutive
//! elements. Elements of a tensor `(T, D)` are numbered from the start of their sequence: position·D + d. So
//! the backward pass computes the mask again instead of storing it, and the division of a batch into chunks
//! and ranks does not change a mask.

use crate::Packing;
use crate::rows::new_rows;
use crate::tensor::{packed, read, tensor};
use candle_core::{Result, Tensor, bail};
use std::ops::Range;

#[cfg(any(test, gpu))]
pub(crate) mod gpu;

/// The probability and the random key of one dropout. The masks of two different `seed`, `step` or `site` are
/// independent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability that an element is dropped: at least 0 and below 1.
    pub p: f32,
    /// The seed of the run.
    pub seed: u64,
    /// The optimizer step.
    pub step: u32,
    /// The index of this dropout in the model.
    pub site: u32,
}

/// Applies the dropout `d` to x `(T, D)` and returns a new tensor. The backward pass is the same function of
/// dy.
///
/// # Errors
/// If `p` is not at least 0 and below 1, if `x` does not have as many rows as the packing has tokens, or if
/// `x` is not contiguous f32 (on a GPU: not contiguous).
pub fn apply(x: &Tensor, packing: &Packing, d: &Dropout) -> Result<Tensor> {
    let (tokens, width) = packed("x", x, packing)?;
    d.check()?;
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return gpu::apply(x, packing, d);
    }
    let xs = read::<f32>(x)?;
    let xs = &*xs;
    let [y] = new_rows(
        tokens,
        [width],
        #[inline(always)]
        |t, [y]| {
            let mut y = y.fill(xs[t * width..][..width].iter().copied());
            d.scale_row(packing, t, &mut y);
            [y]
        },
    );
    tensor(y, (tokens, width))
}

impl Dropout {
    /// Fails unless `p` is at least 0 and below 1.
    pub(crate) fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.p) {
            bail!("the dropout is {}, expected at least 0 and below 1", self.p);
        }
        Ok(())
    }

    /// The threshold p·2³²: an element is dropped if its random word is below it.
    pub(crate) fn threshold(&self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    /// Multiplies row `t` of a packed tensor by its factors. Must be called inside `vectorised`.
    #[inline(always)]
    pub(crate) fn scale_row(&self, packing: &Packing, t: usize, row: &mut [f32]) {
        let (n, position) = packing.locate(t);
        let first = position as u64 * row.len() as u64;
        self.factors(
            packing.number(n),
            first,
            row.len(),
            #[inline(always)]
            |range, factors| {
                for (x, factor) in row[range].iter_mut().zip(factors) {
                    *x *= factor;
                }
            },
        );
    }

    /// Calls `f(range, factors)` with the factors, 0 or 1/(1 − p), of consecutive elements of a sequence,
    /// until all of `first..first + count` are covered. `range` is relative to `first`. An element index must
    /// be below 2³⁴. Must be called inside `vectorised`.
    #[inline(always)]
    pub(crate) fn factors(
        &self,
        sequence: u32,
        first: u64,
        count: usize,
        mut f: impl FnMut(Range<usize>, &[f32]),
    ) {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let threshold = self.threshold();
        let kept = 1.0 / (1.0 - self.p);
        let mut skip = (first % 4) as usize;
        let mut counter = (first / 4) as u32;
        let mut done = 0;
        while done < count {
            let mut counters = [[0; WIDE]; 4];
            for i in 0..WIDE {
                counters[0][i] = counter.wrapping_add(i as u32);
                counters[1][i] = self.site;
                counters[2][i] = sequence;
                counters[3][i] = self.step;
            }
            let words = philox(counters, key);
            let mut factors = [0f32; 4 * WIDE];
            for i in 0..WIDE {
                for word in 0..4 {
                    factors[4 * i + word] = if words[word][i] >= threshold { kept } else { 0.0 };
                }
            }
            let end = count.min(done + factors.len() - skip);
            f(done..end, &factors[skip..skip + end - done]);
            (done, skip, counter) = (end, 0, counter.wrapping_add(WIDE as u32));
        }
    }
}

/// The number of counters that are computed together: the lanes of the widest vectors.
const WIDE: usize = 16;

/// Philox4x32-10 of W counters: `counter[i]` holds word i of each counter.
#[inline(always)]
fn philox<const W: usize>(mut counter: [[u32; W]; 4], mut key: [u32; 2]) -> [[u32; W]; 4] {
    for _ in 0..10 {
        let [a, b, c, d] = counter;
        for i in 0..W {
            let even = u64::from(a[i]) * 0xd251_1f53;
            let odd = u64::from(c[i]) * 0xcd9e_8d57;
            counter[0][i] = (odd >> 32) as u32 ^ b[i] ^ key[0];
            counter[1][i] = odd as u32;
            counter[2][i] = (even >> 32) as u32 ^ d[i] ^ key[1];
            counter[3][i] = even as u32;
        }
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{numbers, random};
    use candle_core::{DType, Device, IndexOp};

    const D: Dropout = Dropout { p: 0.25, seed: 0x0123_4567_89ab_cdef, step: 3, site: 5 };

    fn ones(tokens: usize, width: usize) -> Tensor {
        Tensor::ones((tokens, width), DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn philox_equals_the_known_answers_of_random123() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox(counter.map(|word| [word; 3]), key), want.map(|word| [word; 3]));
        }
    }

    #[test]
    fn an_element_uses_its_word_of_its_counter() {
        for width in [1, 3, 64, 101] {
            let packing = Packing::new(&[2, 3], vec![7, 1 << 31]);
            let got = numbers(&apply(&ones(5, width), &packing, &D).unwrap());
            for (t, row) in got.chunks(width).enumerate() {
                let (n, position) = packing.locate(t);
                for (d, &got) in row.iter().enumerate() {
                    let element = position * width + d;
                    let counter = [element as u32 / 4, D.site, packing.number(n), D.step].map(|word| [word]);
                    let word = philox(counter, [0x89ab_cdef, 0x0123_4567])[element % 4][0];
                    // A quarter of all words is below 2³⁰.
                    let want = if word < 1 << 30 { 0.0 } else { f64::from(1.0f32 / 0.75) };
                    assert_eq!(got, want, "{width} {t} {d}");
                }
            }
        }
    }

    #[test]
    fn a_sequence_keeps_its_mask_in_another_chunk() {
        let x = random(1, (9, 33));
        let together = apply(&x, &Packing::new(&[4, 0, 5], vec![10, 11, 12]), &D).unwrap();
        let alone = apply(&x.i(4..).unwrap(), &Packing::new(&[5], vec![12]), &D).unwrap();
        assert_eq!(numbers(&together.i(4..).unwrap()), numbers(&alone));
    }

    #[test]
    fn masks_of_other_sequences_sites_steps_and_seeds_differ() {
        let mask = |d: Dropout, number| {
            numbers(&apply(&ones(1, 256), &Packing::new(&[1], vec![number]), &d).unwrap())
        };
        let first = mask(D, 0);
        assert_eq!(first, mask(D, 0));
        for other in [
            mask(D, 1),
            mask(Dropout { site: 6, ..D }, 0),
            mask(Dropout { step: 4, ..D }, 0),
            mask(Dropout { seed: D.seed ^ (1 << 63), ..D }, 0),
            mask(Dropout { seed: D.seed ^ 1, ..D }, 0),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn the_rate_is_kept() {
        let packing = Packing::new(&[1000], vec![0]);
        for p in [0.0, 0.1, 0.5, 0.9] {
            let got = numbers(&apply(&ones(1000, 300), &packing, &Dropout { p, ..D }).unwrap());
            let dropped = got.iter().filter(|&&y| y == 0.0).count() as f64 / got.len() as f64;
            // Five standard deviations of the mean of 300,000 elements.
            assert!((dropped - f64::from(p)).abs() < 5.0 * 0.5 / 300_000f64.sqrt(), "{p}: {dropped}");
            assert!(got.iter().all(|&y| y == 0.0 || y == f64::from(1.0 / (1.0 - p))), "{p}");
        }
    }

    #[test]
    fn without_tokens_there_is_nothing_to_drop() {
        assert_eq!(apply(&ones(0, 8), &Packing::new(&[], vec![]), &D).unwrap().dims(), [0, 8]);
        assert_eq!(apply(&ones(2, 0), &Packing::new(&[2], vec![0]), &D).unwrap().dims(), [2, 0]);
    }

    #[test]
    fn a_wrong_probability_or_packing_is_an_error() {
        let packing = Packing::new(&[2], vec![0]);
        for p in [1.0, -0.1, f32::NAN] {
            assert!(apply(&ones(2, 3), &packing, &Dropout { p, ..D }).is_err());
        }
        let error = apply(&ones(3, 3), &packing, &D).unwrap_err().to_string();
        assert!(error.contains("3 rows") && error.contains("2 tokens"), "{error}");
    }
}
