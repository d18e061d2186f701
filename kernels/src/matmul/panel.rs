//! The inside of a product: both factors are copied into panels that the microkernel reads from end to end.
//!
//! As in Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): a panel of b, two vectors wide, stays in
//! the first cache while panels of a, as high as a block of the microkernel, stream past it from the second.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{Matrix, Start, cut};
use crate::block::{Block, Onto, rows_of_pair};
use crate::simd;
use crate::tile::{split, transpose, transpose_four, with_scratch};

/// The shape of panels, by the vectors of this processor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    lanes: usize,
    /// Rows of a panel of a.
    pub(super) height: usize,
    /// Rows of b, and columns of a, that are summed up in registers before C is touched.
    pub(super) depth: usize,
}

/// Of a panel of b: three quarters of a first cache.
const PANEL_BYTES: usize = 24 << 10;

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

    /// Columns of a panel of b.
    pub(super) fn columns(self) -> usize {
        2 * self.lanes
    }
}

/// A factor b (K, N) in panels of some of its columns and all of its rows, one after another. The last one is filled up with zeros to
/// whole vectors.
pub(super) struct Panels<'a> {
    geometry: Geometry,
    rows: usize,
    columns: usize,
    elements: &'a [f32],
}

impl Panels<'_> {
    /// Hands `then` the panels of `b`.
    pub(super) fn pack(geometry: Geometry, b: Matrix, on_all_threads: bool, then: impl FnOnce(&Panels)) {
        let (rows, columns) = (b.rows, b.columns);
        with_scratch(|scratch| {
            let [elements] = split(scratch, [rows * columns.next_multiple_of(geometry.lanes)]);
            let size = (rows * geometry.columns()).max(1);
            let pack = |(i, panel): (usize, &mut [f32])| {
                let first = i * geometry.columns();
                let b = b.columns(first..columns.min(first + geometry.columns()));
                simd::vectorised(
                    #[inline(always)]
                    || pack_columns(panel, b, geometry.lanes),
                );
            };
            if on_all_threads {
                let grain = (simd::GRAIN / size).max(1);
                elements.par_chunks_mut(size).enumerate().with_min_len(grain).for_each(pack);
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

/// A panel of b: `lanes` or twice as many columns, beside each other in each of its rows.
#[inline(always)]
fn pack_columns(panel: &mut [f32], b: Matrix, lanes: usize) {
    let width = b.columns.next_multiple_of(lanes);
    if b.row_stride == 1 && lanes.is_multiple_of(4) {
        let column = |j: usize| &b.elements[j * b.column_stride..][..b.rows];
        transpose(panel, width, (b.columns, b.rows), lanes, 1.0, column);
        return;
    }
    for (l, row) in panel.chunks_exact_mut(width).enumerate() {
        let (row, rest) = row.split_at_mut(b.columns);
        let from = &b.elements[l * b.row_stride..];
        if b.column_stride == 1 {
            row.copy_from_slice(&from[..b.columns]);
        } else {
            row.iter_mut().enumerate().for_each(|(j, element)| *element = from[j * b.column_stride]);
        }
        rest.fill(0.0);
    }
}

/// Panels of a, one after another: `HEIGHT` rows, beside each other in each column. Rows that the last one lacks are arbitrary.
/// `panels` is three elements longer than they.
#[inline(always)]
fn pack_rows<const HEIGHT: usize>(panels: &mut [f32], a: Matrix) {
    let size = HEIGHT * a.columns;
    for first in (0..a.rows).step_by(HEIGHT) {
        let panel = &mut panels[first / HEIGHT * size..][..size + 3];
        let rows = HEIGHT.min(a.rows - first);
        if a.row_stride == 1 {
            for (l, column) in panel.chunks_exact_mut(HEIGHT).enumerate().take(a.columns) {
                let from = &a.elements[l * a.column_stride + first..];
                match from.first_chunk::<HEIGHT>() {
                    Some(from) => column.copy_from_slice(from),
                    None => column[..rows].copy_from_slice(&from[..rows]),
                }
            }
        } else {
            // From the last row up: of four rows beyond the height, what spills into the next column is then overwritten.
            for four in (0..rows).step_by(4).rev() {
                let row = |r: usize| match four + r < rows {
                    true => &a.elements[(first + four + r) * a.row_stride..][..a.columns],
                    false => &[],
                };
                transpose_four(&mut panel[four..], HEIGHT, 1.0, [row(0), row(1), row(2), row(3)]);
            }
        }
    }
}

/// Some rows and columns of a product.
pub(super) struct Piece<'a> {
    c: *mut f32,
    stride: usize,
    start: Start<'a>,
    scale: f32,
    a: Matrix<'a>,
    b: &'a Panels<'a>,
    columns: Range<usize>,
    scratch: &'a mut Vec<f32>,
}

impl Piece<'_> {
    /// `a` times `columns`, which start with a panel, of `b`: to `c`, whose rows are `stride` apart.
    ///
    /// # Safety
    /// `c` is valid for writes of the piece, and also for reads if some of what is there is kept.
    pub(super) unsafe fn compute(
        c: *mut f32,
        stride: usize,
        start: Start,
        scale: f32,
        a: Matrix,
        b: &Panels,
        columns: Range<usize>,
    ) {
        with_scratch(|scratch| simd::dispatch(Piece { c, stride, start, scale, a, b, columns, scratch }));
    }
}

impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { c, stride, start, scale, a, b, columns, scratch } = self;
        let Geometry { lanes, height, depth } = b.geometry;
        let width = b.geometry.columns();
        assert_eq!(lanes, S::F32_LANES, "panels for these vectors");
        // Where few columns read it, a is read in place.
        let in_place = columns.len() <= 2 * width;
        let blocks = a.rows.div_ceil(height);
        let [panels, corner] = split(
            scratch,
            [if in_place { 0 } else { blocks * height * depth.min(a.columns) + 3 }, height * width],
        );
        for k in cut(a.columns, depth) {
            let a = a.columns(k.clone());
            if !in_place {
                match height {
                    12 => pack_rows::<12>(panels, a),
                    _ => pack_rows::<6>(panels, a),
                }
            }
            for first in columns.clone().step_by(width) {
                let whole = width.min(b.columns.next_multiple_of(lanes) - first);
                let valid = width.min(columns.end - first);
                let panel = &b.elements[first * b.rows + k.start * whole..][..k.len() * whole];
                let onto = match (start, scale) {
                    (_, 1.0) if k.start > 0 => Onto::Sum,
                    (_, scale) if k.start > 0 => Onto::Scaled { keep: 1.0, scale },
                    (Start::Kept(0.0), 1.0) => Onto::Nothing,
                    (Start::Kept(1.0), 1.0) => Onto::Sum,
                    (Start::Kept(keep), scale) => Onto::Scaled { keep, scale },
                    (Start::Row(row), _) => Onto::Row(row[first - columns.start..].as_ptr()),
                };
                for row in (0..a.rows).step_by(height) {
                    let rows = height.min(a.rows - row);
                    let (elements, a_row, a_column) = if in_place {
                        (&a.elements[row * a.row_stride..], a.row_stride, a.column_stride)
                    } else {
                        (&panels[row * k.len()..], 1, height)
                    };
                    let block = Block {
                        k: k.len(),
                        a: elements.as_ptr(),
                        a_row,
                        a_column,
                        b: panel.as_ptr(),
                        b_row: whole,
                        c: c.wrapping_add(row * stride + first - columns.start),
                        c_row: stride,
                        onto,
                    };
                    // SAFETY: a `Matrix` lies inside its slice and a panel has `whole` elements, one or two vectors, in each of its
                    // rows; the caller vouches for C, and `corner` holds what would reach beyond it.
                    unsafe {
                        if valid == whole {
                            compute(simd, block, whole, rows);
                        } else {
                            let sums =
                                Block { c: corner.as_mut_ptr(), c_row: whole, onto: Onto::Nothing, ..block };
                            compute(simd, sums, whole, rows);
                            for (i, sums) in corner.chunks_exact(whole).enumerate().take(rows) {
                                block.write_row(i, &sums[..valid]);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`Block::compute`].
#[inline(always)]
unsafe fn compute<S: Simd>(simd: S, block: Block, columns: usize, rows: usize) {
    // SAFETY: handed on.
    unsafe {
        if columns == S::F32_LANES {
            block.compute::<S, 1>(simd, rows);
        } else {
            block.compute::<S, 2>(simd, rows);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a processor without AVX2 runs.
    #[test]
    fn products_without_vectors_are_the_same() {
        let (m, k, n) = (14, 5, 9);
        let a: Vec<f32> = (0..m * k).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
        let b: Vec<f32> = (0..k * n).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
        let mut c = vec![f32::NAN; m * n];
        let geometry = Geometry::of::<pulp::Scalar>();
        Panels::pack(geometry, Matrix::new(&b, k, n), false, |panels| {
            let start = Start::Kept(0.0);
            let (a, columns, mut scratch) = (Matrix::new(&a, m, k), 0..n, Vec::new());
            let (c, scratch) = (c.as_mut_ptr(), &mut scratch);
            Piece { c, stride: n, start, scale: 1.0, a, b: panels, columns, scratch }
                .with_simd(pulp::Scalar::new());
        });
        let sum = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum::<f32>();
        // Whole numbers, exact in f32.
        assert!((0..m).all(|i| (0..n).all(|j| c[i * n + j] == sum(i, j))));
    }
}
