//! Rotary position embedding (Su et al. 2021), by halves as in transformers' Llama.
//!
//! With θ = position·base^(−2i/K), each head's elements i and i + K/2 are a pair that turns by θ:
//! y_i = x_i·cos θ − x_{i+K/2}·sin θ, y_{i+K/2} = x_{i+K/2}·cos θ + x_i·sin θ. Backward turns by −θ.

use crate::Packing;
use crate::rows::new_rows;
use crate::tensor::{packed, read, tensor};
use candle_core::{Result, Tensor, bail};

#[cfg(any(test, gpu))]
mod gpu;

/// Cosines and sines of every position's angles.
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
    /// For `positions` positions and heads of `head_width`; `base` is a checkpoint's `rope_theta`.
    pub fn new(positions: usize, head_width: usize, base: f64) -> Self {
        let frequency = |i: usize| base.powf(-(2.0 * i as f64) / head_width as f64);
        Self { head_width, ..Self::of(positions, &(0..head_width / 2).map(frequency).collect::<Vec<_>>()) }
    }

    /// For `positions` positions, pair i of a head turning by position·`frequencies[i]`: K/2 of them.
    pub fn of(positions: usize, frequencies: &[f64]) -> Self {
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

    /// Cosines and sines where the kernels are.
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

/// x `(T, H·K)` with every head turned by its token's position.
///
/// # Errors
/// If the width is no multiple of K, K is odd, a sequence is longer than the table, or `x` has not the packing's tokens or
/// is not contiguous f32.
pub fn forward(x: &Tensor, packing: &Packing, table: &Table) -> Result<Tensor> {
    turn(x, packing, table, 1.0)
}

/// The gradient of x, from that of y: both `(T, H·K)`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: &Tensor, packing: &Packing, table: &Table) -> Result<Tensor> {
    turn(dy, packing, table, -1.0)
}

/// (T, width) of what the table can turn.
fn check(x: &Tensor, packing: &Packing, table: &Table) -> Result<(usize, usize)> {
    let (tokens, width) = packed("x", x, packing)?;
    let Table { positions, head_width, .. } = *table;
    if head_width == 0 || !head_width.is_multiple_of(2) || !width.is_multiple_of(head_width) {
        bail!("rows of {width} are no heads of an even width of {head_width}");
    }
    if packing.longest() > positions {
        bail!(
            "a sequence has {} tokens, but the rotary table ends at {positions} positions",
            packing.longest()
        );
    }
    Ok((tokens, width))
}

/// [`forward`] of queries `(T, H·K)` and keys `(T, G·K)`, which on a GPU is one launch.
///
/// # Errors
/// As [`forward`].
pub fn forward_both(q: &Tensor, k: &Tensor, packing: &Packing, table: &Table) -> Result<(Tensor, Tensor)> {
    turn_both(q, k, packing, table, 1.0)
}

/// [`backward`] of both.
///
/// # Errors
/// As [`forward`].
pub fn backward_both(dq: &Tensor, dk: &Tensor, packing: &Packing, table: &Table) -> Result<(Tensor, Tensor)> {
    turn_both(dq, dk, packing, table, -1.0)
}

fn turn_both(
    q: &Tensor,
    k: &Tensor,
    packing: &Packing,
    table: &Table,
    direction: f32,
) -> Result<(Tensor, Tensor)> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::turn([q, k], packing, table, direction).map(|[q, k]| (q, k));
    }
    Ok((turn(q, packing, table, direction)?, turn(k, packing, table, direction)?))
}

fn turn(x: &Tensor, packing: &Packing, table: &Table, direction: f32) -> Result<Tensor> {
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return Ok(gpu::turn([x], packing, table, direction)?[0].clone());
    }
    let (tokens, width) = check(x, packing, table)?;
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
            // A product and a sum each, of a cosine and sine rounded once.
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
