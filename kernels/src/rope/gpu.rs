//! The GPU version of RoPE: calls rope.cu.

use super::Table;
use crate::Packing;
use crate::gpu::{Memory, VoidPointer, VoidPointerMut, dtype_code_of, entries};
use crate::packing::gpu::DevicePacking;
use candle_core::{Result, Tensor, bail};

#[repr(C)]
struct Rope {
    x: [VoidPointer; 2],
    y: [VoidPointerMut; 2],
    cos: *const f32,
    sin: *const f32,
    positions: *const u32,
    rows: i64,
    heads: [i32; 2],
    head_width: i32,
    dtype: i32,
    direction: f32,
}

entries! {
    rope(Rope);
}

/// Rotates one or two tensors `(T, heads·K)` of the same type with one kernel launch, after the checks of
/// their shapes. `direction` is 1, or −1 for backward.
pub(super) fn rotate<const N: usize>(
    xs: [&Tensor; N],
    packing: &Packing,
    table: &Table,
    direction: f32,
) -> Result<[Tensor; N]> {
    const { assert!(N == 1 || N == 2) };
    let rows = packing.tokens();
    let mut heads = [0; 2];
    for (i, x) in xs.iter().enumerate() {
        let (_, width) = x.dims2()?;
        if x.dtype() != xs[0].dtype() {
            bail!(
                "the queries are of {:?} and the keys of {:?}, expected the same type",
                xs[0].dtype(),
                x.dtype()
            );
        }
        heads[i] = (width / table.head_width) as i32;
    }
    let device = xs[0].device();
    let sources = xs.iter().map(|x| Memory::of(x)).collect::<Result<Vec<_>>>()?;
    let rotated =
        xs.iter().map(|x| Memory::new(device, x.dtype(), x.elem_count())).collect::<Result<Vec<_>>>()?;
    if xs.iter().any(|x| x.elem_count() > 0) {
        let [cos, sin] = table.on(device)?;
        let (cos, sin, packing) = (Memory::of(&cos)?, Memory::of(&sin)?, DevicePacking::of(packing, device)?);
        let last = N - 1;
        let arguments = Rope {
            x: [
                sources[0].pointer::<u8>().cast_const().cast(),
                sources[last].pointer::<u8>().cast_const().cast(),
            ],
            y: [rotated[0].pointer(), rotated[last].pointer()],
            cos: cos.pointer(),
            sin: sin.pointer(),
            positions: packing.positions(),
            rows: rows as i64,
            heads,
            head_width: table.head_width as i32,
            dtype: dtype_code_of(xs[0])?,
            direction,
        };
        // SAFETY: the caller has checked the shapes.
        unsafe { rope(device, &arguments)? };
    }
    let mut rotated = rotated.into_iter().zip(xs).map(|(y, x)| y.tensor(x.shape()));
    let mut next = || rotated.next().unwrap_or_else(|| bail!("rope returned fewer results than inputs"));
    let mut all = [const { None }; N];
    for y in &mut all {
        *y = Some(next()?);
    }
    Ok(all.map(|y| y.unwrap_or_else(|| unreachable!("every one was set"))))
}

#[cfg(test)]
mod tests {
    use super::super::tests::reference;
    use super::*;
    use crate::testing::{TYPES, cast, numbers, random_on_device, relative_error};

    #[test]
    fn queries_and_keys_are_rotated_and_rotated_back() {
        for (dtype, rounding) in TYPES {
            for (lengths, heads, kv_heads, head_width) in [
                (vec![], 2, 1, 4),
                (vec![3, 0], 0, 1, 4),
                (vec![1], 1, 1, 2),
                (vec![3, 0, 7], 3, 1, 6),
                (vec![1023, 1], 1, 1, 16),
                (vec![5, 2], 4, 2, 128),
            ] {
                let packing = Packing::new(&lengths, vec![0; lengths.len()]);
                let q = cast(&random_on_device(1, (packing.tokens(), heads * head_width)), dtype);
                let k = cast(&random_on_device(2, (packing.tokens(), kv_heads * head_width)), dtype);
                let table = Table::new(1023, head_width, 10_000.0);
                let name = format!("{dtype:?} {lengths:?} {heads} {head_width}");
                let rotated = rotate([&q, &k], &packing, &table, 1.0).unwrap();
                for (x, y) in [&q, &k].into_iter().zip(&rotated) {
                    let width = x.dims()[1];
                    let want = reference(&numbers(x), &packing, width, head_width, 10_000.0);
                    assert!(relative_error(y, &want) < rounding, "{name}");
                }
                let [alone] = rotate([&q], &packing, &table, 1.0).unwrap();
                assert_eq!(numbers(&alone), numbers(&rotated[0]), "{name}");
                // The inverse of a rotation is its transpose, which is the backward pass.
                let [back, _] = rotate([&rotated[0], &rotated[1]], &packing, &table, -1.0).unwrap();
                assert!(relative_error(&back, &numbers(&q)) < 2.0 * rounding, "{name}");
            }
        }
    }
}
