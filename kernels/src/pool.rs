//! From the hidden states of a text to its embedding: the mean over a span of its tokens, scaled to length 1.
//!
//!     s = 1/|span| Σ x_t        e = s / max(‖s‖, 10⁻¹²)        (torch's `normalize`)
//!
//! Masked mean, first token and last token differ only in the span. One pass over the tokens that a span holds.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use crate::rows::{new_rows, new_rows_and_sums};
use crate::simd::dot;
use crate::tensor::{expect_shape, matrix, read, tensor};

/// A sum shorter than this is not scaled up to length 1.
const SHORTEST: f32 = 1e-12;

/// x (T, D) and the rows of each sequence's span (N) → embeddings (N, D), and the length of each before it was scaled (N).
///
/// # Errors
/// A span is empty or ends after T.
pub fn forward(x: &Tensor, spans: &[Range<usize>], normalize: bool) -> Result<(Tensor, Tensor)> {
    let (tokens, width) = matrix("x", x)?;
    check(spans, tokens)?;
    let x = read::<f32>(x)?;
    let [embeddings, norms] = new_rows(spans.len(), [width, 1], |n, [e, norm]| {
        let span = &spans[n];
        let mut e = e.fill(x[span.start * width..][..width].iter().copied());
        for token in x[(span.start + 1) * width..span.end * width].chunks_exact(width.max(1)) {
            e.iter_mut().zip(token).for_each(|(e, x)| *e += x);
        }
        let share = (span.len() as f32).recip();
        e.iter_mut().for_each(|e| *e *= share);
        let length = dot(&e, &e).sqrt();
        if normalize {
            let scale = length.max(SHORTEST).recip();
            e.iter_mut().for_each(|e| *e *= scale);
        }
        [e, norm.fill([length])]
    });
    Ok((tensor(embeddings, (spans.len(), width))?, tensor(norms, spans.len())?))
}

/// de (N, D) → dx (T, D), with `e` and `norms` as [`forward`] gave them. Tokens outside all spans get 0.
///
///     ds = (de − e·(e·de)) / ‖s‖        dx_t = ds / |span|
pub fn backward(
    e: &Tensor,
    norms: &Tensor,
    spans: &[Range<usize>],
    de: &Tensor,
    tokens: usize,
    normalize: bool,
) -> Result<Tensor> {
    let (n, width) = matrix("de", de)?;
    expect_shape("e", e, &[n, width])?;
    expect_shape("norms", norms, &[spans.len()])?;
    check(spans, tokens)?;
    let mut owner = vec![None; tokens];
    for (n, span) in spans.iter().enumerate() {
        for token in &mut owner[span.clone()] {
            if token.replace(n).is_some() {
                bail!("pool: two spans share a token");
            }
        }
    }
    let (e, norms, de) = (read::<f32>(e)?, read::<f32>(norms)?, read::<f32>(de)?);
    let ([ds], _) = new_rows_and_sums(n, [width], 0, |n, [row], _| {
        let (e, de) = (&e[n * width..][..width], &de[n * width..][..width]);
        // Below the shortest length the scale is a constant.
        let (scale, along) = match normalize {
            true if norms[n] > SHORTEST => (norms[n].recip(), dot(e, de)),
            true => (SHORTEST.recip(), 0.0),
            false => (1.0, 0.0),
        };
        let scale = scale / spans[n].len() as f32;
        [row.fill(e.iter().zip(de).map(|(e, de)| (de - e * along) * scale))]
    });
    let zero = vec![0f32; width];
    let [dx] = new_rows(tokens, [width], |t, [row]| {
        let from = owner[t].map_or(&zero[..], |n| &ds[n * width..][..width]);
        [row.fill(from.iter().copied())]
    });
    tensor(dx, (tokens, width))
}

fn check(spans: &[Range<usize>], tokens: usize) -> Result<()> {
    match spans.iter().find(|span| span.is_empty() || span.end > tokens) {
        Some(span) => bail!("pool: the span {span:?} is empty or ends after the {tokens} tokens"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error};

    fn reference(x: &[f64], width: usize, spans: &[Range<usize>], normalize: bool) -> Vec<f64> {
        let mut all = Vec::new();
        for span in spans {
            let mean: Vec<f64> = (0..width)
                .map(|d| span.clone().map(|t| x[t * width + d]).sum::<f64>() / span.len() as f64)
                .collect();
            let norm = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
            all.extend(mean.iter().map(|x| if normalize { x / norm } else { *x }));
        }
        all
    }

    #[test]
    fn forward_and_backward_are_those_of_f64() {
        for width in [1, 3, 7, 64] {
            for (spans, tokens) in [
                (vec![0..3, 3..4, 6..9], 10), // a mean, one token, a prompt left out
                (vec![0..1, 4..5], 6),        // first tokens
                (vec![], 0),
            ] {
                for normalize in [true, false] {
                    let (x, de) = (random(1, (tokens, width)), random(2, (spans.len(), width)));
                    let (e, norms) = forward(&x, &spans, normalize).unwrap();
                    let f = |x: &[f64]| reference(x, width, &spans, normalize);
                    assert!(relative_error(&e, &f(&numbers(&x))) < 1e-6);
                    let want = finite_difference(&numbers(&x), |x| inner(&f(x), &numbers(&de)));
                    let dx = backward(&e, &norms, &spans, &de, tokens, normalize).unwrap();
                    // f32's rounding of e against the part that normalisation takes out
                    assert!(relative_error(&dx, &want) < 1e-5, "{width} {spans:?} {normalize}");
                }
            }
        }
    }

    #[test]
    fn a_text_of_zeros_has_a_finite_gradient() {
        let x = random(1, (2, 4)).zeros_like().unwrap();
        let (e, norms) = forward(&x, &[0..2], true).unwrap();
        let dx = backward(&e, &norms, &[0..2], &random(2, (1, 4)), 2, true).unwrap();
        assert!(numbers(&e).iter().all(|&e| e == 0.0) && numbers(&dx).iter().all(|dx| dx.is_finite()));
    }

    #[test]
    fn spans_that_do_not_fit_are_refused() {
        let x = random(1, (3, 2));
        assert!(forward(&x, &[1..1], true).is_err());
        assert!(forward(&x, &[1..4], true).is_err());
        let (e, norms) = forward(&x, &[0..2, 1..3], true).unwrap();
        assert!(backward(&e, &norms, &[0..2, 1..3], &e, 3, true).is_err());
    }
}
