//! Attention inside each sequence of a packing: o = softmax(scale · q kᵀ) v over the visible keys.
//!
//! The scores are never stored as a whole, neither of all tokens nor of one sequence. A task computes one
//! sequence and one key-value head. It iterates over tiles of queries and of visible keys with an online
//! softmax. Forward stores the log-sum-exp of each query; backward recomputes the probabilities from it (Dao,
//! "FlashAttention-2", 2023):
//!
//! ```text
//! p = exp(s − lse)    dv = pᵀ do    ds = p ∘ (do vᵀ − rowsum(do ∘ o))
//! dq = scale · ds k    dk = scale · dsᵀ q
//! ```
//!
//! An optional relative position bias (T5, MPNet) is added to the scores. It depends on the distance from
//! query to key; its gradient is the sum of ds over all pairs at that distance, first within each sequence,
//! then over the sequences in their order.

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

/// The shape, the window and the dropout of an attention layer.
///
/// Token i attends to token j of the same sequence if i − left ≤ j ≤ i + right; flash-attn calls this pair
/// `window_size`.
#[derive(Clone, Debug)]
pub struct Attention {
    /// H, the number of query heads.
    pub heads: usize,
    /// G, the number of key-value heads. It divides H, and query head h uses key-value head h / (H/G).
    pub kv_heads: usize,
    /// K, the size of a head.
    pub head_width: usize,
    /// The factor of q kᵀ, usually 1/√K.
    pub scale: f32,
    /// The number of visible tokens before the query; `None` sets no limit.
    pub left: Option<usize>,
    /// The number of visible tokens after the query; `None` sets no limit, and `Some(0)` is causal.
    pub right: Option<usize>,
    /// Dropout of the probabilities. In a sequence of S tokens the element index is (h·S + i)·S + j.
    pub dropout: Option<Dropout>,
}

impl Attention {
    /// The keys that query `i` of a sequence of `tokens` tokens attends to.
    #[inline(always)]
    fn visible(&self, i: usize, tokens: usize) -> Range<usize> {
        let start = self.left.map_or(0, |left| i.saturating_sub(left));
        let end = self.right.map_or(tokens, |right| i.saturating_add(right).saturating_add(1).min(tokens));
        start..end
    }
}

/// Returns o `(T, H·K)` and the log-sum-exp of each query `(H, T)`, from q `(T, H·K)`, k and v, both
/// `(T, G·K)`.
///
/// # Errors
/// If a shape differs from the above, the heads are not a multiple of the key-value heads, or a tensor is not
/// contiguous f32 (on a GPU: not contiguous, or not of the type of q).
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    forward_any(q, k, v, None, packing, attention)
}

/// Like [`forward`], with the relative position bias `bias` `(H, 2·W + 1)` added to the scores.
///
/// Column W + d holds the bias at the distance d = j − i from query i to key j. Distances are clamped to ±W.
///
/// # Errors
/// As [`forward`], and if `bias` has an even number of columns or H is not G.
pub fn forward_biased(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: &Tensor,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    forward_any(q, k, v, Some(bias), packing, attention)
}

/// Backward pass of [`forward`]: returns dq `(T, H·K)`, dk and dv, both `(T, G·K)`.
///
/// `d_o` `(T, H·K)` is the gradient of o. The other arguments are those of [`forward`] and its results.
///
/// # Errors
/// As [`forward`].
#[expect(clippy::too_many_arguments, reason = "the formula has as many terms")]
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
    let (dq, dk, dv, _) = backward_any([q, k, v, o, lse, d_o], None, packing, attention)?;
    Ok((dq, dk, dv))
}

/// Backward pass of [`forward_biased`]: returns dq, dk and dv like [`backward`], and the gradient of the bias
/// `(H, 2·W + 1)`.
///
/// # Errors
/// As [`forward_biased`].
#[expect(clippy::too_many_arguments, reason = "the formula has as many terms")]
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
    match backward_any([q, k, v, o, lse, d_o], Some(bias), packing, attention)? {
        (dq, dk, dv, Some(dbias)) => Ok((dq, dk, dv, dbias)),
        _ => bail!("the backward pass of attention with a bias returned no gradient of the bias"),
    }
}

/// Checks the arguments and computes [`forward`] or [`forward_biased`] on the device of q.
fn forward_any(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor)> {
    check(attention, packing, [q, k, v], bias)?;
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::forward(q, k, v, bias, packing, attention);
    }
    forward_in(TILES, q, k, v, bias, packing, attention)
}

/// Checks the arguments and computes [`backward`] or [`backward_biased`] on the device of q. The fourth
/// result is the gradient of the bias, if there is one.
fn backward_any(
    tensors: [&Tensor; 6],
    bias: Option<&Tensor>,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor, Tensor, Option<Tensor>)> {
    let [q, k, v, o, lse, d_o] = tensors;
    check(attention, packing, [q, k, v], bias)?;
    expect_shape("o", o, q.dims())?;
    expect_shape("d_o", d_o, q.dims())?;
    expect_shape("lse", lse, &[attention.heads, packing.tokens()])?;
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::backward(tensors, bias, packing, attention);
    }
    backward_in(TILES, tensors, bias, packing, attention)
}

/// The size of a tile of scores. `queries` must be a multiple of the lanes of every vector width.
#[derive(Clone, Copy)]
struct Tiles {
    queries: usize,
    keys: usize,
}

/// 16 KiB of scores, which fit into the L1 cache together with the keys and values of the tile.
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
    let columns = columns(bias);
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
    // SAFETY: each token and head belongs to exactly one task, which has written its row of o and its
    // log-sum-exp.
    let (o, lse) = unsafe { (o.written(), lse.written()) };
    Ok((tensor(o, (tokens, heads * width))?, tensor(lse, (heads, tokens))?))
}

fn backward_in(
    tiles: Tiles,
    [q, k, v, o, lse, d_o]: [&Tensor; 6],
    bias: Option<&Tensor>,
    packing: &Packing,
    attention: &Attention,
) -> Result<(Tensor, Tensor, Tensor, Option<Tensor>)> {
    let (columns, bias_shape) = (columns(bias), bias.map(Tensor::shape));
    let bias = bias.map(read::<f32>).transpose()?;
    let bias = bias.as_deref().unwrap_or_default();
    let (tokens, heads, width) = (packing.tokens(), attention.heads, attention.head_width);
    let kv_width = attention.kv_heads * width;
    let (q, k, v) = (read::<f32>(q)?, read::<f32>(k)?, read::<f32>(v)?);
    let (o, lse, d_o) = (read::<f32>(o)?, read::<f32>(lse)?, read::<f32>(d_o)?);
    let job = Job { attention, packing, tiles, q: &q, k: &k, v: &v, bias, columns };
    let mut dq = New::of(tokens * heads * width);
    let (mut dk, mut dv) = (New::of(tokens * kv_width), New::of(tokens * kv_width));
    // One gradient for each sequence and head.
    let mut dbias = New::zeros(packing.sequences() * bias.len());
    let (dq_shared, dk_shared, dv_shared) = (dq.shared(), dk.shared(), dv.shared());
    let dbias_shared = dbias.shared();
    job.for_each_head(|head, scratch| {
        let (dq, dk, dv, dbias) = (&dq_shared, &dk_shared, &dv_shared, &dbias_shared);
        simd::dispatch(Backward { job: &job, head, scratch, o: &o, lse: &lse, d_o: &d_o, dq, dk, dv, dbias });
    });
    // SAFETY: each token and head belongs to exactly one task, which has written its rows of all three
    // gradients.
    let (dq, dk, dv) = unsafe { (dq.written(), dk.written(), dv.written()) };
    let mut sum = vec![0f32; bias.len()];
    for sequence in dbias.elements.chunks_exact(bias.len().max(1)) {
        add(&mut sum, sequence);
    }
    Ok((
        tensor(dq, (tokens, heads * width))?,
        tensor(dk, (tokens, kv_width))?,
        tensor(dv, (tokens, kv_width))?,
        bias_shape.map(|shape| tensor(sum, shape)).transpose()?,
    ))
}

fn check(
    attention: &Attention,
    packing: &Packing,
    [q, k, v]: [&Tensor; 3],
    bias: Option<&Tensor>,
) -> Result<()> {
    let Attention { heads, kv_heads, head_width, .. } = *attention;
    if heads == 0 || kv_heads == 0 || head_width == 0 || heads % kv_heads != 0 {
        bail!(
            "{heads} heads of size {head_width} cannot share {kv_heads} key-value heads, expected a multiple"
        );
    }
    if let Some(dropout) = attention.dropout {
        dropout.check()?;
    }
    let tokens = packing.tokens();
    expect_shape("q", q, &[tokens, heads * head_width])?;
    expect_shape("k", k, &[tokens, kv_heads * head_width])?;
    expect_shape("v", v, &[tokens, kv_heads * head_width])?;
    let Some(bias) = bias else { return Ok(()) };
    let (_, columns) = matrix("bias", bias)?;
    expect_shape("bias", bias, &[heads, columns])?;
    if columns.is_multiple_of(2) {
        bail!("`bias` has {columns} columns, expected an odd number, 2·W + 1 for the distances −W to W");
    }
    if heads != kv_heads {
        bail!("a relative position bias needs as many key-value heads as heads, got {kv_heads} and {heads}");
    }
    Ok(())
}

/// The number of columns of a bias `(H, 2·W + 1)`; 0 without a bias.
fn columns(bias: Option<&Tensor>) -> usize {
    bias.map_or(0, |bias| bias.dims()[1])
}

/// The inputs of all tasks of one call.
struct Job<'a> {
    attention: &'a Attention,
    packing: &'a Packing,
    tiles: Tiles,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// (H, columns), empty without a bias.
    bias: &'a [f32],
    columns: usize,
}

/// One task: key-value head `g` of sequence `n`, with all query heads that share it. The sequence has
/// `tokens` tokens from token `start` on.
#[derive(Clone, Copy)]
struct Head {
    n: usize,
    g: usize,
    start: usize,
    tokens: usize,
}

/// The queries of one tile of scores, and the keys that at least one of them sees.
struct Block {
    /// The first row of the head's queries.
    first: usize,
    /// The number of queries, which are the lanes of the tile's vectors.
    lanes: usize,
    keys: Range<usize>,
}

impl Job<'_> {
    /// H/G, the number of query heads that share a key-value head.
    #[inline(always)]
    fn group(&self) -> usize {
        self.attention.heads / self.attention.kv_heads
    }

    /// The offset in q of row `r` of a head's queries. The rows are ordered by token, then by query head of
    /// the group.
    #[inline(always)]
    fn query(&self, head: Head, r: usize) -> usize {
        let (token, member) = self.token_and_member(r);
        let a = self.attention;
        ((head.start + token) * a.heads + head.g * self.group() + member) * a.head_width
    }

    /// The offset in lse of row `r` of a head's queries.
    #[inline(always)]
    fn query_lse(&self, head: Head, r: usize) -> usize {
        let (token, member) = self.token_and_member(r);
        (head.g * self.group() + member) * self.packing.tokens() + head.start + token
    }

    /// The token of row `r` of a head's queries, and its query head within the group.
    #[inline(always)]
    fn token_and_member(&self, r: usize) -> (usize, usize) {
        let group = self.group();
        if group == 1 { (r, 0) } else { (r / group, r % group) }
    }

    /// The offset of key `j` of a head in k and in v.
    #[inline(always)]
    fn key(&self, head: Head, j: usize) -> usize {
        ((head.start + j) * self.attention.kv_heads + head.g) * self.attention.head_width
    }

    /// The distance between two rows of k, and of v, in elements.
    #[inline(always)]
    fn key_stride(&self) -> usize {
        self.attention.kv_heads * self.attention.head_width
    }

    /// The blocks that the queries of a head are cut into.
    #[inline(always)]
    fn blocks(&self, head: Head) -> impl Iterator<Item = Block> {
        let rows = head.tokens * self.group();
        (0..rows).step_by(self.tiles.queries).map(move |first| {
            let lanes = self.tiles.queries.min(rows - first);
            let visible = |r| self.attention.visible(self.token_and_member(r).0, head.tokens);
            Block { first, lanes, keys: visible(first).start..visible(first + lanes - 1).end }
        })
    }

    /// The keys of a block, one tile at a time.
    #[inline(always)]
    fn key_tiles(&self, block: &Block) -> impl Iterator<Item = Range<usize>> + use<> {
        let (end, step) = (block.keys.end, self.tiles.keys);
        block.keys.clone().step_by(step).map(move |start| start..end.min(start + step))
    }

    /// Calls `f` for each sequence and key-value head, the longest sequences first. A thread that is done
    /// takes the next task.
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
        // Waking a thread takes longer than a few microseconds of work.
        let threads = rayon::current_num_threads().min(tasks).min(total / (64 * simd::GRAIN) + 1);
        if threads < 2 {
            run();
        } else {
            (0..threads).into_par_iter().with_max_len(1).for_each(|_| run());
        }
    }
}

/// The memory of a new tensor that several tasks write in disjoint pieces.
struct New {
    elements: Vec<f32>,
    len: usize,
}

/// The address of a [`New`] tensor, which the tasks share.
struct Shared {
    start: *mut f32,
    len: usize,
}

// SAFETY: only `write` accesses the memory, and its callers write disjoint pieces.
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

    /// Returns the elements.
    ///
    /// # Safety
    /// Every element must have been written.
    unsafe fn written(mut self) -> Vec<f32> {
        // SAFETY: the capacity is at least `len`, and the caller guarantees that the elements are written.
        unsafe { self.elements.set_len(self.len) };
        self.elements
    }
}

impl Shared {
    /// Writes `values`, multiplied by `scale`, from element `at` on.
    ///
    /// # Safety
    /// No other thread may read or write these elements.
    #[inline(always)]
    unsafe fn write(&self, at: usize, values: &[f32], scale: f32) {
        assert!(at + values.len() <= self.len);
        for (i, value) in values.iter().enumerate() {
            // SAFETY: the assertion has checked that the elements lie within the capacity.
            unsafe { self.start.add(at + i).write(value * scale) };
        }
    }
}

#[cfg(test)]
mod tests;
