//! The GPU version of AdamW and gradient clipping: calls adamw.cu.

use super::{Clip, Factors};
use crate::gpu::{Memory, entries};
use candle_core::{DType, Result, Tensor, bail};

#[repr(C)]
struct ClipArguments {
    grads: *const f32,
    losses: *const f32,
    partials: *mut f64,
    norm: *mut f64,
    scale: *mut f32,
    count: i64,
    rows: i64,
    max_norm: f64,
}

#[repr(C)]
struct AdamW {
    params: *mut f32,
    grads: *const f32,
    m: *mut f32,
    v: *mut f32,
    scale: *const f32,
    count: i64,
    decayed: i64,
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    sqrt_bias_correction2: f32,
    epsilon: f32,
    step_size: f32,
}

entries! {
    clip_scale(ClipArguments);
    adamw(AdamW);
}

/// The number of partial sums of the norm: `NORM_BLOCKS` of adamw.cu.
const NORM_BLOCKS: usize = 1024;

/// [`super::step`], after its checks.
pub(super) fn step(
    params: &Tensor,
    grads: &Tensor,
    m: &Tensor,
    v: &Tensor,
    decayed: usize,
    scale: &Tensor,
    factors: &Factors,
) -> Result<()> {
    if [params, grads, m, v, scale].iter().any(|tensor| tensor.dtype() != DType::F32) {
        bail!("expected parameters, gradients, moments and scale of F32");
    }
    if params.elem_count() == 0 {
        return Ok(());
    }
    let (p, g, m, v) =
        (Memory::mutable(params)?, Memory::of(grads)?, Memory::mutable(m)?, Memory::mutable(v)?);
    let scale = Memory::of(scale)?;
    let arguments = AdamW {
        params: p.pointer(),
        grads: g.pointer(),
        m: m.pointer(),
        v: v.pointer(),
        scale: scale.pointer(),
        count: params.elem_count() as i64,
        decayed: decayed as i64,
        decay: factors.decay,
        one_minus_beta1: factors.one_minus_beta1,
        beta2: factors.beta2,
        one_minus_beta2: factors.one_minus_beta2,
        sqrt_bias_correction2: factors.sqrt_bias_correction2,
        epsilon: factors.epsilon,
        step_size: factors.step_size,
    };
    // SAFETY: the caller has checked that the four tensors have the same size.
    unsafe { adamw(params.device(), &arguments) }
}

/// [`super::clip_grad_norm`].
pub(super) fn clip_grad_norm(grads: &Tensor, losses: &Tensor, max_norm: Option<f64>) -> Result<Clip> {
    if grads.dtype() != DType::F32 || losses.dtype() != DType::F32 {
        bail!("`grads` is of {:?} and `losses` of {:?}, expected F32", grads.dtype(), losses.dtype());
    }
    let device = grads.device();
    let new = |dtype, count| Memory::new(device, dtype, count);
    let (partials, norm, scale) = (new(DType::F64, NORM_BLOCKS)?, new(DType::F64, 1)?, new(DType::F32, 1)?);
    let (from, of_rows) = (Memory::of(grads)?, Memory::of(losses)?);
    let arguments = ClipArguments {
        grads: from.pointer(),
        losses: of_rows.pointer(),
        partials: partials.pointer(),
        norm: norm.pointer(),
        scale: scale.pointer(),
        count: grads.elem_count() as i64,
        rows: losses.elem_count() as i64,
        max_norm: max_norm.unwrap_or(f64::INFINITY),
    };
    // SAFETY: the buffers have the sizes that adamw.cu expects.
    unsafe { clip_scale(device, &arguments)? };
    Ok(Clip { norm: norm.tensor(1)?, scale: scale.tensor(1)? })
}

#[cfg(test)]
mod tests {
    use super::super::AdamW;
    use super::*;
    use crate::testing::{numbers, random, relative_error, to_test_device};
    use candle_core::Device;

    #[test]
    fn steps_are_those_of_the_cpu() {
        let adamw = AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.1 };
        for (count, decayed) in [(0, 0), (1, 1), (7, 3), (1024, 513), (4099, 4099)] {
            let start = || [random(1, count), random(2, count), random(3, count).abs().unwrap()];
            let [want_p, want_m, want_v] = start();
            let [p, m, v] = start().map(|x| to_test_device(&x));
            for (n, seed) in (1..4).zip(10..) {
                let g = random(seed, count);
                let scale = Tensor::new(&[0.5f32], &Device::Cpu).unwrap();
                super::super::step(&want_p, &g, &want_m, &want_v, decayed, n, &scale, &adamw).unwrap();
                let (g, scale) = (to_test_device(&g), to_test_device(&scale));
                step(&p, &g, &m, &v, decayed, &scale, &Factors::new(&adamw, n)).unwrap();
            }
            for (got, want) in [(&p, &want_p), (&m, &want_m), (&v, &want_v)] {
                assert!(relative_error(got, &numbers(want)) < 3e-7, "{count}");
            }
        }
    }

    #[test]
    fn norms_are_those_of_f64_and_clip_as_the_cpu_does() {
        for count in [0, 1, 7, 300_001] {
            let (g, losses) = (random(1, count), random(2, 1000));
            let want = numbers(&g).iter().map(|g| g * g).sum::<f64>().sqrt();
            for max in [None, Some(0.5), Some(1e9)] {
                let Clip { norm, scale } =
                    clip_grad_norm(&to_test_device(&g), &to_test_device(&losses), max).unwrap();
                let norm: f64 = norm.get(0).unwrap().to_scalar().unwrap();
                assert!((norm - want).abs() <= 1e-12 * want, "{count}");
                let want = super::super::clip_grad_norm(&g, &losses, max).unwrap().scale;
                assert!(relative_error(&scale, &numbers(&want)) < 1e-7, "{count} {max:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_changes_nothing() {
        let adamw = AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.1 };
        let (good, losses) = (random(1, 9), random(2, 300));
        let with = |x: &Tensor, none: f32| {
            let mut x = x.to_vec1::<f32>().unwrap();
            *x.last_mut().unwrap() = none;
            Tensor::new(x, &Device::Cpu).unwrap()
        };
        for none in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (g, losses) in [(&with(&good, none), &losses), (&good, &with(&losses, none))] {
                for max in [None, Some(0.5)] {
                    let g = to_test_device(g);
                    let Clip { norm, scale } = clip_grad_norm(&g, &to_test_device(losses), max).unwrap();
                    let of_good: f64 = norm.get(0).unwrap().to_scalar().unwrap();
                    assert_eq!(of_good.is_finite(), numbers(&g)[8].is_finite());
                    let start = [3, 4, 5].map(|seed| random(seed, 9));
                    let [p, m, v] = [0, 1, 2].map(|n| to_test_device(&start[n]));
                    step(&p, &g, &m, &v, 9, &scale, &Factors::new(&adamw, 1)).unwrap();
                    assert_eq!([&p, &m, &v].map(numbers), [0, 1, 2].map(|n| numbers(&start[n])));
                }
            }
        }
    }
}
