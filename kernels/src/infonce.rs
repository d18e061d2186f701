//! InfoNCE: the cross-entropy of each query's positive among its candidates, and its gradient.
//!
//! ```text
//! s_ij = q_i · c_j    loss_i = log Σ_j exp(scale · s_ij) − scale · s_ip    p: the positive of row i
//! dL/ds_ij = weight · scale · (softmax_j − 1[j = p])
//! ```
//!
//! (van den Oord et al., 2018). The similarities exist one tile at a time, with an online log-sum-exp over the
//! tiles; backward computes them again. All sums are relative to the positive's score: with z_ij =
//! scale · (s_ij − s_ip) the loss is log Σ exp(z_ij), which keeps its digits when it is small and scale is large.
//!
//! Which j count: see [`Candidates`] and [`InfoNce::margin`]. The positive itself always does.

use crate::matmul::{Matrix, Threads, multiply};
use crate::simd::{dot, exp, vectorised};
use crate::tensor::{expect_shape, matrix, read, tensor};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

#[cfg(any(test, gpu))]
mod gpu;

/// For each of B rows a list of columns: those of row i are `columns[offsets[i]..offsets[i + 1]]`, in any order.
#[derive(Clone, Copy, Debug)]
pub struct Lists<'a> {
    /// (B+1), from 0 up to the number of columns.
    pub offsets: &'a [u32],
    /// Columns, each below M.
    pub columns: &'a [u32],
}

/// The columns that a row's positive competes with.
#[derive(Clone, Copy, Debug)]
pub enum Candidates<'a> {
    /// All M.
    All,
    /// All but those listed: known positives and duplicates.
    AllBut(Lists<'a>),
    /// Those listed, each once. Costs as much as there are in the lists, not B·M.
    Only(Lists<'a>),
}

/// What the loss compares.
#[derive(Clone, Copy, Debug)]
pub struct InfoNce<'a> {
    /// (B) the column of each row's positive. It counts whatever the candidates say.
    pub positives: &'a [u32],
    /// What else counts.
    pub candidates: Candidates<'a>,
    /// 1/temperature.
    pub scale: f32,
    /// Drops columns with s_ij > s_ip + margin: probably unlabelled positives. In units of s, before the scale.
    pub margin: Option<f32>,
}

/// What [`backward`] needs of [`forward`]; it stays where the embeddings are.
#[derive(Clone, Debug)]
pub struct Tape {
    /// (B) loss of each row.
    pub losses: Tensor,
    /// (B) s_ip.
    pub positive_scores: Tensor,
}

impl Tape {
    fn expect(&self, rows: usize) -> Result<()> {
        expect_shape("losses", &self.losses, &[rows])?;
        expect_shape("positive_scores", &self.positive_scores, &[rows])
    }
}

/// The loss of each row of q (B, D) among the candidates c (M, D).
pub fn forward(q: &Tensor, c: &Tensor, infonce: &InfoNce) -> Result<Tape> {
    #[cfg(gpu)]
    if crate::gpu::runs(q.device()) {
        return gpu::forward(q, c, infonce);
    }
    forward_in(TILE, q, c, infonce)
}

/// dq (B, D) and dc (M, D) of Σ weight · loss_i.
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

/// The size of a tile of similarities. A product of this size runs at full speed on many threads; it takes 4 MiB.
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
    let mut sums = vec![Sum::default(); problem.rows];
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
                    problem.hide(i, &columns, scores);
                    vectorised(|| sum.add(scores));
                },
            );
        });
    }
    let losses = sums.iter().map(Sum::loss).collect();
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
    let size = weight * infonce.scale;
    let differentiate = |i: usize, logits: &mut [f32]| {
        let loss = losses[i];
        vectorised(|| logits.iter_mut().for_each(|z| *z = size * exp(*z - loss)));
    };
    // softmax − 1 of the positive keeps its digits this way.
    let of_positive = |i: usize| size * (-losses[i]).exp_m1();

    if let Some(lists) = &problem.only {
        let gradients: Vec<Vec<f32>> = (0..b)
            .into_par_iter()
            .map(|i| {
                let mut scores = problem.listed_scores(i, lists, &q, &c);
                problem.make_logits(positive_scores[i], &mut scores);
                differentiate(i, &mut scores);
                if let Some(at) = problem.positive_in(lists, i) {
                    scores[at] = of_positive(i);
                }
                scores
            })
            .collect();
        dq.par_chunks_mut(d).enumerate().for_each(|(i, dq)| {
            for (&j, &g) in lists.of(i).iter().zip(&gradients[i]) {
                vectorised(|| add_scaled(dq, g, &c[j as usize * d..][..d]));
            }
        });
        // The lists by column: each row of dc is one task's, and adds its rows in order.
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
                problem.hide(i, &columns, scores);
                differentiate(i, scores);
                let positive = infonce.positives[i] as usize;
                if columns.contains(&positive) {
                    scores[positive - columns.start] = of_positive(i);
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

/// Σ exp(z) over what was added so far and the positive, whose z is 0, as exp(top) · (exp(-top) + rest).
#[derive(Clone, Copy, Default)]
struct Sum {
    top: f32,
    rest: f64,
}

impl Sum {
    #[inline(always)]
    fn add(&mut self, z: &[f32]) {
        let top = highest(z).max(self.top);
        self.rest = self.rest * f64::from(self.top - top).exp() + f64::from(sum_of_powers(z, top));
        self.top = top;
    }

    fn loss(&self) -> f32 {
        // 1 + rest, of which `ln_1p` keeps all digits where the positive is on top.
        let others = self.rest + f64::from(-self.top).exp_m1();
        (f64::from(self.top) + others.ln_1p()) as f32
    }
}

/// Σ exp(z − top) in sixteen lanes.
#[inline(always)]
fn sum_of_powers(z: &[f32], top: f32) -> f32 {
    let mut lanes = [0f32; 16];
    let pieces = z.chunks_exact(16);
    let rest: f32 = pieces.remainder().iter().map(|z| exp(z - top)).sum();
    for piece in pieces {
        for (lane, z) in lanes.iter_mut().zip(piece) {
            *lane += exp(z - top);
        }
    }
    crate::simd::sum(&lanes) + rest
}

/// The greatest element, NaN aside: a NaN reaches the sum instead.
#[inline(always)]
fn highest(z: &[f32]) -> f32 {
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

#[inline(always)]
fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// The checked problem.
struct Problem<'a> {
    infonce: &'a InfoNce<'a>,
    tile: Tile,
    rows: usize,
    candidates: usize,
    width: usize,
    only: Option<Columns>,
    excluded: Option<Columns>,
}

impl<'a> Problem<'a> {
    fn new(tile: Tile, q: &Tensor, c: &Tensor, infonce: &'a InfoNce<'a>) -> Result<Self> {
        let ((rows, width), (candidates, c_width)) = (matrix("q", q)?, matrix("c", c)?);
        if width != c_width || width == 0 {
            bail!("queries of width {width} cannot be compared with candidates of width {c_width}");
        }
        let positives = infonce.positives;
        if positives.len() != rows {
            bail!("{} positives for {rows} queries", positives.len());
        }
        if let Some(i) = positives.iter().position(|&p| p as usize >= candidates) {
            bail!("row {i}: its positive is column {} of {candidates}", positives[i]);
        }
        let (only, excluded) = match infonce.candidates {
            Candidates::All => (None, None),
            Candidates::AllBut(lists) => (None, Some(Columns::new(lists, rows, candidates, None)?)),
            Candidates::Only(lists) => (Some(Columns::new(lists, rows, candidates, Some(positives))?), None),
        };
        Ok(Self { infonce, tile, rows, candidates, width, only, excluded })
    }

    fn positive_scores(&self, q: &[f32], c: &[f32]) -> Vec<f32> {
        let d = self.width;
        let score = |(q, &p): (&[f32], &u32)| vectorised(|| dot(q, &c[p as usize * d..][..d]));
        q.par_chunks_exact(d).zip(self.infonce.positives).map(score).collect()
    }

    fn listed_scores(&self, i: usize, lists: &Columns, q: &[f32], c: &[f32]) -> Vec<f32> {
        let d = self.width;
        let q = &q[i * d..][..d];
        vectorised(|| lists.of(i).iter().map(|&j| dot(q, &c[j as usize * d..][..d])).collect())
    }

    /// Where in row `i`'s list its positive is.
    fn positive_in(&self, lists: &Columns, i: usize) -> Option<usize> {
        lists.of(i).binary_search(&self.infonce.positives[i]).ok()
    }

    /// Hands the similarities to `f` one tile (rows, columns) at a time, all tiles of a row in order.
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

    /// Sets the logits of row `i` that do not count, and its positive's, which is summed apart, to -∞.
    fn hide(&self, i: usize, columns: &Range<usize>, logits: &mut [f32]) {
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

    /// From s to z, in place, with -∞ for those that the margin drops.
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

/// [`Lists`], checked, each sorted and without repetitions.
struct Columns {
    offsets: Vec<usize>,
    columns: Vec<u32>,
}

impl Columns {
    /// `with`: one more column for each row.
    fn new(lists: Lists, rows: usize, candidates: usize, with: Option<&[u32]>) -> Result<Self> {
        let Lists { offsets, columns } = lists;
        let ends = (offsets.first(), offsets.last());
        if offsets.len() != rows + 1
            || ends != (Some(&0), Some(&(columns.len() as u32)))
            || !offsets.is_sorted()
        {
            bail!("the lists of {rows} rows need {} rising offsets from 0 to {}", rows + 1, columns.len());
        }
        let mut sorted = Self { offsets: vec![0], columns: Vec::with_capacity(columns.len() + rows) };
        for (i, range) in offsets.windows(2).enumerate() {
            let mut row = columns[range[0] as usize..range[1] as usize].to_vec();
            if let Some(j) = row.iter().find(|&&j| j as usize >= candidates) {
                bail!("row {i}: its list names column {j} of {candidates}");
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
