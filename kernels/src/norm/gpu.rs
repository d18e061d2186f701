//! The GPU version of the norms: calls norm.cu. The callers have checked the shapes.

use super::Tape;
use crate::gpu::{
    Memory, VoidPointer, VoidPointerMut, dtype_code_of, entries, optional, optional_mutable, pointer,
};
use crate::linear::gpu::converted;
use candle_core::{DType, Result, Tensor, bail};

#[repr(C)]
struct NormForward {
    x: VoidPointer,
    residual: VoidPointer,
    w: *const f32,
    b: *const f32,
    y: VoidPointerMut,
    sum: VoidPointerMut,
    mean: *mut f32,
    rstd: *mut f32,
    rows: i64,
    width: i32,
    dtype: i32,
    centred: i32,
    eps: f32,
}

#[repr(C)]
struct NormBackward {
    sum: VoidPointer,
    mean: *const f32,
    rstd: *const f32,
    w: *const f32,
    dy: VoidPointer,
    dsum: VoidPointer,
    dx: VoidPointerMut,
    dw: *mut f32,
    db: *mut f32,
    partials: *mut f32,
    rows: i64,
    width: i32,
    dtype: i32,
    centred: i32,
}

entries! {
    norm_forward(NormForward);
    norm_recompute(NormForward);
    norm_backward(NormBackward);
}

/// The number of partial sums for the gradients of w and b: `PARTIALS` of partials.cuh.
const PARTIALS: usize = 512;

/// The maximum number of threads of a block, and `VECTORS` of norm.cu: the vectors that a thread keeps in
/// registers.
const THREADS: usize = 1024;
const ACCESSES: usize = 4;

pub(super) fn forward<const CENTRED: bool>(
    x: &Tensor,
    residual: Option<&Tensor>,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Tape)> {
    let (rows, width) = x.dims2()?;
    expect_width("a norm", width, x.dtype(), THREADS)?;
    if let Some(residual) = residual {
        expect_type("residual", residual, x.dtype())?;
    }
    let (w, b) = (&wide(w)?, b.map(wide).transpose()?);
    let device = x.device();
    let y = Memory::new(device, x.dtype(), rows * width)?;
    let sum = residual.map(|_| Memory::new(device, x.dtype(), rows * width)).transpose()?;
    let mean = if CENTRED { Some(Memory::new(device, DType::F32, rows)?) } else { None };
    let rstd = Memory::new(device, DType::F32, rows)?;
    if rows * width > 0 {
        let (xs, residual, w, b) =
            (Memory::of(x)?, optional(residual)?, Memory::of(w)?, optional(b.as_ref())?);
        let arguments = NormForward {
            x: xs.pointer(),
            residual: pointer::<u8>(residual.as_ref()).cast(),
            w: w.pointer(),
            b: pointer(b.as_ref()),
            y: y.pointer(),
            sum: pointer::<u8>(sum.as_ref()).cast(),
            mean: pointer(mean.as_ref()),
            rstd: rstd.pointer(),
            rows: rows as i64,
            width: width as i32,
            dtype: dtype_code_of(x)?,
            centred: i32::from(CENTRED),
            eps: eps as f32,
        };
        // SAFETY: the caller has checked the shapes.
        unsafe { norm_forward(device, &arguments)? };
    }
    let sum = sum.map_or_else(|| Ok(x.clone()), |sum| sum.tensor((rows, width)))?;
    let mean = mean.map(|mean| mean.tensor(rows)).transpose()?;
    Ok((y.tensor((rows, width))?, Tape { sum, mean, rstd: rstd.tensor(rows)? }))
}

pub(super) fn recompute<const CENTRED: bool>(tape: &Tape, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (rows, width) = tape.sum.dims2()?;
    expect_width("a norm", width, tape.sum.dtype(), THREADS)?;
    let (w, b) = (&wide(w)?, b.map(wide).transpose()?);
    let device = tape.sum.device();
    let y = Memory::new(device, tape.sum.dtype(), rows * width)?;
    if rows * width > 0 {
        let (sum, mean, rstd) =
            (Memory::of(&tape.sum)?, optional(tape.mean.as_ref())?, Memory::of(&tape.rstd)?);
        let (w, b) = (Memory::of(w)?, optional(b.as_ref())?);
        let arguments = NormForward {
            x: sum.pointer(),
            residual: std::ptr::null(),
            w: w.pointer(),
            b: pointer(b.as_ref()),
            y: y.pointer(),
            sum: std::ptr::null_mut(),
            mean: pointer(mean.as_ref()),
            rstd: rstd.pointer(),
            rows: rows as i64,
            width: width as i32,
            dtype: dtype_code_of(&tape.sum)?,
            centred: i32::from(CENTRED),
            eps: 0.0,
        };
        // SAFETY: the caller has checked the shapes.
        unsafe { norm_recompute(device, &arguments)? };
    }
    y.tensor((rows, width))
}

pub(super) fn backward<const CENTRED: bool>(
    tape: &Tape,
    w: &Tensor,
    dy: &Tensor,
    dsum: Option<&Tensor>,
    dw: Option<&Tensor>,
    db: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, width) = tape.sum.dims2()?;
    expect_backward_width(width, dy.dtype(), dw.is_some() || db.is_some())?;
    expect_type("dy", dy, tape.sum.dtype())?;
    for (name, tensor, dtype) in [("dsum", dsum, dy.dtype()), ("dw", dw, DType::F32), ("db", db, DType::F32)]
    {
        tensor.map_or(Ok(()), |tensor| expect_type(name, tensor, dtype))?;
    }
    let w = &wide(w)?;
    let device = dy.device();
    let dx = Memory::new(device, dy.dtype(), rows * width)?;
    if rows * width > 0 {
        let (sum, mean, rstd) =
            (Memory::of(&tape.sum)?, optional(tape.mean.as_ref())?, Memory::of(&tape.rstd)?);
        let (w, dys, dsum) = (Memory::of(w)?, Memory::of(dy)?, optional(dsum)?);
        let partials = if dw.is_some() || db.is_some() { rows.min(PARTIALS) * 2 * width } else { 0 };
        let partials = Memory::new(device, DType::F32, partials)?;
        let (dw, db) = (optional_mutable(dw)?, optional_mutable(db)?);
        let arguments = NormBackward {
            sum: sum.pointer(),
            mean: pointer(mean.as_ref()),
            rstd: rstd.pointer(),
            w: w.pointer(),
            dy: dys.pointer(),
            dsum: pointer::<u8>(dsum.as_ref()).cast(),
            dx: dx.pointer(),
            dw: pointer(dw.as_ref()),
            db: pointer(db.as_ref()),
            partials: partials.pointer(),
            rows: rows as i64,
            width: width as i32,
            dtype: dtype_code_of(dy)?,
            centred: i32::from(CENTRED),
        };
        // SAFETY: the caller has checked the shapes.
        unsafe { norm_backward(device, &arguments)? };
    }
    dx.tensor((rows, width))
}

/// Fails if a row does not fit into the registers of one block. `threads` limits the block for rows of whole
/// vectors.
fn expect_width(what: &str, width: usize, dtype: DType, threads: usize) -> Result<()> {
    let vector = 16 / dtype.size_in_bytes();
    let widest = ACCESSES * if width.is_multiple_of(vector) { threads * vector } else { THREADS };
    if width > widest {
        bail!("{what} has rows of {width} {dtype:?} elements; a GPU kernel supports at most {widest}");
    }
    Ok(())
}

/// Like [`expect_width`], for the backward pass.
///
/// A block has 65,536 registers, so it has fewer than [`THREADS`] threads where a thread needs many
/// registers. The comments below give the registers of a thread, as `ptxas.txt` in the target folder reports
/// them.
fn expect_backward_width(width: usize, dtype: DType, parameters: bool) -> Result<()> {
    let (what, threads) = match (dtype, parameters) {
        (DType::F32, false) => ("the backward pass of a norm", 896), // 72 registers
        (_, false) => ("the backward pass of a norm", 512),          // 104
        (DType::F32, true) => ("the backward pass of a trained norm", 512), // 102
        (_, true) => ("the backward pass of a trained norm", 384),   // 165
    };
    expect_width(what, width, dtype, threads)
}

/// Fails unless the tensor called `name` has the element type `dtype`.
fn expect_type(name: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() != dtype {
        bail!("`{name}` is of {:?}, expected {dtype:?}", tensor.dtype());
    }
    Ok(())
}

/// A weight or bias as f32, the type in which the kernels read it.
fn wide(vector: &Tensor) -> Result<Tensor> {
    converted(vector, DType::F32)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::tests::{analytic, reference};
    use super::*;
    use crate::testing::{TYPES, cast, numbers, random_on_device, relative_error};

    const EPS: f64 = 1e-5;
    const SHAPES: [(usize, usize); 8] =
        [(0, 8), (3, 0), (1, 3), (3, 7), (2, 1023), (65, 384), (3, 136), (514, 16)];

    /// Calls `f` with the arguments of the entry `norm_forward` for x `(T, D)`.
    pub(crate) fn with_arguments(x: &Tensor, w: &Tensor, f: impl FnOnce(*const std::ffi::c_void)) {
        let (rows, width) = x.dims2().unwrap();
        let new = |count| Memory::new(x.device(), DType::F32, count).unwrap();
        let (xs, ws, y, mean, rstd) =
            (Memory::of(x).unwrap(), Memory::of(w).unwrap(), new(rows * width), new(rows), new(rows));
        let arguments = NormForward {
            x: xs.pointer(),
            residual: std::ptr::null(),
            w: ws.pointer(),
            b: std::ptr::null(),
            y: y.pointer(),
            sum: std::ptr::null_mut(),
            mean: mean.pointer(),
            rstd: rstd.pointer(),
            rows: rows as i64,
            width: width as i32,
            dtype: 0,
            centred: 1,
            eps: 1e-5,
        };
        f((&raw const arguments).cast());
    }

    fn plus(a: &[f64], b: Vec<f64>) -> Vec<f64> {
        a.iter().zip(b).map(|(a, b)| a + b).collect()
    }

    #[test]
    fn kernels_equal_the_reference_for_odd_and_empty_shapes() {
        for (dtype, rounding) in TYPES {
            for (tokens, width) in SHAPES {
                let [x, residual, dy, dsum] =
                    [1, 2, 5, 6].map(|seed| cast(&random_on_device(seed, (tokens, width)), dtype));
                let [w, b] = [3, 4].map(|seed| random_on_device(seed, width));
                let (dw, db) = (random_on_device(7, width), random_on_device(8, width));
                let (ws, bs, dws, dbs) = (numbers(&w), numbers(&b), numbers(&dw), numbers(&db));
                let zero = vec![0.0; width];
                let name = format!("{dtype:?} {tokens} {width}");

                let (y, tape) = forward::<true>(&x, Some(&residual), &w, Some(&b), EPS).unwrap();
                let sum = plus(&numbers(&x), numbers(&residual));
                assert!(relative_error(&tape.sum, &sum) < rounding, "{name}");
                // The kernel normalises the sum that it has rounded for the tape.
                let sum = numbers(&tape.sum);
                assert!(relative_error(&y, &reference(&sum, &ws, &bs, EPS, true)) < rounding, "{name}");
                assert_eq!(numbers(&recompute::<true>(&tape, &w, Some(&b)).unwrap()), numbers(&y), "{name}");
                let dx = backward::<true>(&tape, &w, &dy, Some(&dsum), Some(&dw), Some(&db)).unwrap();
                let want = plus(&numbers(&dsum), analytic(&sum, &ws, &numbers(&dy), true));
                assert!(relative_error(&dx, &want) < rounding, "dx {name}");
                let (mut want_w, mut want_b) = (dws, dbs);
                let n = reference(&sum, &vec![1.0; width], &zero, EPS, true);
                for (at, (dy, n)) in numbers(&dy).iter().zip(n).enumerate() {
                    want_w[at % width] += dy * n;
                    want_b[at % width] += dy;
                }
                // Sums are f32 for every type.
                assert!(relative_error(&dw, &want_w) < 2e-6, "dw {name}");
                assert!(relative_error(&db, &want_b) < 2e-6, "db {name}");

                let (y, tape) = forward::<false>(&x, None, &w, None, EPS).unwrap();
                let xs = numbers(&x);
                assert!(relative_error(&y, &reference(&xs, &ws, &zero, EPS, false)) < rounding, "{name}");
                assert_eq!(numbers(&recompute::<false>(&tape, &w, None).unwrap()), numbers(&y), "{name}");
                let dx = backward::<false>(&tape, &w, &dy, None, None, None).unwrap();
                let want = analytic(&xs, &ws, &numbers(&dy), false);
                assert!(relative_error(&dx, &want) < rounding, "dx {name}");
            }
        }
    }

    #[test]
    fn other_types_and_rows_that_are_too_wide_are_an_error() {
        let (x, w) = (random_on_device(1, (2, 8)), random_on_device(2, 8));
        assert!(forward::<true>(&x, Some(&cast(&x, DType::BF16)), &w, None, EPS).is_err());
        let wide = random_on_device(1, (1, 4097));
        let error =
            forward::<true>(&wide, None, &random_on_device(2, 4097), None, EPS).unwrap_err().to_string();
        assert!(error.contains("4097"), "{error}");
    }

    #[test]
    fn the_widest_rows_go_backward_and_wider_ones_are_an_error() {
        for (dtype, trained, widest) in [
            (DType::F32, false, 14_336),
            (DType::F32, true, 8192),
            (DType::BF16, false, 16_384),
            (DType::F16, true, 12_288),
        ] {
            let backward = |width: usize| {
                let [x, dy] = [1, 2].map(|seed| cast(&random_on_device(seed, (1, width)), dtype));
                let (w, dw) = (random_on_device(3, width), random_on_device(4, width));
                let (_, tape) = forward::<false>(&x, None, &w, None, EPS).unwrap();
                super::backward::<false>(&tape, &w, &dy, None, trained.then_some(&dw), None)
            };
            backward(widest).unwrap();
            let error = backward(widest + 8).unwrap_err().to_string();
            assert!(error.contains("backward") && error.contains(&widest.to_string()), "{error}");
        }
    }
}
