//! The GPU version of LoRA: matrix products by cuBLASLt, which also add their results to y and dx.

use super::{Adapter, Shape};
use crate::gpu::Memory;
use crate::gpu::product::{Matrix, multiply};
use crate::linear::gpu::converted;
use crate::{Packing, dropout};
use candle_core::{DType, Result, Tensor, bail};

/// [`super::forward`]. A and B are f32 and rounded to the type of x; y and xa have that type too.
pub(super) fn forward(
    shape: Shape,
    x: &Tensor,
    y: &Tensor,
    adapter: &Adapter,
    packing: &Packing,
) -> Result<Tensor> {
    let Shape { tokens, inputs, outputs, rank } = shape;
    expect_types(x, &[("y", y)])?;
    let (device, dtype) = (x.device(), x.dtype());
    let (a, b) = (converted(adapter.a, dtype)?, converted(adapter.b, dtype)?);
    let dropped = dropped(x, adapter, packing)?;
    let (xs, a, b, to) = (Memory::of(&dropped)?, Memory::of(&a)?, Memory::of(&b)?, Memory::mutable(y)?);
    let xa = Memory::new(device, dtype, tokens * rank)?;
    let of_xa = Matrix::new(&xa, tokens, rank, dtype);
    let of_x = Matrix::new(&xs, tokens, inputs, dtype);
    multiply(device, of_xa, 0.0, 1.0, of_x, Matrix::new(&a, rank, inputs, dtype).transposed())?;
    let of_y = Matrix::new(&to, tokens, outputs, dtype);
    multiply(device, of_y, 1.0, adapter.scale, of_xa, Matrix::new(&b, outputs, rank, dtype).transposed())?;
    xa.tensor((tokens, rank))
}

/// [`super::backward`]. da and db are f32.
pub(super) fn backward(
    shape: Shape,
    x: &Tensor,
    xa: &Tensor,
    dy: &Tensor,
    adapter: &Adapter,
    packing: &Packing,
    dx: Option<&Tensor>,
    da: &Tensor,
    db: &Tensor,
) -> Result<()> {
    let Shape { tokens, inputs, outputs, rank } = shape;
    expect_types(x, &[("xa", xa), ("dy", dy)])?;
    if da.dtype() != DType::F32 || db.dtype() != DType::F32 {
        bail!("`da` is of {:?} and `db` of {:?}, expected F32", da.dtype(), db.dtype());
    }
    if tokens == 0 {
        return Ok(());
    }
    let (device, dtype, scale) = (x.device(), x.dtype(), adapter.scale);
    let (a, b) = (converted(adapter.a, dtype)?, converted(adapter.b, dtype)?);
    let (a, b, dys, xas) = (Memory::of(&a)?, Memory::of(&b)?, Memory::of(dy)?, Memory::of(xa)?);
    let (of_a, of_b) = (Matrix::new(&a, rank, inputs, dtype), Matrix::new(&b, outputs, rank, dtype));
    let (of_dy, of_xa) = (Matrix::new(&dys, tokens, outputs, dtype), Matrix::new(&xas, tokens, rank, dtype));
    // One after the other: both may be views of one flat buffer.
    {
        let to = Memory::mutable(db)?;
        multiply(device, Matrix::new(&to, outputs, rank, DType::F32), 1.0, scale, of_dy.transposed(), of_xa)?;
    }
    let g = Memory::new(device, dtype, tokens * rank)?;
    let of_g = Matrix::new(&g, tokens, rank, dtype);
    multiply(device, of_g, 0.0, scale, of_dy, of_b)?;
    {
        let dropped = dropped(x, adapter, packing)?;
        let (xs, to) = (Memory::of(&dropped)?, Memory::mutable(da)?);
        let of_x = Matrix::new(&xs, tokens, inputs, dtype);
        multiply(device, Matrix::new(&to, rank, inputs, DType::F32), 1.0, 1.0, of_g.transposed(), of_x)?;
    }
    let Some(dx) = dx else { return Ok(()) };
    expect_types(x, &[("dx", dx)])?;
    match &adapter.dropout {
        None => {
            let to = Memory::mutable(dx)?;
            multiply(device, Matrix::new(&to, tokens, inputs, dtype), 1.0, 1.0, of_g, of_a)
        }
        Some(d) => {
            let z = Memory::new(device, dtype, tokens * inputs)?;
            multiply(device, Matrix::new(&z, tokens, inputs, dtype), 0.0, 1.0, of_g, of_a)?;
            dropout::gpu::add(&z.tensor((tokens, inputs))?, dx, packing, d)
        }
    }
}

fn dropped(x: &Tensor, adapter: &Adapter, packing: &Packing) -> Result<Tensor> {
    match &adapter.dropout {
        Some(d) => dropout::gpu::apply(x, packing, d),
        None => Ok(x.clone()),
    }
}

fn expect_types(x: &Tensor, others: &[(&str, &Tensor)]) -> Result<()> {
    for (name, tensor) in others {
        if tensor.dtype() != x.dtype() {
            bail!("`{name}` is of {:?}, expected {:?}", tensor.dtype(), x.dtype());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dropout::Dropout;
    use crate::testing::{TYPES, cast, numbers, random, random_on_device, relative_error};
    use candle_core::IndexOp;

    /// Compares with the CPU version in f32, which is compared with a reference in its own tests.
    #[test]
    fn adapters_are_those_of_the_cpu() {
        let dropout = Dropout { p: 0.25, seed: 1, step: 2, site: 3 };
        for (dtype, rounding) in TYPES {
            for (t, i, o, r) in [(0, 4, 3, 2), (1, 1, 1, 1), (3, 7, 5, 2), (40, 64, 33, 8), (130, 6, 4, 3)] {
                for dropout in [None, Some(dropout)] {
                    let name = format!("{dtype:?} {t} {i} {o} {r} {dropout:?}");
                    let packing = Packing::new(&[t / 2, t - t / 2], vec![4, 9]);
                    let [x, y, dy, dx] = [(1, i), (2, o), (5, o), (6, i)]
                        .map(|(seed, width)| cast(&random_on_device(seed, (t, width)), dtype));
                    // Values that the type represents exactly, because the kernels round A and B to it.
                    let [a, b] = [(3, r, i), (4, o, r)].map(|(seed, rows, columns)| {
                        cast(&cast(&random_on_device(seed, (rows, columns)), dtype), DType::F32)
                    });
                    let adapter = Adapter { a: &a, b: &b, scale: 0.7, dropout };
                    let wide = |x: &Tensor| {
                        let x = cast(x, DType::F32).to_device(&candle_core::Device::Cpu).unwrap();
                        x.copy().unwrap()
                    };
                    let flats = [random_on_device(7, r * i + o * r), random(7, r * i + o * r)];
                    let parts = |flat: &Tensor| {
                        let (da, db) = (flat.i(..r * i).unwrap(), flat.i(r * i..).unwrap());
                        (da.reshape((r, i)).unwrap(), db.reshape((o, r)).unwrap())
                    };
                    let (want_y, want_dx) = (wide(&y), wide(&dx));
                    let (wide_a, wide_b) = (wide(&a), wide(&b));
                    let on_cpu = Adapter { a: &wide_a, b: &wide_b, ..adapter };
                    let want_xa = super::super::forward(&wide(&x), &want_y, &on_cpu, &packing).unwrap();
                    let ((da, db), (want_da, want_db)) = (parts(&flats[0]), parts(&flats[1]));
                    super::super::backward(
                        &wide(&x),
                        &want_xa,
                        &wide(&dy),
                        &on_cpu,
                        &packing,
                        Some(&want_dx),
                        &want_da,
                        &want_db,
                    )
                    .unwrap();

                    let shape = Shape::of(&x, &y, "y", &adapter, &packing).unwrap();
                    let xa = forward(shape, &x, &y, &adapter, &packing).unwrap();
                    backward(shape, &x, &xa, &dy, &adapter, &packing, Some(&dx), &da, &db).unwrap();
                    for (what, got, want) in [
                        ("xa", &xa, &want_xa),
                        ("y", &y, &want_y),
                        ("dx", &dx, &want_dx),
                        ("da and db", &flats[0], &flats[1]),
                    ] {
                        // dropout(x), xa and g are rounded to the type as well.
                        let error = relative_error(got, &numbers(want));
                        assert!(error < 2.0 * rounding, "{what} {name}: {error:.1e}");
                    }
                }
            }
        }
    }
}
