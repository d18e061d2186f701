//! Attention inside each sequence of a packing: o = softmax(scale · q kᵀ, over what a token sees) v.
//!
//! Neither T×T scores nor those of a whole sequence are ever stored. A task takes one sequence and one key-value
//! head, and walks its queries, and for them the visible keys, in tiles with an online softmax; forward keeps
//! the log-sum-exp of each query, and backward computes the probabilities again from it (Dao, "FlashAttention-2", 2023):
//!
//! ```text
//! p = exp(s − lse)    dv = pᵀ do    ds = p ∘ (do vᵀ − rowsum(do ∘ o))    dq = scale · ds k    dk = scale · dsᵀ q
//! ```
//!
//! A bias by the distance from query to key (T5, MPNet) is added to the scores where one is given; its gradient is the sum
//! of ds over all pairs at that distance, per text first and then over the texts in their order.

#[cfg(any(test, gpu))]
pub(crate) mod gpu;
mod head;
mod scores;

use crate::rows::add;
use crate::tensor::{expect_shape, matrix, read, tensor};
use crate::tile::with_scratch;
use crate::{Packing, dropout::Dropout, simd};
use candle_core::{Result, Tensor, bail};
use head::{Backward, Forward};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What token i of a sequence sees: token j of the same sequence with i − left ≤ j ≤ i + right.
#[derive(Clone, Debug)]
pub struct Attention {
    /// H.
    pub heads: usize,
    /// G, a divisor of H: query head h looks at key-value head h / (H/G).
    pub kv_heads: usize,
    /// K.
    pub head_width: usize,
    /// Factor of q kᵀ, usually 1/√K.
    pub scale: f32,
    /// How far back; `None`: no limit.
    pub left: Option<usize>,
    /// How far ahead; `Some(0)` is causal.
    pub right: Option<usize>,
    /// Of the probabilities. Element (h·S + i)·S + j of a sequence of S tokens.
    pub dropout: Option<Dropout>,
}

impl Attention {
    /// The keys that query `i` of `tokens` sees.
    #[inline(always)]
    fn visible(&self, i: usize, tokens: usize) -> Range<usize> {
        let start = self.left.map_or(0, |left| i.saturating_sub(left));
        let end = self.right.map_or(tokens, |right| i.saturating_add(right).saturating_add(1).min(tokens));
        start..end
    }
}

/// o (T, H·K) and each query's log-sum-exp (H, T), from q (T, H·K), k and v (T, G·K).
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::forward(q, k, v, None, packing, attention);
    }
    forward_in(TILES, q, k, v, None, packing, attention)
}

/// As [`forward`], with `bias` (H, 2·W + 1) added to the scores: column W + d at the distance d from query to key, where
/// distances beyond W count as W. Heads do not share keys.
pub fn forward_biased(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: &Tensor,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::forward(q, k, v, Some(bias), packing, attention);
    }
    forward_in(TILES, q, k, v, Some(bias), packing, attention)
}

/// dq (T, H·K), dk and dv (T, G·K), from what [`forward`] took and returned, and dL/do (T, H·K).
#[expect(clippy::too_many_arguments, reason = "they are the formula's")]
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    d_o: &Tensor,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor, Tensor)> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        let (dq, dk, dv, _) = gpu::backward([q, k, v, o, lse, d_o], None, packing, attention)?;
        return Ok((dq, dk, dv));
    }
    let (dq, dk, dv, _) = backward_in(TILES, [q, k, v, o, lse, d_o], None, packing, attention)?;
    Ok((dq, dk, dv))
}

/// As [`backward`], of [`forward_biased`]; the gradient of the bias (H, 2·W + 1) is the fourth.
#[expect(clippy::too_many_arguments, reason = "they are the formula's")]
pub fn backward_biased(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    d_o: &Tensor,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor, Tensor, Tensor)> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return match gpu::backward([q, k, v, o, lse, d_o], Some(bias), packing, attention)? {
            (dq, dk, dv, Some(dbias)) => Ok((dq, dk, dv, dbias)),
            _ => bail!("attention with a bias has the bias's gradient"),
        };
    }
    backward_in(TILES, [q, k, v, o, lse, d_o], Some(bias), packing, attention)
}

/// The size of a tile of scores. Queries: a multiple of every vector's lanes.
#[derive(Clone, Copy)]
struct Tiles {
    queries: usize,
    keys: usize,
}

/// 16 KiB of scores: with the keys and values beside them they stay in the first cache.
const TILES: Tiles = Tiles { queries: 32, keys: 128 };

fn forward_in(
    tiles: Tiles,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    check(attention, packing, q, k, v)?;
    let columns = columns(bias, attention)?;
    let bias = bias.map(read::<f32>).transpose()?;
    let (q, k, v) = (read::<f32>(q)?, read::<f32>(k)?, read::<f32>(v)?);
    let bias = bias.as_deref().unwrap_or_default();
    let job = Job { attention, packing, tiles, q: &q, k: &k, v: &v, bias, columns };
    let (tokens, heads, width) = (packing.tokens(), attention.heads, attention.head_width);
    let (mut o, mut lse) = (New::of(tokens * heads * width), New::of(heads * tokens));
    let (o_shared, lse_shared) = (o.shared(), lse.shared());
    job.for_each_head(|head, scratch| {
        simd::dispatch(Forward { job: &job, head, scratch, o: &o_shared, lse: &lse_shared });
    });
    // SAFETY: every token of every head belongs to one task, which has written its row of o and its lse.
    let (o, lse) = unsafe { (o.written(), lse.written()) };
    Ok((tensor(o, (tokens, heads * width))?, tensor(lse, (heads, tokens))?))
}

fn backward_in(
    tiles: Tiles,
    [q, k, v, o, lse, d_o]: [&Tensor; 6],
    bias: Option<&Tensor>,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor, Tensor, Tensor)> {
    check(attention, packing, q, k, v)?;
    let columns = columns(bias, attention)?;
    let bias = bias.map(read::<f32>).transpose()?;
    let bias = bias.as_deref().unwrap_or_default();
    let (tokens, heads, width) = (packing.tokens(), attention.heads, attention.head_width);
    expect_shape("o", o, &[tokens, heads * width])?;
    expect_shape("d_o", d_o, &[tokens, heads * width])?;
    expect_shape("lse", lse, &[heads, tokens])?;
    let kv_width = attention.kv_heads * width;
    let (q, k, v) = (read::<f32>(q)?, read::<f32>(k)?, read::<f32>(v)?);
    let (o, lse, d_o) = (read::<f32>(o)?, read::<f32>(lse)?, read::<f32>(d_o)?);
    let job = Job { attention, packing, tiles, q: &q, k: &k, v: &v, bias, columns };
    let mut dq = New::of(tokens * heads * width);
    let (mut dk, mut dv) = (New::of(tokens * kv_width), New::of(tokens * kv_width));
    // Of each text and head.
    let mut dbias = New::zeros(packing.sequences() * bias.len());
    let (dq_shared, dk_shared, dv_shared) = (dq.shared(), dk.shared(), dv.shared());
    let dbias_shared = dbias.shared();
    job.for_each_head(|head, scratch| {
        let (dq, dk, dv, dbias) = (&dq_shared, &dk_shared, &dv_shared, &dbias_shared);
        simd::dispatch(Backward { job: &job, head, scratch, o: &o, lse: &lse, d_o: &d_o, dq, dk, dv, dbias });
    });
    // SAFETY: every token of every head belongs to one task, which has written its rows of all three.
    let (dq, dk, dv) = unsafe { (dq.written(), dk.written(), dv.written()) };
    let mut sum = vec![0f32; bias.len()];
    for text in dbias.elements.chunks_exact(bias.len().max(1)) {
        add(&mut sum, text);
    }
    Ok((
        tensor(dq, (tokens, heads * width))?,
        tensor(dk, (tokens, kv_width))?,
        tensor(dv, (tokens, kv_width))?,
        tensor(sum, (bias.len() / columns.max(1), columns))?,
    ))
}

fn check(attention: &Attention, packing: &Packing, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    let Attention { heads, kv_heads, head_width, .. } = *attention;
    if heads == 0 || kv_heads == 0 || head_width == 0 || heads % kv_heads != 0 {
        bail!("{heads} heads of width {head_width} cannot share {kv_heads} key-value heads");
    }
    if let Some(dropout) = attention.dropout {
        dropout.check()?;
    }
    let tokens = packing.tokens();
    expect_shape("q", q, &[tokens, heads * head_width])?;
    expect_shape("k", k, &[tokens, kv_heads * head_width])?;
    expect_shape("v", v, &[tokens, kv_heads * head_width])?;
    Ok(())
}

/// 2·W + 1 of a bias (H, 2·W + 1); 0 without.
fn columns(bias: Option<&Tensor>, attention: &Attention) -> Result<usize> {
    let Some(bias) = bias else { return Ok(0) };
    let Attention { heads, kv_heads, .. } = *attention;
    let (_, columns) = matrix("bias", bias)?;
    expect_shape("bias", bias, &[heads, columns])?;
    if columns.is_multiple_of(2) {
        bail!("`bias` has {columns} columns, expected an odd number: as many distances back as ahead");
    }
    if heads != kv_heads {
        bail!("{heads} heads share {kv_heads} key-value heads, which a bias by distance does not support");
    }
    Ok(columns)
}

/// What all tasks read.
struct Job<'a> {
    attention: &'a Attention,
    packing: &'a Packing,
    tiles: Tiles,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// (H, columns), empty without.
    bias: &'a [f32],
    columns: usize,
}

/// One task: key-value head `g` of sequence `n`, which starts at token `start`.
#[derive(Clone, Copy)]
struct Head {
    n: usize,
    g: usize,
    start: usize,
    tokens: usize,
}

impl Job<'_> {
    /// H/G.
    #[inline(always)]
    fn group(&self) -> usize {
        self.attention.heads / self.attention.kv_heads
    }

    /// Where row `r` of a head's queries lies in q: rows are the tokens, and for each the heads of the group.
    #[inline(always)]
    fn query(&self, head: Head, r: usize) -> usize {
        let (token, member) = self.token_and_member(r);
        let a = self.attention;
        ((head.start + token) * a.heads + head.g * self.group() + member) * a.head_width
    }

    /// Where row `r` of a head's queries lies in lse.
    #[inline(always)]
    fn query_sum(&self, head: Head, r: usize) -> usize {
        let (token, member) = self.token_and_member(r);
        (head.g * self.group() + member) * self.packing.tokens() + head.start + token
    }

    #[inline(always)]
    fn token_and_member(&self, r: usize) -> (usize, usize) {
        let group = self.group();
        if group == 1 { (r, 0) } else { (r / group, r % group) }
    }

    /// Where key `j` of a head lies in k and v.
    #[inline(always)]
    fn key(&self, head: Head, j: usize) -> usize {
        ((head.start + j) * self.attention.kv_heads + head.g) * self.attention.head_width
    }

    /// From one row of k to the next.
    #[inline(always)]
    fn key_stride(&self) -> usize {
        self.attention.kv_heads * self.attention.head_width
    }

    /// Runs `f` for every sequence and key-value head, the longest first; each thread takes the next when it is done.
    fn for_each_head(&self, f: impl Fn(Head, &mut Vec<f32>) + Sync) {
        let kv_heads = self.attention.kv_heads;
        let mut sequences: Vec<(usize, Range<usize>)> =
            self.packing.ranges().enumerate().filter(|(_, rows)| !rows.is_empty()).collect();
        sequences.sort_by_key(|(_, rows)| std::cmp::Reverse(rows.len()));
        let tasks = sequences.len() * kv_heads;
        let work = |rows: &Range<usize>| rows.len() * rows.len() * self.attention.head_width;
        let total = self.attention.heads * sequences.iter().map(|(_, rows)| work(rows)).sum::<usize>();
        let next = AtomicUsize::new(0);
        let run = || {
            with_scratch(|scratch| {
                loop {
                    let task = next.fetch_add(1, Ordering::Relaxed);
                    let Some((n, rows)) = sequences.get(task / kv_heads) else { break };
                    f(Head { n: *n, g: task % kv_heads, start: rows.start, tokens: rows.len() }, scratch);
                }
            });
        };
        // Below some microseconds of work, waking a thread takes longer.
        let threads = rayon::current_num_threads().min(tasks).min(total / (64 * simd::GRAIN) + 1);
        if threads < 2 {
            run();
        } else {
            (0..threads).into_par_iter().with_max_len(1).for_each(|_| run());
        }
    }
}

/// A new tensor, written in disjoint pieces by several tasks.
struct New {
    elements: Vec<f32>,
    len: usize,
}

/// The place of a [`New`] tensor.
struct Shared {
    start: *mut f32,
    len: usize,
}

// SAFETY: only `write` touches the memory, and its callers keep to pieces of their own.
unsafe impl Sync for Shared {}

impl New {
    fn of(len: usize) -> Self {
        Self { elements: Vec::with_capacity(len), len }
    }

    fn zeros(len: usize) -> Self {
        Self { elements: vec![0.0; len], len }
    }

    fn shared(&mut self) -> Shared {
        Shared { start: self.elements.as_mut_ptr(), len: self.len }
    }

    /// # Safety
    /// Every element has been written.
    unsafe fn written(mut self) -> Vec<f32> {
        // SAFETY: the capacity is at least `len`, and the caller vouches for the elements.
        unsafe { self.elements.set_len(self.len) };
        self.elements
    }
}

impl Shared {
    /// Writes `values`, each times `scale`, from element `at` on.
    ///
    /// # Safety
    /// No other thread reads or writes these elements.
    #[inline(always)]
    unsafe fn write(&self, at: usize, values: &[f32], scale: f32) {
        assert!(at + values.len() <= self.len);
        for (i, value) in values.iter().enumerate() {
            // SAFETY: inside the capacity by the assertion.
            unsafe { self.start.add(at + i).write(value * scale) };
        }
    }
}

#[cfg(test)]
mod tests;
