//! InfoNCE: the cross-entropy of the positive of each query among its candidates, and its gradient.
//!
//! ```text
//! s_ij = q_i · c_j    loss_i = log Σ_j exp(scale · s_ij) − scale · s_ip    p: the positive of row i
//! dL/ds_ij = weight · scale · (softmax_j − 1[j = p])
//! ```
//!
//! (van den Oord et al., 2018). The matrix of similarities is never stored as a whole: it is computed tile by
//! tile with an online log-sum-exp, and backward recomputes it. All sums are relative to the score of the
//! positive: with z_ij = scale · (s_ij − s_ip) the loss is log Σ exp(z_ij), which is accurate for small
//! losses and large scales.
//!
//! [`Candidates`] and [`InfoNce::margin`] select the columns j of the sum. The positive is always in the sum.

use crate::matmul::{Matrix, Threads, multiply};
use crate::simd::{dot, exp, vectorised};
use crate::tensor::{expect_shape, matrix, read, tensor};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

#[cfg(any(test, gpu))]
mod gpu;

/// A list of column indices for each of B rows, in compressed sparse row (CSR) format.
///
/// The columns of row i are `columns[offsets[i]..offsets[i + 1]]`, in any order.
#[derive(Clone, Copy, Debug)]
pub struct CsrIndices<'a> {
    /// `(B+1)`, ascending from 0 to `columns.len()`.
    pub offsets: &'a [u32],
    /// The column indices of all rows, each below M.
    pub columns: &'a [u32],
}

/// The columns that the positive of a row is compared with.
#[derive(Clone, Copy, Debug)]
pub enum Candidates<'a> {
    /// All M columns.
    All,
    /// All columns except the listed ones, for example known positives and duplicates.
    AllBut(CsrIndices<'a>),
    /// Only the listed columns. The cost is proportional to the length of the lists, not to B·M.
    Only(CsrIndices<'a>),
}

/// The arguments of the loss, except for the embeddings.
#[derive(Clone, Copy, Debug)]
pub struct InfoNce<'a> {
    /// `(B)` the column of the positive of each row. It is in the sum even if `candidates` excludes it.
    pub positives: &'a [u32],
    /// The columns in the sum beside the positive.
    pub candidates: Candidates<'a>,
    /// 1/temperature.
    pub scale: f32,
    /// Drops the columns with s_ij > s_ip + margin, which are probably unlabelled positives. In units of s,
    /// before `scale`.
    pub margin: Option<f32>,
}

/// The result of [`forward`], which [`backward`] needs. The tensors are on the device of the embeddings.
#[derive(Clone, Debug)]
pub struct Tape {
    /// `(B)` the loss of each row.
    pub losses: Tensor,
    /// `(B)` s_ip, the similarity of each query and its positive.
    pub positive_scores: Tensor,
}

impl Tape {
    fn expect(&self, rows: usize) -> Result<()> {
        expect_shape("losses", &self.losses, &[rows])?;
        expect_shape("positive_scores", &self.positive_scores, &[rows])
    }
}

/// Computes the loss of each of the queries q `(B, D)` among the candidates c `(M, D)`.
///
/// # Errors
/// If a shape differs from the above, an index is out of range, or a tensor is not contiguous f32.
pub fn forward(q: &Tensor, c: &Tensor, infonce: &InfoNce) -> Result<Tape> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::forward(q, c, infonce);
    }
    forward_in(TILE, q, c, infonce)
}

/// Backward pass of [`forward`]: returns the gradients dq `(B, D)` and dc `(M, D)` of Σ weight · loss_i.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    q: &Tensor,
    c: &Tensor,
    infonce: &InfoNce,
    tape: &Tape,
    weight: f32,
) -> Result<(Tensor, Tensor)> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::backward(q, c, infonce, tape, weight);
    }
    backward_in(TILE, q, c, infonce, tape, weight)
}

/// The size of a tile of similarities. Its 4 MiB are enough for a matrix product to run at full speed on many
/// threads.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    columns: usize,
}

const TILE: Tile = Tile { rows: 256, columns: 4096 };

fn forward_in(tile: Tile, q: &Tensor, c: &Tensor, infonce: &InfoNce) -> Result<Tape> {
    let problem = Problem::new(tile, q, c, infonce)?;
    let (q, c) = (read::<f32>(q)?, read::<f32>(c)?);
    let positive_scores = problem.positive_scores(&q, &c);
    let mut sums = vec![LogSumExp::default(); problem.rows];
    if let Some(lists) = &problem.only {
        sums.par_iter_mut().enumerate().for_each(|(i, sum)| {
            let mut scores = problem.listed_scores(i, lists, &q, &c);
            problem.make_logits(positive_scores[i], &mut scores);
            if let Some(at) = problem.positive_in(lists, i) {
                scores[at] = f32::NEG_INFINITY;
            }
            vectorised(|| sum.add(&scores));
        });
    } else {
        problem.for_each_tile(&q, &c, |rows, columns, scores| {
            let width = columns.len();
            sums[rows.clone()].par_iter_mut().zip(scores.par_chunks_mut(width)).zip(rows).for_each(
                |((sum, scores), i)| {
                    problem.make_logits(positive_scores[i], scores);
                    problem.mask(i, &columns, scores);
                    vectorised(|| sum.add(scores));
                },
            );
        });
    }
    let losses = sums.iter().map(LogSumExp::loss).collect();
    let rows = problem.rows;
    Ok(Tape { losses: tensor(losses, rows)?, positive_scores: tensor(positive_scores, rows)? })
}

fn backward_in(
    tile: Tile,
    q: &Tensor,
    c: &Tensor,
    infonce: &InfoNce,
    tape: &Tape,
    weight: f32,
) -> Result<(Tensor, Tensor)> {
    let problem = Problem::new(tile, q, c, infonce)?;
    let Problem { rows: b, candidates: m, width: d, .. } = problem;
    tape.expect(b)?;
    let (q, c) = (read::<f32>(q)?, read::<f32>(c)?);
    let (losses, positive_scores) = (read::<f32>(&tape.losses)?, read::<f32>(&tape.positive_scores)?);
    let (losses, positive_scores) = (&*losses, &*positive_scores);
    let (mut dq, mut dc) = (vec![0f32; b * d], vec![0f32; m * d]);
    let factor = weight * infonce.scale;
    let to_gradients = |i: usize, logits: &mut [f32]| {
        let loss = losses[i];
        vectorised(|| logits.iter_mut().for_each(|z| *z = factor * exp(*z - loss)));
    };
    // expm1(−loss) is softmax − 1 of the positive without cancellation.
    let gradient_of_positive = |i: usize| factor * (-losses[i]).exp_m1();

    if let Some(lists) = &problem.only {
        let gradients: Vec<Vec<f32>> = (0..b)
            .into_par_iter()
            .map(|i| {
                let mut scores = problem.listed_scores(i, lists, &q, &c);
                problem.make_logits(positive_scores[i], &mut scores);
                to_gradients(i, &mut scores);
                if let Some(at) = problem.positive_in(lists, i) {
                    scores[at] = gradient_of_positive(i);
                }
                scores
            })
            .collect();
        dq.par_chunks_mut(d).enumerate().for_each(|(i, dq)| {
            for (&j, &g) in lists.of(i).iter().zip(&gradients[i]) {
                vectorised(|| add_scaled(dq, g, &c[j as usize * d..][..d]));
            }
        });
        // The entries by column: one task computes a row of dc, and adds its entries in the order of the
        // rows.
        let mut by_column: Vec<Vec<(usize, f32)>> = vec![Vec::new(); m];
        for (i, gradients) in gradients.iter().enumerate() {
            for (&j, &g) in lists.of(i).iter().zip(gradients) {
                by_column[j as usize].push((i, g));
            }
        }
        dc.par_chunks_mut(d).zip(by_column).for_each(|(dc, entries)| {
            for (i, g) in entries {
                vectorised(|| add_scaled(dc, g, &q[i * d..][..d]));
            }
        });
    } else {
        problem.for_each_tile(&q, &c, |rows, columns, scores| {
            let width = columns.len();
            scores.par_chunks_mut(width).zip(rows.clone()).for_each(|(scores, i)| {
                problem.make_logits(positive_scores[i], scores);
                problem.mask(i, &columns, scores);
                to_gradients(i, scores);
                let positive = infonce.positives[i] as usize;
                if columns.contains(&positive) {
                    scores[positive - columns.start] = gradient_of_positive(i);
                }
            });
            let gradient = Matrix::new(scores, rows.len(), width);
            let q = Matrix::new(&q[rows.start * d..], rows.len(), d);
            let c = Matrix::new(&c[columns.start * d..], width, d);
            multiply(&mut dq[rows.start * d..], d, 1.0, 1.0, gradient, c, Threads::All);
            multiply(&mut dc[columns.start * d..], d, 1.0, 1.0, gradient.transposed(), q, Threads::All);
        });
    }
    Ok((tensor(dq, (b, d))?, tensor(dc, (m, d))?))
}

/// The running sum Σ exp(z) of a row, as exp(max) · (exp(−max) + rest).
///
/// `rest` is Σ exp(z − max) over the columns that were added. The term exp(−max) is the positive, whose z is
/// 0.
#[derive(Clone, Copy, Default)]
struct LogSumExp {
    max: f32,
    rest: f64,
}

impl LogSumExp {
    #[inline(always)]
    fn add(&mut self, z: &[f32]) {
        let max = max_element(z).max(self.max);
        self.rest = self.rest * f64::from(self.max - max).exp() + f64::from(sum_exp(z, max));
        self.max = max;
    }

    fn loss(&self) -> f32 {
        // The sum is 1 + others if the positive has the maximum, and `ln_1p` is accurate for small others.
        let others = self.rest + f64::from(-self.max).exp_m1();
        (f64::from(self.max) + others.ln_1p()) as f32
    }
}

/// Σ exp(z − max), with sixteen accumulators.
#[inline(always)]
fn sum_exp(z: &[f32], max: f32) -> f32 {
    let mut lanes = [0f32; 16];
    let pieces = z.chunks_exact(16);
    let rest: f32 = pieces.remainder().iter().map(|z| exp(z - max)).sum();
    for piece in pieces {
        for (lane, z) in lanes.iter_mut().zip(piece) {
            *lane += exp(z - max);
        }
    }
    crate::simd::sum(&lanes) + rest
}

/// The maximum of the elements that are not NaN. A NaN makes the sum NaN instead.
#[inline(always)]
fn max_element(z: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let pieces = z.chunks_exact(16);
    let rest = pieces.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for piece in pieces {
        for (lane, &z) in lanes.iter_mut().zip(piece) {
            *lane = if z > *lane { z } else { *lane };
        }
    }
    lanes.into_iter().fold(rest, f32::max)
}

/// `to += factor · from`.
#[inline(always)]
fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// The checked arguments, and the sizes B, M and D.
struct Problem<'a> {
    infonce: &'a InfoNce<'a>,
    tile: Tile,
    rows: usize,
    candidates: usize,
    width: usize,
    only: Option<SortedIndices>,
    excluded: Option<SortedIndices>,
}

impl<'a> Problem<'a> {
    fn new(tile: Tile, q: &Tensor, c: &Tensor, infonce: &'a InfoNce<'a>) -> Result<Self> {
        let ((rows, width), (candidates, c_width)) = (matrix("q", q)?, matrix("c", c)?);
        if width != c_width || width == 0 {
            bail!(
                "the queries have {width} columns and the candidates {c_width}, expected as many and not 0"
            );
        }
        let positives = infonce.positives;
        if positives.len() != rows {
            bail!("there are {} positives for {rows} queries", positives.len());
        }
        if let Some(i) = positives.iter().position(|&p| p as usize >= candidates) {
            bail!("row {i}: the positive is column {}, but there are {candidates} columns", positives[i]);
        }
        let (only, excluded) = match infonce.candidates {
            Candidates::All => (None, None),
            Candidates::AllBut(lists) => (None, Some(SortedIndices::new(lists, rows, candidates, None)?)),
            Candidates::Only(lists) => {
                (Some(SortedIndices::new(lists, rows, candidates, Some(positives))?), None)
            }
        };
        Ok(Self { infonce, tile, rows, candidates, width, only, excluded })
    }

    fn positive_scores(&self, q: &[f32], c: &[f32]) -> Vec<f32> {
        let d = self.width;
        let score = |(q, &p): (&[f32], &u32)| vectorised(|| dot(q, &c[p as usize * d..][..d]));
        q.par_chunks_exact(d).zip(self.infonce.positives).map(score).collect()
    }

    fn listed_scores(&self, i: usize, lists: &SortedIndices, q: &[f32], c: &[f32]) -> Vec<f32> {
        let d = self.width;
        let q = &q[i * d..][..d];
        vectorised(|| lists.of(i).iter().map(|&j| dot(q, &c[j as usize * d..][..d])).collect())
    }

    /// The index of the positive in the list of row `i`.
    fn positive_in(&self, lists: &SortedIndices, i: usize) -> Option<usize> {
        lists.of(i).binary_search(&self.infonce.positives[i]).ok()
    }

    /// Calls `f(rows, columns, similarities)` for one tile at a time. The tiles of a row come in the order of
    /// the columns.
    fn for_each_tile(&self, q: &[f32], c: &[f32], mut f: impl FnMut(Range<usize>, Range<usize>, &mut [f32])) {
        let (Tile { rows, columns }, d) = (self.tile, self.width);
        let mut scores = vec![0f32; rows.min(self.rows) * columns.min(self.candidates)];
        for top in (0..self.rows).step_by(rows) {
            let band = top..self.rows.min(top + rows);
            for left in (0..self.candidates).step_by(columns) {
                let panel = left..self.candidates.min(left + columns);
                let scores = &mut scores[..band.len() * panel.len()];
                let q = Matrix::new(&q[top * d..], band.len(), d);
                let c = Matrix::new(&c[left * d..], panel.len(), d).transposed();
                multiply(scores, panel.len(), 0.0, 1.0, q, c, Threads::All);
                f(band.clone(), panel, scores);
            }
        }
    }

    /// Sets the excluded logits of row `i` to −∞, and the logit of its positive, which [`LogSumExp`] adds by
    /// itself.
    fn mask(&self, i: usize, columns: &Range<usize>, logits: &mut [f32]) {
        if let Some(excluded) = &self.excluded {
            let listed = excluded.of(i);
            let start = listed.partition_point(|&j| (j as usize) < columns.start);
            for &j in listed[start..].iter().take_while(|&&j| (j as usize) < columns.end) {
                logits[j as usize - columns.start] = f32::NEG_INFINITY;
            }
        }
        let positive = self.infonce.positives[i] as usize;
        if columns.contains(&positive) {
            logits[positive - columns.start] = f32::NEG_INFINITY;
        }
    }

    /// Replaces the similarities s by z, and by −∞ where the margin drops a column.
    fn make_logits(&self, positive: f32, scores: &mut [f32]) {
        let scale = self.infonce.scale;
        let limit = self.infonce.margin.map_or(f32::INFINITY, |margin| positive + margin);
        vectorised(|| {
            for s in scores {
                let z = scale * (*s - positive);
                *s = if *s > limit { f32::NEG_INFINITY } else { z };
            }
        });
    }
}

/// Checked [`CsrIndices`], with the columns of each row sorted and without repetitions.
struct SortedIndices {
    offsets: Vec<usize>,
    columns: Vec<u32>,
}

impl SortedIndices {
    /// Checks and sorts `lists`. `with` adds one column to each row.
    fn new(lists: CsrIndices, rows: usize, candidates: usize, with: Option<&[u32]>) -> Result<Self> {
        let CsrIndices { offsets, columns } = lists;
        let ends = (offsets.first(), offsets.last());
        if offsets.len() != rows + 1
            || ends != (Some(&0), Some(&(columns.len() as u32)))
            || !offsets.is_sorted()
        {
            bail!("expected {} ascending offsets from 0 to {}, one more than rows", rows + 1, columns.len());
        }
        let mut sorted = Self { offsets: vec![0], columns: Vec::with_capacity(columns.len() + rows) };
        for (i, range) in offsets.windows(2).enumerate() {
            let mut row = columns[range[0] as usize..range[1] as usize].to_vec();
            if let Some(j) = row.iter().find(|&&j| j as usize >= candidates) {
                bail!("row {i}: its list has column {j}, but there are {candidates} columns");
            }
            row.extend(with.map(|columns| columns[i]));
            row.sort_unstable();
            row.dedup();
            sorted.columns.extend(row);
            sorted.offsets.push(sorted.columns.len());
        }
        Ok(sorted)
    }

    fn of(&self, i: usize) -> &[u32] {
        &self.columns[self.offsets[i]..self.offsets[i + 1]]
    }
}

#[cfg(test)]
mod tests;
