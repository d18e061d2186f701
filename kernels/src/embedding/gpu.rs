//! The GPU version of the embedding layer: calls embedding.cu.

use super::Tables;
use crate::gpu::{
    Memory, VoidPointer, VoidPointerMut, dtype_code_of, entries, optional, optional_mutable, pointer,
};
use crate::packing::gpu::{DevicePacking, PackingArguments};
use crate::{Packing, linear};
use candle_core::{IndexOp, Result, Tensor};

#[repr(C)]
struct Forward {
    ids: *const u32,
    word: VoidPointer,
    position: VoidPointer,
    token_type: VoidPointer,
    x: VoidPointerMut,
    packing: PackingArguments,
    width: i32,
    position_offset: i32,
    dtype: i32,
}

#[repr(C)]
struct Backward {
    dx: VoidPointer,
    ids: *const u32,
    d_word: *mut f32,
    d_position: *mut f32,
    packing: PackingArguments,
    width: i32,
    position_offset: i32,
    dtype: i32,
}

entries! {
    embedding_forward(Forward);
    embedding_backward(Backward);
}

/// [`super::forward`] after its checks of the shapes. It does not check the ids, which would need a copy to
/// the host: the caller has to check them.
pub(super) fn forward(ids: &Tensor, packing: &Packing, tables: &Tables) -> Result<Tensor> {
    let tokens = packing.tokens();
    let (_, width) = tables.word_embeddings.dims2()?;
    let (device, dtype) = (tables.word_embeddings.device(), tables.word_embeddings.dtype());
    let x = Memory::new(device, dtype, tokens * width)?;
    if tokens * width > 0 {
        let (ids, word) = (Memory::of(ids)?, Memory::of(tables.word_embeddings)?);
        let (position, token_type) =
            (optional(tables.position_embeddings)?, optional(tables.token_type_embeddings)?);
        let packing = DevicePacking::of(packing, device)?;
        let arguments = Forward {
            ids: ids.pointer(),
            word: word.pointer(),
            position: pointer(position.as_ref()),
            token_type: pointer(token_type.as_ref()),
            x: x.pointer(),
            packing: packing.arguments(),
            width: width as i32,
            position_offset: tables.position_offset as i32,
            dtype: dtype_code_of(tables.word_embeddings)?,
        };
        // SAFETY: the caller has checked the shapes.
        unsafe { embedding_forward(device, &arguments)? };
    }
    x.tensor((tokens, width))
}

/// [`super::backward`] after its checks of the shapes.
pub(super) fn backward(
    dx: &Tensor,
    ids: &Tensor,
    packing: &Packing,
    position_offset: usize,
    d_word: Option<&Tensor>,
    d_position: Option<&Tensor>,
    d_token_type: Option<&Tensor>,
) -> Result<()> {
    let (tokens, width) = dx.dims2()?;
    if let Some(d_token_type) = d_token_type {
        linear::gpu::backward_bias(dx, &d_token_type.i(0)?)?;
    }
    if tokens * width > 0 && (d_word.is_some() || d_position.is_some()) {
        let device = dx.device();
        let (dxs, ids, packing) = (Memory::of(dx)?, Memory::of(ids)?, DevicePacking::of(packing, device)?);
        let (d_word, d_position) = (optional_mutable(d_word)?, optional_mutable(d_position)?);
        let arguments = Backward {
            dx: dxs.pointer(),
            ids: ids.pointer(),
            d_word: pointer(d_word.as_ref()),
            d_position: pointer(d_position.as_ref()),
            packing: packing.arguments(),
            width: width as i32,
            position_offset: position_offset as i32,
            dtype: dtype_code_of(dx)?,
        };
        // SAFETY: the caller has checked the shapes.
        unsafe { embedding_backward(device, &arguments)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{id_tensor, ids, reference};
    use super::*;
    use crate::testing::{TYPES, cast, numbers, random_on_device, relative_error, to_test_device};

    #[test]
    fn kernels_equal_the_reference_for_odd_and_empty_shapes() {
        for (dtype, rounding) in TYPES {
            for (lengths, width) in [
                (vec![], 3),
                (vec![2], 0),
                (vec![1], 1),
                (vec![3, 0, 7], 7),
                (vec![40, 5], 33),
                (vec![70], 264),
            ] {
                let packing = Packing::new(&lengths, vec![0; lengths.len()]);
                let (tokens, offset) = (packing.tokens(), 2);
                let ids = ids(tokens);
                let [word, position, token_type] = [(1, 11), (2, 72), (3, 2)]
                    .map(|(seed, rows)| cast(&random_on_device(seed, (rows, width)), dtype));
                let tables = Tables {
                    word_embeddings: &word,
                    position_embeddings: Some(&position),
                    position_offset: offset,
                    token_type_embeddings: Some(&token_type),
                };
                let name = format!("{dtype:?} {lengths:?} {width}");
                let ids_there = to_test_device(&id_tensor(&ids));
                let x = forward(&ids_there, &packing, &tables).unwrap();
                let (w, p, k) = (numbers(&word), numbers(&position), numbers(&token_type));
                let want = reference(&ids, &packing, width, offset, &w, &p, &k);
                assert!(relative_error(&x, &want) < rounding, "{name}");

                let dx = cast(&random_on_device(4, (tokens, width)), dtype);
                let got =
                    [(5, 11), (6, 72), (7, 2)].map(|(seed, rows)| random_on_device(seed, (rows, width)));
                let mut want = got.each_ref().map(numbers);
                for (t, row) in numbers(&dx).chunks(width.max(1)).enumerate() {
                    let places = [ids[t] as usize, packing.locate(t).1 + offset, 0];
                    for (want, place) in want.iter_mut().zip(places) {
                        row.iter().enumerate().for_each(|(d, dx)| want[place * width + d] += dx);
                    }
                }
                let [d_word, d_position, d_token_type] = &got;
                backward(
                    &dx,
                    &ids_there,
                    &packing,
                    offset,
                    Some(d_word),
                    Some(d_position),
                    Some(d_token_type),
                )
                .unwrap();
                for (got, want) in got.iter().zip(&want) {
                    // Up to 70 additions in f32.
                    assert!(relative_error(got, want) < 1e-6, "{name}");
                }
            }
        }
    }
}
