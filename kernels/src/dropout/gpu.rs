//! Calls dropout.cu.

use super::Dropout;
use crate::gpu::{self, Any, AnyMut, DropoutArguments, Memory, PackingArguments, entries, type_of};
use crate::tensor::{expect_shape, packed};
use candle_core::{Result, Tensor};

#[repr(C)]
struct DropoutApply {
    x: Any,
    y: AnyMut,
    packing: PackingArguments,
    dropout: DropoutArguments,
    width: i32,
    dtype: i32,
    add: i32,
}

entries! {
    dropout(DropoutApply);
}

/// The dropout of x `(T, D)`.
pub(crate) fn apply(x: &Tensor, packing: &crate::Packing, d: &Dropout) -> Result<Tensor> {
    let y = Memory::new(x.device(), x.dtype(), x.elem_count())?;
    run(x, &y, packing, d, false)?;
    y.tensor(x.shape())
}

/// Adds the dropout of x to y, both `(T, D)` and of one type.
pub(crate) fn add(x: &Tensor, y: &Tensor, packing: &crate::Packing, d: &Dropout) -> Result<()> {
    expect_shape("y", y, x.dims())?;
    run(x, &Memory::mutable(y)?, packing, d, true)
}

fn run(x: &Tensor, y: &Memory, packing: &crate::Packing, d: &Dropout, add: bool) -> Result<()> {
    let (_, width) = packed("x", x, packing)?;
    d.check()?;
    if x.elem_count() == 0 {
        return Ok(());
    }
    let (xs, packing) = (Memory::of(x)?, gpu::Packing::of(packing, x.device())?);
    let arguments = DropoutApply {
        x: xs.pointer(),
        y: y.pointer(),
        packing: packing.arguments(),
        dropout: DropoutArguments::of(Some(*d)),
        width: width as i32,
        dtype: type_of(x)?,
        add: i32::from(add),
    };
    // SAFETY: all shapes have been checked.
    unsafe { dropout(x.device(), &arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Packing;
    use crate::testing::{TYPES, each_type, moved, numbers, placed, random};

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
            let x = moved(&x);
            for (dtype, _) in TYPES {
                let x = each_type(&x, dtype);
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

    #[test]
    fn a_wrong_probability_or_packing_is_an_error() {
        let d = Dropout { p: 1.0, seed: 0, step: 0, site: 0 };
        assert!(apply(&placed(1, (2, 3)), &Packing::new(&[2], vec![0]), &d).is_err());
        assert!(apply(&placed(1, (3, 3)), &Packing::new(&[2], vec![0]), &Dropout { p: 0.5, ..d }).is_err());
    }
}
