//! The activation functions of a feed-forward layer, plain and gated.
//!
//! - `Gelu`: x·Φ(x) = x/2·(1 + erf(x/√2)), Hendrycks and Gimpel 2016
//! - `GeluTanh`: x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the approximation of the same paper
//! - `Silu`: x·σ(x); gated it is SwiGLU, Shazeer 2020
//! - `Relu`: max(x, 0)
//!
//! They apply to tensors of any shape, element by element, and read and write memory once.

use crate::rows::{fill_both, new_rows};
use crate::simd::exp;
use crate::tensor::{expect_shape, read, tensor};
use candle_core::{Result, Tensor};
use std::iter::zip;

#[cfg(any(test, gpu))]
mod gpu;

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU with the error function: `gelu` in transformers.
    Gelu,
    /// GELU with the tanh approximation: `gelu_new` and `gelu_pytorch_tanh` in transformers.
    GeluTanh,
    /// x·σ(x): `silu` and `swish` in transformers.
    Silu,
    /// max(x, 0). Its derivative at 0 is 0.
    Relu,
}

/// An activation function of one element.
trait Function {
    fn value(x: f32) -> f32;

    /// The value and the derivative at x.
    fn value_and_slope(x: f32) -> (f32, f32);
}

struct Gelu;
struct GeluTanh;
struct Silu;
struct Relu;

impl Function for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * normal(x).0
    }

    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, f32) {
        let (below, density) = normal(x);
        (x * below, below + x * density)
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(Self::argument(x))
    }

    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, f32) {
        let s = sigmoid(Self::argument(x));
        (x * s, s + x * s * (1.0 - s) * (Self::SCALE + 3.0 * Self::CUBIC * x * x))
    }
}

impl GeluTanh {
    const SCALE: f32 = 1.595_769_2; // 2·√(2/π)
    const CUBIC: f32 = 0.044_715 * Self::SCALE;

    /// The z of 1/2·(1 + tanh(z/2)) = σ(z). So the sigmoid computes the tanh, and keeps its precision for
    /// negative x.
    #[inline(always)]
    fn argument(x: f32) -> f32 {
        x * (Self::SCALE + Self::CUBIC * x * x)
    }
}

impl Function for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        (x * s, s * (1.0 + x * (1.0 - s)))
    }
}

impl Function for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        if x <= 0.0 { 0.0 } else { x } // NaN stays NaN
    }

    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, f32) {
        (Self::value(x), if x > 0.0 { 1.0 } else { 0.0 })
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The cumulative distribution function Φ(x) and the density φ(x) of the standard normal distribution.
///
/// Φ(−|x|) = exp(−x²/2)·r·g(1 − 2·k·r) with r = 1/(|x| + k), the form of Schonfelder 1978 ("Chebyshev
/// expansions for the error and related functions"). g is the Chebyshev fit of degree 9 on 0 ≤ |x| ≤ 14 for k
/// = 2.5, with a relative error of 6e-8. This form keeps the precision of Φ for large negative x, where 1 +
/// erf cancels.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const K: f32 = 2.5;
    const INVERSE_SQRT_2PI: f32 = 0.398_942_3;
    let e = exp(-0.5 * x * x);
    let r = 1.0 / (x.abs() + K);
    let u = r.mul_add(-2.0 * K, 1.0);
    let g = -1.571_075_6e-4f32;
    let g = g.mul_add(u, -3.117_024_3e-4);
    let g = g.mul_add(u, 6.829_995e-4);
    let g = g.mul_add(u, 2.524_011_3e-3);
    let g = g.mul_add(u, -1.599_755_1e-3);
    let g = g.mul_add(u, -1.638_620_2e-2);
    let g = g.mul_add(u, 9.235_587e-3);
    let g = g.mul_add(u, 0.131_986_98);
    let g = g.mul_add(u, -0.433_691_98);
    let g = g.mul_add(u, 0.706_656_63);
    let outside = e * r * g;
    (if x < 0.0 { outside } else { 1.0 - outside }, e * INVERSE_SQRT_2PI)
}

/// Evaluates `$run` with `$F` set to the [`Function`] of `$activation`, so that each function gets its own
/// compiled loop.
macro_rules! with_function {
    ($activation:expr, $F:ident => $run:expr) => {
        match $activation {
            Activation::Gelu => {
                type $F = Gelu;
                $run
            }
            Activation::GeluTanh => {
                type $F = GeluTanh;
                $run
            }
            Activation::Silu => {
                type $F = Silu;
                $run
            }
            Activation::Relu => {
                type $F = Relu;
                $run
            }
        }
    };
}

/// Returns `act(x)`, with the shape of `x`.
///
/// # Errors
/// If `x` is not a contiguous f32 tensor.
pub fn forward(x: &Tensor, activation: Activation) -> Result<Tensor> {
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return Ok(gpu::activate(x, None, None, activation)?.0);
    }
    let (rows, width) = rows_of(x);
    let elements = read::<f32>(x)?;
    let elements = &*elements;
    let row = |t: usize| &elements[t * width..][..width];
    let [y] = with_function!(activation, F => new_rows(rows, [width], #[inline(always)] |t, [y]| {
        [y.fill(row(t).iter().map(|&x| F::value(x)))]
    }));
    tensor(y, x.shape())
}

/// Backward pass of [`forward`]: returns the gradient of `x` for the gradient `dy` of `act(x)`; all have the
/// same shape.
///
/// # Errors
/// If the shapes differ, or one is not a contiguous f32 tensor.
pub fn backward(x: &Tensor, dy: &Tensor, activation: Activation) -> Result<Tensor> {
    expect_shape("dy", dy, x.dims())?;
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return Ok(gpu::activate(x, None, Some(dy), activation)?.0);
    }
    let (rows, width) = rows_of(x);
    let (elements, gradients) = (read::<f32>(x)?, read::<f32>(dy)?);
    let (elements, gradients) = (&*elements, &*gradients);
    let row = |t: usize| zip(&elements[t * width..][..width], &gradients[t * width..][..width]);
    let [dx] = with_function!(activation, F => new_rows(rows, [width], #[inline(always)] |t, [dx]| {
        [dx.fill(row(t).map(|(&x, dy)| dy * F::value_and_slope(x).1))]
    }));
    tensor(dx, x.shape())
}

/// Returns `act(gate)·up`; all have the same shape.
///
/// # Errors
/// If the shapes differ, or one is not a contiguous f32 tensor.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    expect_shape("up", up, gate.dims())?;
    #[cfg(gpu)]
    if crate::gpu::runs(gate.device()) {
        return Ok(gpu::activate(gate, Some(up), None, activation)?.0);
    }
    let (rows, width) = rows_of(gate);
    let (gates, ups) = (read::<f32>(gate)?, read::<f32>(up)?);
    let (gates, ups) = (&*gates, &*ups);
    let row = |t: usize| zip(&gates[t * width..][..width], &ups[t * width..][..width]);
    let [y] = with_function!(activation, F => new_rows(rows, [width], #[inline(always)] |t, [y]| {
        [y.fill(row(t).map(|(&gate, up)| F::value(gate) * up))]
    }));
    tensor(y, gate.shape())
}

/// Backward pass of [`gated`]: returns the gradients of `gate` and of `up` for the gradient `dy`; all have
/// the same shape.
///
/// # Errors
/// If the shapes differ, or one is not a contiguous f32 tensor.
pub fn gated_backward(
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
    activation: Activation,
) -> Result<(Tensor, Tensor)> {
    expect_shape("up", up, gate.dims())?;
    expect_shape("dy", dy, gate.dims())?;
    #[cfg(gpu)]
    if crate::gpu::runs(gate.device()) {
        return match gpu::activate(gate, Some(up), Some(dy), activation)? {
            (dgate, Some(dup)) => Ok((dgate, dup)),
            (_, None) => {
                candle_core::bail!("the backward pass of a gated activation returned no gradient of `up`")
            }
        };
    }
    let (rows, width) = rows_of(gate);
    let (gates, ups, gradients) = (read::<f32>(gate)?, read::<f32>(up)?, read::<f32>(dy)?);
    let (gates, ups, gradients) = (&*gates, &*ups, &*gradients);
    let [dgate, dup] = with_function!(activation, F => new_rows(rows, [width; 2], #[inline(always)] |t, new| {
        let range = t * width..(t + 1) * width;
        let (gate, up, dy) = (&gates[range.clone()], &ups[range.clone()], &gradients[range]);
        fill_both(new, zip(gate, zip(up, dy)).map(|(&gate, (up, dy))| {
            let (value, slope) = F::value_and_slope(gate);
            (dy * up * slope, dy * value)
        }))
    }));
    Ok((tensor(dgate, gate.shape())?, tensor(dup, gate.shape())?))
}

/// The number of rows of a tensor of any shape, and the width of a row.
fn rows_of(x: &Tensor) -> (usize, usize) {
    let width = x.dims().last().copied().unwrap_or(1);
    (x.elem_count().checked_div(width).unwrap_or(0), width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error, relative_error_f64};
    use candle_core::Device;
    use std::f64::consts::{FRAC_1_SQRT_2, PI};

    pub(super) const ALL: [Activation; 4] =
        [Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Relu];

    /// erf by its Maclaurin series, and for |x| > 3 by the continued fraction of erfc (Abramowitz and Stegun
    /// 7.1.6, 7.1.14).
    fn erf_reference(x: f64) -> f64 {
        if x.abs() > 3.0 {
            let fraction = (1..=60).rev().fold(0.0, |below, k| f64::from(k) / 2.0 / (x.abs() + below));
            let erfc = (-x * x).exp() / PI.sqrt() / (x.abs() + fraction);
            return x.signum() * (1.0 - erfc);
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        2.0 / PI.sqrt() * (-x * x).exp() * sum
    }

    pub(super) fn reference(x: f64, activation: Activation) -> f64 {
        match activation {
            Activation::Gelu => 0.5 * x * (1.0 + erf_reference(x * FRAC_1_SQRT_2)),
            Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Relu => x.max(0.0),
        }
    }

    #[test]
    fn both_references_of_erf_are_right_and_agree_at_3() {
        assert!((erf_reference(0.5) - 0.520_499_877_813_046_5).abs() < 1e-15);
        assert!((erf_reference(2.0) - 0.995_322_265_018_952_7).abs() < 1e-15);
        assert!((erf_reference(3.0 + 1e-9) - erf_reference(3.0)).abs() < 1e-12);
    }

    #[test]
    fn the_normal_distribution_is_exact_to_a_few_ulp() {
        for i in -80_000..=80_000 {
            let x = i as f32 / 10_000.0;
            let (below, density) = normal(x);
            let want = 0.5 + 0.5 * erf_reference(f64::from(x) * FRAC_1_SQRT_2);
            assert!((f64::from(below) - want).abs() < 2e-7, "Φ({x}) = {below}, expected {want}");
            let want = (-0.5 * f64::from(x).powi(2)).exp() / (2.0 * PI).sqrt();
            assert!((f64::from(density) - want).abs() < 1e-7, "φ({x}) = {density}, expected {want}");
        }
    }

    #[test]
    fn the_tail_below_zero_keeps_its_precision() {
        // erfc by its continued fraction. An exponent x²/2 near 32 has a rounding error of 2e-6.
        for x in [-4.5f64, -6.0, -8.0] {
            let z = -x * FRAC_1_SQRT_2;
            let fraction = (1..=60).rev().fold(0.0, |below, k| f64::from(k) / 2.0 / (z + below));
            let want = 0.5 * (-z * z).exp() / PI.sqrt() / (z + fraction);
            assert!((f64::from(normal(x as f32).0) / want - 1.0).abs() < 3e-6, "{x}");
        }
    }

    #[test]
    fn values_equal_the_reference_for_odd_and_empty_shapes() {
        for activation in ALL {
            for shape in [(0, 3), (3, 0), (1, 1), (3, 7), (7, 1023), (33, 1024)] {
                let (x, up) = (random(1, shape), random(2, shape));
                let want: Vec<f64> = numbers(&x).iter().map(|&x| reference(x, activation)).collect();
                let y = forward(&x, activation).unwrap();
                assert_eq!(y.dims(), x.dims());
                // A few roundings per element, each at most 6e-8.
                assert!(relative_error(&y, &want) < 2e-7, "{activation:?} {shape:?}");
                let want: Vec<f64> = zip(want, numbers(&up)).map(|(y, up)| y * up).collect();
                assert!(
                    relative_error(&gated(&x, &up, activation).unwrap(), &want) < 2e-7,
                    "{activation:?} {shape:?}"
                );
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for activation in ALL {
            for shape in [(0, 3), (1, 1), (3, 7), (1, 1023)] {
                let (x, up, dy) = (random(1, shape), random(2, shape), random(3, shape));
                let (xs, ups, dys) = (numbers(&x), numbers(&up), numbers(&dy));
                let slopes: Vec<f64> =
                    xs.iter().map(|&x| finite_difference(&[x], |x| reference(x[0], activation))[0]).collect();
                let want: Vec<f64> = zip(&slopes, &dys).map(|(slope, dy)| slope * dy).collect();
                // A few roundings of 6e-8, relative to derivatives of about 1.
                assert!(
                    relative_error(&backward(&x, &dy, activation).unwrap(), &want) < 4e-7,
                    "{activation:?} {shape:?}"
                );

                let (dgate, dup) = gated_backward(&x, &up, &dy, activation).unwrap();
                let want_gate: Vec<f64> = zip(&want, &ups).map(|(d, up)| d * up).collect();
                let want_up: Vec<f64> =
                    zip(&xs, &dys).map(|(&x, dy)| reference(x, activation) * dy).collect();
                assert!(relative_error(&dgate, &want_gate) < 4e-7, "{activation:?} {shape:?}");
                assert!(relative_error(&dup, &want_up) < 4e-7, "{activation:?} {shape:?}");
            }
        }
    }

    #[test]
    fn the_gradient_of_a_gate_is_that_of_the_product() {
        let (gate, up, dy) = (random(1, 5), random(2, 5), random(3, 5));
        let (ups, dys) = (numbers(&up), numbers(&dy));
        let want = finite_difference(&numbers(&gate), |gate| {
            let y: Vec<f64> = zip(gate, &ups).map(|(&x, up)| reference(x, Activation::Silu) * up).collect();
            inner(&y, &dys)
        });
        let (dgate, _) = gated_backward(&gate, &up, &dy, Activation::Silu).unwrap();
        assert!(relative_error_f64(&numbers(&dgate), &want) < 4e-7);
    }

    #[test]
    fn far_from_zero_values_are_those_of_the_limit() {
        let x = Tensor::new(&[-1e4f32, -100.0, -20.0, 20.0, 100.0, 1e4], &Device::Cpu).unwrap();
        for activation in ALL {
            let want: Vec<f64> = numbers(&x).iter().map(|x| x.max(0.0)).collect();
            // SiLU at -20 is -4e-8.
            assert!(relative_error(&forward(&x, activation).unwrap(), &want) < 1e-8, "{activation:?}");
            let dx = numbers(&backward(&x, &x.ones_like().unwrap(), activation).unwrap());
            assert!(relative_error_f64(&dx, &[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]) < 1e-7, "{activation:?} {dx:?}");
        }
    }

    #[test]
    fn a_nan_stays_a_nan() {
        let x = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
        for activation in ALL {
            assert!(numbers(&forward(&x, activation).unwrap())[0].is_nan(), "{activation:?}");
        }
    }

    #[test]
    fn differing_shapes_are_an_error() {
        let (x, y) = (random(1, (2, 3)), random(2, (3, 2)));
        assert!(backward(&x, &y, Activation::Gelu).is_err());
        assert!(gated(&x, &y, Activation::Silu).is_err());
        assert!(gated_backward(&x, &x, &y, Activation::Silu).is_err());
        assert!(forward(&x.t().unwrap(), Activation::Gelu).unwrap_err().to_string().contains("contiguous"));
    }
}
