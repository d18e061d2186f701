//! Calls adamw.cu.

use super::Factors;
use crate::gpu::{Memory, entries};
use candle_core::{DType, Result, Tensor, bail};

#[repr(C)]
struct Norm {
    grads: *const f32,
    partials: *mut f64,
    norm: *mut f64,
    count: i64,
}

#[repr(C)]
struct AdamW {
    params: *mut f32,
    grads: *const f32,
    m: *mut f32,
    v: *mut f32,
    count: i64,
    decayed: i64,
    grad_scale: f32,
    keep: f32,
    weight1: f32,
    beta2: f32,
    weight2: f32,
    correction2: f32,
    epsilon: f32,
    size: f32,
}

entries! {
    norm(Norm);
    adamw(AdamW);
}

/// Blocks that share a norm: `NORM_BLOCKS` of adamw.cu.
const NORM_BLOCKS: usize = 1024;

/// As [`super::step`], whose checks have been made.
pub(super) fn step(
    params: &Tensor,
    grads: &Tensor,
    m: &Tensor,
    v: &Tensor,
    decayed: usize,
    factors: &Factors,
) -> Result<()> {
    if [params, grads, m, v].iter().any(|tensor| tensor.dtype() != DType::F32) {
        bail!("parameters, gradients and moments are f32");
    }
    if params.elem_count() == 0 {
        return Ok(());
    }
    let (p, g, m, v) =
        (Memory::mutable(params)?, Memory::of(grads)?, Memory::mutable(m)?, Memory::mutable(v)?);
    let arguments = AdamW {
        params: p.pointer(),
        grads: g.pointer(),
        m: m.pointer(),
        v: v.pointer(),
        count: params.elem_count() as i64,
        decayed: decayed as i64,
        grad_scale: factors.grad_scale,
        keep: factors.keep,
        weight1: factors.weight1,
        beta2: factors.beta2,
        weight2: factors.weight2,
        correction2: factors.correction2,
        epsilon: factors.epsilon,
        size: factors.size,
    };
    // SAFETY: four tensors of one size.
    unsafe { adamw(params.device(), &arguments) }
}

/// ‖grads‖₂: the one number that a step brings to the host, with its losses.
pub(super) fn norm_of(grads: &Tensor) -> Result<f64> {
    if grads.dtype() != DType::F32 {
        bail!("gradients are f32");
    }
    let device = grads.device();
    let (partials, result) =
        (Memory::new(device, DType::F64, NORM_BLOCKS)?, Memory::new(device, DType::F64, 1)?);
    let memory = Memory::of(grads)?;
    let arguments = Norm {
        grads: memory.pointer(),
        partials: partials.pointer(),
        norm: result.pointer(),
        count: grads.elem_count() as i64,
    };
    // SAFETY: the sizes that adamw.cu has.
    unsafe { norm(device, &arguments)? };
    result.tensor(1)?.get(0)?.to_scalar()
}

#[cfg(test)]
mod tests {
    use super::super::AdamW;
    use super::*;
    use crate::testing::{moved, numbers, place, random, relative_error};

    #[test]
    fn steps_are_those_of_the_cpu() {
        let adamw = AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.1 };
        for (count, decayed) in [(0, 0), (1, 1), (7, 3), (1024, 513), (4099, 4099)] {
            let start = || [random(1, count), random(2, count), random(3, count).abs().unwrap()];
            let [want_p, want_m, want_v] = start();
            let [p, m, v] = start().map(|x| moved(&x));
            for (n, seed) in (1..4).zip(10..) {
                let g = random(seed, count);
                super::super::step(&want_p, &g, &want_m, &want_v, decayed, n, 0.5, &adamw).unwrap();
                let g = moved(&g);
                step(&p, &g, &m, &v, decayed, &Factors::new(&adamw, n, 0.5)).unwrap();
            }
            for (got, want) in [(&p, &want_p), (&m, &want_m), (&v, &want_v)] {
                assert!(relative_error(got, &numbers(want)) < 3e-7, "{count}");
            }
        }
    }

    #[test]
    fn norms_are_those_of_f64_and_nan_stays() {
        for count in [0, 1, 7, 300_001] {
            let g = random(1, count);
            let want = numbers(&g).iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!((norm_of(&moved(&g)).unwrap() - want).abs() <= 1e-12 * want, "{count}");
        }
        assert!(norm_of(&Tensor::new(&[1.0, f32::NAN], place()).unwrap()).unwrap().is_nan());
    }
}
