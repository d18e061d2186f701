//! The GPU version of dropout: calls dropout.cu.

use super::Dropout;
use crate::Packing;
use crate::gpu::{Memory, VoidPointer, VoidPointerMut, dtype_code_of, entries};
use crate::packing::gpu::{DevicePacking, PackingArguments};
use crate::tensor::expect_shape;
use candle_core::{Result, Tensor};

/// The struct `Dropout` of common.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DropoutArguments {
    seed: [u32; 2],
    step: u32,
    site: u32,
    threshold: u32,
    kept: f32,
}

impl DropoutArguments {
    /// The arguments of a dropout; without one, every element is kept.
    pub(crate) fn of(dropout: Option<Dropout>) -> Self {
        let d = dropout.unwrap_or(Dropout { p: 0.0, seed: 0, step: 0, site: 0 });
        Self {
            seed: [d.seed as u32, (d.seed >> 32) as u32],
            step: d.step,
            site: d.site,
            threshold: d.threshold(),
            kept: 1.0 / (1.0 - d.p),
        }
    }
}

#[repr(C)]
struct DropoutApply {
    x: VoidPointer,
    y: VoidPointerMut,
    packing: PackingArguments,
    dropout: DropoutArguments,
    width: i32,
    dtype: i32,
    add: i32,
}

entries! {
    dropout(DropoutApply);
}

/// [`super::apply`] after its checks, for an x of any floating-point type.
pub(crate) fn apply(x: &Tensor, packing: &Packing, d: &Dropout) -> Result<Tensor> {
    let y = Memory::new(x.device(), x.dtype(), x.elem_count())?;
    run(x, &y, packing, d, false)?;
    y.tensor(x.shape())
}

/// Adds the dropout of x to y in place; both have the shape `(T, D)` and the same type.
pub(crate) fn add(x: &Tensor, y: &Tensor, packing: &Packing, d: &Dropout) -> Result<()> {
    expect_shape("y", y, x.dims())?;
    run(x, &Memory::mutable(y)?, packing, d, true)
}

fn run(x: &Tensor, y: &Memory, packing: &Packing, d: &Dropout, add: bool) -> Result<()> {
    let (_, width) = x.dims2()?;
    if x.elem_count() == 0 {
        return Ok(());
    }
    let (xs, packing) = (Memory::of(x)?, DevicePacking::of(packing, x.device())?);
    let arguments = DropoutApply {
        x: xs.pointer(),
        y: y.pointer(),
        packing: packing.arguments(),
        dropout: DropoutArguments::of(Some(*d)),
        width: width as i32,
        dtype: dtype_code_of(x)?,
        add: i32::from(add),
    };
    // SAFETY: the caller has checked that x has the tokens of the packing, and y has the shape of x.
    unsafe { dropout(x.device(), &arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TYPES, cast, numbers, random, to_test_device};

    #[test]
    fn the_masks_are_those_of_the_cpu_to_the_last_bit() {
        let d = Dropout { p: 0.25, seed: 0x0123_4567_89ab_cdef, step: 3, site: 5 };
        for (lengths, width) in [
            (vec![], 4),
            (vec![2], 0),
            (vec![2, 0, 3], 1),
            (vec![2, 3], 7),
            (vec![130, 1], 64),
            (vec![9], 1023),
        ] {
            let packing = Packing::new(&lengths, (0..lengths.len() as u32).map(|n| n + 7).collect());
            let x = random(1, (packing.tokens(), width));
            let want = numbers(&super::super::apply(&x, &packing, &d).unwrap());
            let x = to_test_device(&x);
            for (dtype, _) in TYPES {
                let x = cast(&x, dtype);
                let y = apply(&x, &packing, &d).unwrap();
                let want: Vec<f64> = numbers(&x)
                    .iter()
                    .zip(&want)
                    .map(|(x, want)| if *want == 0.0 { 0.0 } else { f64::from(*x as f32 * (1.0f32 / 0.75)) })
                    .collect();
                let want = candle_core::Tensor::new(want, &candle_core::Device::Cpu).unwrap();
                let want = numbers(&want.to_dtype(candle_core::DType::F32).unwrap().to_dtype(dtype).unwrap());
                assert_eq!(numbers(&y), want, "{dtype:?} {lengths:?} {width}");

                if want.is_empty() {
                    continue;
                }
                let sum = x.copy().unwrap();
                add(&x, &sum, &packing, &d).unwrap();
                let more = numbers(&sum).iter().zip(numbers(&x)).map(|(s, x)| s - x).collect::<Vec<_>>();
                assert!(
                    more.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 0.04 * b.abs()),
                    "{dtype:?} {width}"
                );
            }
        }
    }
}
