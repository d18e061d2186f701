//! The GPU version of pooling: calls pool.cu.

use crate::gpu::{Memory, VoidPointer, VoidPointerMut, dtype_code, dtype_code_of, entries, zeros};
use candle_core::{DType, Result, Tensor};
use std::ops::Range;

#[repr(C)]
struct Forward {
    x: VoidPointer,
    starts: *const u32,
    ends: *const u32,
    e: *mut f32,
    norms: *mut f32,
    count: i32,
    width: i32,
    dtype: i32,
    normalize: i32,
}

#[repr(C)]
struct Backward {
    e: *const f32,
    norms: *const f32,
    de: *const f32,
    starts: *const u32,
    ends: *const u32,
    dx: VoidPointerMut,
    count: i32,
    width: i32,
    longest: i32,
    dtype: i32,
    normalize: i32,
}

entries! {
    pool_forward(Forward);
    pool_backward(Backward);
}

/// [`super::forward`] after its checks. The embeddings are f32 for every type of x.
pub(super) fn forward(x: &Tensor, spans: &[Range<usize>], normalize: bool) -> Result<(Tensor, Tensor)> {
    let (_, width) = x.dims2()?;
    let (device, count) = (x.device(), spans.len());
    let (e, norms) =
        (Memory::new(device, DType::F32, count * width)?, Memory::new(device, DType::F32, count)?);
    if count > 0 {
        let (xs, [starts, ends]) = (Memory::of(x)?, upload(spans, device)?);
        let arguments = Forward {
            x: xs.pointer(),
            starts: starts.pointer(),
            ends: ends.pointer(),
            e: e.pointer(),
            norms: norms.pointer(),
            count: count as i32,
            width: width as i32,
            dtype: dtype_code_of(x)?,
            normalize: i32::from(normalize),
        };
        // SAFETY: the caller has checked the shapes and the spans.
        unsafe { pool_forward(device, &arguments)? };
    }
    Ok((e.tensor((count, width))?, norms.tensor(count)?))
}

/// [`super::backward`] after its checks. dx has the type `dtype`.
pub(super) fn backward(
    e: &Tensor,
    norms: &Tensor,
    spans: &[Range<usize>],
    de: &Tensor,
    tokens: usize,
    normalize: bool,
    dtype: DType,
) -> Result<Tensor> {
    let (count, width) = e.dims2()?;
    let device = e.device();
    let dx = zeros((tokens, width), dtype, device)?;
    if count > 0 && width > 0 {
        let (es, norms, de) = (Memory::of(e)?, Memory::of(norms)?, Memory::of(de)?);
        let (dxs, [starts, ends]) = (Memory::mutable(&dx)?, upload(spans, device)?);
        let arguments = Backward {
            e: es.pointer(),
            norms: norms.pointer(),
            de: de.pointer(),
            starts: starts.pointer(),
            ends: ends.pointer(),
            dx: dxs.pointer(),
            count: count as i32,
            width: width as i32,
            longest: spans.iter().map(Range::len).max().unwrap_or(0) as i32,
            dtype: dtype_code(dtype)?,
            normalize: i32::from(normalize),
        };
        // SAFETY: the caller has checked the shapes and the spans.
        unsafe { pool_backward(device, &arguments)? };
    }
    Ok(dx)
}

fn upload(spans: &[Range<usize>], device: &candle_core::Device) -> Result<[Memory; 2]> {
    let starts: Vec<u32> = spans.iter().map(|span| span.start as u32).collect();
    let ends: Vec<u32> = spans.iter().map(|span| span.end as u32).collect();
    Ok([Memory::upload(device, &starts)?, Memory::upload(device, &ends)?])
}

#[cfg(test)]
mod tests {
    use super::super::tests::reference;
    use super::*;
    use crate::testing::{TYPES, cast, finite_difference, inner, numbers, random_on_device, relative_error};

    #[test]
    fn means_and_their_gradients_equal_the_reference() {
        for (dtype, rounding) in TYPES {
            for (tokens, width, spans) in [
                (4, 3, vec![]),
                (1, 1, vec![0..1]),
                (7, 3, vec![0..3, 3..4, 4..7]),
                (7, 3, vec![2..3, 6..7]),
                (45, 16, vec![40..45, 0..40]),
            ] {
                for normalize in [false, true] {
                    let name = format!("{dtype:?} {tokens} {width} {normalize}");
                    let x = cast(&random_on_device(1, (tokens, width)), dtype);
                    let (e, norms) = forward(&x, &spans, normalize).unwrap();
                    let want = reference(&numbers(&x), width, &spans, normalize);
                    // Embeddings are f32 for every type.
                    assert!(relative_error(&e, &want) < 1e-6, "{name}");
                    let de = random_on_device(2, (spans.len(), width));
                    let dx = backward(&e, &norms, &spans, &de, tokens, normalize, dtype).unwrap();
                    let loss = |x: &[f64]| inner(&reference(x, width, &spans, normalize), &numbers(&de));
                    let want = finite_difference(&numbers(&x), loss);
                    assert_eq!(dx.dtype(), dtype);
                    // A normalised embedding of one element is ±1, so its gradient is zero.
                    assert!(relative_error(&dx, &want) < rounding || width == 1, "{name}");
                }
            }
        }
    }

    #[test]
    fn rows_wider_than_a_block_equal_the_reference() {
        let x = random_on_device(3, (3, 4096));
        let (e, norms) = forward(&x, &[0..3], true).unwrap();
        assert!(relative_error(&e, &reference(&numbers(&x), 4096, &[0..3], true)) < 1e-6);
        let de = random_on_device(4, (1, 4096));
        let dx = backward(&e, &norms, &[0..3], &de, 3, true, DType::F32).unwrap();
        let [e, norms, de] = [e, norms, de].map(|x| x.to_device(&candle_core::Device::Cpu).unwrap());
        let want = super::super::backward(&e, &norms, &[0..3], &de, 3, true).unwrap();
        assert!(relative_error(&dx, &numbers(&want)) < 1e-6);
    }

    #[test]
    fn zeros_stay_zeros_and_nan_stays_nan() {
        let zeros = random_on_device(1, (2, 3)).zeros_like().unwrap();
        let (e, norms) = forward(&zeros, &[0..2], true).unwrap();
        assert_eq!(numbers(&e), [0.0; 3]);
        let dx = backward(&e, &norms, &[0..2], &random_on_device(1, (1, 3)), 2, true, DType::F32).unwrap();
        assert!(numbers(&dx).iter().all(|x| x.is_finite()));
        let nan = (zeros.ones_like().unwrap() * f64::NAN).unwrap();
        assert!(numbers(&forward(&nan, &[0..2], true).unwrap().0).iter().all(|x| x.is_nan()));
    }
}
