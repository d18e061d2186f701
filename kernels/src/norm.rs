//! LayerNorm and RMSNorm, each fused with the residual addition before it.
//!
//! With s = x + residual, for each row of D elements:
//! - LayerNorm (Ba, Kiros, Hinton 2016): y = (s − mean)·rstd·w + b, rstd = 1/√(Σ(s − mean)²/D + eps)
//! - RMSNorm (Zhang, Sennrich 2019): y = s·rstd·w, rstd = 1/√(Σs²/D + eps)
//!
//! Backward, with n = (s − mean)·rstd and g = dy·w: ds = rstd·(g − Σg/D − n·Σ(g·n)/D), where RMSNorm omits
//! Σg/D; dw = Σ_t dy·n; db = Σ_t dy. Sums over tokens are computed in fixed blocks of rows, so they do not
//! depend on the number of threads.

use crate::rows::{Row, Unwritten, add, new_rows, new_rows_and_sums};
use crate::simd::{sum, sums_by};
use crate::tensor::{expect_shape, matrix, read, tensor, write};
use candle_core::{Result, Tensor, bail};
use std::iter::zip;

#[cfg(any(test, gpu))]
pub(crate) mod gpu;

/// The tensors of a forward pass that the backward pass needs.
#[derive(Clone, Debug)]
pub struct Tape {
    /// x + residual `(T, D)`. Without a residual it is x itself and shares its memory.
    pub sum: Tensor,
    /// The mean of each row of `sum`, `(T)`. Only LayerNorm has it.
    pub mean: Option<Tensor>,
    /// The inverse of the standard deviation (LayerNorm) or of the root mean square (RMSNorm) of each row,
    /// `(T)`.
    pub rstd: Tensor,
}

/// LayerNorm of x + residual, both `(T, D)`, with weight `w` `(D)` and bias `b` `(D)`. Returns y `(T, D)` and
/// the tape.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn layer_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Tape)> {
    forward::<true>(x, residual, w, b, eps)
}

/// RMSNorm of x + residual, both `(T, D)`, with weight `w` `(D)`. Returns y `(T, D)` and the tape.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn rms_norm(x: &Tensor, residual: Option<&Tensor>, w: &Tensor, eps: f64) -> Result<(Tensor, Tape)> {
    forward::<false>(x, residual, w, None, eps)
}

/// Recomputes the y of [`layer_norm`] from its tape, bit for bit, so that no tape has to store y.
///
/// # Errors
/// As [`layer_norm`].
pub fn layer_norm_recompute(tape: &Tape, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    recompute::<true>(tape, w, b)
}

/// Recomputes the y of [`rms_norm`] from its tape, bit for bit, so that no tape has to store y.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_recompute(tape: &Tape, w: &Tensor) -> Result<Tensor> {
    recompute::<false>(tape, w, None)
}

/// Backward pass of [`layer_norm`]: returns the gradient of x, `(T, D)`, which is also the gradient of the
/// residual.
///
/// `dy` `(T, D)` is the gradient of y. `dsum` `(T, D)` is a gradient of x + residual that is added to the
/// result: in a pre-norm layer the residual connection contributes it. The gradients of w and b are added to
/// `dw` and `db`, both `(D)`; pass `None` for frozen parameters.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn layer_norm_backward(
    tape: &Tape,
    w: &Tensor,
    dy: &Tensor,
    dsum: Option<&Tensor>,
    dw: Option<&Tensor>,
    db: Option<&Tensor>,
) -> Result<Tensor> {
    backward::<true>(tape, w, dy, dsum, dw, db)
}

/// Backward pass of [`rms_norm`], with the arguments of [`layer_norm_backward`].
///
/// # Errors
/// As [`layer_norm_backward`].
pub fn rms_norm_backward(
    tape: &Tape,
    w: &Tensor,
    dy: &Tensor,
    dsum: Option<&Tensor>,
    dw: Option<&Tensor>,
) -> Result<Tensor> {
    backward::<false>(tape, w, dy, dsum, dw, None)
}

fn forward<const CENTRED: bool>(
    x: &Tensor,
    residual: Option<&Tensor>,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Tape)> {
    let (tokens, width) = matrix("x", x)?;
    expect_vectors(&[("w", Some(w)), ("b", b)], width)?;
    if let Some(residual) = residual {
        expect_shape("residual", residual, x.dims())?;
    }
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return gpu::forward::<CENTRED>(x, residual, w, b, eps);
    }
    let (xs, w, b) = (read::<f32>(x)?, read::<f32>(w)?, b.map(read::<f32>).transpose()?);
    let (xs, w, b) = (&*xs, &*w, b.as_deref());

    let (y, sum, mean, rstd) = match residual {
        Some(residual) => {
            let residuals = read::<f32>(residual)?;
            let residuals = &*residuals;
            let [sum, y, mean, rstd] = new_rows(
                tokens,
                [width, width, 1, 1],
                #[inline(always)]
                |t, [sum, y, mean, rstd]| {
                    let range = t * width..(t + 1) * width;
                    let sum = sum.fill(zip(&xs[range.clone()], &residuals[range]).map(|(x, r)| x + r));
                    let (m, r) = moments::<CENTRED>(&sum, eps);
                    let y = fill(y, &sum, m, r, w, b);
                    [sum, y, mean.fill([m]), rstd.fill([r])]
                },
            );
            (y, tensor(sum, (tokens, width))?, mean, rstd)
        }
        None => {
            let [y, mean, rstd] = new_rows(
                tokens,
                [width, 1, 1],
                #[inline(always)]
                |t, [y, mean, rstd]| {
                    let x = &xs[t * width..][..width];
                    let (m, r) = moments::<CENTRED>(x, eps);
                    [fill(y, x, m, r, w, b), mean.fill([m]), rstd.fill([r])]
                },
            );
            (y, x.clone(), mean, rstd)
        }
    };
    let mean = if CENTRED { Some(tensor(mean, tokens)?) } else { None };
    Ok((tensor(y, (tokens, width))?, Tape { sum, mean, rstd: tensor(rstd, tokens)? }))
}

fn recompute<const CENTRED: bool>(tape: &Tape, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (tokens, width) = tape.shape::<CENTRED>()?;
    expect_vectors(&[("w", Some(w)), ("b", b)], width)?;
    #[cfg(gpu)]
    if crate::gpu::runs(tape.sum.device()) {
        return gpu::recompute::<CENTRED>(tape, w, b);
    }
    let (w, b) = (read::<f32>(w)?, b.map(read::<f32>).transpose()?);
    let (w, b) = (&*w, b.as_deref());
    let (sums, rstds) = (read::<f32>(&tape.sum)?, read::<f32>(&tape.rstd)?);
    let (sums, rstds) = (&*sums, &*rstds);
    let means = tape.mean.as_ref().map(read::<f32>).transpose()?;
    let means = means.as_deref().unwrap_or_default();

    let [y] = new_rows(
        tokens,
        [width],
        #[inline(always)]
        |t, [y]| {
            let mean = if CENTRED { means[t] } else { 0.0 };
            [fill(y, &sums[t * width..][..width], mean, rstds[t], w, b)]
        },
    );
    tensor(y, (tokens, width))
}

fn backward<const CENTRED: bool>(
    tape: &Tape,
    w: &Tensor,
    dy: &Tensor,
    dsum: Option<&Tensor>,
    dw: Option<&Tensor>,
    db: Option<&Tensor>,
) -> Result<Tensor> {
    let (tokens, width) = tape.shape::<CENTRED>()?;
    expect_vectors(&[("w", Some(w)), ("dw", dw), ("db", db)], width)?;
    expect_shape("dy", dy, &[tokens, width])?;
    if let Some(dsum) = dsum {
        expect_shape("dsum", dsum, &[tokens, width])?;
    }
    #[cfg(gpu)]
    if crate::gpu::runs(dy.device()) {
        return gpu::backward::<CENTRED>(tape, w, dy, dsum, dw, db);
    }
    let (w, dys) = (read::<f32>(w)?, read::<f32>(dy)?);
    let (w, dys) = (&*w, &*dys);
    let (sums, rstds) = (read::<f32>(&tape.sum)?, read::<f32>(&tape.rstd)?);
    let (sums, rstds) = (&*sums, &*rstds);
    let means = tape.mean.as_ref().map(read::<f32>).transpose()?;
    let means = means.as_deref().unwrap_or_default();
    let dsums = dsum.map(read::<f32>).transpose()?;
    let dsums = dsums.as_deref();
    let width_of = |gradient: Option<&Tensor>| if gradient.is_some() { width } else { 0 };

    let ([dx], gradients) = new_rows_and_sums(
        tokens,
        [width],
        width_of(dw) + width_of(db),
        #[inline(always)]
        |t, [dx], gradients| {
            let range = t * width..(t + 1) * width;
            let (sum, dy, rstd) = (&sums[range.clone()], &dys[range.clone()], rstds[t]);
            let mean = if CENTRED { means[t] } else { 0.0 };
            // n is not stored. It is a factor twice in n·Σ(g·n), so `mean_gn` has the factor rstd twice.
            let [mean_g, mean_gn] = sums_by(
                [dy, w, sum],
                #[inline(always)]
                |[dy, w, sum]| [dy * w, dy * w * (sum - mean)],
            );
            let mean_g = if CENTRED { mean_g / width as f32 } else { 0.0 };
            let mean_gn = mean_gn * rstd * rstd / width as f32;
            let ds = zip(zip(dy, w), sum).map(
                #[inline(always)]
                |((dy, w), sum)| rstd * (dy * w - mean_g - (sum - mean) * mean_gn),
            );
            let dx = match dsums {
                Some(dsums) => dx.fill(zip(ds, &dsums[range]).map(|(ds, dsum)| ds + dsum)),
                None => dx.fill(ds),
            };
            let (dw_row, db_row) = gradients.split_at_mut(width_of(dw));
            for ((dw, dy), sum) in zip(zip(dw_row, dy), sum) {
                *dw += dy * ((sum - mean) * rstd);
            }
            add(db_row, dy);
            [dx]
        },
    );

    // One after the other: both may be views of one flat buffer, and `write` locks the buffer.
    let (of_w, of_b) = gradients.split_at(width_of(dw));
    for (to, from) in [(dw, of_w), (db, of_b)] {
        if let Some(to) = to {
            write(to, |to| add(to, from))?;
        }
    }
    tensor(dx, (tokens, width))
}

impl Tape {
    /// Checks that the shapes of all parts agree, and returns (T, D).
    fn shape<const CENTRED: bool>(&self) -> Result<(usize, usize)> {
        let (tokens, width) = matrix("tape.sum", &self.sum)?;
        expect_shape("tape.rstd", &self.rstd, &[tokens])?;
        match &self.mean {
            Some(mean) => expect_shape("tape.mean", mean, &[tokens])?,
            None if CENTRED => {
                bail!("the tape has no mean: it comes from `rms_norm`, expected one from `layer_norm`")
            }
            None => {}
        }
        Ok((tokens, width))
    }
}

fn expect_vectors(vectors: &[(&str, Option<&Tensor>)], width: usize) -> Result<()> {
    for (name, vector) in vectors {
        vector.map_or(Ok(()), |vector| expect_shape(name, vector, &[width]))?;
    }
    Ok(())
}

/// Returns the mean of a row (0 unless CENTRED) and 1/√(mean square of the deviations from that mean + eps).
#[inline(always)]
fn moments<const CENTRED: bool>(row: &[f32], eps: f64) -> (f32, f32) {
    let width = row.len() as f32;
    let mean = if CENTRED { sum(row) / width } else { 0.0 };
    // Not E[x²] − E[x]², which loses the precision of a row whose mean is far from 0.
    let [squares] = sums_by(
        [row],
        #[inline(always)]
        |[x]| [(x - mean) * (x - mean)],
    );
    (mean, (1.0 / (f64::from(squares / width) + eps).sqrt()) as f32)
}

/// Writes one row of y.
#[inline(always)]
fn fill<'r>(y: Unwritten<'r>, sum: &[f32], mean: f32, rstd: f32, w: &[f32], b: Option<&[f32]>) -> Row<'r> {
    let scaled = zip(sum, w).map(
        #[inline(always)]
        |(sum, w)| (sum - mean) * rstd * w,
    );
    match b {
        Some(b) => y.fill(zip(scaled, b).map(|(y, b)| y + b)),
        None => y.fill(scaled),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error, relative_error_f64};
    use candle_core::{Device, IndexOp};

    /// LayerNorm (`centred`) or RMSNorm in f64.
    pub(super) fn reference(sum: &[f64], w: &[f64], b: &[f64], eps: f64, centred: bool) -> Vec<f64> {
        let width = w.len();
        let mut y = Vec::new();
        for row in sum.chunks(width.max(1)) {
            let mean = if centred { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let square = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width as f64;
            y.extend((0..width).map(|d| (row[d] - mean) / (square + eps).sqrt() * w[d] + b[d]));
        }
        y
    }

    struct Case {
        x: Tensor,
        residual: Tensor,
        w: Tensor,
        b: Tensor,
        dy: Tensor,
    }

    impl Case {
        fn new(tokens: usize, width: usize) -> Self {
            Self {
                x: random(1, (tokens, width)),
                residual: random(2, (tokens, width)),
                w: random(3, width),
                b: random(4, width),
                dy: random(5, (tokens, width)),
            }
        }

        fn sum(&self) -> Vec<f64> {
            zip(numbers(&self.x), numbers(&self.residual)).map(|(x, r)| x + r).collect()
        }
    }

    const SHAPES: [(usize, usize); 8] =
        [(0, 8), (3, 0), (1, 1), (1, 3), (3, 7), (7, 1023), (65, 384), (130, 16)];
    const EPS: f64 = 1e-5;

    #[test]
    fn values_equal_the_reference_for_odd_and_empty_shapes() {
        for (tokens, width) in SHAPES {
            let c = Case::new(tokens, width);
            let (w, b, zero) = (numbers(&c.w), numbers(&c.b), vec![0.0; width]);
            let check = |y: &Tensor, want: &[f64]| {
                // Sums of up to 1023 terms in 16 accumulators, and a few roundings of about 6e-8 each.
                assert!(relative_error(y, want) < 5e-7, "{tokens} {width}");
            };
            let (y, tape) = layer_norm(&c.x, Some(&c.residual), &c.w, Some(&c.b), EPS).unwrap();
            check(&y, &reference(&c.sum(), &w, &b, EPS, true));
            check(&tape.sum, &c.sum());
            let (y, _) = layer_norm(&c.x, None, &c.w, None, EPS).unwrap();
            check(&y, &reference(&numbers(&c.x), &w, &zero, EPS, true));
            let (y, _) = rms_norm(&c.x, Some(&c.residual), &c.w, EPS).unwrap();
            check(&y, &reference(&c.sum(), &w, &zero, EPS, false));
            let (y, _) = rms_norm(&c.x, None, &c.w, EPS).unwrap();
            check(&y, &reference(&numbers(&c.x), &w, &zero, EPS, false));
        }
    }

    #[test]
    fn y_is_recomputed_from_the_tape_bit_for_bit() {
        let c = Case::new(7, 1023);
        let (y, tape) = layer_norm(&c.x, Some(&c.residual), &c.w, Some(&c.b), EPS).unwrap();
        assert_eq!(numbers(&layer_norm_recompute(&tape, &c.w, Some(&c.b)).unwrap()), numbers(&y));
        let (y, tape) = rms_norm(&c.x, None, &c.w, EPS).unwrap();
        assert_eq!(numbers(&rms_norm_recompute(&tape, &c.w).unwrap()), numbers(&y));
        assert!(layer_norm_recompute(&tape, &c.w, None).is_err());
    }

    #[test]
    fn gradients_equal_finite_differences_and_are_added() {
        for (tokens, width) in [(1, 1), (1, 3), (3, 7), (66, 5)] {
            for centred in [true, false] {
                let c = Case::new(tokens, width);
                let (w, b, dy) = (numbers(&c.w), numbers(&c.b), numbers(&c.dy));
                let loss =
                    |sum: &[f64], w: &[f64], b: &[f64]| inner(&reference(sum, w, b, EPS, centred), &dy);
                let dsum = random(6, (tokens, width));
                let (dw, db) = (random(7, width), random(8, width));
                let plus = |tensor: &Tensor, gradient: Vec<f64>| -> Vec<f64> {
                    zip(numbers(tensor), gradient).map(|(a, b)| a + b).collect()
                };
                let want_x = plus(&dsum, finite_difference(&c.sum(), |sum| loss(sum, &w, &b)));
                let want_w = plus(&dw, finite_difference(&w, |w| loss(&c.sum(), w, &b)));
                let want_b = plus(&db, finite_difference(&b, |b| loss(&c.sum(), &w, b)));
                let dx = if centred {
                    let (_, tape) = layer_norm(&c.x, Some(&c.residual), &c.w, Some(&c.b), EPS).unwrap();
                    layer_norm_backward(&tape, &c.w, &c.dy, Some(&dsum), Some(&dw), Some(&db)).unwrap()
                } else {
                    let (_, tape) = rms_norm(&c.x, Some(&c.residual), &c.w, EPS).unwrap();
                    rms_norm_backward(&tape, &c.w, &c.dy, Some(&dsum), Some(&dw)).unwrap()
                };
                // Terms that nearly cancel in narrow rows: tens of roundings of 6e-8.
                assert!(relative_error(&dx, &want_x) < 5e-6, "dx {tokens} {width}");
                assert!(relative_error(&dw, &want_w) < 5e-6, "dw {tokens} {width}");
                if centred {
                    assert!(relative_error(&db, &want_b) < 1e-6, "db {tokens} {width}");
                }
            }
        }
    }

    /// The backward formula of the module documentation in f64. The test with finite differences checks it
    /// indirectly.
    pub(super) fn analytic(sum: &[f64], w: &[f64], dy: &[f64], centred: bool) -> Vec<f64> {
        let width = w.len();
        let mut ds = Vec::new();
        for (row, dy) in zip(sum.chunks(width.max(1)), dy.chunks(width.max(1))) {
            let n = reference(row, &vec![1.0; width], &vec![0.0; width], EPS, centred);
            let mean = if centred { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let rstd =
                1.0 / (row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64 + EPS).sqrt();
            let g: Vec<f64> = zip(dy, w).map(|(dy, w)| dy * w).collect();
            let mean_g = if centred { g.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let mean_gn = inner(&g, &n) / width as f64;
            ds.extend((0..width).map(|d| rstd * (g[d] - mean_g - n[d] * mean_gn)));
        }
        ds
    }

    #[test]
    fn gradients_equal_the_formula_for_odd_and_empty_shapes() {
        // In a row of one element the gradient is 0 up to rounding; the test with finite differences covers
        // it.
        for (tokens, width) in SHAPES.into_iter().filter(|&(_, width)| width != 1) {
            let c = Case::new(tokens, width);
            let (w, dy) = (numbers(&c.w), numbers(&c.dy));
            let (_, tape) = layer_norm(&c.x, Some(&c.residual), &c.w, Some(&c.b), EPS).unwrap();
            let dx = layer_norm_backward(&tape, &c.w, &c.dy, None, None, None).unwrap();
            let want = analytic(&c.sum(), &w, &dy, true);
            assert!(relative_error(&dx, &want) < 1e-6, "{tokens} {width}");
            let (_, tape) = rms_norm(&c.x, None, &c.w, EPS).unwrap();
            let dx = rms_norm_backward(&tape, &c.w, &c.dy, None, None).unwrap();
            let want = analytic(&numbers(&c.x), &w, &dy, false);
            assert!(relative_error(&dx, &want) < 1e-6, "{tokens} {width}");
        }
    }

    #[test]
    fn a_row_far_from_zero_keeps_its_precision() {
        let x = (random(1, (1, 64)).affine(1.0, 100.0)).unwrap();
        let ones = Tensor::ones(64, candle_core::DType::F32, &Device::Cpu).unwrap();
        let (y, _) = layer_norm(&x, None, &ones, None, 0.0).unwrap();
        let want = reference(&numbers(&x), &[1.0; 64], &[0.0; 64], 0.0, true);
        // The mean of numbers near 100 has an error of half an ulp of 100, 4e-6; E[x²] − E[x]² would have one
        // of 1e-3.
        assert!(relative_error(&y, &want) < 1e-5);
    }

    #[test]
    fn gradients_of_parameters_may_share_one_flat_buffer() {
        let c = Case::new(3, 4);
        let flat = Tensor::zeros(8, candle_core::DType::F32, &Device::Cpu).unwrap();
        let (dw, db) = (flat.i(..4).unwrap(), flat.i(4..).unwrap());
        let (_, tape) = layer_norm(&c.x, None, &c.w, Some(&c.b), EPS).unwrap();
        layer_norm_backward(&tape, &c.w, &c.dy, None, Some(&dw), Some(&db)).unwrap();
        let dy = numbers(&c.dy);
        let want: Vec<f64> = (0..4).map(|d| dy[d] + dy[4 + d] + dy[8 + d]).collect();
        assert!(relative_error_f64(&numbers(&flat)[4..], &want) < 1e-6);
    }

    #[test]
    fn misshaped_tensors_are_an_error() {
        let c = Case::new(3, 4);
        let (_, tape) = layer_norm(&c.x, None, &c.w, None, EPS).unwrap();
        let wrong = random(1, 3);
        assert!(layer_norm(&c.x, None, &wrong, None, EPS).is_err());
        assert!(layer_norm(&c.x, None, &c.w, Some(&wrong), EPS).is_err());
        assert!(rms_norm(&c.x, Some(&wrong), &c.w, EPS).is_err());
        assert!(layer_norm_backward(&tape, &c.w, &wrong, None, None, None).is_err());
        assert!(layer_norm_backward(&tape, &c.w, &c.dy, Some(&wrong), None, None).is_err());
        assert!(layer_norm_backward(&tape, &c.w, &c.dy, None, Some(&wrong), None).is_err());
        assert!(
            rms_norm(&c.x.t().unwrap(), None, &wrong, EPS).unwrap_err().to_string().contains("contiguous")
        );
    }
}
