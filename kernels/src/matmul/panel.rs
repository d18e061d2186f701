//! One piece of a matrix product: copies both factors into panels, which the microkernel reads sequentially.
//!
//! The method is that of Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008). A
//! panel of b is two vectors wide and stays in the L1 cache, while panels of a, as high as a block of the
//! microkernel, are streamed from the L2 cache. If a has few rows, packing b takes longer than the product:
//! this code is not meant for single tokens.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{Matrix, Start};
use crate::block::{Block, MOST_ROWS, MOST_ROWS_OF_16, RawStart, rows_of_pair};
use crate::simd;
use crate::tile::{split, transpose, transpose_four, with_scratch};

/// The sizes of the panels, which depend on the vector width of the processor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    lanes: usize,
    /// The rows of a panel of a.
    pub(super) height: usize,
    /// The maximum number of rows of b in a panel. The microkernel adds up their products in registers, and
    /// then updates C once.
    pub(super) depth: usize,
}

/// The size of a panel of b: five eighths of an L1 cache of 32 KiB, which leaves room for rows of a and of C.
const PANEL_BYTES: usize = 20 << 10;

impl Geometry {
    pub(super) fn of_processor() -> Self {
        struct Ask;
        impl WithSimd for Ask {
            type Output = Geometry;

            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> Geometry {
                Geometry::of::<S>()
            }
        }
        simd::dispatch(Ask)
    }

    fn of<S: Simd>() -> Self {
        let lanes = S::F32_LANES;
        Self { lanes, height: rows_of_pair::<S>(), depth: PANEL_BYTES / size_of::<f32>() / (2 * lanes) }
    }

    /// The columns of a panel of b.
    pub(super) fn columns(self) -> usize {
        2 * self.lanes
    }
}

/// A factor b (k, n), packed into consecutive panels. A panel has some of the columns and all rows of b; the
/// last one is padded with zeros to whole vectors.
pub(super) struct Panels<'a> {
    geometry: Geometry,
    rows: usize,
    columns: usize,
    elements: &'a [f32],
}

impl Panels<'_> {
    /// Packs `b` and calls `then` with the panels.
    pub(super) fn pack(geometry: Geometry, b: Matrix, on_all_threads: bool, then: impl FnOnce(&Panels)) {
        let (rows, columns) = (b.rows, b.columns);
        with_scratch(|scratch| {
            let [elements] = split(scratch, [rows * columns.next_multiple_of(geometry.lanes)]);
            let group = GROUP * geometry.columns();
            let pack = |(i, panels): (usize, &mut [f32])| {
                let b = b.columns(i * group..columns.min((i + 1) * group));
                simd::vectorised(
                    #[inline(always)]
                    || pack_columns(panels, b, geometry),
                );
            };
            let size = (rows * group).max(1);
            if on_all_threads {
                elements.par_chunks_mut(size).enumerate().with_max_len(1).for_each(pack);
            } else {
                elements.chunks_mut(size).enumerate().for_each(pack);
            }
            then(&Panels { geometry, rows, columns, elements });
        });
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }
}

/// The number of panels of b that are packed together, so that several cache lines of a row of b are read at
/// once.
const GROUP: usize = 8;

/// Packs columns of b into consecutive panels. A row of a panel holds two vectors of columns, or the
/// remaining ones.
#[inline(always)]
fn pack_columns(panels: &mut [f32], b: Matrix, geometry: Geometry) {
    let lanes = geometry.lanes;
    let size = (b.rows * geometry.columns()).max(1);
    if b.row_stride == 1 && lanes.is_multiple_of(4) {
        for (i, panel) in panels.chunks_mut(size).enumerate() {
            let first = i * geometry.columns();
            let columns = geometry.columns().min(b.columns - first);
            let width = columns.next_multiple_of(lanes);
            transpose(
                panel,
                width,
                (columns, b.rows),
                lanes,
                1.0,
                #[inline(always)]
                |j| &b.elements[(first + j) * b.column_stride..][..b.rows],
            );
        }
        return;
    }
    for l in 0..b.rows {
        let from = &b.elements[l * b.row_stride..];
        for first in (0..b.columns).step_by(geometry.columns()) {
            let columns = geometry.columns().min(b.columns - first);
            let width = columns.next_multiple_of(lanes);
            let row = &mut panels[first * b.rows + l * width..][..width];
            if b.column_stride == 1 && columns == width && lanes.is_multiple_of(4) {
                // Four elements at a time: for a copy of unknown length the compiler emits a function call.
                let (row, from) = (row.as_chunks_mut::<4>().0, from[first..][..width].as_chunks::<4>().0);
                row.iter_mut().zip(from).for_each(|(row, from)| *row = *from);
                continue;
            }
            for (j, element) in row.iter_mut().enumerate() {
                *element = if j < columns { from[(first + j) * b.column_stride] } else { 0.0 };
            }
        }
    }
}

/// Packs rows of a into consecutive panels. A column of a panel holds `HEIGHT` rows; missing rows of the last
/// panel have arbitrary values. `panels` must be [`SPILL`] elements longer than all panels.
#[inline(always)]
fn pack_rows<const HEIGHT: usize>(panels: &mut [f32], a: Matrix) {
    let size = HEIGHT * a.columns;
    if size == 0 {
        return;
    }
    if a.row_stride == 1 {
        // Column by column in the order of memory, not panel by panel, because columns may be far apart.
        for l in 0..a.columns {
            let column = &a.elements[l * a.column_stride..][..a.rows];
            let (whole, rest) = column.as_chunks::<HEIGHT>();
            for (i, rows) in whole.iter().enumerate() {
                panels[i * size + l * HEIGHT..][..HEIGHT].copy_from_slice(rows);
            }
            for (i, row) in rest.iter().enumerate() {
                panels[whole.len() * size + l * HEIGHT + i] = *row;
            }
        }
        return;
    }
    for first in (0..a.rows).step_by(HEIGHT) {
        let panel = &mut panels[first / HEIGHT * size..][..size + SPILL];
        let rows = HEIGHT.min(a.rows - first);
        // The last four rows can extend beyond the height, into the first elements of the next column of the
        // panel. So they are written first, and the first four rows then overwrite those elements.
        for four in (0..rows).step_by(4).rev() {
            let row = |r: usize| match four + r < rows {
                true => &a.elements[(first + four + r) * a.row_stride..][..a.columns],
                false => &[],
            };
            transpose_four(&mut panel[four..], HEIGHT, 1.0, [row(0), row(1), row(2), row(3)]);
        }
    }
}

/// The number of elements that a group of four rows can write behind the end of a panel.
const SPILL: usize = 3;

/// Some rows and columns of a product.
pub(super) struct Piece<'a> {
    c: *mut f32,
    stride: usize,
    start: Start<'a>,
    alpha: f32,
    a: Matrix<'a>,
    b: &'a Panels<'a>,
    columns: Range<usize>,
    scratch: &'a mut Vec<f32>,
}

impl Piece<'_> {
    /// Multiplies `a` by the columns `columns` of `b`, which must start with a panel, into `c`, whose rows
    /// are `stride` apart.
    ///
    /// # Safety
    /// `c` must be valid for writes of the piece, and for reads unless `start` is a bias or a beta of 0.
    ///
    /// # Panics
    /// If `start` is a bias that does not have an element for each column of the piece.
    pub(super) unsafe fn write(
        c: *mut f32,
        stride: usize,
        start: Start,
        alpha: f32,
        a: Matrix,
        b: &Panels,
        columns: Range<usize>,
    ) {
        if let Start::Bias(row) = start {
            assert_eq!(row.len(), columns.len(), "the bias has an element for each column of the piece");
        }
        with_scratch(|scratch| simd::dispatch(Piece { c, stride, start, alpha, a, b, columns, scratch }));
    }
}

impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { c, stride, start, alpha, a, b, columns, scratch } = self;
        let Geometry { lanes, height, .. } = b.geometry;
        let (depth, width) = (b.rows, b.geometry.columns());
        assert!(lanes == S::F32_LANES && depth == a.columns, "the panels fit the vectors and a");
        // With few columns, packing a takes longer than it saves.
        let in_place = columns.len() <= 2 * width;
        let packed = if in_place { 0 } else { a.rows.next_multiple_of(height) * depth + SPILL };
        let [panels, corner] = split(scratch, [packed, MOST_ROWS * width]);
        match height {
            _ if in_place => {}
            MOST_ROWS => pack_rows::<MOST_ROWS>(panels, a),
            MOST_ROWS_OF_16 => pack_rows::<MOST_ROWS_OF_16>(panels, a),
            _ => unreachable!("panels of {height} rows"),
        }
        for first in columns.clone().step_by(width) {
            let whole = width.min(b.columns.next_multiple_of(lanes) - first);
            let valid = width.min(columns.end - first);
            let panel = &b.elements[first * depth..][..depth * whole];
            let first = first - columns.start;
            let start = match start {
                Start::Beta(beta) => RawStart::Beta(beta),
                Start::Bias(row) => RawStart::Bias(row[first..].as_ptr()),
            };
            // A block that is one vector wide can and must be higher to keep the multipliers busy.
            let step = if in_place && whole == lanes { MOST_ROWS } else { height };
            for row in (0..a.rows).step_by(step) {
                let rows = step.min(a.rows - row);
                let (a, a_row, a_column) = if in_place {
                    (a.rows(row..row + rows).elements, a.row_stride, a.column_stride)
                } else {
                    (&panels[row * depth..], 1, height)
                };
                let (a, b, c) = (a.as_ptr(), panel.as_ptr(), c.wrapping_add(row * stride + first));
                let (k, b_row, c_row) = (depth, whole, stride);
                let block = Block { k, a, a_row, a_column, b, b_row, c, c_row, start, alpha };
                // A block that extends beyond C is computed in `corner` first.
                let inside = if valid == whole {
                    block
                } else {
                    Block {
                        c: corner.as_mut_ptr(),
                        c_row: whole,
                        start: RawStart::Beta(0.0),
                        alpha: 1.0,
                        ..block
                    }
                };
                // SAFETY: a `Matrix` lies inside its slice, and a row of the panel has `whole` elements, one
                // or two vectors. The caller guarantees that C is valid, and a bias has an element for each
                // of its columns.
                unsafe {
                    if whole == lanes {
                        inside.compute::<S, 1>(simd, rows);
                    } else {
                        inside.compute::<S, 2>(simd, rows);
                    }
                    if valid < whole {
                        for (i, sums) in corner.chunks_exact(whole).enumerate().take(rows) {
                            block.write_row(i, &sums[..valid]);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks products for one vector width, including those of other processors.
    fn products_are_right<S: Simd>(simd: S) {
        for (m, k, n) in [(14, 5, 9), (25, 30, 70), (3, 2, 40)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
            let mut c = vec![f32::NAN; m * n];
            Panels::pack(Geometry::of::<S>(), Matrix::new(&b, k, n), false, |panels| {
                let start = Start::Beta(0.0);
                let (a, columns, mut scratch) = (Matrix::new(&a, m, k), 0..n, Vec::new());
                let (c, scratch) = (c.as_mut_ptr(), &mut scratch);
                Piece { c, stride: n, start, alpha: 1.0, a, b: panels, columns, scratch }.with_simd(simd);
            });
            let sum = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum::<f32>();
            // Integers, which are exact in f32.
            assert!((0..m).all(|i| (0..n).all(|j| c[i * n + j] == sum(i, j))), "{m} {k} {n}");
        }
    }

    #[test]
    fn products_are_right_with_vectors_of_any_width() {
        products_are_right(pulp::Scalar::new());
        products_are_right(pulp::Scalar128b);
        products_are_right(pulp::Scalar512b);
    }

    #[test]
    fn panels_hold_the_rows_of_a_column_beside_each_other() {
        fn check<const HEIGHT: usize>(rows: usize, columns: usize) {
            let a: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let across: Vec<f32> = (0..rows * columns).map(|i| a[i % rows * columns + i / rows]).collect();
            for a in [Matrix::new(&a, rows, columns), Matrix::new(&across, columns, rows).transposed()] {
                let mut panels = vec![f32::NAN; rows.next_multiple_of(HEIGHT) * columns + SPILL];
                pack_rows::<HEIGHT>(&mut panels, a);
                for (r, l) in (0..rows).flat_map(|r| (0..columns).map(move |l| (r, l))) {
                    let place = r / HEIGHT * HEIGHT * columns + l * HEIGHT + r % HEIGHT;
                    assert_eq!(panels[place], (r * columns + l) as f32, "{rows} × {columns}: {r}, {l}");
                }
            }
        }
        for (rows, columns) in [(1, 1), (6, 3), (25, 7), (36, 5)] {
            check::<MOST_ROWS>(rows, columns);
            check::<MOST_ROWS_OF_16>(rows, columns);
        }
    }
}
