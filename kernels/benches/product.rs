//! Compares the matrix products of a linear layer (forward, dx and dW) with those of the `gemm` crate, which
//! candle uses.
//!
//! ```text
//! MIMALLOC_PURGE_DELAY=-1 cargo bench --workspace --bench product
//! ```
//!
//! The variable makes the allocator keep freed memory, as the programs do. The benchmark runs both on one
//! thread, in turn. It prints the GFLOP/s of each, the median of 41 turns, and their ratio. `gemm` writes to
//! existing memory; ours returns a new tensor. The layers are those of MiniLM and of BERT base; the input is
//! a chunk of 1000 tokens.

#![expect(clippy::print_stdout, reason = "a benchmark reports")]

use std::error::Error;
use std::time::Instant;

use candle_core::{Device, Tensor};
use gemm::Parallelism;
use kernels::linear;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TOKENS: usize = 1000;
const TURNS: usize = 41;

/// A factor: its elements, its row stride and its column stride.
type Factor<'a> = (&'a [f32], usize, usize);

/// c (m, n) = a (m, k) · b (k, n), or c += a · b if `add`.
fn product(c: &mut [f32], add: bool, (m, k, n): (usize, usize, usize), a: Factor, b: Factor) {
    assert_eq!((a.0.len(), b.0.len(), c.len()), (m * k, k * n, m * n));
    let ((x, x_row, x_column), (y, y_row, y_column)) = (a, b);
    // SAFETY: the strides are those of matrices without gaps, and the assertion has checked their sizes.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            add,
            x.as_ptr(),
            x_column as isize,
            x_row as isize,
            y.as_ptr(),
            y_column as isize,
            y_row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// The GFLOP/s of both, each the median of its turns.
fn measure(flop: f64, mut one: impl FnMut(), mut other: impl FnMut()) -> (f64, f64) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let speed = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        flop / start.elapsed().as_secs_f64() / 1e9
    };
    for _ in 0..TURNS {
        ours.push(speed(&mut one));
        theirs.push(speed(&mut other));
    }
    let median = |mut speeds: Vec<f64>| {
        speeds.sort_by(f64::total_cmp);
        speeds[TURNS / 2]
    };
    (median(ours), median(theirs))
}

fn main() -> Result<(), Box<dyn Error>> {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global()?;
    println!("{:<12} {:>16} {:>9} {:>9} {:>7}", "layer", "", "kernels", "gemm", "ratio");
    for (inputs, outputs) in [(384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768)] {
        let random = |rows: usize, columns: usize| Tensor::rand(-1f32, 1f32, (rows, columns), &Device::Cpu);
        let (x, w, dy) = (random(TOKENS, inputs)?, random(outputs, inputs)?, random(TOKENS, outputs)?);
        let dw = w.zeros_like()?;
        let elements = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let (xs, ws, dys) = (elements(&x)?, elements(&w)?, elements(&dy)?);
        let (mut ys, mut dxs, mut dws) = (dys.clone(), xs.clone(), ws.clone());
        let flop = 2.0 * (TOKENS * inputs * outputs) as f64;
        let report = |what: &str, (ours, theirs): (f64, f64)| {
            println!(
                "{inputs:>5} → {outputs:<4} {what:>16} {ours:>9.1} {theirs:>9.1} {:>6.2}×",
                ours / theirs
            );
        };
        let forward = measure(
            flop,
            || drop(linear::forward(&x, &w, None)),
            || product(&mut ys, false, (TOKENS, inputs, outputs), (&xs, inputs, 1), (&ws, 1, inputs)),
        );
        report("forward", forward);
        let dx = measure(
            flop,
            || drop(linear::backward_input(&dy, &w)),
            || product(&mut dxs, false, (TOKENS, outputs, inputs), (&dys, outputs, 1), (&ws, inputs, 1)),
        );
        report("dx", dx);
        let weight = measure(
            flop,
            || drop(linear::backward_weight(&x, &dy, &dw)),
            || product(&mut dws, true, (outputs, TOKENS, inputs), (&dys, 1, outputs), (&xs, inputs, 1)),
        );
        report("dW", weight);
    }
    Ok(())
}
