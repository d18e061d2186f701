//! Calls embedding.cu.

use super::{Tables, expect_kinds, expect_positions};
use crate::gpu::{
    self, Any, AnyMut, Memory, PackingArguments, entries, optional, optional_mutable, pointer, type_of,
};
use crate::linear;
use crate::tensor::{expect_shape, matrix, packed};
use candle_core::{IndexOp, Result, Tensor};

#[repr(C)]
struct Forward {
    ids: *const u32,
    word: Any,
    position: Any,
    kind: Any,
    x: AnyMut,
    packing: PackingArguments,
    width: i32,
    position_offset: i32,
    dtype: i32,
}

#[repr(C)]
struct Backward {
    dx: Any,
    ids: *const u32,
    dword: *mut f32,
    dposition: *mut f32,
    packing: PackingArguments,
    width: i32,
    position_offset: i32,
    dtype: i32,
}

entries! {
    embedding_forward(Forward);
    embedding_backward(Backward);
}

/// As [`super::forward`], but ids are not looked at: that would take a copy to the host, and the tokenizer has checked them.
pub(super) fn forward(ids: &Tensor, packing: &crate::Packing, tables: &Tables) -> Result<Tensor> {
    let tokens = packing.tokens();
    let (_, width) = matrix("word", tables.word)?;
    expect_shape("ids", ids, &[tokens])?;
    if let Some(position) = tables.position {
        expect_positions(position, packing, tables.position_offset, width)?;
    }
    if let Some(kind) = tables.kind {
        expect_kinds(kind, width)?;
    }
    let (device, dtype) = (tables.word.device(), tables.word.dtype());
    let x = Memory::new(device, dtype, tokens * width)?;
    if tokens * width > 0 {
        let (ids, word) = (Memory::of(ids)?, Memory::of(tables.word)?);
        let (position, kind) = (optional(tables.position)?, optional(tables.kind)?);
        let packing = gpu::Packing::of(packing, device)?;
        let arguments = Forward {
            ids: ids.pointer(),
            word: word.pointer(),
            position: pointer(position.as_ref()),
            kind: pointer(kind.as_ref()),
            x: x.pointer(),
            packing: packing.arguments(),
            width: width as i32,
            position_offset: tables.position_offset as i32,
            dtype: type_of(tables.word)?,
        };
        // SAFETY: all shapes have been checked.
        unsafe { embedding_forward(device, &arguments)? };
    }
    x.tensor((tokens, width))
}

/// As [`super::backward`].
pub(super) fn backward(
    dx: &Tensor,
    ids: &Tensor,
    packing: &crate::Packing,
    position_offset: usize,
    dword: Option<&Tensor>,
    dposition: Option<&Tensor>,
    dkind: Option<&Tensor>,
) -> Result<()> {
    let (tokens, width) = packed("dx", dx, packing)?;
    if let Some(dword) = dword {
        let (words, _) = matrix("dword", dword)?;
        expect_shape("dword", dword, &[words, width])?;
        expect_shape("ids", ids, &[tokens])?;
    }
    if let Some(dposition) = dposition {
        expect_positions(dposition, packing, position_offset, width)?;
    }
    if let Some(dkind) = dkind {
        expect_kinds(dkind, width)?;
        linear::gpu::backward_bias(dx, &dkind.i(0)?)?;
    }
    if tokens * width > 0 && (dword.is_some() || dposition.is_some()) {
        let device = dx.device();
        let (dxs, ids, packing) = (Memory::of(dx)?, Memory::of(ids)?, gpu::Packing::of(packing, device)?);
        let (dword, dposition) = (optional_mutable(dword)?, optional_mutable(dposition)?);
        let arguments = Backward {
            dx: dxs.pointer(),
            ids: ids.pointer(),
            dword: pointer(dword.as_ref()),
            dposition: pointer(dposition.as_ref()),
            packing: packing.arguments(),
            width: width as i32,
            position_offset: position_offset as i32,
            dtype: type_of(dx)?,
        };
        // SAFETY: all shapes have been checked.
        unsafe { embedding_backward(device, &arguments)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{id_tensor, ids, reference};
    use super::*;
    use crate::Packing;
    use crate::testing::{TYPES, each_type, moved, numbers, placed, relative_error};

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
                let [word, position, kind] = [(1, 11), (2, 72), (3, 2)]
                    .map(|(seed, rows)| each_type(&placed(seed, (rows, width)), dtype));
                let tables = Tables {
                    word: &word,
                    position: Some(&position),
                    position_offset: offset,
                    kind: Some(&kind),
                };
                let name = format!("{dtype:?} {lengths:?} {width}");
                let ids_there = moved(&id_tensor(&ids));
                let x = forward(&ids_there, &packing, &tables).unwrap();
                let (w, p, k) = (numbers(&word), numbers(&position), numbers(&kind));
                let want = reference(&ids, &packing, width, offset, &w, &p, &k);
                assert!(relative_error(&x, &want) < rounding, "{name}");

                let dx = each_type(&placed(4, (tokens, width)), dtype);
                let got = [(5, 11), (6, 72), (7, 2)].map(|(seed, rows)| placed(seed, (rows, width)));
                let mut want = got.each_ref().map(numbers);
                for (t, row) in numbers(&dx).chunks(width.max(1)).enumerate() {
                    let places = [ids[t] as usize, packing.locate(t).1 + offset, 0];
                    for (want, place) in want.iter_mut().zip(places) {
                        row.iter().enumerate().for_each(|(d, dx)| want[place * width + d] += dx);
                    }
                }
                let [dword, dposition, dkind] = &got;
                backward(&dx, &ids_there, &packing, offset, Some(dword), Some(dposition), Some(dkind))
                    .unwrap();
                for (got, want) in got.iter().zip(&want) {
                    // Up to 70 additions in f32.
                    assert!(relative_error(got, want) < 1e-6, "{name}");
                }
            }
        }
    }
}
