//! Calls attention.cu.

use super::{Attention, check};
use crate::gpu::{
    self, Any, AnyMut, DropoutArguments, Memory, PackingArguments, entries, optional, pointer, type_of,
};
use crate::tensor::{expect_shape, matrix};
use candle_core::{DType, Result, Tensor, bail};
use std::ptr::{null, null_mut};

#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    q: Any,
    k: Any,
    v: Any,
    o: AnyMut,
    lse: *mut f32,
    d_o: Any,
    delta: *mut f32,
    dq: AnyMut,
    dk: AnyMut,
    dv: AnyMut,
    bias: *const f32,
    dbias: *mut f32,
    packing: PackingArguments,
    dropout: DropoutArguments,
    heads: i32,
    kv_heads: i32,
    head_width: i32,
    dtype: i32,
    left: i32,
    right: i32,
    drops: i32,
    reach: i32,
    scale: f32,
}

entries! {
    attention_forward(Arguments);
    attention_backward(Arguments);
}

/// Of a head, for which a block has registers.
const WIDEST: usize = 256;

/// As [`super::forward`], with the bias of [`super::forward_biased`] if there is one.
pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
    packing: &crate::Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    check(attention, packing, q, k, v)?;
    expect_types(attention, q, &[("k", k), ("v", v)], bias)?;
    let (tokens, heads) = (packing.tokens(), attention.heads);
    let device = q.device();
    let o = Memory::new(device, q.dtype(), q.elem_count())?;
    let lse = Memory::new(device, DType::F32, heads * tokens)?;
    if tokens > 0 {
        let inputs = [Memory::of(q)?, Memory::of(k)?, Memory::of(v)?];
        let (bias_memory, packing) = (optional(bias)?, gpu::Packing::of(packing, device)?);
        let mut arguments = arguments(attention, &inputs, bias, bias_memory.as_ref(), &packing, type_of(q)?);
        (arguments.o, arguments.lse) = (o.pointer(), lse.pointer());
        // SAFETY: all shapes have been checked.
        unsafe { attention_forward(device, &arguments)? };
    }
    Ok((o.tensor(q.shape())?, lse.tensor((heads, tokens))?))
}

/// As [`super::backward`]; with a bias its gradient is the fourth.
pub(super) fn backward(
    [q, k, v, o, lse, d_o]: [&Tensor; 6],
    bias: Option<&Tensor>,
    packing: &crate::Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor, Tensor, Option<Tensor>)> {
    check(attention, packing, q, k, v)?;
    let (tokens, heads) = (packing.tokens(), attention.heads);
    expect_shape("o", o, q.dims())?;
    expect_shape("d_o", d_o, q.dims())?;
    expect_shape("lse", lse, &[heads, tokens])?;
    expect_types(attention, q, &[("k", k), ("v", v), ("o", o), ("d_o", d_o)], bias)?;
    let device = q.device();
    let new = |like: &Tensor| Memory::new(device, like.dtype(), like.elem_count());
    let (dq, dk, dv, dbias) = (new(q)?, new(k)?, new(v)?, bias.map(new).transpose()?);
    if tokens > 0 {
        let inputs = [Memory::of(q)?, Memory::of(k)?, Memory::of(v)?];
        let (o, lse, d_o, delta) = (Memory::of(o)?, Memory::of(lse)?, Memory::of(d_o)?, new(lse)?);
        let (bias_memory, packing) = (optional(bias)?, gpu::Packing::of(packing, device)?);
        let mut arguments = arguments(attention, &inputs, bias, bias_memory.as_ref(), &packing, type_of(q)?);
        (arguments.o, arguments.lse, arguments.d_o) = (o.pointer(), lse.pointer(), d_o.pointer());
        (arguments.dq, arguments.dk, arguments.dv) = (dq.pointer(), dk.pointer(), dv.pointer());
        (arguments.delta, arguments.dbias) = (delta.pointer(), pointer(dbias.as_ref()));
        // SAFETY: all shapes have been checked.
        unsafe { attention_backward(device, &arguments)? };
    }
    let dbias = match (dbias, bias) {
        (Some(_), Some(bias)) if tokens == 0 => Some(bias.zeros_like()?),
        (Some(dbias), Some(bias)) => Some(dbias.tensor(bias.shape())?),
        _ => None,
    };
    Ok((dq.tensor(q.shape())?, dk.tensor(k.shape())?, dv.tensor(v.shape())?, dbias))
}

fn arguments(
    attention: &Attention,
    [q, k, v]: &[Memory; 3],
    bias: Option<&Tensor>,
    bias_memory: Option<&Memory>,
    packing: &gpu::Packing,
    dtype: i32,
) -> Arguments {
    // Farther than any sequence reaches; the kernels add it to positions.
    const NO_LIMIT: usize = 1 << 28;
    let limit = |sight: Option<usize>| sight.unwrap_or(NO_LIMIT).min(NO_LIMIT) as i32;
    Arguments {
        q: q.pointer(),
        k: k.pointer(),
        v: v.pointer(),
        o: null_mut(),
        lse: null_mut(),
        d_o: null(),
        delta: null_mut(),
        dq: null_mut(),
        dk: null_mut(),
        dv: null_mut(),
        bias: pointer(bias_memory),
        dbias: null_mut(),
        packing: packing.arguments(),
        dropout: DropoutArguments::of(attention.dropout),
        heads: attention.heads as i32,
        kv_heads: attention.kv_heads as i32,
        head_width: attention.head_width as i32,
        dtype,
        left: limit(attention.left),
        right: limit(attention.right),
        drops: i32::from(attention.dropout.is_some()),
        reach: bias.map_or(0, |bias| bias.dims()[1] / 2) as i32,
        scale: attention.scale,
    }
}

fn expect_types(
    attention: &Attention,
    q: &Tensor,
    others: &[(&str, &Tensor)],
    bias: Option<&Tensor>,
) -> Result<()> {
    for (name, tensor) in others {
        if tensor.dtype() != q.dtype() {
            bail!("`{name}` is of {:?}, expected {:?}", tensor.dtype(), q.dtype());
        }
    }
    if let Some(bias) = bias {
        let (_, columns) = matrix("bias", bias)?;
        expect_shape("bias", bias, &[attention.heads, columns])?;
        if columns.is_multiple_of(2) || bias.dtype() != DType::F32 {
            bail!("`bias` is {columns} columns of {:?}, expected an odd number of F32", bias.dtype());
        }
    }
    if attention.head_width > WIDEST {
        bail!("heads of width {}; a GPU takes at most {WIDEST}", attention.head_width);
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
