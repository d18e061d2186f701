//! New tensors that are computed row by row, on all threads and vectorised, in memory that is written only
//! once.
//!
//! An op passes a closure that computes one row. The memory is not filled with zeros first, because for most
//! ops that costs as much as the op itself. The types prove that every element is written:
//! [`Unwritten::fill`] is the only way to turn an [`Unwritten`] row into the [`Row`] that the closure must
//! return.

use crate::simd::{rows_per_task, vectorised};
use rayon::prelude::*;
use std::array;
use std::marker::PhantomData;
use std::mem::{self, MaybeUninit};
use std::ops::{Deref, DerefMut, Range};

// A plain `assert`: `assert_eq` takes the address of the counter, which is then stored in every iteration of
// the loop, and the compiler vectorises the loop with vectors of half the width.
const NOT_ALL: &str = "a new row needs a value for every element";

/// A row of a new tensor before it is written. The lifetime `'r` is a brand that is unique to the row.
pub(crate) struct Unwritten<'r> {
    elements: &'r mut [MaybeUninit<f32>],
    brand: PhantomData<fn(&'r ()) -> &'r ()>,
}

/// A row of a new tensor after all of its elements were written.
pub(crate) struct Row<'r> {
    elements: &'r mut [f32],
    brand: PhantomData<fn(&'r ()) -> &'r ()>,
}

impl<'r> Unwritten<'r> {
    /// Writes one value to each element.
    ///
    /// # Panics
    /// If there are fewer values than elements.
    #[inline(always)]
    pub(crate) fn fill(self, values: impl IntoIterator<Item = f32>) -> Row<'r> {
        let mut written = 0;
        for (element, value) in self.elements.iter_mut().zip(values) {
            element.write(value);
            written += 1;
        }
        assert!(written == self.elements.len(), "{NOT_ALL}");
        // SAFETY: the loop has written each element once, and the assertion has checked their number.
        Row { elements: unsafe { self.elements.assume_init_mut() }, brand: PhantomData }
    }
}

/// Writes two rows of the same width from pairs of values.
///
/// # Panics
/// If there are fewer pairs than elements, or the widths differ.
#[inline(always)]
pub(crate) fn fill_both<'r>(
    new: [Unwritten<'r>; 2],
    values: impl IntoIterator<Item = (f32, f32)>,
) -> [Row<'r>; 2] {
    let [a, b] = new.map(|row| row.elements);
    assert_eq!(a.len(), b.len(), "both rows have the same width");
    let mut written = 0;
    for ((a, b), values) in a.iter_mut().zip(b.iter_mut()).zip(values) {
        a.write(values.0);
        b.write(values.1);
        written += 1;
    }
    assert!(written == a.len(), "{NOT_ALL}");
    // SAFETY: the loop has written each element of both rows once, and the assertion has checked their
    // number.
    unsafe { [a.assume_init_mut(), b.assume_init_mut()] }.map(|elements| Row { elements, brand: PhantomData })
}

impl Deref for Row<'_> {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        self.elements
    }
}

impl DerefMut for Row<'_> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        self.elements
    }
}

/// Computes N new tensors with `rows` rows of `widths[i]` elements: `f(row index, rows)` fills one row of
/// each tensor.
#[inline(always)]
pub(crate) fn new_rows<const N: usize>(
    rows: usize,
    widths: [usize; N],
    f: impl for<'r> Fn(usize, [Unwritten<'r>; N]) -> [Row<'r>; N] + Sync,
) -> [Vec<f32>; N] {
    let step = rows_per_task(rows, widths.iter().sum());
    in_pieces(
        rows,
        widths,
        step,
        0,
        #[inline(always)]
        |t, new, _: &mut [f32]| f(t, new),
    )
    .0
}

/// The number of rows that are added to one partial sum in [`new_rows_and_sums`]. It is a constant, so that a
/// sum has the same bits for any number of threads.
const ROWS_PER_SUM: usize = 64;

/// Like [`new_rows`], and also accumulates `sums` sums: `f(row index, rows, sums)` adds the terms of its row
/// to `sums`. The order of the additions depends only on the number of rows.
#[inline(always)]
pub(crate) fn new_rows_and_sums<const N: usize>(
    rows: usize,
    widths: [usize; N],
    sums: usize,
    f: impl for<'r> Fn(usize, [Unwritten<'r>; N], &mut [f32]) -> [Row<'r>; N] + Sync,
) -> ([Vec<f32>; N], Vec<f32>) {
    let (new, partial) = in_pieces(rows, widths, ROWS_PER_SUM, sums, f);
    let mut total = vec![0.0; sums];
    if sums > 0 {
        vectorised(|| partial.chunks_exact(sums).for_each(|piece| add(&mut total, piece)));
    }
    (new, total)
}

/// `to += from`.
#[inline(always)]
pub(crate) fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// Runs one task for every `step` rows. Each task has its own `sums` partial sums, which start at zero.
#[inline(always)]
fn in_pieces<const N: usize>(
    rows: usize,
    widths: [usize; N],
    step: usize,
    sums: usize,
    f: impl for<'r> Fn(usize, [Unwritten<'r>; N], &mut [f32]) -> [Row<'r>; N] + Sync,
) -> ([Vec<f32>; N], Vec<f32>) {
    let mut new: [Vec<f32>; N] = widths.map(|width| Vec::with_capacity(rows * width));
    let count = rows.div_ceil(step);
    let mut partial = vec![0f32; count * sums];

    let mut rest = new.each_mut().map(Vec::spare_capacity_mut);
    let mut rest_partial = partial.as_mut_slice();
    let mut pieces = Vec::with_capacity(count);
    for piece in 0..count {
        let range: Range<usize> = piece * step..rows.min((piece + 1) * step);
        let elements: [_; N] = array::from_fn(|i| take(&mut rest[i], range.len() * widths[i]));
        pieces.push((range, elements, take(&mut rest_partial, sums)));
    }
    pieces.into_par_iter().for_each(|(range, mut elements, sums)| {
        vectorised(
            #[inline(always)]
            || {
                for t in range {
                    let row = array::from_fn(|i| Unwritten {
                        elements: take(&mut elements[i], widths[i]),
                        brand: PhantomData,
                    });
                    f(t, row, sums);
                }
            },
        );
    });
    for (tensor, width) in new.iter_mut().zip(widths) {
        // SAFETY: the capacity is `rows * width`, and `f` was called with each row exactly once. `f` returned
        // N rows with the brand of its N unwritten rows. An unwritten row cannot be copied, and only `fill`,
        // which writes all of its elements, turns it into a `Row`. If `f` panics in any thread, the program
        // does not reach this line.
        unsafe { tensor.set_len(rows * width) };
    }
    (new, partial)
}

/// Removes the first `count` elements from `rest` and returns them.
#[inline(always)]
pub(crate) fn take<'a, T>(rest: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    let (head, tail) = mem::take(rest).split_at_mut(count);
    *rest = tail;
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_several_widths_are_written_in_order() {
        for rows in [0, 1, 3, 1023] {
            let [numbers, squares] = new_rows(rows, [2, 1], |t, [a, b]| {
                [a.fill([t as f32, t as f32 + 0.5]), b.fill([(t * t) as f32])]
            });
            assert_eq!(numbers, (0..rows).flat_map(|t| [t as f32, t as f32 + 0.5]).collect::<Vec<_>>());
            assert_eq!(squares, (0..rows).map(|t| (t * t) as f32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn sums_do_not_depend_on_the_number_of_threads() {
        let sums = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                new_rows_and_sums(1023, [], 3, |t, [], sums| {
                    add(sums, &[1.0 / (t as f32 + 1.0), 1.0, t as f32]);
                    []
                })
                .1
            })
        };
        assert_eq!(sums(1), sums(3));
        assert_eq!(sums(2)[1..], [1023.0, (1022 * 1023 / 2) as f32]);
    }

    #[test]
    #[should_panic = "a value for every element"]
    fn a_row_with_too_few_values_is_refused() {
        new_rows(1, [3], |_, [row]| [row.fill([1.0, 2.0])]);
    }
}
