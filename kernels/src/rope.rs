//! Rotary position embedding, RoPE (Su et al. 2021), with the pairs of transformers' Llama (`rotate_half`).
//!
//! With θ = position·base^(−2i/K), each head's elements i and i + K/2 are a pair rotated by θ:
//! y_i = x_i·cos θ − x_{i+K/2}·sin θ, y_{i+K/2} = x_{i+K/2}·cos θ + x_i·sin θ. Backward rotates by −θ.

use crate::Packing;
use crate::rows::new_rows;
use crate::tensor::{packed, read, tensor};
use candle_core::{Result, Tensor, bail};

#[cfg(any(test, gpu))]
mod gpu;

/// The cosines and sines of the angles of all positions.
#[derive(Clone, Debug)]
pub struct Table {
    positions: usize,
    head_width: usize,
    cos: Vec<f32>, // (P, K/2)
    sin: Vec<f32>, // (P, K/2)
    #[cfg(feature = "cuda")]
    copies: crate::gpu::Copies<2>,
}

impl Table {
    /// A table for `positions` positions and heads of `head_width` elements. `base` is `rope_theta` of
    /// config.json.
    pub fn new(positions: usize, head_width: usize, base: f64) -> Self {
        let frequency = |i: usize| base.powf(-(2.0 * i as f64) / head_width as f64);
        Self {
            head_width,
            ..Self::from_frequencies(positions, &(0..head_width / 2).map(frequency).collect::<Vec<_>>())
        }
    }

    /// A table for `positions` positions, where pair i of a head is rotated by position·`frequencies[i]`.
    /// There are K/2 pairs.
    pub fn from_frequencies(positions: usize, frequencies: &[f64]) -> Self {
        let angles: Vec<f64> =
            (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f)).collect();
        Self {
            positions,
            head_width: 2 * frequencies.len(),
            cos: angles.iter().map(|angle| angle.cos() as f32).collect(),
            sin: angles.iter().map(|angle| angle.sin() as f32).collect(),
            #[cfg(feature = "cuda")]
            copies: crate::gpu::Copies::default(),
        }
    }

    /// Copies of the cosines and sines on `device`, each `(P·K/2)`.
    #[cfg(any(test, gpu))]
    fn on(&self, device: &candle_core::Device) -> Result<[Tensor; 2]> {
        let make =
            || Ok([Tensor::new(self.cos.as_slice(), device)?, Tensor::new(self.sin.as_slice(), device)?]);
        #[cfg(feature = "cuda")]
        return self.copies.on(device, make);
        #[cfg(not(feature = "cuda"))]
        make()
    }
}

/// Rotates every head of x `(T, H·K)` by the position of its token, and returns a new tensor.
///
/// # Errors
/// If the width of x is not a multiple of K, K is odd or 0, a sequence is longer than the table, or `x` does
/// not have as many rows as the packing has tokens or is not contiguous f32.
pub fn forward(x: &Tensor, packing: &Packing, table: &Table) -> Result<Tensor> {
    rotate(x, packing, table, 1.0)
}

/// Backward pass of [`forward`]: returns dx `(T, H·K)` for dy `(T, H·K)`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, packing: &Packing, table: &Table) -> Result<Tensor> {
    rotate(dy, packing, table, -1.0)
}

/// Checks that the table can rotate `x`, and returns (T, width).
fn check(x: &Tensor, packing: &Packing, table: &Table) -> Result<(usize, usize)> {
    let (tokens, width) = packed("x", x, packing)?;
    let Table { positions, head_width, .. } = *table;
    if head_width == 0 || !head_width.is_multiple_of(2) || !width.is_multiple_of(head_width) {
        bail!("{width} elements cannot be divided into heads of {head_width}, expected an even divisor");
    }
    if packing.longest() > positions {
        bail!(
            "a sequence has {} tokens, but the rotary table ends at {positions} positions",
            packing.longest()
        );
    }
    Ok((tokens, width))
}

/// [`forward`] of queries `(T, H·K)` and keys `(T, G·K)`, with one kernel launch on a GPU.
///
/// # Errors
/// As [`forward`].
pub fn forward_both(q: &Tensor, k: &Tensor, packing: &Packing, table: &Table) -> Result<(Tensor, Tensor)> {
    rotate_both(q, k, packing, table, 1.0)
}

/// Backward pass of [`forward_both`].
///
/// # Errors
/// As [`forward`].
pub fn backward_both(dq: &Tensor, dk: &Tensor, packing: &Packing, table: &Table) -> Result<(Tensor, Tensor)> {
    rotate_both(dq, dk, packing, table, -1.0)
}

fn rotate_both(
    q: &Tensor,
    k: &Tensor,
    packing: &Packing,
    table: &Table,
    direction: f32,
) -> Result<(Tensor, Tensor)> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        check(q, packing, table)?;
        check(k, packing, table)?;
        return gpu::rotate([q, k], packing, table, direction).map(|[q, k]| (q, k));
    }
    Ok((rotate(q, packing, table, direction)?, rotate(k, packing, table, direction)?))
}

fn rotate(x: &Tensor, packing: &Packing, table: &Table, direction: f32) -> Result<Tensor> {
    let (tokens, width) = check(x, packing, table)?;
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return Ok(gpu::rotate([x], packing, table, direction)?[0].clone());
    }
    let Table { head_width, ref cos, ref sin, .. } = *table;
    let half = head_width / 2;
    let xs = read::<f32>(x)?;
    let xs = &*xs;
    let [y] = new_rows(
        tokens,
        [width],
        #[inline(always)]
        |t, [y]| {
            let mut y = y.fill(xs[t * width..][..width].iter().copied());
            let (_, position) = packing.locate(t);
            let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
            for head in y.chunks_exact_mut(head_width) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (low[i], high[i]);
                    let sin = direction * sin[i];
                    low[i] = a * cos[i] - b * sin;
                    high[i] = b * cos[i] + a * sin;
                }
            }
            [y]
        },
    );
    tensor(y, (tokens, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error};

    pub(super) fn reference(
        x: &[f64],
        packing: &Packing,
        width: usize,
        head_width: usize,
        base: f64,
    ) -> Vec<f64> {
        let (half, mut y) = (head_width / 2, x.to_vec());
        for (t, row) in y.chunks_mut(width.max(1)).enumerate() {
            let position = packing.locate(t).1 as f64;
            for head in row.chunks_mut(head_width) {
                for i in 0..half {
                    let (sin, cos) = (position / base.powf(2.0 * i as f64 / head_width as f64)).sin_cos();
                    let (a, b) = (head[i], head[half + i]);
                    (head[i], head[half + i]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
        y
    }

    #[test]
    fn values_equal_the_reference_for_odd_and_empty_shapes() {
        for (lengths, heads, head_width) in [
            (vec![], 2, 4),
            (vec![3, 0], 0, 4),
            (vec![1], 1, 2),
            (vec![3, 0, 7], 3, 6),
            (vec![1023, 1], 1, 32),
            (vec![5], 4, 128),
        ] {
            let packing = Packing::new(&lengths, vec![0; lengths.len()]);
            let x = random(1, (packing.tokens(), heads * head_width));
            let table = Table::new(1023, head_width, 10_000.0);
            let y = forward(&x, &packing, &table).unwrap();
            let want = reference(&numbers(&x), &packing, heads * head_width, head_width, 10_000.0);
            // Two products and a sum, with a cosine and a sine that are rounded once.
            assert!(relative_error(&y, &want) < 2e-7, "{lengths:?} {heads} {head_width}");
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let packing = Packing::new(&[3, 1, 2], vec![0; 3]);
        let (x, dy) = (random(1, (6, 12)), random(2, (6, 12)));
        let dys = numbers(&dy);
        let want = finite_difference(&numbers(&x), |x| inner(&reference(x, &packing, 12, 6, 100.0), &dys));
        let dx = backward(&dy, &packing, &Table::new(3, 6, 100.0)).unwrap();
        assert!(relative_error(&dx, &want) < 2e-7);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let (x, packing) = (random(1, (3, 12)), Packing::new(&[3], vec![0]));
        for (positions, head_width) in [(2, 4), (3, 3), (3, 8), (3, 0)] {
            assert!(
                forward(&x, &packing, &Table::new(positions, head_width, 1e4)).is_err(),
                "{positions} {head_width}"
            );
        }
        assert!(forward(&x, &Packing::new(&[2], vec![0]), &Table::new(3, 4, 1e4)).is_err());
    }
}
