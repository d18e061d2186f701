//! Pooling: the embedding of a sequence is the mean of some of its token rows, optionally normalised to
//! length 1.
//!
//! ```text
//! e = x̄ / max(‖x̄‖, 1e-12)        x̄ = 1/|span| Σ x_t over t in the span
//! ```
//!
//! The span selects the kind of pooling: all tokens of a sequence (mean), the first one (CLS) or the last
//! one. The lower limit of the norm is that of `torch.nn.functional.normalize`; a row of zeros stays zero.

use crate::rows::{add, new_rows};
use crate::simd::{GRAIN, dot, vectorised};
use crate::tensor::{expect_shape, matrix, read, tensor};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

#[cfg(any(test, gpu))]
mod gpu;

/// The lower limit of the norm that a mean is divided by.
const MIN_NORM: f32 = 1e-12;

/// Returns the embeddings `(N, D)` and the norms of the means `(N)`. x is `(T, D)`; `spans` are the rows to
/// pool for each of the N sequences.
///
/// # Errors
/// If a span is empty or ends behind T, or x is not contiguous f32.
pub fn forward(x: &Tensor, spans: &[Range<usize>], normalize: bool) -> Result<(Tensor, Tensor)> {
    let (tokens, width) = matrix("x", x)?;
    check(spans, tokens)?;
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return gpu::forward(x, spans, normalize);
    }
    let x = read::<f32>(x)?;
    let mut e = vec![0f32; spans.len() * width];
    let mut norms = vec![0f32; spans.len()];
    let rows = spans.iter().map(Range::len).sum::<usize>() / spans.len().max(1);
    e.par_chunks_mut(width.max(1))
        .zip(&mut norms)
        .zip(spans)
        .with_min_len(GRAIN.div_ceil((rows * width).max(1)))
        .for_each(|((e, norm), span)| vectorised(|| *norm = pool(&x, width, span, normalize, e)));
    Ok((tensor(e, (spans.len(), width))?, tensor(norms, spans.len())?))
}

/// Backward pass of [`forward`]: returns dx `(T, D)`, which is zero outside the spans.
///
/// `e` `(N, D)` and `norms` `(N)` are the results of [`forward`], `de` `(N, D)` is the gradient of e, and
/// `tokens` is T.
///
/// # Errors
/// If a shape differs from the above, two spans share a row, or as [`forward`].
pub fn backward(
    e: &Tensor,
    norms: &Tensor,
    spans: &[Range<usize>],
    de: &Tensor,
    tokens: usize,
    normalize: bool,
) -> Result<Tensor> {
    let (_, width) = matrix("e", e)?;
    expect_shape("e", e, &[spans.len(), width])?;
    expect_shape("de", de, &[spans.len(), width])?;
    expect_shape("norms", norms, &[spans.len()])?;
    check(spans, tokens)?;
    let owners = owners(spans, tokens)?;
    #[cfg(gpu)]
    if crate::gpu::runs(e.device()) {
        return gpu::backward(e, norms, spans, de, tokens, normalize, e.dtype());
    }
    let (e, norms, de) = (read::<f32>(e)?, read::<f32>(norms)?, read::<f32>(de)?);
    // The gradient of each row of a span, which is the same for all its rows.
    let [row_gradients] = new_rows(
        spans.len(),
        [width],
        #[inline(always)]
        |n, [gradient]| {
            let (e, de) = (&e[n * width..][..width], &de[n * width..][..width]);
            let count = spans[n].len() as f32;
            if !normalize {
                return [gradient.fill(de.iter().map(|de| de / count))];
            }
            // Below the limit the divisor is a constant.
            let radial = if norms[n] < MIN_NORM { 0.0 } else { dot(e, de) };
            let divisor = norms[n].max(MIN_NORM) * count;
            [gradient.fill(e.iter().zip(de).map(|(e, de)| (de - e * radial) / divisor))]
        },
    );
    let [dx] = new_rows(
        tokens,
        [width],
        #[inline(always)]
        |t, [dx]| match owners[t] {
            Some(n) => [dx.fill(row_gradients[n * width..][..width].iter().copied())],
            None => [dx.fill(std::iter::repeat_n(0.0, width))],
        },
    );
    tensor(dx, (tokens, width))
}

/// Writes one embedding, and returns the norm of the mean.
#[inline(always)]
fn pool(x: &[f32], width: usize, span: &Range<usize>, normalize: bool, e: &mut [f32]) -> f32 {
    for t in span.clone() {
        add(e, &x[t * width..][..width]);
    }
    let count = span.len() as f32;
    e.iter_mut().for_each(|e| *e /= count);
    let norm = dot(e, e).sqrt();
    if normalize {
        // `max` would lose a NaN.
        let divisor = if norm < MIN_NORM { MIN_NORM } else { norm };
        e.iter_mut().for_each(|e| *e /= divisor);
    }
    norm
}

/// The index of the span that contains each row; an error if two spans share a row.
fn owners(spans: &[Range<usize>], tokens: usize) -> Result<Vec<Option<usize>>> {
    let mut owners = vec![None; tokens];
    for (n, span) in spans.iter().enumerate() {
        for owner in &mut owners[span.clone()] {
            if let Some(other) = owner.replace(n) {
                bail!("spans {other} and {n} share a row, but a row belongs to one sequence");
            }
        }
    }
    Ok(owners)
}

fn check(spans: &[Range<usize>], tokens: usize) -> Result<()> {
    for (n, span) in spans.iter().enumerate() {
        if span.is_empty() {
            bail!("sequence {n} has no rows to pool");
        }
        if span.end > tokens {
            bail!("sequence {n} pools the rows {span:?}, but there are {tokens} rows");
        }
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one span")]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error};
    use candle_core::{DType, Device};

    /// Means of up to 1023 rows in f32.
    const TOLERANCE: f64 = 1e-6;

    pub(super) fn reference(x: &[f64], width: usize, spans: &[Range<usize>], normalize: bool) -> Vec<f64> {
        let mut e = Vec::new();
        for span in spans {
            let mean: Vec<f64> = (0..width)
                .map(|d| span.clone().map(|t| x[t * width + d]).sum::<f64>() / span.len() as f64)
                .collect();
            let norm = mean.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
            e.extend(mean.iter().map(|x| if normalize { x / norm } else { *x }));
        }
        e
    }

    #[test]
    fn means_and_their_gradients_equal_the_reference() {
        for (tokens, width, spans) in [
            (1, 1, vec![0..1]),
            (7, 3, vec![0..3, 3..4, 4..7]),
            (7, 3, vec![2..3, 6..7]),
            (9, 17, vec![5..9, 0..5]),
        ] {
            for normalize in [false, true] {
                let x = random(1, (tokens, width));
                let (e, norms) = forward(&x, &spans, normalize).unwrap();
                assert!(relative_error(&e, &reference(&numbers(&x), width, &spans, normalize)) < TOLERANCE);
                let de = random(2, (spans.len(), width));
                let dx = backward(&e, &norms, &spans, &de, tokens, normalize).unwrap();
                let loss = |x: &[f64]| inner(&reference(x, width, &spans, normalize), &numbers(&de));
                let want = finite_difference(&numbers(&x), loss);
                // A normalised embedding of one element is ±1, so its gradient is zero.
                assert!(relative_error(&dx, &want) < TOLERANCE || width == 1);
            }
        }
    }

    #[test]
    fn long_texts_are_pooled_on_all_threads() {
        let x = random(3, (2 * 1023, 96));
        let spans = [0..1023, 1023..2046];
        let (e, norms) = forward(&x, &spans, true).unwrap();
        assert!(relative_error(&e, &reference(&numbers(&x), 96, &spans, true)) < TOLERANCE);
        assert_eq!(norms.dims(), [2]);
    }

    #[test]
    fn no_sequences_are_no_work() {
        let x = random(1, (4, 3));
        let (e, norms) = forward(&x, &[], true).unwrap();
        assert_eq!((e.dims(), norms.dims()), (&[0, 3][..], &[0][..]));
        let dx = backward(&e, &norms, &[], &e, 4, true).unwrap();
        assert_eq!(numbers(&dx), [0.0; 12]);
    }

    #[test]
    fn zeros_stay_zeros_and_nan_stays_nan() {
        let zeros = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let (e, norms) = forward(&zeros, &[0..2], true).unwrap();
        assert_eq!(numbers(&e), [0.0; 3]);
        let dx = backward(&e, &norms, &[0..2], &random(1, (1, 3)), 2, true).unwrap();
        assert!(numbers(&dx).iter().all(|x| x.is_finite()));

        let mut rows = random(1, (3, 2)).to_vec2::<f32>().unwrap();
        rows[1][0] = f32::NAN;
        let (e, _) = forward(&Tensor::new(rows, &Device::Cpu).unwrap(), &[0..2, 2..3], true).unwrap();
        let e = numbers(&e);
        assert!(e[..2].iter().all(|x| x.is_nan()) && e[2..].iter().all(|x| x.is_finite()));
    }

    #[test]
    #[expect(clippy::reversed_empty_ranges, reason = "the test needs an invalid span")]
    fn spans_that_do_not_fit_are_refused() {
        let x = random(1, (4, 3));
        let error = |spans: &[Range<usize>]| forward(&x, spans, true).unwrap_err().to_string();
        assert!(error(&[0..1, 2..2]).contains("sequence 1 has no rows"));
        assert!(error(&[3..1]).contains("sequence 0 has no rows"));
        assert!(error(&[0..1, 2..5]).contains("sequence 1 pools the rows 2..5, but there are 4 rows"));
        let (e, norms) = forward(&x, &[0..2, 1..3], true).unwrap();
        let error = backward(&e, &norms, &[0..2, 1..3], &e, 4, true).unwrap_err();
        assert!(error.to_string().contains("spans 0 and 1 share a row"));
        assert!(backward(&e, &norms, &[0..2, 2..3], &x, 4, true).is_err());
    }
}
