//! AdamW (Loshchilov & Hutter, 2019) on the flat buffer of all trained parameters, and gradient clipping by
//! the global norm.
//!
//! The order of the operations is that of `torch.optim.AdamW`, so that runs of both can be compared step by
//! step:
//!
//! ```text
//! p ← p·(1 − lr·decay)    m ← m + (1−β₁)(g − m)    v ← β₂v + (1−β₂)g²
//! p ← p − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
//! ```

use crate::simd::{GRAIN, vectorised};
use crate::tensor::{expect_shape, read, tensor, write};
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

#[cfg(any(test, gpu))]
mod gpu;

/// The hyperparameters of one step, with the names of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// The learning rate of this step, after the schedule.
    pub learning_rate: f64,
    /// The decay rate of the first moment (`betas[0]`).
    pub beta1: f64,
    /// The decay rate of the second moment (`betas[1]`).
    pub beta2: f64,
    /// ε, which is added to the denominator (`eps`).
    pub epsilon: f64,
    /// The decoupled weight decay: a step multiplies a parameter by 1 − learning rate · weight decay.
    pub weight_decay: f64,
}

/// The norm of a gradient and the factor that clips it. Both stay on the device of the gradient, so the host
/// does not wait for a GPU.
#[derive(Clone, Debug)]
pub struct Clip {
    /// ‖gradients‖₂, an f64 tensor `(1)`. It is NaN or ∞ if a gradient is.
    pub norm: Tensor,
    /// The factor of the gradients, an f32 tensor `(1)`: min(1, max_norm/(norm + 1e-6)) as in torch's
    /// `clip_grad_norm_`. It is NaN if the norm or a loss is not finite; [`step`] then changes nothing.
    pub scale: Tensor,
}

/// Returns the norm of the gradients `grads` `(P)` of the losses `losses` `(B)`, and the factor that clips it
/// to `max_norm`. Without `max_norm` the factor is 1.
///
/// # Errors
/// If a tensor is not contiguous f32.
pub fn clip_grad_norm(grads: &Tensor, losses: &Tensor, max_norm: Option<f64>) -> Result<Clip> {
    #[cfg(gpu)]
    if crate::gpu::runs(grads.device()) {
        return gpu::clip_grad_norm(grads, losses, max_norm);
    }
    let norm = norm(grads)?;
    let finite = norm.is_finite() && read::<f32>(losses)?.iter().all(|loss| loss.is_finite());
    let scale = max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
    let scale = if finite { scale as f32 } else { f32::NAN };
    Ok(Clip { norm: tensor(vec![norm], 1)?, scale: tensor(vec![scale], 1)? })
}

/// Performs step number `step`, counted from 1: updates `params` and the moments `m` and `v` in place.
///
/// `params`, `grads`, `m` and `v` have the shape `(P)` and must not share a storage. Weight decay applies to
/// the first `decayed` elements. The gradients are first multiplied by `scale` `(1)`, see [`Clip`].
///
/// # Errors
/// If a shape differs from the above, `decayed` is greater than P, `step` is 0, two tensors share a storage,
/// or a tensor is not contiguous f32.
pub fn step(
    params: &Tensor,
    grads: &Tensor,
    m: &Tensor,
    v: &Tensor,
    decayed: usize,
    step: u64,
    scale: &Tensor,
    adamw: &AdamW,
) -> Result<()> {
    let &[count] = params.dims() else {
        bail!("`params` has the shape {:?}, expected one dimension", params.dims());
    };
    for (name, tensor) in [("grads", grads), ("m", m), ("v", v)] {
        expect_shape(name, tensor, &[count])?;
    }
    expect_shape("scale", scale, &[1])?;
    if decayed > count {
        bail!("weight decay is set for {decayed} of {count} parameters");
    }
    if step == 0 {
        bail!("`step` is 0, but steps count from 1");
    }
    // A storage is locked while it is written, so two views of one storage would deadlock.
    let mut storages = [params, grads, m, v].map(|tensor| &raw const *tensor.storage_and_layout().0);
    storages.sort_unstable();
    if storages.windows(2).any(|pair| pair[0] == pair[1]) {
        bail!("`params`, `grads`, `m` and `v` must not be views of one storage");
    }
    let factors = Factors::new(adamw, step);
    #[cfg(gpu)]
    if crate::gpu::runs(params.device()) {
        return gpu::step(params, grads, m, v, decayed, scale, &factors);
    }
    let scale = read::<f32>(scale)?[0];
    if scale.is_nan() {
        return Ok(());
    }
    let grads = read::<f32>(grads)?;
    let mut result = Ok(());
    let all = |params: &mut [f32], m: &mut [f32], v: &mut [f32]| {
        params
            .par_chunks_mut(GRAIN)
            .zip(grads.par_chunks(GRAIN))
            .zip(m.par_chunks_mut(GRAIN))
            .zip(v.par_chunks_mut(GRAIN))
            .enumerate()
            .for_each(|(piece, (((p, g), m), v))| {
                let at = decayed.saturating_sub(piece * GRAIN).min(p.len());
                let ((p0, p1), (g0, g1)) = (p.split_at_mut(at), g.split_at(at));
                let ((m0, m1), (v0, v1)) = (m.split_at_mut(at), v.split_at_mut(at));
                for (p, g, m, v, decay) in [(p0, g0, m0, v0, factors.decay), (p1, g1, m1, v1, 1.0)] {
                    vectorised(
                        #[inline(always)]
                        || update_in_blocks(p, g, m, v, scale, decay, &factors),
                    );
                }
            });
    };
    write(params, |params| result = write_both(m, v, |m, v| all(params, m, v)))?;
    result
}

/// Whether all elements of `values` `(P)` are finite. The host waits for a GPU.
///
/// It tests the sum of squares in f64, which finite f32 values cannot overflow.
///
/// # Errors
/// If `values` is not contiguous f32.
pub fn all_finite(values: &Tensor) -> Result<bool> {
    let none = crate::zeros(0, DType::F32, values.device())?;
    Ok(clip_grad_norm(values, &none, None)?.norm.to_vec1::<f64>()?[0].is_finite())
}

fn norm(grads: &Tensor) -> Result<f64> {
    let grads = read::<f32>(grads)?;
    // Pieces have a fixed size and are added in order, so the result has the same bits for any number of
    // threads.
    let squares: Vec<f64> = grads.par_chunks(GRAIN).map(|piece| vectorised(|| squares(piece))).collect();
    Ok(squares.iter().sum::<f64>().sqrt())
}

fn write_both(a: &Tensor, b: &Tensor, f: impl FnOnce(&mut [f32], &mut [f32])) -> Result<()> {
    let mut result = Ok(());
    write(a, |a| result = write(b, |b| f(a, b)))?;
    result
}

/// The factors of a step, rounded to f32 where torch rounds them.
struct Factors {
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    sqrt_bias_correction2: f32,
    epsilon: f32,
    step_size: f32,
}

impl Factors {
    fn new(adamw: &AdamW, step: u64) -> Self {
        let AdamW { learning_rate, beta1, beta2, epsilon, weight_decay } = *adamw;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Self {
            decay: (1.0 - learning_rate * weight_decay) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            sqrt_bias_correction2: correction(beta2).sqrt() as f32,
            epsilon: epsilon as f32,
            step_size: (learning_rate / correction(beta1)) as f32,
        }
    }
}

/// The number of elements that are tested for zeros together: one page of memory.
const BLOCK: usize = 1024;

/// Updates the parameters block by block.
///
/// The moments of a block are not written if its gradients and moments are all 0, as for embedding rows whose
/// token never occurs. The operating system does not allocate memory pages that are never written.
#[inline(always)]
fn update_in_blocks(
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    scale: f32,
    decay: f32,
    f: &Factors,
) {
    let moments = m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK));
    for ((p, g), (m, v)) in p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(moments) {
        if is_zero(g) && is_zero(m) && is_zero(v) {
            p.iter_mut().for_each(|p| *p *= decay);
        } else {
            update(p, g, m, v, scale, decay, f);
        }
    }
}

#[inline(always)]
fn is_zero(block: &[f32]) -> bool {
    block.iter().fold(0, |bits, x| bits | x.to_bits() << 1) == 0 // the shift ignores the sign of −0
}

/// Sets the gradients `grads` `(P)` to 0.
///
/// On a CPU, blocks that are already 0 are not written, so that memory pages that were never written stay
/// unallocated.
///
/// # Errors
/// If `grads` is not contiguous f32.
pub fn zero(grads: &Tensor) -> Result<()> {
    if !grads.device().is_cpu() {
        return grads.zero_set();
    }
    write(grads, |grads| {
        grads.par_chunks_mut(GRAIN).for_each(|piece| {
            vectorised(
                #[inline(always)]
                || {
                    for block in piece.chunks_mut(BLOCK) {
                        if !is_zero(block) {
                            block.fill(0.0);
                        }
                    }
                },
            );
        });
    })
}

#[inline(always)]
fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], scale: f32, decay: f32, f: &Factors) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * scale;
        // As `torch.lerp`, which starts from the nearer end.
        *m = if f.one_minus_beta1 < 0.5 {
            *m + f.one_minus_beta1 * (g - *m)
        } else {
            g - (g - *m) * (1.0 - f.one_minus_beta1)
        };
        *v = *v * f.beta2 + f.one_minus_beta2 * g * g;
        let divisor = v.sqrt() / f.sqrt_bias_correction2 + f.epsilon;
        *p = *p * decay - f.step_size * *m / divisor;
    }
}

#[inline(always)]
fn squares(block: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    let pieces = block.chunks_exact(16);
    let rest: f64 = pieces.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    for piece in pieces {
        for (lane, &x) in lanes.iter_mut().zip(piece) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{numbers, random, relative_error};
    use candle_core::Device;

    const ADAMW: AdamW =
        AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.1 };

    #[test]
    fn rows_without_gradient_are_only_decayed_and_cleared_gradients_are_zero() {
        let count = 3 * BLOCK + 7;
        let element = |i: usize| if i / BLOCK == 1 { 0.0 } else { (i % 13) as f32 - 6.0 };
        let grads: Vec<f32> = (0..count).map(element).collect();
        let one = |range: std::ops::Range<usize>| {
            let (p, g) = (vector(&vec![1.5; range.len()]), vector(&grads[range.clone()]));
            let (m, v) = (zeros(range.len()), zeros(range.len()));
            step(&p, &g, &m, &v, range.len(), 1, &scale(1.0), &ADAMW).unwrap();
            zero(&g).unwrap();
            assert_eq!(numbers(&g), vec![0.0; range.len()]);
            numbers(&p)
        };
        let whole = one(0..count);
        // Shorter vectors have other block boundaries, which must not change any element.
        let pieces: Vec<f64> = (0..count).step_by(100).flat_map(|i| one(i..count.min(i + 100))).collect();
        assert_eq!(whole, pieces);
        assert_eq!(whole[BLOCK], f64::from(1.5f32 * (1.0f32 - 1e-3)));
    }

    fn scale(factor: f32) -> Tensor {
        vector(&[factor])
    }

    fn vector(elements: &[f32]) -> Tensor {
        Tensor::new(elements, &Device::Cpu).unwrap()
    }

    fn zeros(count: usize) -> Tensor {
        Tensor::zeros(count, DType::F32, &Device::Cpu).unwrap()
    }

    // torch 2.15:
    //
    //     torch.manual_seed(0)
    //     p0 = torch.randn(6); gs = torch.randn(3, 6)
    //     gs[1, 2] = 0; gs[:, 3] = 0
    //     head, tail = p0[:4].clone().requires_grad_(), p0[4:].clone().requires_grad_()
    //     groups = [{"params": [head], "weight_decay": 0.1}, {"params": [tail], "weight_decay": 0.0}]
    //     opt = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-6)
    //     for g in gs:
    //         head.grad, tail.grad = (g * 0.5)[:4], (g * 0.5)[4:]
    //         opt.step()
    //     print(p0.tolist()); print(gs.tolist()); print(torch.cat([head, tail]).tolist())
    //     for key in ("exp_avg", "exp_avg_sq"):
    //         print(torch.cat([opt.state[head][key], opt.state[tail][key]]).tolist())
    const PARAMS: [f32; 6] =
        [1.540_996_1, -0.293_428_9, -2.178_789_4, 0.568_431_26, -1.084_522_4, -1.398_595_5];
    const GRADS: [[f32; 6]; 3] = [
        [-0.088_531_43, 0.523_883_3, -0.143_473_85, 0.0, -0.613_583_1, 0.031_592_74],
        [-0.492_676_97, 0.248_414_75, 0.0, 0.0, -0.841_064_75, -2.316_042],
        [-0.102_309_65, 0.792_444, -0.289_667_7, 0.0, 0.522_860_47, 2.302_205_3],
    ];
    const PARAMS_AFTER: [f64; 6] = [
        1.5625630617141724,
        -0.3211350739002228,
        -2.1475703716278076,
        0.5667276382446289,
        -1.060556411743164,
        -1.401737093925476,
    ];
    const M_AFTER: [f64; 6] = [
        -0.030871469527482986,
        0.07201813906431198,
        -0.020294075831770897,
        0.0,
        -0.036555007100105286,
        0.01216788962483406,
    ];
    const V_AFTER: [f64; 6] = [
        0.0006461309967562556,
        0.002395130693912506,
        0.0002602062013465911,
        0.0,
        0.0033567280042916536,
        0.026528842747211456,
    ];

    #[test]
    fn three_steps_equal_torch() {
        let (p, m, v) = (vector(&PARAMS), zeros(6), zeros(6));
        for (t, grads) in (1..).zip(&GRADS) {
            step(&p, &vector(grads), &m, &v, 4, t, &scale(0.5), &ADAMW).unwrap();
        }
        // PyTorch may fuse a product and a sum into one rounding, a difference of one ulp per step.
        for (got, want) in [(&p, PARAMS_AFTER), (&m, M_AFTER), (&v, V_AFTER)] {
            assert!(relative_error(got, &want) < 1e-7, "{got}, expected {want:?}");
        }
    }

    #[test]
    fn the_flat_buffer_is_stepped_as_its_parts_would_be() {
        // More than one block, and the end of weight decay inside of a block.
        let (count, decayed) = (2 * GRAIN + 37, GRAIN + 5);
        let (params, grads) = (random(1, count), random(2, count));
        let run = |params: &Tensor, grads: &Tensor, decayed: usize| {
            let params = params.copy().unwrap();
            let (m, v) = (zeros(params.elem_count()), zeros(params.elem_count()));
            step(&params, grads, &m, &v, decayed, 1, &scale(1.0), &ADAMW).unwrap();
            [params, m, v].map(|x| numbers(&x)).concat()
        };
        let whole = run(&params, &grads, decayed);
        for (range, decays) in [(0..decayed, true), (decayed..count, false)] {
            let part = |x: &Tensor| x.narrow(0, range.start, range.len()).unwrap();
            let alone = run(&part(&params), &part(&grads), if decays { range.len() } else { 0 });
            for (x, all) in alone.chunks(range.len()).zip(whole.chunks(count)) {
                assert_eq!(x, &all[range.clone()]);
            }
        }
    }

    #[test]
    fn a_view_of_a_larger_buffer_is_stepped_in_place() {
        let all = random(1, 10);
        let before = numbers(&all);
        let (m, v) = (zeros(4), zeros(4));
        step(&all.narrow(0, 3, 4).unwrap(), &random(2, 4), &m, &v, 0, 1, &scale(1.0), &ADAMW).unwrap();
        for (i, (before, after)) in before.iter().zip(numbers(&all)).enumerate() {
            assert_eq!(*before != after, (3..7).contains(&i), "element {i}");
        }
    }

    #[test]
    fn no_parameters_are_no_work_and_bad_arguments_are_refused() {
        let none = zeros(0);
        step(&none, &zeros(0), &zeros(0), &zeros(0), 0, 1, &scale(1.0), &ADAMW).unwrap();
        assert_eq!(norm(&none).unwrap(), 0.0);
        let [p, g, m, v] = [0; 4].map(|_| zeros(3));
        assert!(
            step(&p, &zeros(4), &m, &v, 0, 1, &scale(1.0), &ADAMW)
                .unwrap_err()
                .to_string()
                .contains("`grads`")
        );
        assert!(step(&p, &g, &m, &v, 4, 1, &scale(1.0), &ADAMW).unwrap_err().to_string().contains("4 of 3"));
        assert!(
            step(&p, &g, &m, &v, 0, 0, &scale(1.0), &ADAMW).unwrap_err().to_string().contains("count from 1")
        );
        assert!(
            step(&p, &p, &m, &v, 0, 1, &scale(1.0), &ADAMW).unwrap_err().to_string().contains("one storage")
        );
        assert!(step(&zeros(6).reshape((2, 3)).unwrap(), &g, &m, &v, 0, 1, &scale(1.0), &ADAMW).is_err());
    }

    #[test]
    fn the_norm_is_exact_where_f32_would_overflow_and_lets_nan_through() {
        let count = GRAIN + 37;
        let grads = random(3, count);
        let want = numbers(&grads).iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!((norm(&grads).unwrap() / want - 1.0).abs() < 1e-12);
        let huge = vector(&[3e30, 4e30]);
        assert!((norm(&huge).unwrap() / 5e30 - 1.0).abs() < 1e-6);
        assert!(norm(&vector(&[1.0, f32::NAN])).unwrap().is_nan());
        assert_eq!(norm(&vector(&[1.0, f32::NEG_INFINITY])).unwrap(), f64::INFINITY);
        let finite = |values: &[f32]| all_finite(&vector(values)).unwrap();
        assert!(finite(&[f32::MAX, f32::MIN]) && !finite(&[1.0, f32::NAN]) && !finite(&[f32::INFINITY, 0.0]));
    }

    #[test]
    fn long_gradients_are_shortened_and_what_is_not_finite_changes_nothing() {
        let (grads, losses) = (vector(&[3.0, 4.0]), vector(&[1.0, 2.0]));
        let clipped = |grads: &Tensor, losses: &Tensor, max| {
            let Clip { norm, scale } = clip_grad_norm(grads, losses, max).unwrap();
            (norm.to_vec1::<f64>().unwrap()[0], scale.to_vec1::<f32>().unwrap()[0])
        };
        assert_eq!(clipped(&grads, &losses, None), (5.0, 1.0));
        assert_eq!(clipped(&grads, &losses, Some(6.0)), (5.0, 1.0));
        assert_eq!(clipped(&grads, &losses, Some(2.0)), (5.0, (2.0 / (5.0 + 1e-6)) as f32));
        for none in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (grads, losses) in [(&vector(&[none, 1.0]), &losses), (&grads, &vector(&[1.0, none]))] {
                for max in [None, Some(2.0)] {
                    let Clip { scale, .. } = clip_grad_norm(grads, losses, max).unwrap();
                    let (p, m, v) = (vector(&[1.0, 2.0]), zeros(2), zeros(2));
                    step(&p, grads, &m, &v, 2, 1, &scale, &ADAMW).unwrap();
                    assert_eq!([&p, &m, &v].map(numbers), [vec![1.0, 2.0], vec![0.0; 2], vec![0.0; 2]]);
                }
            }
        }
    }

    #[test]
    fn nan_in_a_gradient_reaches_its_parameter_only() {
        let (p, m, v) = (vector(&[1.0, 2.0]), zeros(2), zeros(2));
        step(&p, &vector(&[f32::NAN, 1.0]), &m, &v, 2, 1, &scale(1.0), &ADAMW).unwrap();
        let p = numbers(&p);
        assert!(p[0].is_nan() && p[1].is_finite());
    }
}
