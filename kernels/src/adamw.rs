//! AdamW (Loshchilov & Hutter 2017) over flat buffers, in the order of operations of `torch.optim.AdamW`:
//!
//!     p ← p·(1 − η·λ)            m ← m + (1 − β₁)(g − m)        v ← β₂·v + (1 − β₂)·g²
//!     p ← p − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
//!
//! One pass over the four buffers; clipping is a factor on g.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::simd::{GRAIN, vectorised};
use crate::tensor::{read, write};

/// The rule's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// η.
    pub learning_rate: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
}

/// Updates `params` and the moments `m` and `v` in place; all (P) and f32. `step` counts from 1, `grad_scale` multiplies each
/// gradient first, and only the first `decayed` elements are subject to weight decay.
///
/// # Errors
/// The buffers differ in length, or `step` is 0.
pub fn step(
    params: &Tensor,
    grads: &Tensor,
    m: &Tensor,
    v: &Tensor,
    decayed: usize,
    step: u64,
    grad_scale: f32,
    rule: &AdamW,
) -> Result<()> {
    let elements = params.elem_count();
    if [grads, m, v].iter().any(|tensor| tensor.elem_count() != elements) || decayed > elements {
        bail!("adamw: parameters, gradients and moments differ in length, or {decayed} of {elements} decay");
    }
    if step == 0 {
        bail!("adamw: steps count from 1");
    }
    let constants = Constants::new(rule, step, grad_scale);
    let g = read::<f32>(grads)?;
    let mut done = Ok(());
    write(params, |p| {
        done = write_two(m, v, |m, v| {
            let pieces = p.par_chunks_mut(GRAIN).zip(m.par_chunks_mut(GRAIN)).zip(v.par_chunks_mut(GRAIN));
            pieces.zip(g.par_chunks(GRAIN)).enumerate().for_each(|(piece, (((p, m), v), g))| {
                let split = decayed.saturating_sub(piece * GRAIN).min(p.len());
                let (p1, p2) = p.split_at_mut(split);
                let (m1, m2) = m.split_at_mut(split);
                let (v1, v2) = v.split_at_mut(split);
                constants.update(p1, &g[..split], m1, v1, constants.decay);
                constants.update(p2, &g[split..], m2, v2, 1.0);
            });
        });
    })?;
    done
}

/// ‖grads‖₂ of a flat buffer: f32 squares summed in f64, in an order that does not depend on threads. What is not finite stays so.
pub fn norm(grads: &Tensor) -> Result<f64> {
    let g = read::<f32>(grads)?;
    let partial: Vec<f64> = g.par_chunks(GRAIN).map(|piece| vectorised(|| squares(piece))).collect();
    Ok(partial.iter().sum::<f64>().sqrt())
}

/// The factors of one step, computed in f64 as torch does and rounded once.
struct Constants {
    decay: f32,
    first: f32,
    second: f32,
    rate: f32,
    correction: f32,
    epsilon: f32,
    grad_scale: f32,
}

impl Constants {
    fn new(rule: &AdamW, step: u64, grad_scale: f32) -> Self {
        let step = step as f64;
        Self {
            decay: (1.0 - rule.learning_rate * rule.weight_decay) as f32,
            first: (1.0 - rule.beta1) as f32,
            second: rule.beta2 as f32,
            rate: (rule.learning_rate / (1.0 - rule.beta1.powf(step))) as f32,
            correction: (1.0 - rule.beta2.powf(step)).sqrt() as f32,
            epsilon: rule.epsilon as f32,
            grad_scale,
        }
    }

    fn update(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], decay: f32) {
        vectorised(|| {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * self.grad_scale;
                *m += self.first * (g - *m);
                *v = self.second * *v + (1.0 - self.second) * (g * g);
                let denominator = v.sqrt() / self.correction + self.epsilon;
                *p = *p * decay - self.rate * (*m / denominator);
            }
        });
    }
}

fn write_two(a: &Tensor, b: &Tensor, f: impl FnOnce(&mut [f32], &mut [f32])) -> Result<()> {
    let mut done = Ok(());
    write(a, |a| done = write(b, |b| f(a, b)))?;
    done
}

/// Σ xᵢ² in eight lanes of f64.
#[inline(always)]
fn squares(x: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let eights = x.chunks_exact(8);
    let rest: f64 = eights.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    for eight in eights {
        for (lane, &x) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{numbers, random, relative_error};
    use candle_core::{DType, Device};

    const RULE: AdamW =
        AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };

    fn zeros(n: usize) -> Tensor {
        Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap()
    }

    /// import torch
    /// p = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    /// o = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1)
    /// for g in [[0.1, -0.2, 0.3], [0.05, 0.4, -1e-9], [0.0, -0.3, 5.0]]:
    ///     p.grad = torch.tensor(g, dtype=torch.float64); o.step()
    /// print([f"{x:.10f}" for x in p.tolist()])
    const TORCH: [f64; 3] = [0.4720032426, -0.9894698907, 1.9706455084];

    #[test]
    fn three_steps_are_those_of_torch() {
        let p = Tensor::from_slice(&[0.5f32, -1.0, 2.0], 3, &Device::Cpu).unwrap();
        let (m, v) = (zeros(3), zeros(3));
        for (t, g) in [[0.1f32, -0.2, 0.3], [0.05, 0.4, -1e-9], [0.0, -0.3, 5.0]].iter().enumerate() {
            let g = Tensor::from_slice(g, 3, &Device::Cpu).unwrap();
            step(&p, &g, &m, &v, 3, t as u64 + 1, 1.0, &RULE).unwrap();
        }
        // three roundings of each of a handful of f32 operations
        assert!(relative_error(&p, &TORCH) < 3e-7, "{:?}", numbers(&p));
    }

    #[test]
    fn any_length_is_updated_as_in_f64_and_only_the_first_part_decays() {
        for (n, decayed) in [(0, 0), (1, 1), (7, 3), (1023, 0), (GRAIN + 5, GRAIN + 1), (3 * GRAIN, GRAIN)] {
            let (p, g) = (random(1, n), random(2, n));
            let (m, v) = (random(3, n), random(4, n).sqr().unwrap());
            let (p0, g0, m0, v0) = (numbers(&p), numbers(&g), numbers(&m), numbers(&v));
            step(&p, &g, &m, &v, decayed, 5, 0.5, &RULE).unwrap();
            let want: Vec<f64> = (0..n)
                .map(|i| {
                    let g = g0[i] * 0.5;
                    let m = 0.9 * m0[i] + 0.1 * g;
                    let v = 0.999 * v0[i] + 0.001 * g * g;
                    let decay = if i < decayed { 1.0 - 1e-2 * 0.1 } else { 1.0 };
                    let denominator = (v / (1.0 - 0.999f64.powi(5))).sqrt() + 1e-8;
                    p0[i] * decay - 1e-2 / (1.0 - 0.9f64.powi(5)) * m / denominator
                })
                .collect();
            assert!(relative_error(&p, &want) < 1e-6, "{n}");
        }
    }

    #[test]
    fn norms_are_those_of_f64_and_keep_what_is_not_finite() {
        for n in [0, 1, 7, 1023, 3 * GRAIN + 1] {
            let g = random(1, n);
            let want = numbers(&g).iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!((norm(&g).unwrap() - want).abs() <= 1e-12 * want);
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let g = Tensor::from_slice(&[1.0, bad, 2.0], 3, &Device::Cpu).unwrap();
            assert!(!norm(&g).unwrap().is_finite());
        }
    }

    #[test]
    fn buffers_of_other_lengths_are_refused() {
        let rule = RULE;
        assert!(step(&zeros(3), &zeros(2), &zeros(3), &zeros(3), 0, 1, 1.0, &rule).is_err());
        assert!(step(&zeros(3), &zeros(3), &zeros(3), &zeros(3), 4, 1, 1.0, &rule).is_err());
        assert!(step(&zeros(3), &zeros(3), &zeros(3), &zeros(3), 0, 0, 1.0, &rule).is_err());
    }
}
