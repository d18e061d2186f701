//! The microkernel of the ops' products on a CPU, of `matmul` and of `tile`: a block of C stays in registers while rows of B stream past,
//! and elements of A are broadcast from wherever they lie.

use pulp::Simd;

/// Rows of the highest block.
pub(crate) const MOST_ROWS: usize = 12;
/// Rows of the highest block that is two vectors wide, where there are 16 registers.
pub(crate) const MOST_ROWS_OF_16: usize = 6;

/// Rows of a block two vectors wide, as many as leave registers for a row of B and an element of A.
pub(crate) const fn rows_of_pair<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { MOST_ROWS } else { MOST_ROWS_OF_16 }
}

/// Whether this is the block that nearly all of a large product is made of.
const fn fills_the_registers<S: Simd>(height: usize, width: usize) -> bool {
    width == 2 && height == rows_of_pair::<S>()
}

/// What the sums of a block are added to.
#[derive(Clone, Copy)]
pub(crate) enum Onto {
    /// So many times C, which is not read if that is 0.
    Kept(f32),
    /// This row, in each row of C.
    Row(*const f32),
}

/// A block of C with its rows of A and its columns of B. Rows of B and C are contiguous, A has any strides.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub(crate) k: usize,
    pub(crate) a: *const f32,
    pub(crate) a_row: usize,
    pub(crate) a_column: usize,
    pub(crate) b: *const f32,
    pub(crate) b_row: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    pub(crate) onto: Onto,
    /// Times the sums, before they are added.
    pub(crate) scale: f32,
}

impl Block {
    /// Computes `height` rows of WIDTH vectors.
    ///
    /// # Safety
    /// That many rows of A and C, `k` columns of A and rows of B, and WIDTH vectors from the pointers of B, C and the row that
    /// C starts as must lie in memory that is valid to read, and C's to write.
    ///
    /// # Panics
    /// If the block is higher than [`MOST_ROWS`] or, two vectors wide, than [`rows_of_pair`].
    #[inline(always)]
    pub(crate) unsafe fn compute<S: Simd, const WIDTH: usize>(self, simd: S, height: usize) {
        macro_rules! height {
            ($($h:literal),*) => {
                match height {
                    $($h if WIDTH == 1 || $h <= rows_of_pair::<S>() => {
                        // SAFETY: handed on.
                        unsafe { self.rows::<S, $h, WIDTH>(simd) }
                    })*
                    _ => unreachable!("a block of {height} rows"),
                }
            };
        }
        height!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12);
    }

    /// # Safety
    /// As [`Self::compute`], of HEIGHT rows.
    #[inline(always)]
    unsafe fn rows<S: Simd, const HEIGHT: usize, const WIDTH: usize>(self, simd: S) {
        self.fetch(HEIGHT, WIDTH * S::F32_LANES);
        // SAFETY: handed on.
        let sums = unsafe {
            match self.a_row {
                // The distances of rows that lie beside each other are then part of the instructions.
                1 if fills_the_registers::<S>(HEIGHT, WIDTH) => self.sums::<S, HEIGHT, WIDTH>(simd, 1),
                a_row => self.sums::<S, HEIGHT, WIDTH>(simd, a_row),
            }
        };
        // One loop for all that sums are added to: more would be most of the code.
        let (base, base_row, keep) = match self.onto {
            Onto::Kept(keep) => (self.c.cast_const(), self.c_row, keep),
            Onto::Row(row) => (row, 0, 1.0),
        };
        let (factor, scale) = (simd.splat_f32s(keep), simd.splat_f32s(self.scale));
        for (i, row) in sums.into_iter().enumerate() {
            for (j, sum) in row.into_iter().enumerate() {
                let sum = simd.mul_f32s(scale, sum);
                // SAFETY: C holds the block, as does the row; what is unaligned is read and written as such.
                unsafe {
                    let value = if keep == 0.0 {
                        sum
                    } else {
                        let base = base.add(i * base_row).cast::<S::f32s>().add(j).read_unaligned();
                        simd.add_f32s(simd.mul_f32s(factor, base), sum)
                    };
                    self.c.add(i * self.c_row).cast::<S::f32s>().add(j).write_unaligned(value);
                }
            }
        }
    }

    /// Has C brought to the first cache meanwhile: what is added to it would else wait for it.
    #[inline(always)]
    fn fetch(self, rows: usize, columns: usize) {
        #[cfg(target_arch = "x86_64")]
        for i in 0..rows {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let row = self.c.wrapping_add(i * self.c_row);
            // SAFETY: nothing is read, and any address is allowed. A row of a block begins and ends in two lines at most.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(row.cast());
                _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(columns - 1).cast());
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, columns);
    }

    /// # Safety
    /// As [`Self::rows`], of A and B.
    #[inline(always)]
    unsafe fn sums<S: Simd, const HEIGHT: usize, const WIDTH: usize>(
        self,
        simd: S,
        a_row: usize,
    ) -> [[S::f32s; WIDTH]; HEIGHT] {
        let mut sums = [[simd.splat_f32s(0.0); WIDTH]; HEIGHT];
        let (mut column, mut b) = (0, self.b);
        // Not a closure, which would be called rather than inlined.
        macro_rules! step {
            () => {
                // SAFETY: see above; unaligned reads.
                unsafe {
                    let mut vectors = [simd.splat_f32s(0.0); WIDTH];
                    for (j, vector) in vectors.iter_mut().enumerate() {
                        *vector = b.add(j * S::F32_LANES).cast::<S::f32s>().read_unaligned();
                    }
                    for (i, row) in sums.iter_mut().enumerate() {
                        let x = simd.splat_f32s(*self.a.add(column + i * a_row));
                        for (sum, vector) in row.iter_mut().zip(vectors) {
                            *sum = simd.mul_add_e_f32s(x, vector, *sum);
                        }
                    }
                }
                column += self.a_column;
                b = b.wrapping_add(self.b_row);
            };
        }
        // Four at a time only in this block: of all they would take minutes to compile.
        let fours = if fills_the_registers::<S>(HEIGHT, WIDTH) { self.k / 4 } else { 0 };
        for _ in 0..fours {
            step!();
            step!();
            step!();
            step!();
        }
        for _ in 4 * fours..self.k {
            step!();
        }
        sums
    }

    /// Writes to the first elements of row `i` what [`Self::compute`] would with `sums`: for a block that reaches beyond C.
    ///
    /// # Safety
    /// As many elements of C, and of the row that it starts as, are valid.
    pub(crate) unsafe fn write_row(self, i: usize, sums: &[f32]) {
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: see above.
            unsafe {
                let c = self.c.add(i * self.c_row + j);
                let sum = self.scale * sum;
                *c = match self.onto {
                    Onto::Kept(0.0) => sum,
                    Onto::Kept(keep) => keep * *c + sum,
                    Onto::Row(row) => *row.add(j) + sum,
                };
            }
        }
    }
}
