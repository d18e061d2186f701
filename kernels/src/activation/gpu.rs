//! The GPU version of the activation functions: calls activation.cu.

use super::Activation;
use crate::gpu::{Memory, VoidPointer, VoidPointerMut, dtype_code_of, entries, optional, pointer};
use candle_core::{Result, Tensor, bail};

#[repr(C)]
struct Arguments {
    gate: VoidPointer,
    up: VoidPointer,
    dy: VoidPointer,
    y: VoidPointerMut,
    dup: VoidPointerMut,
    count: i64,
    function: i32,
    dtype: i32,
}

entries! {
    activation(Arguments);
}

/// Computes act(gate), or act(gate)·up if there is an `up`. With `dy` it computes the gradient of `gate`, and
/// of `up`, instead.
pub(super) fn activate(
    gate: &Tensor,
    up: Option<&Tensor>,
    dy: Option<&Tensor>,
    function: Activation,
) -> Result<(Tensor, Option<Tensor>)> {
    for (name, other) in [("up", up), ("dy", dy)] {
        if let Some(other) = other.filter(|other| other.dtype() != gate.dtype()) {
            bail!("`{name}` is of {:?}, expected {:?}", other.dtype(), gate.dtype());
        }
    }
    let (device, count) = (gate.device(), gate.elem_count());
    let new = || Memory::new(device, gate.dtype(), count);
    let (y, dup) = (new()?, if up.is_some() && dy.is_some() { Some(new()?) } else { None });
    if count > 0 {
        let (gates, up, dy) = (Memory::of(gate)?, optional(up)?, optional(dy)?);
        let arguments = Arguments {
            gate: gates.pointer(),
            up: pointer(up.as_ref()),
            dy: pointer(dy.as_ref()),
            y: y.pointer(),
            dup: pointer(dup.as_ref()),
            count: count as i64,
            function: match function {
                Activation::Gelu => 0,
                Activation::GeluTanh => 1,
                Activation::Silu => 2,
                Activation::Relu => 3,
            },
            dtype: dtype_code_of(gate)?,
        };
        // SAFETY: the caller has checked that all tensors have the same shape.
        unsafe { activation(device, &arguments)? };
    }
    Ok((y.tensor(gate.shape())?, dup.map(|dup| dup.tensor(gate.shape())).transpose()?))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ALL, reference};
    use super::*;
    use crate::testing::{
        TYPES, cast, finite_difference, numbers, random_on_device, relative_error, test_device,
    };

    #[test]
    fn kernels_equal_the_reference_for_odd_and_empty_shapes() {
        for (dtype, rounding) in TYPES {
            for function in ALL {
                for shape in [(0, 3), (3, 0), (1, 1), (3, 7), (7, 1023), (33, 64)] {
                    let [x, up, dy] = [1, 2, 3].map(|seed| cast(&random_on_device(seed, shape), dtype));
                    let (xs, ups, dys) = (numbers(&x), numbers(&up), numbers(&dy));
                    let name = format!("{dtype:?} {function:?} {shape:?}");
                    let check = |what: &str, got: &Tensor, want: &dyn Fn(usize) -> f64| {
                        let want: Vec<f64> = (0..xs.len()).map(want).collect();
                        assert!(relative_error(got, &want) < rounding, "{what} {name}");
                    };
                    let value = |i: usize| reference(xs[i], function);
                    let slope = |i: usize| finite_difference(&xs[i..=i], |x| reference(x[0], function))[0];

                    check("y", &activate(&x, None, None, function).unwrap().0, &value);
                    check("gated", &activate(&x, Some(&up), None, function).unwrap().0, &|i| {
                        value(i) * ups[i]
                    });
                    let (dx, none) = activate(&x, None, Some(&dy), function).unwrap();
                    check("dx", &dx, &|i| dys[i] * slope(i));
                    assert!(none.is_none());
                    let (dgate, dup) = activate(&x, Some(&up), Some(&dy), function).unwrap();
                    check("dgate", &dgate, &|i| dys[i] * ups[i] * slope(i));
                    check("dup", &dup.unwrap(), &|i| dys[i] * value(i));
                }
            }
        }
    }

    #[test]
    fn far_from_zero_nothing_overflows_and_a_nan_stays() {
        let x = Tensor::new(&[-1e4f32, -100.0, -20.0, 20.0, 100.0, 1e4, f32::NAN], test_device()).unwrap();
        for function in ALL {
            let y = numbers(&activate(&x, None, None, function).unwrap().0);
            for (y, want) in y.iter().zip([0.0, 0.0, 0.0, 20.0, 100.0, 1e4]) {
                assert!((y - want).abs() < 1e-7, "{function:?} {y}");
            }
            assert!(y[6].is_nan(), "{function:?}");
            let dy = x.ones_like().unwrap();
            let dx = numbers(&activate(&x, None, Some(&dy), function).unwrap().0);
            assert!(dx[..6].iter().all(|x| x.is_finite()), "{function:?} {dx:?}");
        }
    }
}
