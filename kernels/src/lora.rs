//! Low-rank adaptation (LoRA) of a frozen linear layer (Hu et al. 2021): y += scale·dropout(x)·Aᵀ·Bᵀ.
//!
//! With `xa = dropout(x)·Aᵀ` and `g = scale·dy·B`, both `(T, R)`: dA = gᵀ·dropout(x), dB = scale·dyᵀ·xa,
//! dx += dropout(g·A).
//!
//! Forward and backward read each input and write each output once. All products of a block of tokens are
//! computed while the block is in the cache, where dropout(x) is computed and discarded. The size of a block
//! is fixed, so sums over tokens do not depend on the number of threads.

use crate::Packing;
use crate::dropout::Dropout;
use crate::matmul::{Matrix, Threads, multiply};
use crate::rows::add;
use crate::simd::{fill_rows, vectorised};
use crate::tensor::{expect_shape, matrix, packed, read, tensor, write};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

#[cfg(any(test, gpu))]
mod gpu;

/// The trained low-rank matrices of a frozen linear layer with the weight W `(O, I)`.
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'a> {
    /// A `(R, I)`, `lora_A` in PEFT.
    pub a: &'a Tensor,
    /// B `(O, R)`, `lora_B` in PEFT.
    pub b: &'a Tensor,
    /// The factor of the product: α/R, or α/√R with rsLoRA.
    pub scale: f32,
    /// Dropout of the adapter's input. The frozen layer gets x without dropout.
    pub dropout: Option<Dropout>,
}

/// Adds the adapter's output for x `(T, I)` to y `(T, O)` in place, and returns `xa` `(T, R)`, which
/// [`backward`] needs.
///
/// # Errors
/// If a shape differs from the above, a dimension other than T is 0, or a tensor is not contiguous f32.
pub fn forward(x: &Tensor, y: &Tensor, adapter: &Adapter, packing: &Packing) -> Result<Tensor> {
    let shape = Shape::of(x, y, "y", adapter, packing)?;
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return gpu::forward(shape, x, y, adapter, packing);
    }
    let Shape { tokens, inputs, outputs, rank } = shape;
    let (xs, a, b) = (read::<f32>(x)?, read::<f32>(adapter.a)?, read::<f32>(adapter.b)?);
    let (xs, a, b) = (&*xs, Matrix::new(&a, rank, inputs), Matrix::new(&b, outputs, rank));
    let mut xa = vec![0f32; tokens * rank];
    write(y, |y| {
        let blocks = xa.par_chunks_mut(BLOCK * rank).zip(y.par_chunks_mut(BLOCK * outputs)).enumerate();
        blocks.for_each_init(Vec::new, |scratch, (block, (xa, y))| {
            let rows = shape.block(block);
            let x = dropped(
                &xs[rows.start * inputs..rows.end * inputs],
                inputs,
                &rows,
                adapter,
                packing,
                scratch,
            );
            multiply(xa, rank, 0.0, 1.0, Matrix::new(x, rows.len(), inputs), a.transposed(), Threads::One);
            multiply(
                y,
                outputs,
                1.0,
                adapter.scale,
                Matrix::new(xa, rows.len(), rank),
                b.transposed(),
                Threads::One,
            );
        });
    })?;
    tensor(xa, (tokens, rank))
}

/// Backward pass of [`forward`]: adds the gradient of A to `da` `(R, I)`, of B to `db` `(O, R)` and of x to
/// `dx` `(T, I)`.
///
/// `xa` `(T, R)` is the result of [`forward`], `dy` `(T, O)` the gradient of y. Pass `None` for `dx` if no
/// parameter before the layer is trained.
///
/// # Errors
/// If a shape differs from the above, a dimension other than T is 0, or a tensor is not contiguous f32.
pub fn backward(
    x: &Tensor,
    xa: &Tensor,
    dy: &Tensor,
    adapter: &Adapter,
    packing: &Packing,
    dx: Option<&Tensor>,
    da: &Tensor,
    db: &Tensor,
) -> Result<()> {
    let shape = Shape::of(x, dy, "dy", adapter, packing)?;
    let Shape { tokens, inputs, outputs, rank } = shape;
    expect_shape("xa", xa, &[tokens, rank])?;
    expect_shape("da", da, &[rank, inputs])?;
    expect_shape("db", db, &[outputs, rank])?;
    if let Some(dx) = dx {
        expect_shape("dx", dx, &[tokens, inputs])?;
    }
    #[cfg(gpu)]
    if crate::gpu::runs(x.device()) {
        return gpu::backward(shape, x, xa, dy, adapter, packing, dx, da, db);
    }
    let (xs, xas, dys) = (read::<f32>(x)?, read::<f32>(xa)?, read::<f32>(dy)?);
    let (xs, xas, dys) = (&*xs, &*xas, &*dys);
    let (a, b) = (read::<f32>(adapter.a)?, read::<f32>(adapter.b)?);
    let (a, b) = (Matrix::new(&a, rank, inputs), Matrix::new(&b, outputs, rank));

    // dA and dB of each block.
    let (of_a, of_b) = (rank * inputs, outputs * rank);
    let mut partial = vec![0f32; tokens.div_ceil(BLOCK) * (of_a + of_b)];
    let run = |block: usize, partial: &mut [f32], dx: Option<&mut [f32]>, scratch: &mut Vec<f32>| {
        let rows = shape.block(block);
        let (da, db) = partial.split_at_mut(of_a);
        let dy = Matrix::new(&dys[rows.start * outputs..rows.end * outputs], rows.len(), outputs);
        let xa = Matrix::new(&xas[rows.start * rank..rows.end * rank], rows.len(), rank);
        multiply(db, rank, 0.0, adapter.scale, dy.transposed(), xa, Threads::One);

        let mut g = vec![0f32; rows.len() * rank];
        multiply(&mut g, rank, 0.0, adapter.scale, dy, b, Threads::One);
        let g = Matrix::new(&g, rows.len(), rank);
        let x =
            dropped(&xs[rows.start * inputs..rows.end * inputs], inputs, &rows, adapter, packing, scratch);
        multiply(da, inputs, 0.0, 1.0, g.transposed(), Matrix::new(x, rows.len(), inputs), Threads::One);

        match (dx, &adapter.dropout) {
            (None, _) => {}
            (Some(dx), None) => multiply(dx, inputs, 1.0, 1.0, g, a, Threads::One),
            (Some(dx), Some(dropout)) => {
                // The copy of x in `scratch` is no longer needed, and has the right size.
                multiply(scratch, inputs, 0.0, 1.0, g, a, Threads::One);
                scale_rows(scratch, inputs, &rows, dropout, packing);
                vectorised(
                    #[inline(always)]
                    || add(dx, scratch),
                );
            }
        }
    };
    let partials = partial.par_chunks_mut(of_a + of_b);
    match dx {
        Some(dx) => {
            write(dx, |dx| {
                let blocks = partials.zip(dx.par_chunks_mut(BLOCK * inputs)).enumerate();
                blocks.for_each_init(Vec::new, |scratch, (block, (partial, dx))| {
                    run(block, partial, Some(dx), scratch);
                });
            })?;
        }
        None => partials.enumerate().for_each_init(Vec::new, |scratch, (block, partial)| {
            run(block, partial, None, scratch);
        }),
    }

    // One after the other: both may be views of one flat buffer, and `write` locks the buffer.
    for (to, width, start) in [(da, inputs, 0), (db, rank, of_a)] {
        write(to, |to| {
            fill_rows(
                to,
                width,
                #[inline(always)]
                |row, to| {
                    for partial in partial.chunks_exact(of_a + of_b) {
                        add(to, &partial[start + row * width..][..width]);
                    }
                },
            );
        })?;
    }
    Ok(())
}

/// The number of tokens of a block, which is also the number of tokens of one partial sum.
const BLOCK: usize = 128;

/// The checked sizes of a call: T, I, O and R.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
}

impl Shape {
    fn of(x: &Tensor, y: &Tensor, name: &str, adapter: &Adapter, packing: &Packing) -> Result<Self> {
        let (tokens, inputs) = packed("x", x, packing)?;
        let (rank, _) = matrix("a", adapter.a)?;
        let (outputs, _) = matrix("b", adapter.b)?;
        expect_shape("a", adapter.a, &[rank, inputs])?;
        expect_shape("b", adapter.b, &[outputs, rank])?;
        expect_shape(name, y, &[tokens, outputs])?;
        if inputs == 0 || outputs == 0 || rank == 0 {
            bail!(
                "an adapter of rank {rank} from {inputs} to {outputs} features; expected none of them to be 0"
            );
        }
        adapter.dropout.map_or(Ok(()), |dropout| dropout.check())?;
        Ok(Self { tokens, inputs, outputs, rank })
    }

    /// The rows of block `block`.
    fn block(&self, block: usize) -> Range<usize> {
        block * BLOCK..self.tokens.min((block + 1) * BLOCK)
    }
}

/// dropout(x) of some rows: `x` itself without dropout, otherwise a copy in `scratch`.
fn dropped<'a>(
    x: &'a [f32],
    width: usize,
    rows: &Range<usize>,
    adapter: &Adapter,
    packing: &Packing,
    scratch: &'a mut Vec<f32>,
) -> &'a [f32] {
    let Some(dropout) = &adapter.dropout else { return x };
    scratch.clear();
    scratch.extend_from_slice(x);
    scale_rows(scratch, width, rows, dropout, packing);
    scratch
}

fn scale_rows(elements: &mut [f32], width: usize, rows: &Range<usize>, dropout: &Dropout, packing: &Packing) {
    vectorised(
        #[inline(always)]
        || {
            for (t, row) in rows.clone().zip(elements.chunks_exact_mut(width)) {
                dropout.scale_row(packing, t, row);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error};
    use crate::{dropout, linear};
    use candle_core::{DType, Device, IndexOp};
    use std::iter::zip;

    const DROPOUT: Dropout = Dropout { p: 0.25, seed: 1, step: 2, site: 3 };
    /// T (divided into two sequences), I, O, R.
    const SHAPES: [(usize, usize, usize, usize); 6] =
        [(0, 4, 3, 2), (1, 1, 1, 1), (3, 7, 5, 2), (7, 1023, 33, 8), (128, 5, 3, 1), (300, 6, 4, 3)];

    struct Case {
        packing: Packing,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        /// The dropout factors of x.
        mask: Vec<f64>,
        dropout: Option<Dropout>,
    }

    impl Case {
        fn new((t, i, o, r): (usize, usize, usize, usize), dropout: Option<Dropout>) -> Self {
            let packing = Packing::new(&[t / 2, t - t / 2], vec![4, 9]);
            let ones = Tensor::ones((t, i), DType::F32, &Device::Cpu).unwrap();
            let mask = match &dropout {
                Some(dropout) => numbers(&dropout::apply(&ones, &packing, dropout).unwrap()),
                None => numbers(&ones),
            };
            let (x, y, a, b) = (random(1, (t, i)), random(2, (t, o)), random(3, (r, i)), random(4, (o, r)));
            Self { packing, x, y, a, b, mask, dropout }
        }

        fn adapter(&self) -> Adapter<'_> {
            Adapter { a: &self.a, b: &self.b, scale: 0.7, dropout: self.dropout }
        }

        /// scale·dropout(x)·Aᵀ·Bᵀ in f64.
        fn reference(&self, x: &[f64], a: &[f64], b: &[f64]) -> Vec<f64> {
            let (rank, inputs) = self.a.dims2().unwrap();
            let x: Vec<f64> = zip(x, &self.mask).map(|(x, mask)| x * mask).collect();
            let mut y = Vec::new();
            for x in x.chunks(inputs) {
                let xa: Vec<f64> = a.chunks(inputs).map(|a| inner(x, a)).collect();
                y.extend(b.chunks(rank).map(|b| f64::from(0.7f32) * inner(&xa, b)));
            }
            y
        }
    }

    fn plus(tensor: &Tensor, gradient: Vec<f64>) -> Vec<f64> {
        zip(numbers(tensor), gradient).map(|(a, b)| a + b).collect()
    }

    #[test]
    fn values_equal_the_reference_for_odd_and_empty_shapes() {
        for shape in SHAPES {
            for dropout in [None, Some(DROPOUT)] {
                let c = Case::new(shape, dropout);
                let want = plus(&c.y, c.reference(&numbers(&c.x), &numbers(&c.a), &numbers(&c.b)));
                let xa = forward(&c.x, &c.y, &c.adapter(), &c.packing).unwrap();
                // Sums of up to 1023 terms, then of R terms, in f32.
                assert!(relative_error(&c.y, &want) < 1e-6, "{shape:?} {dropout:?}");
                assert_eq!(xa.dims(), [shape.0, shape.3]);
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences_and_are_added() {
        for shape in SHAPES.into_iter().filter(|shape| shape.1 < 100) {
            for dropout in [None, Some(DROPOUT)] {
                let (t, i, o, r) = shape;
                let c = Case::new(shape, dropout);
                let (xs, az, bs) = (numbers(&c.x), numbers(&c.a), numbers(&c.b));
                let (dy, dx, da, db) =
                    (random(5, (t, o)), random(6, (t, i)), random(7, (r, i)), random(8, (o, r)));
                let dys = numbers(&dy);
                let want_x = plus(&dx, finite_difference(&xs, |x| inner(&c.reference(x, &az, &bs), &dys)));
                let want_a = plus(&da, finite_difference(&az, |a| inner(&c.reference(&xs, a, &bs), &dys)));
                let want_b = plus(&db, finite_difference(&bs, |b| inner(&c.reference(&xs, &az, b), &dys)));
                let (before_a, before_b) = (da.copy().unwrap(), db.copy().unwrap());

                let xa = forward(&c.x, &c.y, &c.adapter(), &c.packing).unwrap();
                backward(&c.x, &xa, &dy, &c.adapter(), &c.packing, Some(&dx), &da, &db).unwrap();
                // Sums over up to 300 tokens in f32; finite differences of sums this large are accurate to
                // 1e-7.
                assert!(relative_error(&dx, &want_x) < 2e-6, "dx {shape:?} {dropout:?}");
                assert!(relative_error(&da, &want_a) < 2e-6, "da {shape:?} {dropout:?}");
                assert!(relative_error(&db, &want_b) < 2e-6, "db {shape:?} {dropout:?}");

                backward(&c.x, &xa, &dy, &c.adapter(), &c.packing, None, &before_a, &before_b).unwrap();
                assert_eq!((numbers(&before_a), numbers(&before_b)), (numbers(&da), numbers(&db)));
            }
        }
    }

    #[test]
    fn gradients_of_a_wide_layer_equal_the_products() {
        let shape @ (t, i, o, r) = (257, 1023, 33, 8);
        let c = Case::new(shape, None);
        let (dy, dx) = (random(5, (t, o)), Tensor::zeros((t, i), DType::F32, &Device::Cpu).unwrap());
        let flat = Tensor::zeros(r * i + o * r, DType::F32, &Device::Cpu).unwrap();
        let (da, db) = (
            flat.i(..r * i).unwrap().reshape((r, i)).unwrap(),
            flat.i(r * i..).unwrap().reshape((o, r)).unwrap(),
        );
        let xa = forward(&c.x, &c.y, &c.adapter(), &c.packing).unwrap();
        backward(&c.x, &xa, &dy, &c.adapter(), &c.packing, Some(&dx), &da, &db).unwrap();
        // The same gradients by three linear layers, which have their own reference.
        let g = linear::backward_input(&dy, &c.b).unwrap().affine(f64::from(0.7f32), 0.0).unwrap();
        let (want_a, want_b) = (da.zeros_like().unwrap(), db.zeros_like().unwrap());
        linear::backward_weight(&c.x, &g, &want_a).unwrap();
        linear::backward_weight(&xa.affine(f64::from(0.7f32), 0.0).unwrap(), &dy, &want_b).unwrap();
        let want_x = linear::backward_input(&g, &c.a).unwrap();
        for (got, want) in [(&da, &want_a), (&db, &want_b), (&dx, &want_x)] {
            assert!(relative_error(got, &numbers(want)) < 1e-6);
        }
    }

    #[test]
    fn misshaped_tensors_are_an_error() {
        let c = Case::new((4, 3, 2, 2), None);
        let wrong = random(9, (5, 5));
        let adapter = c.adapter();
        assert!(forward(&wrong, &c.y, &adapter, &c.packing).is_err());
        assert!(forward(&c.x, &wrong, &adapter, &c.packing).is_err());
        assert!(forward(&c.x, &c.y, &Adapter { a: &wrong, ..adapter }, &c.packing).is_err());
        assert!(forward(&c.x, &c.y, &Adapter { b: &wrong, ..adapter }, &c.packing).is_err());
        assert!(forward(&c.x, &c.y, &adapter, &Packing::new(&[3], vec![0])).is_err());
        let dropout = Some(Dropout { p: 1.5, ..DROPOUT });
        assert!(forward(&c.x, &c.y, &Adapter { dropout, ..adapter }, &c.packing).is_err());
        let (empty_a, empty_b) = (random(1, (0, 3)), random(1, (2, 0)));
        assert!(forward(&c.x, &c.y, &Adapter { a: &empty_a, b: &empty_b, ..adapter }, &c.packing).is_err());
        let xa = forward(&c.x, &c.y, &adapter, &c.packing).unwrap();
        assert!(backward(&c.x, &xa, &c.y, &adapter, &c.packing, Some(&wrong), &c.a, &c.b).is_err());
        assert!(backward(&c.x, &wrong, &c.y, &adapter, &c.packing, None, &c.a, &c.b).is_err());
        assert!(backward(&c.x, &xa, &c.y, &adapter, &c.packing, None, &wrong, &c.b).is_err());
        assert!(backward(&c.x, &xa, &c.y, &adapter, &c.packing, None, &c.a, &wrong).is_err());
    }
}
