//! Rounding to bf16 and f16: a GPU converts the tensor, a CPU rounds the values and keeps f32 tensors.
//!
//! A CPU always computes in f32. With bf16 or f16 it rounds the tensors that go from one op to the next to
//! values that the 16-bit type can represent, so that a run on a CPU has the rounding of a run on a GPU. Sums
//! inside an op stay f32.

use crate::rows::new_rows;
use crate::tensor::{read, tensor};
use candle_core::{Result, Tensor};
use half::f16;

/// The type that activations and weights are rounded to (to nearest, ties to even).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// No rounding.
    #[default]
    F32,
    /// bfloat16: 8 bits of precision and the range of f32.
    Bf16,
    /// IEEE half precision: 11 bits of precision, and infinite above 65,504.
    F16,
}

/// Rounds `x` to `precision`. With [`Precision::F32`] it returns `x` itself.
///
/// # Errors
/// If `x` is not a contiguous f32 tensor.
pub fn round(x: Tensor, precision: Precision) -> Result<Tensor> {
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        let dtype = match precision {
            Precision::F32 => candle_core::DType::F32,
            Precision::Bf16 => candle_core::DType::BF16,
            Precision::F16 => candle_core::DType::F16,
        };
        return crate::linear::gpu::converted(&x, dtype);
    }
    match precision {
        Precision::F32 => Ok(x),
        Precision::Bf16 => each(&x, bf16),
        Precision::F16 => each(&x, |x| f16::from_f32(x).to_f32()),
    }
}

#[inline(always)]
fn each(x: &Tensor, f: impl Fn(f32) -> f32 + Sync) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    let rows = x.elem_count() / width.max(1);
    let elements = read::<f32>(x)?;
    let elements = &*elements;
    let [y] = new_rows(
        rows,
        [width],
        #[inline(always)]
        |t, [y]| [y.fill(elements[t * width..][..width].iter().map(|&x| f(x)))],
    );
    tensor(y, x.shape())
}

#[inline(always)]
fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let even = (bits >> 16) & 1;
    let rounded = f32::from_bits(bits.wrapping_add(0x7fff + even) & 0xffff_0000);
    if x.is_nan() { x } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn values_are_those_of_the_half_types() {
        let mut values: Vec<f32> = (0..1 << 16).map(|i| f32::from_bits(i << 16 | 0x8000)).collect();
        values.extend((0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9))));
        values.extend([
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN_POSITIVE,
            65_519.9,
            65_520.0,
        ]);
        let x = Tensor::from_slice(&values, values.len(), &Device::Cpu).unwrap();
        for (precision, want) in [
            (Precision::Bf16, (|x| half::bf16::from_f32(x).to_f32()) as fn(f32) -> f32),
            (Precision::F16, |x| f16::from_f32(x).to_f32()),
            (Precision::F32, |x| x),
        ] {
            let got: Vec<f32> = round(x.clone(), precision).unwrap().to_vec1().unwrap();
            for (&x, got) in values.iter().zip(got) {
                let want = want(x);
                let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                assert!(same, "{precision:?} of {x}: {got}, expected {want}");
            }
        }
    }

    #[test]
    fn shapes_stay() {
        for shape in [vec![], vec![0, 3], vec![3, 0], vec![2, 3, 5]] {
            let x = Tensor::ones(shape.as_slice(), candle_core::DType::F32, &Device::Cpu).unwrap();
            assert_eq!(round(x, Precision::Bf16).unwrap().dims(), shape);
        }
    }
}
