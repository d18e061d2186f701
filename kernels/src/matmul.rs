//! The matrix product: divides it into pieces for the threads; `panel` computes a piece.

mod panel;

use std::ops::Range;

use rayon::prelude::*;

use self::panel::{Geometry, Panels, Piece};

/// A view of a slice as a matrix. One of its two strides is 1.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    elements: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix of `rows` rows of `columns` elements, without gaps.
    pub(crate) fn new(elements: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(elements, rows, columns, columns)
    }

    /// A matrix whose rows are `stride` elements apart, such as some columns of a wider matrix.
    ///
    /// # Panics
    /// If the slice is shorter than the matrix. No input can cause that, because the ops check the shapes of
    /// their tensors.
    pub(crate) fn strided(elements: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(extent(rows, columns, stride) <= elements.len(), "the slice is shorter than the matrix");
        Self { elements, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// The rows `range`.
    fn rows(self, range: Range<usize>) -> Self {
        Self { elements: self.from(range.start * self.row_stride), rows: range.len(), ..self }
    }

    /// The columns `range`.
    fn columns(self, range: Range<usize>) -> Self {
        Self { elements: self.from(range.start * self.column_stride), columns: range.len(), ..self }
    }

    /// The elements from `offset` on; none if the matrix is empty.
    fn from(self, offset: usize) -> &'a [f32] {
        &self.elements[offset.min(self.elements.len())..]
    }

    /// The transpose, without a copy.
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

/// The threads that compute a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// Only the calling thread, for a caller that is one of many tasks.
    One,
    /// All threads of the current thread pool.
    All,
}

/// Computes `dst = beta·dst + alpha·a·b`, where the rows of `dst` are `stride` elements apart.
///
/// As in BLAS, `dst` is not read if `beta` is 0, so that a NaN in it has no effect.
///
/// # Panics
/// If the inner dimensions differ, the rows of `dst` overlap, or `dst` is shorter than the result. No input
/// can cause that, because the ops check the shapes of their tensors.
pub(crate) fn multiply(
    dst: &mut [f32],
    stride: usize,
    beta: f32,
    alpha: f32,
    a: Matrix,
    b: Matrix,
    threads: Threads,
) {
    assert!(extent(a.rows, b.columns, stride) <= dst.len(), "`dst` is shorter than the product");
    assert!(a.rows < 2 || b.columns <= stride, "the rows of `dst` overlap");
    // SAFETY: the assertions have checked that the result lies in `dst`, whose elements are initialised and
    // may be read.
    unsafe { write(Target(dst.as_mut_ptr()), stride, Start::Beta(beta), alpha, a, b, threads) }
}

/// Returns `a·b` without gaps between the rows, computed on all threads.
pub(crate) fn product(a: Matrix, b: Matrix) -> Vec<f32> {
    new_product(a, b, Start::Beta(0.0))
}

/// Like [`product`], with `bias` added to each row.
///
/// # Panics
/// If `bias` does not have an element for each column.
pub(crate) fn product_and_bias(a: Matrix, b: Matrix, bias: &[f32]) -> Vec<f32> {
    assert_eq!(bias.len(), b.columns, "the bias has an element for each column");
    new_product(a, b, Start::Bias(bias))
}

fn new_product(a: Matrix, b: Matrix, start: Start) -> Vec<f32> {
    let len = a.rows * b.columns;
    let mut dst = Vec::with_capacity(len);
    // SAFETY: the capacity is the size of the result. With these two starts `write` reads no element and
    // writes all of them.
    unsafe {
        write(Target(dst.as_mut_ptr()), b.columns, start, 1.0, a, b, Threads::All);
        dst.set_len(len);
    }
    dst
}

/// What the product is added to.
#[derive(Clone, Copy)]
enum Start<'a> {
    /// beta times the present values of the result; with 0 they are not read.
    Beta(f32),
    /// The same bias in each row.
    Bias(&'a [f32]),
}

impl Start<'_> {
    fn columns(self, range: Range<usize>) -> Self {
        match self {
            Self::Beta(_) => self,
            Self::Bias(row) => Self::Bias(&row[range]),
        }
    }
}

/// Computes a product into `dst`.
///
/// # Safety
/// `dst` must be valid for writes of the whole result, and for reads unless `start` is a bias or a beta of 0.
/// The rows of the result must not overlap.
unsafe fn write(
    dst: Target,
    stride: usize,
    start: Start,
    alpha: f32,
    a: Matrix,
    b: Matrix,
    threads: Threads,
) {
    assert_eq!(a.columns, b.rows, "the inner dimensions of a product are equal");
    let threads = match threads {
        Threads::All if a.rows * b.columns * a.columns >= WORTH_A_THREAD => rayon::current_num_threads(),
        _ => 1,
    };
    let geometry = Geometry::of_processor();
    for k in cut(a.columns, geometry.depth, 1) {
        let start = if k.start == 0 { start } else { Start::Beta(1.0) };
        let (a, b) = (a.columns(k.clone()), b.rows(k.clone()));
        for columns in cut(b.columns, PACKED / k.len().max(1), geometry.columns()) {
            let start = start.columns(columns.clone());
            let dst = Target(dst.at(columns.start));
            Panels::pack(geometry, b.columns(columns), threads > 1, |b| {
                let grid = Grid::new(geometry, a.rows, b.columns(), threads);
                let piece = |i: usize| {
                    let (rows, columns) = grid.piece(i);
                    let c = dst.at(rows.start * stride + columns.start);
                    let start = start.columns(columns.clone());
                    // SAFETY: the caller guarantees that `dst` is valid, and no other piece has the same rows
                    // and columns.
                    unsafe { Piece::write(c, stride, start, alpha, a.rows(rows), b, columns) };
                };
                if threads > 1 {
                    (0..grid.pieces()).into_par_iter().with_max_len(1).for_each(piece);
                } else {
                    (0..grid.pieces()).for_each(piece);
                }
            });
        }
    }
}

/// The number of multiplications below which a second thread costs more time than it saves.
const WORTH_A_THREAD: usize = 1 << 18;
/// The number of elements of b that are packed at a time: 4 MiB.
const PACKED: usize = 1 << 20;
/// A piece has at least the rows of `LEAST_BLOCKS` blocks, to reuse a panel of b that is in the L1 cache, and
/// at most `MOST_ROWS` rows, so that its panels of a fit into the L2 cache.
const LEAST_BLOCKS: usize = 4;
const MOST_ROWS: usize = 128;

/// The division of a product into pieces, one for each task.
struct Grid {
    rows: usize,
    columns: usize,
    row_step: usize,
    column_step: usize,
}

impl Grid {
    /// Divides a product into several pieces per thread, so that other threads can take over the pieces of a
    /// slow one. Each piece packs its rows of a, so the columns are divided only if there are too few rows.
    fn new(geometry: Geometry, rows: usize, columns: usize, threads: usize) -> Self {
        let (height, width) = (geometry.height, geometry.columns());
        let wanted = if threads > 1 { 4 * threads } else { 1 };
        let row_step = rows
            .div_ceil(wanted)
            .next_multiple_of(height)
            .clamp(LEAST_BLOCKS * height, MOST_ROWS / height * height);
        let cuts = (wanted / 2).div_ceil(rows.div_ceil(row_step).max(1));
        let column_step = columns.div_ceil(cuts.max(1)).next_multiple_of(width).max(4 * width);
        Self { rows, columns, row_step, column_step }
    }

    fn pieces(&self) -> usize {
        self.rows.div_ceil(self.row_step) * self.columns.div_ceil(self.column_step)
    }

    fn piece(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let across = self.columns.div_ceil(self.column_step);
        let range = |i: usize, step: usize, end: usize| i * step..end.min((i + 1) * step);
        (range(i / across, self.row_step, self.rows), range(i % across, self.column_step, self.columns))
    }
}

/// Divides `0..length` into pieces of equal length, a multiple of `unit` near `most`. There is at least one,
/// maybe empty, piece.
fn cut(length: usize, most: usize, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let step = length.div_ceil(length.div_ceil(most.max(1)).max(1)).max(1).next_multiple_of(unit);
    (0..length.max(1)).step_by(step).map(move |start| start..length.min(start + step))
}

/// The address of a result that several tasks write to.
#[derive(Clone, Copy)]
struct Target(*mut f32);

// SAFETY: it is only an address. Every write through it has its own justification.
unsafe impl Send for Target {}
// SAFETY: see above.
unsafe impl Sync for Target {}

impl Target {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// The number of elements from the first one of a matrix to the last one, including both.
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
        let small = [(1, 1, 1), (3, 7, 5), (7, 1023, 3), (65, 33, 17), (3, 0, 2), (0, 3, 2), (2, 3, 0)];
        let empty = [(0, 3100, 2), (2, 3100, 0), (300, 0, 2), (300, 0, 70)];
        // Several pieces, and a b with more rows, or more columns, than are packed at a time.
        for (m, k, n) in
            small.into_iter().chain(empty).chain([(300, 20, 70), (140, 1700, 33), (2, 1500, 1500)])
        {
            let (a, b) = (random(1, (m, k)), random(2, (k, n)));
            let wanted = reference(&numbers(&a), &numbers(&b), m, k, n);
            let elements = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let [x, y] = [&a, &b].map(elements);
            let [across_x, across_y] = [&a, &b].map(|x| elements(&x.t().unwrap().contiguous().unwrap()));
            let ways = [
                (Matrix::new(&x, m, k), Matrix::new(&y, k, n)),
                (Matrix::new(&x, m, k), Matrix::new(&across_y, n, k).transposed()),
                (Matrix::new(&across_x, k, m).transposed(), Matrix::new(&y, k, n)),
                (Matrix::new(&across_x, k, m).transposed(), Matrix::new(&across_y, n, k).transposed()),
            ];
            for (way, (a, b)) in ways.into_iter().enumerate() {
                let c = Tensor::from_vec(product(a, b), (m, n), &Device::Cpu).unwrap();
                // k additions in f32 have an error of about √k half ulps of the result.
                assert!(relative_error(&c, &wanted) < 1e-6, "{m} {k} {n}, way {way}");
            }
        }
    }

    #[test]
    fn a_product_starts_as_asked_wherever_its_panels_end() {
        for (m, k, n) in [(5, 3, 2), (13, 1700, 45), (150, 40, 64), (3, 700, 203), (2, 1500, 1500)] {
            let (a, b, c, bias) = (random(1, (m, k)), random(2, (k, n)), random(3, (m, n)), random(4, n));
            let sums = reference(&numbers(&a), &numbers(&b), m, k, n);
            let elements = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let [x, y, bias] = [&a, &b, &bias].map(elements);
            let (x, y) = (Matrix::new(&x, m, k), Matrix::new(&y, k, n));
            for (beta, alpha) in [(0.0, 1.0), (1.0, 1.0), (0.0, 0.5), (-2.0, 0.5)] {
                let wanted: Vec<f64> =
                    numbers(&c).iter().zip(&sums).map(|(c, sum)| beta * c + alpha * sum).collect();
                for threads in [Threads::One, Threads::All] {
                    // In a window of a wider matrix, whose other elements must not change.
                    let mut wide = vec![9.0; m * (n + 3)];
                    for (wide, c) in wide.chunks_exact_mut(n + 3).zip(elements(&c).chunks_exact(n)) {
                        wide[1..=n].copy_from_slice(c);
                    }
                    multiply(&mut wide[1..], n + 3, beta as f32, alpha as f32, x, y, threads);
                    let rows = wide.chunks_exact(n + 3);
                    assert!(rows.clone().all(|row| [row[0], row[n + 1], row[n + 2]] == [9.0; 3]));
                    let dst: Vec<f32> = rows.flat_map(|row| row[1..=n].to_vec()).collect();
                    let dst = Tensor::from_vec(dst, (m, n), &Device::Cpu).unwrap();
                    assert!(relative_error(&dst, &wanted) < 1e-6, "{m} {k} {n}, {beta} {alpha} {threads:?}");
                }
            }
            let wanted: Vec<f64> =
                sums.iter().enumerate().map(|(i, sum)| sum + f64::from(bias[i % n])).collect();
            let y = Tensor::from_vec(product_and_bias(x, y, &bias), (m, n), &Device::Cpu).unwrap();
            assert!(relative_error(&y, &wanted) < 1e-6, "{m} {k} {n}, bias");
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_among_others() {
        let (m, k, n) = (200, 900, 70);
        let (a, b) = (random(1, (m, k)), random(2, (k, n)));
        let [a, b] = [a, b].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
        let all = product(a, b);
        for row in [0, 5, 127, 199] {
            assert_eq!(product(a.rows(row..row + 1), b), all[row * n..][..n], "row {row}");
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
