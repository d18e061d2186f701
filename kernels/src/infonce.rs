//! InfoNCE (van den Oord et al. 2018) without its matrix of similarities:
//!
//!     lossᵢ = log Σⱼ exp(s·qᵢ·cⱼ) − s·qᵢ·cₚ₍ᵢ₎        over the columns j that row i may count
//!
//! Similarities are computed in tiles that stay in the cache; forward keeps a running log-sum-exp a row (Milakov & Gimelshein
//! 2018), backward computes the tiles again. Memory is O((B + M)·D), never O(B·M).

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::matmul::{Matrix, Threads, multiply};
use crate::simd::{dot, exp, vectorised};
use crate::tensor::{matrix, read, tensor};

/// Lists of columns, one a row, end to end: row i's are `columns[offsets[i]..offsets[i + 1]]`, ascending.
#[derive(Clone, Copy, Debug)]
pub struct Lists<'a> {
    /// (B+1)
    pub offsets: &'a [u32],
    /// All lists.
    pub columns: &'a [u32],
}

/// The columns that a row counts. Its positive always is one of them.
#[derive(Clone, Copy, Debug)]
pub enum Candidates<'a> {
    /// All M.
    All,
    /// All but those listed.
    AllBut(Lists<'a>),
    /// Those listed.
    Only(Lists<'a>),
}

/// What is compared with what.
#[derive(Clone, Copy, Debug)]
pub struct InfoNce<'a> {
    /// (B) the column of each row's positive.
    pub positives: &'a [u32],
    /// The columns of each row's sum.
    pub candidates: Candidates<'a>,
    /// s, one over the temperature.
    pub scale: f32,
    /// Columns whose similarity exceeds the positive's by more than this are left out. They are not differentiated through.
    pub margin: Option<f32>,
}

/// What [`backward`] needs, and the losses.
#[derive(Clone, Debug)]
pub struct Tape {
    /// (B)
    pub losses: Vec<f32>,
    log_sums: Vec<f32>,  // (B) of s·qᵢ·cⱼ
    positives: Vec<f32>, // (B) qᵢ·cₚ₍ᵢ₎
}

/// Rows and columns of a tile: 256 KiB of similarities.
const TILE: (usize, usize) = (128, 512);

/// q (B, D) and c (M, D) → the loss of each row.
///
/// # Errors
/// Widths differ, or an index lies outside its range.
pub fn forward(q: &Tensor, c: &Tensor, rule: &InfoNce) -> Result<Tape> {
    let problem = Problem::new(q, c, rule)?;
    let (q, c) = (read::<f32>(q)?, read::<f32>(c)?);
    Ok(problem.forward(&q, &c, TILE))
}

/// The gradients of `weight`·Σ lossᵢ: dq (B, D) and dc (M, D).
pub fn backward(
    q: &Tensor,
    c: &Tensor,
    rule: &InfoNce,
    tape: &Tape,
    weight: f32,
) -> Result<(Tensor, Tensor)> {
    let problem = Problem::new(q, c, rule)?;
    let Problem { rows, columns, width, .. } = problem;
    if tape.losses.len() != rows {
        bail!("infonce: a tape of {} rows for {rows}", tape.losses.len());
    }
    let (q, c) = (read::<f32>(q)?, read::<f32>(c)?);
    let (dq, dc) = problem.backward(&q, &c, tape, weight, TILE);
    Ok((tensor(dq, (rows, width))?, tensor(dc, (columns, width))?))
}

struct Problem<'a> {
    rule: InfoNce<'a>,
    rows: usize,
    columns: usize,
    width: usize,
}

/// A row's running sum: Σ exp(xⱼ − highest).
#[derive(Clone, Copy)]
struct Running {
    highest: f32,
    sum: f32,
}

impl<'a> Problem<'a> {
    fn new(q: &Tensor, c: &Tensor, rule: &InfoNce<'a>) -> Result<Self> {
        let ((rows, width), (columns, other)) = (matrix("q", q)?, matrix("c", c)?);
        if width != other {
            bail!("infonce: q is {width} wide, c {other}");
        }
        if rule.positives.len() != rows || rule.positives.iter().any(|&p| p as usize >= columns) {
            bail!("infonce: {} positives for {rows} rows, each below {columns}", rule.positives.len());
        }
        if let Candidates::AllBut(lists) | Candidates::Only(lists) = rule.candidates {
            let Lists { offsets, columns: listed } = lists;
            let whole = offsets.len() == rows + 1
                && offsets.windows(2).all(|pair| pair[0] <= pair[1])
                && offsets.last().is_some_and(|&end| end as usize == listed.len());
            if !whole || listed.iter().any(|&j| j as usize >= columns) {
                bail!("infonce: lists of columns must be one a row, each column below {columns}");
            }
        }
        Ok(Self { rule: *rule, rows, columns, width })
    }

    fn forward(&self, q: &[f32], c: &[f32], tile: (usize, usize)) -> Tape {
        let d = self.width;
        let positives: Vec<f32> = (0..self.rows)
            .into_par_iter()
            .map(|i| vectorised(|| dot(&q[i * d..][..d], &c[self.rule.positives[i] as usize * d..][..d])))
            .collect();
        let log_sums: Vec<f32> = match self.rule.candidates {
            Candidates::Only(_) => (0..self.rows)
                .into_par_iter()
                .map(|i| {
                    let mut running = Running::start(self.rule.scale * positives[i]);
                    self.own(i, q, c, &positives, |_, x| running.add(x));
                    running.log_sum()
                })
                .collect(),
            _ => self
                .blocks(tile.0)
                .into_par_iter()
                .flat_map_iter(|(first, count)| {
                    let start = |i| Running::start(self.rule.scale * positives[first + i]);
                    let mut running: Vec<Running> = (0..count).map(start).collect();
                    self.tiles(first, count, q, c, &positives, tile.1, |scores, width| {
                        for (running, row) in running.iter_mut().zip(scores.chunks_exact(width)) {
                            vectorised(|| running.extend(row));
                        }
                    });
                    running.into_iter().map(|running| running.log_sum())
                })
                .collect(),
        };
        let losses = log_sums.iter().zip(&positives).map(|(sum, p)| sum - self.rule.scale * p).collect();
        Tape { losses, log_sums, positives }
    }

    fn backward(
        &self,
        q: &[f32],
        c: &[f32],
        tape: &Tape,
        weight: f32,
        tile: (usize, usize),
    ) -> (Vec<f32>, Vec<f32>) {
        let (d, share) = (self.width, weight * self.rule.scale);
        let (mut dq, mut dc) = (vec![0f32; self.rows * d], vec![0f32; self.columns * d]);
        let probability = |i: usize, x: f32| share * exp(x - tape.log_sums[i]);
        if let Candidates::Only(_) = self.rule.candidates {
            for i in 0..self.rows {
                let p = self.rule.positives[i] as usize;
                let mut pull = |j: usize, g: f32| {
                    let (qi, cj) = (&q[i * d..][..d], &c[j * d..][..d]);
                    dq[i * d..][..d].iter_mut().zip(cj).for_each(|(dq, c)| *dq += g * c);
                    dc[j * d..][..d].iter_mut().zip(qi).for_each(|(dc, q)| *dc += g * q);
                };
                pull(p, probability(i, self.rule.scale * tape.positives[i]) - share);
                self.own(i, q, c, &tape.positives, |j, x| pull(j, probability(i, x)));
            }
            return (dq, dc);
        }
        // Row blocks share dc: they come one after another, each on all threads, so that dc's sums have one order.
        let mut g = vec![0f32; tile.0 * tile.1];
        for (first, count) in self.blocks(tile.0) {
            for start in (0..self.columns).step_by(tile.1) {
                let width = tile.1.min(self.columns - start);
                let g = &mut g[..count * width];
                let (qs, cs) = (&q[first * d..][..count * d], &c[start * d..][..width * d]);
                self.scores(first, start, qs, cs, g, width, &tape.positives, Threads::All);
                g.par_chunks_mut(width).enumerate().for_each(|(r, row)| {
                    let i = first + r;
                    vectorised(|| row.iter_mut().for_each(|x| *x = probability(i, *x)));
                    let p = self.rule.positives[i] as usize;
                    if (start..start + width).contains(&p) {
                        row[p - start] = probability(i, self.rule.scale * tape.positives[i]) - share;
                    }
                });
                let g = Matrix::new(g, count, width);
                let dq = &mut dq[first * d..][..count * d];
                multiply(dq, d, 1.0, 1.0, g, Matrix::new(cs, width, d), Threads::All);
                let dc = &mut dc[start * d..][..width * d];
                multiply(dc, d, 1.0, 1.0, g.transposed(), Matrix::new(qs, count, d), Threads::All);
            }
        }
        (dq, dc)
    }

    /// Blocks of rows: the first and how many.
    fn blocks(&self, height: usize) -> Vec<(usize, usize)> {
        (0..self.rows).step_by(height).map(|first| (first, height.min(self.rows - first))).collect()
    }

    /// Calls `f(scores, columns)` on each tile of a block of rows, computed by this thread.
    fn tiles(
        &self,
        first: usize,
        count: usize,
        q: &[f32],
        c: &[f32],
        positives: &[f32],
        step: usize,
        mut f: impl FnMut(&[f32], usize),
    ) {
        let d = self.width;
        let mut scores = vec![0f32; count * step.min(self.columns)];
        for start in (0..self.columns).step_by(step) {
            let width = step.min(self.columns - start);
            let scores = &mut scores[..count * width];
            let (qs, cs) = (&q[first * d..][..count * d], &c[start * d..][..width * d]);
            self.scores(first, start, qs, cs, scores, width, positives, Threads::One);
            f(scores, width);
        }
    }

    /// One tile of s·qᵢ·cⱼ; −∞ where j does not count for i, and at the positive, which has its own place in every sum.
    fn scores(
        &self,
        first: usize,
        start: usize,
        q: &[f32],
        c: &[f32],
        scores: &mut [f32],
        width: usize,
        positives: &[f32],
        threads: Threads,
    ) {
        let (d, count, scale) = (self.width, scores.len() / width, self.rule.scale);
        multiply(
            scores,
            width,
            0.0,
            scale,
            Matrix::new(q, count, d),
            Matrix::new(c, width, d).transposed(),
            threads,
        );
        for (r, row) in scores.chunks_exact_mut(width).enumerate() {
            let i = first + r;
            if let Some(margin) = self.rule.margin {
                let most = scale * (positives[i] + margin);
                vectorised(|| {
                    row.iter_mut().for_each(|x| *x = if *x > most { f32::NEG_INFINITY } else { *x })
                });
            }
            if let Candidates::AllBut(lists) = self.rule.candidates {
                let listed = lists.of(i);
                let from = listed.partition_point(|&j| (j as usize) < start);
                for &j in listed[from..].iter().take_while(|&&j| (j as usize) < start + width) {
                    row[j as usize - start] = f32::NEG_INFINITY;
                }
            }
            let p = self.rule.positives[i] as usize;
            if (start..start + width).contains(&p) {
                row[p - start] = f32::NEG_INFINITY;
            }
        }
    }

    /// Calls `f(column, s·qᵢ·cⱼ)` on row i's own negatives.
    fn own(&self, i: usize, q: &[f32], c: &[f32], positives: &[f32], mut f: impl FnMut(usize, f32)) {
        let Candidates::Only(lists) = self.rule.candidates else { return };
        let d = self.width;
        for &j in lists.of(i).iter().filter(|&&j| j != self.rule.positives[i]) {
            let score = vectorised(|| dot(&q[i * d..][..d], &c[j as usize * d..][..d]));
            if self.rule.margin.is_none_or(|margin| score <= positives[i] + margin) {
                f(j as usize, self.rule.scale * score);
            }
        }
    }
}

impl<'a> Lists<'a> {
    fn of(&self, i: usize) -> &'a [u32] {
        &self.columns[self.offsets[i] as usize..self.offsets[i + 1] as usize]
    }
}

impl Running {
    /// With the positive's score alone.
    fn start(score: f32) -> Self {
        Self { highest: score, sum: 1.0 }
    }

    fn add(&mut self, score: f32) {
        self.extend(&[score]);
    }

    #[inline(always)]
    fn extend(&mut self, scores: &[f32]) {
        // A NaN is lost by `max` and found again by the sum.
        let highest = scores.iter().fold(self.highest, |highest, &x| highest.max(x));
        let mut lanes = [0f32; 16];
        let sixteens = scores.chunks_exact(16);
        let rest: f32 = sixteens.remainder().iter().map(|&x| exp(x - highest)).sum();
        for sixteen in sixteens {
            for (lane, &x) in lanes.iter_mut().zip(sixteen) {
                *lane += exp(x - highest);
            }
        }
        self.sum = self.sum * exp(self.highest - highest) + lanes.iter().sum::<f32>() + rest;
        self.highest = highest;
    }

    fn log_sum(self) -> f32 {
        self.highest + self.sum.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error, relative_error_f64};

    struct Case {
        rows: usize,
        columns: usize,
        width: usize,
        scale: f32,
        margin: Option<f32>,
    }

    /// Column lists that hold some columns of each row, its positive among them for every other row.
    fn lists(rows: usize, columns: usize) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
        let positives: Vec<u32> = (0..rows).map(|i| (i * 7 % columns) as u32).collect();
        let (mut offsets, mut listed) = (vec![0], Vec::new());
        for i in 0..rows {
            listed.extend(
                (0..columns as u32)
                    .filter(|&j| (j as usize + i) % 3 == 0 || (i % 2 == 0 && j == positives[i])),
            );
            offsets.push(listed.len() as u32);
        }
        (positives, offsets, listed)
    }

    fn counts(rule: &InfoNce, i: usize, j: usize, score: f64, positive: f64) -> bool {
        let p = rule.positives[i] as usize;
        let listed = |lists: Lists| lists.of(i).contains(&(j as u32));
        let member = match rule.candidates {
            Candidates::All => true,
            Candidates::AllBut(lists) => !listed(lists),
            Candidates::Only(lists) => listed(lists),
        };
        j == p || (member && rule.margin.is_none_or(|margin| score <= positive + f64::from(margin)))
    }

    fn reference(q: &[f64], c: &[f64], rule: &InfoNce, width: usize) -> Vec<f64> {
        let inner = |i: usize, j: usize| (0..width).map(|d| q[i * width + d] * c[j * width + d]).sum::<f64>();
        (0..rule.positives.len())
            .map(|i| {
                let positive = inner(i, rule.positives[i] as usize);
                let scale = f64::from(rule.scale);
                let scores: Vec<f64> = (0..c.len() / width)
                    .filter(|&j| counts(rule, i, j, inner(i, j), positive))
                    .map(|j| scale * inner(i, j))
                    .collect();
                let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                highest + scores.iter().map(|x| (x - highest).exp()).sum::<f64>().ln() - scale * positive
            })
            .collect()
    }

    fn unit(seed: u64, rows: usize, width: usize) -> Tensor {
        let x = random(seed, (rows, width));
        let norm = x.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
        x.broadcast_div(&norm).unwrap()
    }

    fn each_rule(case: &Case, mut f: impl FnMut(&InfoNce)) {
        let (positives, offsets, columns) = lists(case.rows, case.columns);
        let lists = Lists { offsets: &offsets, columns: &columns };
        for candidates in [Candidates::All, Candidates::AllBut(lists), Candidates::Only(lists)] {
            f(&InfoNce { positives: &positives, candidates, scale: case.scale, margin: case.margin });
        }
    }

    #[test]
    fn losses_and_gradients_are_those_of_f64_with_any_tiles() {
        for (case, tile) in [
            (Case { rows: 3, columns: 5, width: 4, scale: 20.0, margin: None }, TILE),
            (Case { rows: 7, columns: 9, width: 3, scale: 5.0, margin: Some(0.1) }, (2, 4)),
            (Case { rows: 1, columns: 1, width: 1, scale: 1.0, margin: None }, TILE),
        ] {
            let (q, c) = (unit(1, case.rows, case.width), unit(2, case.columns, case.width));
            let (q64, c64) = (numbers(&q), numbers(&c));
            each_rule(&case, |rule| {
                let problem = Problem::new(&q, &c, rule).unwrap();
                let (qs, cs) = (read::<f32>(&q).unwrap(), read::<f32>(&c).unwrap());
                let tape = problem.forward(&qs, &cs, tile);
                let losses: Vec<f64> = tape.losses.iter().map(|&loss| f64::from(loss)).collect();
                let want = reference(&q64, &c64, rule, case.width);
                // the difference of two numbers of size `scale`, rounded to f32
                let close =
                    losses.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6 * f64::from(case.scale));
                assert!(close, "{losses:?} {want:?}");
                let (dq, dc) = problem.backward(&qs, &cs, &tape, 0.5, tile);
                let f64s = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
                let total =
                    |q: &[f64], c: &[f64]| 0.5 * reference(q, c, rule, case.width).iter().sum::<f64>();
                // Where a row has no other column its gradient is 0, and finite differences leave noise.
                let close = |got: &[f64], want: &[f64]| {
                    inner(want, want) < 1e-18 || relative_error_f64(got, want) < 1e-5
                };
                assert!(close(&f64s(dq), &finite_difference(&q64, |q| total(q, &c64))));
                assert!(close(&f64s(dc), &finite_difference(&c64, |c| total(&q64, c))));
            });
        }
    }

    #[test]
    fn tiles_change_nothing_that_matters() {
        let case = Case { rows: 150, columns: 1023, width: 32, scale: 50.0, margin: Some(0.3) };
        let (q, c) = (unit(1, case.rows, case.width), unit(2, case.columns, case.width));
        each_rule(&case, |rule| {
            let tape = forward(&q, &c, rule).unwrap();
            let (dq, dc) = backward(&q, &c, rule, &tape, 1.0).unwrap();
            let problem = Problem::new(&q, &c, rule).unwrap();
            let (qs, cs) = (read::<f32>(&q).unwrap(), read::<f32>(&c).unwrap());
            let other = problem.forward(&qs, &cs, (1, 7));
            let (oq, oc) = problem.backward(&qs, &cs, &other, 1.0, (64, 100));
            let f64s = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
            assert!(relative_error_f64(&f64s(&tape.losses), &f64s(&other.losses)) < 1e-6);
            assert!(relative_error(&dq, &f64s(&oq)) < 1e-5 && relative_error(&dc, &f64s(&oc)) < 1e-5);
        });
    }

    #[test]
    fn extreme_temperatures_do_not_overflow_and_nan_stays() {
        let (q, c) = (unit(1, 4, 8), unit(2, 6, 8));
        let positives = [0, 1, 2, 3];
        let rule = InfoNce { positives: &positives, candidates: Candidates::All, scale: 1e4, margin: None };
        let tape = forward(&q, &c, &rule).unwrap();
        let (dq, _) = backward(&q, &c, &rule, &tape, 1.0).unwrap();
        assert!(
            tape.losses.iter().all(|loss| loss.is_finite()) && numbers(&dq).iter().all(|x| x.is_finite())
        );
        let bad = (&q * f64::NAN).unwrap();
        assert!(forward(&bad, &c, &rule).unwrap().losses.iter().all(|loss| loss.is_nan()));
    }

    #[test]
    fn no_rows_have_no_losses_and_wrong_indices_are_refused() {
        let (q, c) = (random(1, (0, 4)), random(2, (3, 4)));
        let rule = InfoNce { positives: &[], candidates: Candidates::All, scale: 1.0, margin: None };
        let tape = forward(&q, &c, &rule).unwrap();
        let (dq, dc) = backward(&q, &c, &rule, &tape, 1.0).unwrap();
        assert_eq!((dq.dims(), numbers(&dc)), (&[0, 4][..], vec![0.0; 12]));
        let q = random(1, (1, 4));
        assert!(forward(&q, &c, &InfoNce { positives: &[3], ..rule }).is_err());
        let lists = Lists { offsets: &[0, 1], columns: &[3] };
        let rule =
            InfoNce { positives: &[0], candidates: Candidates::AllBut(lists), scale: 1.0, margin: None };
        assert!(forward(&q, &c, &rule).is_err());
    }
}
