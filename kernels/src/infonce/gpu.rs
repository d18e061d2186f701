//! The GPU version of InfoNCE: cuBLASLt computes tiles of similarities, infonce.cu their softmax and its
//! gradient.
//!
//! Everything is f32 without TF32: an error of 1e-3 in a similarity is one of 0.05 in a logit at a
//! temperature of 0.02.

use super::{InfoNce, Problem, SortedIndices, Tape, Tile};
use crate::gpu::product::{Matrix, multiply_exactly};
use crate::gpu::{Memory, entries, zeros};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::ops::Range;
use std::ptr::{null, null_mut};

#[repr(C)]
struct Scores {
    scores: *mut f32,
    offsets: *const u32,
    positives: *const u32,
    excluded_offsets: *const u32,
    excluded: *const u32,
    positive_scores: *const f32,
    maxima: *mut f32,
    sums: *mut f64,
    losses: *mut f32,
    rows: i64,
    first: i64,
    columns: i32,
    scale: f32,
    margin: f32,
    gradient_factor: f32,
}

#[repr(C)]
struct ListedScores {
    q: *const f32,
    c: *const f32,
    rows: *const u32,
    columns: *const u32,
    values: *mut f32,
    count: i64,
    width: i32,
}

#[repr(C)]
struct ListedSums {
    from: *const f32,
    values: *const f32,
    offsets: *const u32,
    rows: *const u32,
    entries: *const u32,
    to: *mut f32,
    count: i64,
    width: i32,
}

entries! {
    infonce_sums(Scores);
    infonce_losses(Scores);
    infonce_gradients(Scores);
    listed_scores(ListedScores);
    listed_sums(ListedSums);
}

/// 32 MiB of similarities, which fit into the L2 cache of a large GPU.
const TILE: Tile = Tile { rows: 1024, columns: 8192 };

/// [`super::forward`].
pub(super) fn forward(q: &Tensor, c: &Tensor, infonce: &InfoNce) -> Result<Tape> {
    forward_in(TILE, q, c, infonce)
}

/// [`super::backward`].
pub(super) fn backward(
    q: &Tensor,
    c: &Tensor,
    infonce: &InfoNce,
    tape: &Tape,
    weight: f32,
) -> Result<(Tensor, Tensor)> {
    backward_in(TILE, q, c, infonce, tape, weight)
}

fn forward_in(tile: Tile, q: &Tensor, c: &Tensor, infonce: &InfoNce) -> Result<Tape> {
    let job = Job::new(tile, q, c, infonce)?;
    let rows = job.problem.rows;
    if rows == 0 {
        let none = zeros(0, DType::F32, &job.device)?;
        return Ok(Tape { losses: none.clone(), positive_scores: none });
    }
    let device = &job.device;
    let every: Vec<u32> = (0..rows as u32).collect();
    let positive_scores = job.listed(&every, infonce.positives)?.tensor(rows)?;
    let losses = Memory::new(device, DType::F32, rows)?;
    let (maxima, sums) = (Tensor::zeros(rows, DType::F32, device)?, Tensor::zeros(rows, DType::F64, device)?);
    let (maxima, sums) = (Memory::mutable(&maxima)?, Memory::mutable(&sums)?);
    let state = State { positive_scores: Memory::of(&positive_scores)?, losses, maxima, sums };
    job.for_each(&state, 0.0, |scores, _| {
        // SAFETY: the buffers have the sizes of the checked arguments.
        unsafe { infonce_sums(device, scores) }
    })?;
    let arguments = job.arguments(&state, 0, rows, 0.0);
    // SAFETY: the buffers have the sizes of the checked arguments.
    unsafe { infonce_losses(device, &arguments)? };
    Ok(Tape { losses: state.losses.tensor(rows)?, positive_scores })
}

fn backward_in(
    tile: Tile,
    q: &Tensor,
    c: &Tensor,
    infonce: &InfoNce,
    tape: &Tape,
    weight: f32,
) -> Result<(Tensor, Tensor)> {
    let job = Job::new(tile, q, c, infonce)?;
    let (rows, candidates, width) = (job.problem.rows, job.problem.candidates, job.problem.width);
    tape.expect(rows)?;
    let device = &job.device;
    let dq = zeros((rows, width), DType::F32, device)?;
    let dc = zeros((candidates, width), DType::F32, device)?;
    if rows == 0 {
        return Ok((dq, dc));
    }
    {
        let state = State {
            positive_scores: Memory::of(&tape.positive_scores)?,
            losses: Memory::of(&tape.losses)?,
            maxima: Memory::new(device, DType::F32, 0)?,
            sums: Memory::new(device, DType::F64, 0)?,
        };
        let (to_q, to_c) = (Memory::mutable(&dq)?, Memory::mutable(&dc)?);
        let f32s = |memory, rows| Matrix::new(memory, rows, width, DType::F32);
        job.for_each(&state, weight * infonce.scale, |scores, block| {
            // SAFETY: the buffers have the sizes of the checked arguments.
            unsafe { infonce_gradients(device, scores)? };
            match block {
                ScoreBlock::Tile { band, panel, scores } => {
                    let g = Matrix::new(scores, band.len(), panel.len(), DType::F32);
                    let c = f32s(&job.c, candidates).rows(panel.start, panel.len());
                    multiply_exactly(device, f32s(&to_q, rows).rows(band.start, band.len()), 1.0, 1.0, g, c)?;
                    let q = f32s(&job.q, rows).rows(band.start, band.len());
                    let to = f32s(&to_c, candidates).rows(panel.start, panel.len());
                    multiply_exactly(device, to, 1.0, 1.0, g.transposed(), q)
                }
                ScoreBlock::Listed { lists, scores } => {
                    job.sum_lists(scores, &lists.offsets, &lists.columns, None, &job.c, &to_q)?;
                    // The entries by column, in the order of the rows.
                    let mut by_column: Vec<Vec<(u32, u32)>> = vec![Vec::new(); candidates];
                    for i in 0..rows {
                        for (&j, entry) in lists.of(i).iter().zip(lists.offsets[i]..) {
                            by_column[j as usize].push((i as u32, entry as u32));
                        }
                    }
                    let mut offsets = vec![0];
                    let (mut from, mut entries) = (Vec::new(), Vec::new());
                    for column in by_column {
                        for (i, entry) in column {
                            from.push(i);
                            entries.push(entry);
                        }
                        offsets.push(from.len());
                    }
                    job.sum_lists(scores, &offsets, &from, Some(&entries), &job.q, &to_c)
                }
            }
        })?;
    }
    Ok((dq, dc))
}

/// The checked arguments on the device.
struct Job<'a> {
    problem: Problem<'a>,
    device: Device,
    q: Memory,
    c: Memory,
    positives: Memory,
    excluded: Option<(Memory, Memory)>,
}

/// The state of each row, `(B)` each: see `Scores` of infonce.cu.
struct State {
    positive_scores: Memory,
    losses: Memory,
    maxima: Memory,
    sums: Memory,
}

/// The similarities of some rows: a tile of the matrix, or the listed columns of all rows.
enum ScoreBlock<'a> {
    Tile { band: Range<usize>, panel: Range<usize>, scores: &'a Memory },
    Listed { lists: &'a SortedIndices, scores: &'a Memory },
}

impl<'a> Job<'a> {
    fn new(tile: Tile, q: &Tensor, c: &Tensor, infonce: &'a InfoNce<'a>) -> Result<Self> {
        let problem = Problem::new(tile, q, c, infonce)?;
        if q.dtype() != DType::F32 || c.dtype() != DType::F32 {
            bail!("the queries are of {:?} and the candidates of {:?}, expected F32", q.dtype(), c.dtype());
        }
        let device = q.device().clone();
        let positives: Vec<u32> = match &problem.only {
            // With lists: the index of the positive in the list of its row.
            Some(lists) => (0..problem.rows)
                .map(|i| problem.positive_in(lists, i).map_or(u32::MAX, |at| at as u32))
                .collect(),
            None => infonce.positives.to_vec(),
        };
        let excluded = match &problem.excluded {
            Some(excluded) => {
                Some((upload(&device, &excluded.offsets)?, Memory::upload(&device, &excluded.columns)?))
            }
            None => None,
        };
        let positives = Memory::upload(&device, &positives)?;
        Ok(Self { q: Memory::of(q)?, c: Memory::of(c)?, problem, device, positives, excluded })
    }

    /// The similarities of the pairs (`rows[e]`, `columns[e]`).
    fn listed(&self, rows: &[u32], columns: &[u32]) -> Result<Memory> {
        let values = Memory::new(&self.device, DType::F32, rows.len())?;
        if rows.is_empty() {
            return Ok(values);
        }
        let (rows_memory, columns) =
            (Memory::upload(&self.device, rows)?, Memory::upload(&self.device, columns)?);
        let arguments = ListedScores {
            q: self.q.pointer(),
            c: self.c.pointer(),
            rows: rows_memory.pointer(),
            columns: columns.pointer(),
            values: values.pointer(),
            count: rows.len() as i64,
            width: self.problem.width as i32,
        };
        // SAFETY: `Problem::new` has checked the rows and the columns.
        unsafe { listed_scores(&self.device, &arguments)? };
        Ok(values)
    }

    /// Sets each row of `to` to Σ value · row of `from`, over the entries of that row.
    fn sum_lists(
        &self,
        values: &Memory,
        offsets: &[usize],
        rows: &[u32],
        entries: Option<&[u32]>,
        from: &Memory,
        to: &Memory,
    ) -> Result<()> {
        let (offsets_memory, rows) = (upload(&self.device, offsets)?, Memory::upload(&self.device, rows)?);
        let entries = entries.map(|entries| Memory::upload(&self.device, entries)).transpose()?;
        let arguments = ListedSums {
            from: from.pointer(),
            values: values.pointer(),
            offsets: offsets_memory.pointer(),
            rows: rows.pointer(),
            entries: crate::gpu::pointer(entries.as_ref()),
            to: to.pointer(),
            count: offsets.len() as i64 - 1,
            width: self.problem.width as i32,
        };
        // SAFETY: `SortedIndices` has checked the rows and the columns.
        unsafe { listed_sums(&self.device, &arguments) }
    }

    fn arguments(&self, state: &State, first: usize, rows: usize, gradient_factor: f32) -> Scores {
        let infonce = self.problem.infonce;
        let (excluded_offsets, excluded) = match &self.excluded {
            Some((offsets, columns)) => {
                (offsets.pointer::<u32>().wrapping_add(first).cast_const(), columns.pointer())
            }
            None => (null(), null_mut::<u32>()),
        };
        Scores {
            scores: null_mut(),
            offsets: null(),
            positives: self.positives.pointer::<u32>().wrapping_add(first),
            excluded_offsets,
            excluded,
            positive_scores: state.positive_scores.pointer::<f32>().wrapping_add(first),
            maxima: state.maxima.pointer::<f32>().wrapping_add(first),
            sums: state.sums.pointer::<f64>().wrapping_add(first),
            losses: state.losses.pointer::<f32>().wrapping_add(first),
            rows: rows as i64,
            first: 0,
            columns: 0,
            scale: infonce.scale,
            margin: infonce.margin.unwrap_or(f32::INFINITY),
            gradient_factor,
        }
    }

    /// Calls `f` for one block of similarities at a time, with the arguments of a kernel that reads or
    /// changes it.
    fn for_each(
        &self,
        state: &State,
        gradient_factor: f32,
        mut f: impl FnMut(&Scores, ScoreBlock) -> Result<()>,
    ) -> Result<()> {
        let Problem { tile, rows, candidates, width, .. } = self.problem;
        if let Some(lists) = &self.problem.only {
            let of_row = |i: usize| std::iter::repeat_n(i as u32, lists.of(i).len());
            let entry_rows: Vec<u32> = (0..rows).flat_map(of_row).collect();
            let scores = self.listed(&entry_rows, &lists.columns)?;
            let offsets = upload(&self.device, &lists.offsets)?;
            let mut arguments = self.arguments(state, 0, rows, gradient_factor);
            (arguments.scores, arguments.offsets) = (scores.pointer(), offsets.pointer());
            return f(&arguments, ScoreBlock::Listed { lists, scores: &scores });
        }
        let room = tile.rows.min(rows) * tile.columns.min(candidates);
        let scores = Memory::new(&self.device, DType::F32, room)?;
        for top in (0..rows).step_by(tile.rows) {
            let band = top..rows.min(top + tile.rows);
            for left in (0..candidates).step_by(tile.columns) {
                let panel = left..candidates.min(left + tile.columns);
                let to = Matrix::new(&scores, band.len(), panel.len(), DType::F32);
                let q = Matrix::new(&self.q, rows, width, DType::F32).rows(top, band.len());
                let c = Matrix::new(&self.c, candidates, width, DType::F32).rows(left, panel.len());
                multiply_exactly(&self.device, to, 0.0, 1.0, q, c.transposed())?;
                let mut arguments = self.arguments(state, top, band.len(), gradient_factor);
                arguments.scores = scores.pointer();
                (arguments.first, arguments.columns) = (left as i64, panel.len() as i32);
                f(&arguments, ScoreBlock::Tile { band: band.clone(), panel, scores: &scores })?;
            }
        }
        Ok(())
    }
}

fn upload(device: &Device, offsets: &[usize]) -> Result<Memory> {
    let offsets: Vec<u32> = offsets.iter().map(|&offset| offset as u32).collect();
    Memory::upload(device, &offsets)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{reference, reference_backward};
    use super::super::{Candidates, CsrIndices};
    use super::*;
    use crate::testing::{numbers, relative_error, relative_error_f64, test_device, to_test_device};

    fn unit(seed: u64, rows: usize, width: usize) -> Tensor {
        to_test_device(&super::super::tests::unit(seed, rows, width))
    }

    #[test]
    fn losses_and_gradients_equal_the_reference_for_all_candidates() {
        let small = Tile { rows: 2, columns: 3 };
        for (rows, candidates, width) in [(1, 1, 1), (3, 7, 5), (5, 11, 33), (9, 300, 4)] {
            let (q, c) = (unit(1, rows, width), unit(2, candidates, width));
            let positives: Vec<u32> = (0..rows).map(|i| (i * 7 % candidates) as u32).collect();
            // Row 0 lists its own positive and a column, row 1 nothing, the others three entries with a
            // repetition.
            let offsets: Vec<u32> =
                (0..=rows as u32).map(|i| if i < 2 { 2 * i.min(1) } else { 3 * i - 4 }).collect();
            let named = *offsets.last().unwrap();
            let columns: Vec<u32> = (0..named).map(|e| e * 5 % candidates as u32).collect();
            let lists = CsrIndices { offsets: &offsets, columns: &columns };
            for list in [Candidates::All, Candidates::AllBut(lists), Candidates::Only(lists)] {
                for margin in [None, Some(0.1)] {
                    let infonce = InfoNce { positives: &positives, candidates: list, scale: 20.0, margin };
                    let name = format!("{rows} {candidates} {width} {list:?} {margin:?}");
                    let (qs, cs) = (numbers(&q), numbers(&c));
                    let (want, _) = reference(&qs, &cs, width, &infonce);
                    let want_both = reference_backward(&qs, &cs, width, &infonce, 0.5);
                    for tile in [small, TILE] {
                        let tape = forward_in(tile, &q, &c, &infonce).unwrap();
                        let losses = numbers(&tape.losses);
                        // Similarities in f32, multiplied by a scale of 20.
                        assert!(relative_error_f64(&losses, &want) < 1e-5, "{name}: {losses:?} {want:?}");
                        let (dq, dc) = backward_in(tile, &q, &c, &infonce, &tape, 0.5).unwrap();
                        for (got, want) in [dq, dc].iter().zip(&want_both) {
                            assert!(relative_error(got, want) < 2e-5, "{name}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn no_rows_are_no_work() {
        let (empty, c) = (zeros((0, 4), DType::F32, test_device()).unwrap(), unit(2, 3, 4));
        let infonce = InfoNce { positives: &[], candidates: Candidates::All, scale: 20.0, margin: None };
        let tape = forward(&empty, &c, &infonce).unwrap();
        let (dq, dc) = backward(&empty, &c, &infonce, &tape, 1.0).unwrap();
        assert_eq!((dq.dims(), numbers(&dc)), (&[0, 4][..], vec![0.0; 12]));
    }

    #[test]
    fn a_nan_reaches_its_row() {
        let mut rows = unit(1, 3, 4).to_vec2::<f32>().unwrap();
        rows[1][0] = f32::NAN;
        let (q, c) = (Tensor::new(rows, test_device()).unwrap(), unit(2, 3, 4));
        let infonce =
            InfoNce { positives: &[0, 1, 2], candidates: Candidates::All, scale: 20.0, margin: None };
        let tape = forward(&q, &c, &infonce).unwrap();
        let losses = numbers(&tape.losses);
        assert!(losses[0].is_finite() && losses[1].is_nan() && losses[2].is_finite());
    }
}
