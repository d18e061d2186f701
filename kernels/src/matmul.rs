//! The matrix product: the `gemm` crate on slices.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

/// A matrix in a slice, read by strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    elements: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `columns` elements, end to end.
    pub(crate) fn new(elements: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(elements, rows, columns, columns)
    }

    /// Rows whose starts are `stride` elements apart: some columns of a wider matrix.
    ///
    /// # Panics
    /// If the slice is shorter than the matrix: ops check the shapes that input can reach.
    pub(crate) fn strided(elements: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(extent(rows, columns, stride) <= elements.len(), "a matrix inside its slice");
        Self { elements, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// Some of its rows.
    fn rows(self, range: Range<usize>) -> Self {
        Self { elements: &self.elements[range.start * self.row_stride..], rows: range.len(), ..self }
    }

    /// Some of its columns.
    fn columns(self, range: Range<usize>) -> Self {
        Self { elements: &self.elements[range.start * self.column_stride..], columns: range.len(), ..self }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Self {
            elements: self.elements,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// Who computes a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The caller alone: it is already one of many tasks.
    One,
    /// All threads of the pool.
    All,
}

/// `dst = keep·dst + scale·a·b`, where the starts of dst's rows are `stride` elements apart. With `keep` 0, dst is
/// not read: a NaN in it does not stay.
///
/// # Panics
/// If the inner dimensions differ, or `dst` is shorter than the result: ops check the shapes that input can reach.
pub(crate) fn multiply(
    dst: &mut [f32],
    stride: usize,
    keep: f32,
    scale: f32,
    a: Matrix,
    b: Matrix,
    threads: Threads,
) {
    assert!(extent(a.rows, b.columns, stride) <= dst.len(), "a product inside its slice");
    // SAFETY: the result lies in `dst`, as just checked, and its elements are initialised, so they may be read.
    unsafe { gemm(dst.as_mut_ptr(), stride, keep, scale, a, b, threads) }
}

/// `a·b`, rows end to end, on all threads.
pub(crate) fn product(a: Matrix, b: Matrix) -> Vec<f32> {
    let len = a.rows * b.columns;
    let mut dst = Vec::with_capacity(len);
    // SAFETY: the capacity holds the result; with `keep` 0 its elements are only written, and each of them is.
    unsafe {
        gemm(dst.as_mut_ptr(), b.columns, 0.0, 1.0, a, b, Threads::All);
        dst.set_len(len);
    }
    dst
}

/// # Safety
/// `dst` is valid for writes of the whole result, and also for reads unless `keep` is 0.
unsafe fn gemm(dst: *mut f32, stride: usize, keep: f32, scale: f32, a: Matrix, b: Matrix, threads: Threads) {
    assert_eq!(a.columns, b.rows, "the inner dimensions of a product");
    let (rows, columns) = (a.rows, b.columns);
    let dst = Target(dst);
    // One join a product: `gemm` itself would share out each of its blocks. Both factors are packed by every thread, so the
    // longer side is cut and the smaller factor packed twice.
    let by_rows = rows >= columns;
    let (length, tile) = if by_rows { (rows, TILE_ROWS) } else { (columns, TILE_COLUMNS) };
    let pieces = match threads {
        Threads::All if rows * columns * a.columns >= WORTH_A_THREAD => pieces(length),
        _ => 1,
    };
    let step = length.div_ceil(pieces).next_multiple_of(tile);
    let piece = |start: usize| {
        let range = start..length.min(start + step);
        // SAFETY: a `Matrix` lies inside its slice, and the caller vouches for `dst`; no reference to it exists here, and no
        // other piece has these rows or columns of it.
        unsafe {
            if by_rows {
                one(dst.at(start * stride), stride, keep, scale, a.rows(range), b);
            } else {
                one(dst.at(start), stride, keep, scale, a, b.columns(range));
            }
        }
    };
    if step >= length {
        piece(0);
    } else {
        (0..length.div_ceil(step)).into_par_iter().for_each(|i| piece(i * step));
    }
}

/// Multiplications below which a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 1 << 18;
/// Rows and columns of which a piece has a multiple: whole tiles of `gemm`'s microkernels (6 rows; 2 or 4 vectors of up to 16).
const TILE_ROWS: usize = 6;
const TILE_COLUMNS: usize = 64;

/// Into how many pieces a side of this length is cut: as many for every thread, several if they stay so long that packing the
/// other factor costs little beside the product. Then a thread that is held up leaves some of its share to the others.
fn pieces(length: usize) -> usize {
    let threads = rayon::current_num_threads();
    threads * (length / (256 * threads)).clamp(1, 4)
}

/// Where a product goes, in several pieces at once.
#[derive(Clone, Copy)]
struct Target(*mut f32);

// SAFETY: only an address; who writes through it vouches for that.
unsafe impl Send for Target {}
// SAFETY: see above.
unsafe impl Sync for Target {}

impl Target {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// # Safety
/// As [`gemm`].
unsafe fn one(dst: *mut f32, stride: usize, keep: f32, scale: f32, a: Matrix, b: Matrix) {
    // SAFETY: handed on.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            dst,
            1,
            stride as isize,
            keep != 0.0,
            a.elements.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.elements.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Elements from the first to one past the last of a matrix.
fn extent(rows: usize, columns: usize, stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{numbers, random, relative_error};
    use candle_core::{Device, Tensor};

    fn reference(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
        let mut c = vec![0.0; m * n];
        for (i, c) in c.iter_mut().enumerate() {
            *c = (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum();
        }
        c
    }

    #[test]
    fn products_equal_the_reference_for_odd_and_empty_shapes() {
        for (m, k, n) in [(1, 1, 1), (3, 7, 5), (7, 1023, 3), (65, 33, 17), (3, 0, 2), (0, 3, 2), (2, 3, 0)] {
            let (a, b) = (random(1, (m, k)), random(2, (k, n)));
            let (x, y) =
                (a.flatten_all().unwrap().to_vec1().unwrap(), b.flatten_all().unwrap().to_vec1().unwrap());
            let c = product(Matrix::new(&x, m, k), Matrix::new(&y, k, n));
            let c = Tensor::from_vec(c, (m, n), &Device::Cpu).unwrap();
            // k additions in f32 err by about √k half ulp of the result.
            assert!(
                relative_error(&c, &reference(&numbers(&a), &numbers(&b), m, k, n)) < 1e-6,
                "{m} {k} {n}"
            );
        }
    }

    #[test]
    fn a_window_of_a_wider_matrix_is_multiplied_transposed_and_added() {
        // Columns 1 and 2 of a 2×4 matrix, transposed, times a column; into column 1 of a 2×3 matrix.
        let wide = [9., 1., 2., 9., 9., 3., 4., 9.];
        let mut dst = [0., 1., 0., 0., 1., 0.];
        let a = Matrix::strided(&wide[1..], 2, 2, 4).transposed();
        let b = [10., 100.];
        multiply(&mut dst[1..], 3, 2.0, 0.5, a, Matrix::new(&b, 2, 1), Threads::One);
        assert_eq!(dst, [0., 2. + 155., 0., 0., 2. + 210., 0.]);
    }

    #[test]
    fn what_is_not_kept_is_not_read() {
        let mut dst = [f32::NAN];
        multiply(&mut dst, 1, 0.0, 1.0, Matrix::new(&[2.], 1, 1), Matrix::new(&[3.], 1, 1), Threads::All);
        assert_eq!(dst, [6.0]);
    }
}
