//! The GPU version of a linear layer: matrix products by cuBLASLt, the rest by linear.cu.
//!
//! The callers have checked the shapes.

use crate::gpu::product::{Matrix, multiply};
use crate::gpu::{Memory, VoidPointer, VoidPointerMut, dtype_code, dtype_code_of, entries, zeros};
use candle_core::{DType, Result, Tensor, bail};

#[repr(C)]
struct BiasBackward {
    dy: VoidPointer,
    db: *mut f32,
    partials: *mut f32,
    rows: i64,
    width: i32,
    dtype: i32,
}

#[repr(C)]
struct BiasForward {
    y: VoidPointerMut,
    bias: *const f32,
    rows: i64,
    width: i32,
    dtype: i32,
}

#[repr(C)]
struct Convert {
    x: VoidPointer,
    y: VoidPointerMut,
    count: i64,
    from: i32,
    to: i32,
}

entries! {
    bias_backward(BiasBackward);
    add_bias(BiasForward);
    convert(Convert);
}

/// The number of partial sums of a column sum: `PARTIALS` of partials.cuh.
const PARTIALS: usize = 512;

/// [`super::forward`]. W is rounded to the type of x; the bias is added in f32.
pub(super) fn forward(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let ((tokens, inputs), (outputs, _)) = (x.dims2()?, w.dims2()?);
    let (device, dtype) = (x.device(), x.dtype());
    let w = converted(w, dtype)?;
    let y = Memory::new(device, dtype, tokens * outputs)?;
    let (xs, ws) = (Memory::of(x)?, Memory::of(&w)?);
    let to = Matrix::new(&y, tokens, outputs, dtype);
    let (a, b) = (Matrix::new(&xs, tokens, inputs, dtype), Matrix::new(&ws, outputs, inputs, dtype));
    multiply(device, to, 0.0, 1.0, a, b.transposed())?;
    if let Some(bias) = bias.filter(|_| tokens * outputs > 0) {
        let bias = Memory::of(&converted(bias, DType::F32)?)?;
        let arguments = BiasForward {
            y: y.pointer(),
            bias: bias.pointer(),
            rows: tokens as i64,
            width: outputs as i32,
            dtype: dtype_code_of(x)?,
        };
        // SAFETY: the caller has checked the shapes.
        unsafe { add_bias(device, &arguments)? };
    }
    y.tensor((tokens, outputs))
}

/// [`super::backward_input`].
pub(super) fn backward_input(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((tokens, _), (_, inputs)) = (dy.dims2()?, w.dims2()?);
    let dx = Memory::new(dy.device(), dy.dtype(), tokens * inputs)?;
    product_with_weight(dy, w, &dx, 0.0)?;
    dx.tensor((tokens, inputs))
}

/// [`super::add_backward_input`].
pub(super) fn add_backward_input(dy: &Tensor, w: &Tensor, dx: &Tensor) -> Result<()> {
    if dx.dtype() != dy.dtype() {
        bail!("`dx` is of {:?}, expected {:?}", dx.dtype(), dy.dtype());
    }
    product_with_weight(dy, w, &Memory::mutable(dx)?, 1.0)
}

fn product_with_weight(dy: &Tensor, w: &Tensor, dx: &Memory, beta: f32) -> Result<()> {
    let ((tokens, _), (outputs, inputs)) = (dy.dims2()?, w.dims2()?);
    let w = converted(w, dy.dtype())?;
    let (dys, ws) = (Memory::of(dy)?, Memory::of(&w)?);
    let a = Matrix::new(&dys, tokens, outputs, dy.dtype());
    let b = Matrix::new(&ws, outputs, inputs, w.dtype());
    multiply(dy.device(), Matrix::new(dx, tokens, inputs, dy.dtype()), beta, 1.0, a, b)
}

/// [`super::backward_weight`]. dW is f32.
pub(super) fn backward_weight(x: &Tensor, dy: &Tensor, dw: &Tensor) -> Result<()> {
    let ((tokens, inputs), (_, outputs)) = (x.dims2()?, dy.dims2()?);
    expect_f32("dw", dw)?;
    if tokens == 0 {
        return Ok(());
    }
    let (xs, dys, to) = (Memory::of(x)?, Memory::of(dy)?, Memory::mutable(dw)?);
    let a = Matrix::new(&dys, tokens, outputs, dy.dtype()).transposed();
    let b = Matrix::new(&xs, tokens, inputs, x.dtype());
    multiply(x.device(), Matrix::new(&to, outputs, inputs, DType::F32), 1.0, 1.0, a, b)
}

/// [`super::backward_bias`]. db is f32.
pub(crate) fn backward_bias(dy: &Tensor, db: &Tensor) -> Result<()> {
    let (tokens, outputs) = dy.dims2()?;
    expect_f32("db", db)?;
    if tokens * outputs == 0 {
        return Ok(());
    }
    let partials = Memory::new(dy.device(), DType::F32, tokens.min(PARTIALS) * outputs)?;
    let (dys, to) = (Memory::of(dy)?, Memory::mutable(db)?);
    let arguments = BiasBackward {
        dy: dys.pointer(),
        db: to.pointer(),
        partials: partials.pointer(),
        rows: tokens as i64,
        width: outputs as i32,
        dtype: dtype_code_of(dy)?,
    };
    // SAFETY: the caller has checked the shapes.
    unsafe { bias_backward(dy.device(), &arguments) }
}

/// Converts `x` to `dtype`, rounding to nearest. Returns `x` itself if it already has that type.
pub(crate) fn converted(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    if x.elem_count() == 0 {
        return zeros(x.shape(), dtype, x.device());
    }
    let (from, to) = (Memory::of(x)?, Memory::new(x.device(), dtype, x.elem_count())?);
    let arguments = Convert {
        x: from.pointer(),
        y: to.pointer(),
        count: x.elem_count() as i64,
        from: dtype_code_of(x)?,
        to: dtype_code(dtype)?,
    };
    // SAFETY: both buffers have `count` elements.
    unsafe { convert(x.device(), &arguments)? };
    to.tensor(x.shape())
}

fn expect_f32(name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.dtype() != DType::F32 {
        bail!("`{name}` is of {:?}, expected F32", tensor.dtype());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::reference;
    use super::*;
    use crate::testing::{TYPES, cast, numbers, random_on_device, relative_error};

    #[test]
    fn layers_equal_the_reference_for_odd_and_empty_shapes() {
        for (dtype, rounding) in TYPES {
            for (t, i, o) in [(0, 3, 2), (3, 2, 0), (1, 1, 1), (3, 7, 5), (7, 130, 33), (515, 48, 130)] {
                let name = format!("{dtype:?} {t} {i} {o}");
                let [x, w, dy] = [(1, t, i), (2, o, i), (4, t, o)]
                    .map(|(seed, rows, columns)| cast(&random_on_device(seed, (rows, columns)), dtype));
                let bias = random_on_device(3, o);
                let (xs, ws, bs, dys) = (numbers(&x), numbers(&w), numbers(&bias), numbers(&dy));
                // y is rounded before and after the addition of the bias.
                let y = forward(&x, &w, Some(&bias)).unwrap();
                assert!(relative_error(&y, &reference(&xs, &ws, &bs, i)) < 2.0 * rounding, "y {name}");
                let y = forward(&x, &w, None).unwrap();
                assert!(relative_error(&y, &reference(&xs, &ws, &vec![0.0; o], i)) < rounding, "y {name}");

                let sum = |rows: usize, columns: usize, term: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                    (0..rows)
                        .flat_map(|r| (0..columns).map(move |c| (r, c)))
                        .map(|(r, c)| term(r, c))
                        .collect()
                };
                let want = sum(t, i, &|t, d| (0..o).map(|k| dys[t * o + k] * ws[k * i + d]).sum());
                let dx = cast(&random_on_device(5, (t, i)), dtype);
                let want_more: Vec<f64> = numbers(&dx).iter().zip(&want).map(|(a, b)| a + b).collect();
                assert!(relative_error(&backward_input(&dy, &w).unwrap(), &want) < rounding, "dx {name}");
                add_backward_input(&dy, &w, &dx).unwrap();
                assert!(relative_error(&dx, &want_more) < rounding, "dx {name}");

                let (dw, db) = (random_on_device(6, (o, i)), random_on_device(7, o));
                let (dws, dbs) = (numbers(&dw), numbers(&db));
                backward_weight(&x, &dy, &dw).unwrap();
                backward_bias(&dy, &db).unwrap();
                let want = sum(o, i, &|k, d| {
                    dws[k * i + d] + (0..t).map(|t| dys[t * o + k] * xs[t * i + d]).sum::<f64>()
                });
                // Gradients of parameters are f32 for every type.
                assert!(relative_error(&dw, &want) < 2e-6, "dw {name}");
                let want = sum(1, o, &|_, k| dbs[k] + (0..t).map(|t| dys[t * o + k]).sum::<f64>());
                assert!(relative_error(&db, &want) < 2e-6, "db {name}");
            }
        }
    }

    #[test]
    fn conversions_round_to_nearest() {
        let x = random_on_device(1, 1023);
        for (from, _) in TYPES {
            for (to, _) in TYPES {
                let x = cast(&x, from);
                assert_eq!(numbers(&converted(&x, to).unwrap()), numbers(&cast(&x, to)), "{from:?} {to:?}");
            }
        }
    }

    #[test]
    fn gradients_of_parameters_of_other_types_are_an_error() {
        let (x, dy) = (random_on_device(1, (4, 3)), random_on_device(3, (4, 2)));
        let [dw, db] =
            [cast(&random_on_device(2, (2, 3)), DType::BF16), cast(&random_on_device(4, 2), DType::BF16)];
        assert!(backward_weight(&x, &dy, &dw).is_err());
        assert!(backward_bias(&dy, &db).is_err());
    }
}
