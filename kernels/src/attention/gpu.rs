//! The GPU version of attention: calls attention.cu. The callers have checked the shapes.

use super::Attention;
use crate::Packing;
use crate::dropout::gpu::DropoutArguments;
use crate::gpu::{Memory, VoidPointer, VoidPointerMut, dtype_code_of, entries, optional, pointer};
use crate::packing::gpu::{DevicePacking, PackingArguments};
use candle_core::{DType, Result, Tensor, bail};
use std::ptr::{null, null_mut};

#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    q: VoidPointer,
    k: VoidPointer,
    v: VoidPointer,
    o: VoidPointerMut,
    lse: *mut f32,
    d_o: VoidPointer,
    delta: *mut f32,
    dq: VoidPointerMut,
    dk: VoidPointerMut,
    dv: VoidPointerMut,
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
    has_dropout: i32,
    max_distance: i32,
    scale: f32,
}

entries! {
    attention_forward(Arguments);
    attention_backward(Arguments);
}

/// The largest size of a head for which a block has enough registers.
const MAX_HEAD_WIDTH: usize = 256;

/// [`super::forward`], or [`super::forward_biased`] if there is a bias.
pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    expect_types(attention, q, &[("k", k), ("v", v)], bias)?;
    let (tokens, heads) = (packing.tokens(), attention.heads);
    let device = q.device();
    let o = Memory::new(device, q.dtype(), q.elem_count())?;
    let lse = Memory::new(device, DType::F32, heads * tokens)?;
    if tokens > 0 {
        let inputs = [Memory::of(q)?, Memory::of(k)?, Memory::of(v)?];
        let (bias_memory, packing) = (optional(bias)?, DevicePacking::of(packing, device)?);
        let mut arguments =
            arguments(attention, &inputs, bias, bias_memory.as_ref(), &packing, dtype_code_of(q)?);
        (arguments.o, arguments.lse) = (o.pointer(), lse.pointer());
        // SAFETY: the caller has checked the shapes.
        unsafe { attention_forward(device, &arguments)? };
    }
    Ok((o.tensor(q.shape())?, lse.tensor((heads, tokens))?))
}

/// [`super::backward`], or [`super::backward_biased`] if there is a bias, whose gradient is the fourth
/// result.
pub(super) fn backward(
    [q, k, v, o, lse, d_o]: [&Tensor; 6],
    bias: Option<&Tensor>,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor, Tensor, Option<Tensor>)> {
    let tokens = packing.tokens();
    expect_types(attention, q, &[("k", k), ("v", v), ("o", o), ("d_o", d_o)], bias)?;
    let device = q.device();
    let new = |like: &Tensor| Memory::new(device, like.dtype(), like.elem_count());
    let (dq, dk, dv, dbias) = (new(q)?, new(k)?, new(v)?, bias.map(new).transpose()?);
    if tokens > 0 {
        let inputs = [Memory::of(q)?, Memory::of(k)?, Memory::of(v)?];
        let (o, lse, d_o, delta) = (Memory::of(o)?, Memory::of(lse)?, Memory::of(d_o)?, new(lse)?);
        let (bias_memory, packing) = (optional(bias)?, DevicePacking::of(packing, device)?);
        let mut arguments =
            arguments(attention, &inputs, bias, bias_memory.as_ref(), &packing, dtype_code_of(q)?);
        (arguments.o, arguments.lse, arguments.d_o) = (o.pointer(), lse.pointer(), d_o.pointer());
        (arguments.dq, arguments.dk, arguments.dv) = (dq.pointer(), dk.pointer(), dv.pointer());
        (arguments.delta, arguments.dbias) = (delta.pointer(), pointer(dbias.as_ref()));
        // SAFETY: the caller has checked the shapes.
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
    packing: &DevicePacking,
    dtype: i32,
) -> Arguments {
    // Longer than any sequence, and small enough for the kernels to add it to a position.
    const NO_LIMIT: usize = 1 << 28;
    let limit = |limit: Option<usize>| limit.unwrap_or(NO_LIMIT).min(NO_LIMIT) as i32;
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
        has_dropout: i32::from(attention.dropout.is_some()),
        max_distance: bias.map_or(0, |bias| bias.dims()[1] / 2) as i32,
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
    if let Some(bias) = bias.filter(|bias| bias.dtype() != DType::F32) {
        bail!("`bias` is of {:?}, expected F32", bias.dtype());
    }
    if attention.head_width > MAX_HEAD_WIDTH {
        bail!("heads of size {}; the GPU kernel supports at most {MAX_HEAD_WIDTH}", attention.head_width);
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
