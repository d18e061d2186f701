//! A linear layer: y = x·Wᵀ + bias, with W `(O, I)` in the layout of PyTorch and of checkpoints.
//!
//! Backward: dx = dy·W, dW = dyᵀ·x, dbias = Σ_t dy. Each gradient has its own function, because nothing is
//! computed for a frozen parameter.

use crate::matmul::{Matrix, Threads, multiply, product, product_and_bias};
use crate::rows::{add, new_rows_and_sums};
use crate::tensor::{expect_shape, matrix, read, tensor, write};
use candle_core::{Result, Tensor};

#[cfg(any(test, gpu))]
pub(crate) mod gpu;

/// Returns y `(T, O)` for x `(T, I)`, W `(O, I)` and the bias `(O)`.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn forward(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (tokens, inputs) = matrix("x", x)?;
    let (outputs, _) = matrix("w", w)?;
    expect_shape("w", w, &[outputs, inputs])?;
    if let Some(bias) = bias {
        expect_shape("bias", bias, &[outputs])?;
    }
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return gpu::forward(x, w, bias);
    }
    let (xs, ws) = (read::<f32>(x)?, read::<f32>(w)?);
    let (a, b) = (Matrix::new(&xs, tokens, inputs), Matrix::new(&ws, outputs, inputs).transposed());
    let y = match bias {
        Some(bias) => product_and_bias(a, b, &read::<f32>(bias)?),
        None => product(a, b),
    };
    tensor(y, (tokens, outputs))
}

/// Returns dx `(T, I)` for dy `(T, O)` and W `(O, I)`.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn backward_input(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (tokens, _) = matrix("dy", dy)?;
    let (outputs, inputs) = matrix("w", w)?;
    expect_shape("dy", dy, &[tokens, outputs])?;
    #[cfg(gpu)]
    if crate::gpu::runs(dy.device()) {
        return gpu::backward_input(dy, w);
    }
    let (dys, ws) = (read::<f32>(dy)?, read::<f32>(w)?);
    let dx = product(Matrix::new(&dys, tokens, outputs), Matrix::new(&ws, outputs, inputs));
    tensor(dx, (tokens, inputs))
}

/// Like [`backward_input`], but adds to `dx` `(T, I)`: the query, key and value projections share one input.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn add_backward_input(dy: &Tensor, w: &Tensor, dx: &Tensor) -> Result<()> {
    let (tokens, _) = matrix("dy", dy)?;
    let (outputs, inputs) = matrix("w", w)?;
    expect_shape("dy", dy, &[tokens, outputs])?;
    expect_shape("dx", dx, &[tokens, inputs])?;
    #[cfg(gpu)]
    if crate::gpu::runs(dy.device()) {
        return gpu::add_backward_input(dy, w, dx);
    }
    let (dys, ws) = (read::<f32>(dy)?, read::<f32>(w)?);
    let (a, b) = (Matrix::new(&dys, tokens, outputs), Matrix::new(&ws, outputs, inputs));
    write(dx, |dx| multiply(dx, inputs, 1.0, 1.0, a, b, Threads::All))
}

/// Adds the gradient of W to `dw` `(O, I)`, for x `(T, I)` and dy `(T, O)`.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn backward_weight(x: &Tensor, dy: &Tensor, dw: &Tensor) -> Result<()> {
    let (tokens, inputs) = matrix("x", x)?;
    let (_, outputs) = matrix("dy", dy)?;
    expect_shape("dy", dy, &[tokens, outputs])?;
    expect_shape("dw", dw, &[outputs, inputs])?;
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return gpu::backward_weight(x, dy, dw);
    }
    let (xs, dys) = (read::<f32>(x)?, read::<f32>(dy)?);
    let (a, b) = (Matrix::new(&dys, tokens, outputs).transposed(), Matrix::new(&xs, tokens, inputs));
    write(dw, |dw| multiply(dw, inputs, 1.0, 1.0, a, b, Threads::All))
}

/// Adds the gradient of the bias to `db` `(O)`, for dy `(T, O)`.
///
/// # Errors
/// If a shape differs from the above, or a tensor is not contiguous f32.
pub fn backward_bias(dy: &Tensor, db: &Tensor) -> Result<()> {
    let (tokens, outputs) = matrix("dy", dy)?;
    expect_shape("db", db, &[outputs])?;
    #[cfg(gpu)]
    if crate::gpu::runs(dy.device()) {
        return gpu::backward_bias(dy, db);
    }
    let dys = read::<f32>(dy)?;
    let dys = &*dys;
    let ([], sum) = new_rows_and_sums(
        tokens,
        [],
        outputs,
        #[inline(always)]
        |t, [], sum| {
            add(sum, &dys[t * outputs..][..outputs]);
            []
        },
    );
    write(db, |db| add(db, &sum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error};

    /// x·Wᵀ + bias in f64.
    pub(super) fn reference(x: &[f64], w: &[f64], bias: &[f64], inputs: usize) -> Vec<f64> {
        let tokens = x.len().checked_div(inputs).unwrap_or(0);
        let dot = |t: usize, o: usize| inner(&x[t * inputs..][..inputs], &w[o * inputs..][..inputs]);
        (0..tokens).flat_map(|t| (0..bias.len()).map(move |o| dot(t, o) + bias[o])).collect()
    }

    fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
        a.iter().zip(b).map(|(a, b)| a + b).collect()
    }

    #[test]
    fn values_equal_the_reference_for_odd_and_empty_shapes() {
        for (t, i, o) in [(0, 3, 2), (3, 2, 0), (1, 1, 1), (3, 7, 5), (7, 1023, 33), (65, 48, 130)] {
            let (x, w, bias) = (random(1, (t, i)), random(2, (o, i)), random(3, o));
            let (xs, ws) = (numbers(&x), numbers(&w));
            // i additions in f32 have an error of about √i half ulps of the result.
            let y = forward(&x, &w, Some(&bias)).unwrap();
            assert!(relative_error(&y, &reference(&xs, &ws, &numbers(&bias), i)) < 1e-6, "{t} {i} {o}");
            let y = forward(&x, &w, None).unwrap();
            assert!(relative_error(&y, &reference(&xs, &ws, &vec![0.0; o], i)) < 1e-6, "{t} {i} {o}");
        }
    }

    #[test]
    fn without_inputs_the_bias_remains() {
        let y = forward(&random(1, (2, 0)), &random(2, (3, 0)), Some(&random(3, 3))).unwrap();
        assert_eq!(numbers(&y), numbers(&random(3, 3)).repeat(2));
    }

    #[test]
    fn gradients_equal_finite_differences_and_are_added() {
        for (t, i, o) in [(1, 1, 1), (3, 7, 5), (130, 2, 3)] {
            let (x, w, bias, dy) = (random(1, (t, i)), random(2, (o, i)), random(3, o), random(4, (t, o)));
            let (xs, ws, bs, dys) = (numbers(&x), numbers(&w), numbers(&bias), numbers(&dy));
            let (dx, dw, db) = (random(5, (t, i)), random(6, (o, i)), random(7, o));
            let want_x = finite_difference(&xs, |x| inner(&reference(x, &ws, &bs, i), &dys));
            let want_w = finite_difference(&ws, |w| inner(&reference(&xs, w, &bs, i), &dys));
            let want_b = finite_difference(&bs, |b| inner(&reference(&xs, &ws, b, i), &dys));
            let (want_dx, want_dw, want_db) =
                (sum(&want_x, &numbers(&dx)), sum(&want_w, &numbers(&dw)), sum(&want_b, &numbers(&db)));
            add_backward_input(&dy, &w, &dx).unwrap();
            backward_weight(&x, &dy, &dw).unwrap();
            backward_bias(&dy, &db).unwrap();
            // Up to 130 additions in f32; the finite differences are accurate to 1e-8.
            assert!(relative_error(&backward_input(&dy, &w).unwrap(), &want_x) < 1e-6, "{t} {i} {o}");
            assert!(relative_error(&dx, &want_dx) < 1e-6, "{t} {i} {o}");
            assert!(relative_error(&dw, &want_dw) < 1e-6, "{t} {i} {o}");
            assert!(relative_error(&db, &want_db) < 1e-6, "{t} {i} {o}");
        }
    }

    #[test]
    fn no_tokens_leave_gradients_as_they_are() {
        let (x, dy, dw, db) = (random(1, (0, 3)), random(2, (0, 2)), random(3, (2, 3)), random(4, 2));
        let before = (numbers(&dw), numbers(&db));
        backward_weight(&x, &dy, &dw).unwrap();
        backward_bias(&dy, &db).unwrap();
        assert_eq!((numbers(&dw), numbers(&db)), before);
    }

    #[test]
    fn misshaped_tensors_are_an_error() {
        let (x, w, dy) = (random(1, (4, 3)), random(2, (2, 3)), random(3, (4, 2)));
        let wrong = random(4, (5, 5));
        assert!(forward(&x, &wrong, None).is_err());
        assert!(forward(&x, &w, Some(&wrong)).is_err());
        assert!(forward(&random(1, 3), &w, None).is_err());
        assert!(forward(&x.t().unwrap(), &random(1, (2, 4)), None).is_err());
        assert!(backward_input(&wrong, &w).is_err());
        assert!(add_backward_input(&dy, &w, &wrong).is_err());
        assert!(backward_weight(&x, &wrong, &w).is_err());
        assert!(backward_weight(&x, &dy, &wrong).is_err());
        assert!(backward_bias(&dy, &wrong).is_err());
    }
}
