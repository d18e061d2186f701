//! The microkernel of the matrix products of `matmul` and `tile` on a CPU.
//!
//! It keeps a block of C in registers, loads the rows of B as vectors, and broadcasts the elements of A.

use pulp::Simd;

/// The rows of the highest block.
pub(crate) const MOST_ROWS: usize = 12;
/// The rows of the highest block that is two vectors wide, on processors with 16 vector registers.
pub(crate) const MOST_ROWS_OF_16: usize = 6;

/// The rows of the highest block that is two vectors wide. It leaves registers for a row of B and an element
/// of A.
pub(crate) const fn rows_of_pair<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { MOST_ROWS } else { MOST_ROWS_OF_16 }
}

/// Whether a block has the size that is used for nearly all of a large product.
const fn fills_the_registers<S: Simd>(height: usize, width: usize) -> bool {
    width == 2 && height == rows_of_pair::<S>()
}

/// What the sums of a block are added to: `Start` of `matmul` as a pointer.
#[derive(Clone, Copy)]
pub(crate) enum RawStart {
    /// beta · C; C is not read if beta is 0.
    Beta(f32),
    /// The same row in each row of C.
    Bias(*const f32),
}

/// A block of C with its rows of A and its columns of B. Rows of B and C are contiguous; A has any strides.
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
    pub(crate) start: RawStart,
    /// The factor of the sums.
    pub(crate) alpha: f32,
}

impl Block {
    /// Computes the block, which has `height` rows of WIDTH vectors.
    ///
    /// # Safety
    /// `height` rows and `k` columns of A, `k` rows of WIDTH vectors of B, `height` rows of WIDTH vectors of
    /// C, and WIDTH vectors of a bias must be valid for reads, and those of C for writes.
    ///
    /// # Panics
    /// If the block is higher than [`MOST_ROWS`], or is two vectors wide and higher than [`rows_of_pair`].
    #[inline(always)]
    pub(crate) unsafe fn compute<S: Simd, const WIDTH: usize>(self, simd: S, height: usize) {
        macro_rules! height {
            ($($h:literal),*) => {
                match height {
                    $($h if WIDTH == 1 || $h <= rows_of_pair::<S>() => {
                        // SAFETY: the caller guarantees the same.
                        unsafe { self.rows::<S, $h, WIDTH>(simd) }
                    })*
                    _ => unreachable!("a block of {height} rows"),
                }
            };
        }
        height!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12);
    }

    /// [`Self::compute`] for a constant height.
    ///
    /// # Safety
    /// As [`Self::compute`].
    #[inline(always)]
    unsafe fn rows<S: Simd, const HEIGHT: usize, const WIDTH: usize>(self, simd: S) {
        self.fetch(HEIGHT, WIDTH * S::F32_LANES);
        // SAFETY: the caller guarantees the same.
        let sums = unsafe {
            match self.a_row {
                // A constant distance of the rows becomes part of the instructions.
                1 if fills_the_registers::<S>(HEIGHT, WIDTH) => self.sums::<S, HEIGHT, WIDTH>(simd, 1),
                a_row => self.sums::<S, HEIGHT, WIDTH>(simd, a_row),
            }
        };
        // One loop for both variants of `start`, because two of them would double the code.
        let (base, base_row, beta) = match self.start {
            RawStart::Beta(beta) => (self.c.cast_const(), self.c_row, beta),
            RawStart::Bias(row) => (row, 0, 1.0),
        };
        let (factor, alpha) = (simd.splat_f32s(beta), simd.splat_f32s(self.alpha));
        for (i, row) in sums.into_iter().enumerate() {
            for (j, sum) in row.into_iter().enumerate() {
                let sum = simd.mul_f32s(alpha, sum);
                // SAFETY: the caller guarantees that C and the bias are valid; the accesses are unaligned.
                unsafe {
                    let value = if beta == 0.0 {
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

    /// Prefetches C into the L1 cache during the computation of the sums, which are added to it.
    #[inline(always)]
    fn fetch(self, rows: usize, columns: usize) {
        #[cfg(target_arch = "x86_64")]
        for i in 0..rows {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let row = self.c.wrapping_add(i * self.c_row);
            // SAFETY: a prefetch does not access memory, so any address is allowed. A row spans at most two
            // cache lines.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(row.cast());
                _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(columns - 1).cast());
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, columns);
    }

    /// Computes the sums of the block in registers.
    ///
    /// # Safety
    /// As [`Self::rows`], for A and B.
    #[inline(always)]
    unsafe fn sums<S: Simd, const HEIGHT: usize, const WIDTH: usize>(
        self,
        simd: S,
        a_row: usize,
    ) -> [[S::f32s; WIDTH]; HEIGHT] {
        let mut sums = [[simd.splat_f32s(0.0); WIDTH]; HEIGHT];
        let (mut column, mut b) = (0, self.b);
        // A macro, because the compiler does not inline a closure here.
        macro_rules! step {
            () => {
                // SAFETY: the caller guarantees that A and B are valid; the reads are unaligned.
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
        // Only this block size is unrolled by four; unrolling all sizes would take minutes to compile.
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

    /// Writes the first elements of row `i` from `sums`, like [`Self::compute`], for a block that extends
    /// beyond C.
    ///
    /// # Safety
    /// `sums.len()` elements of row `i` of C and of a bias must be valid.
    pub(crate) unsafe fn write_row(self, i: usize, sums: &[f32]) {
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: the caller guarantees that these elements are valid.
            unsafe {
                let c = self.c.add(i * self.c_row + j);
                let sum = self.alpha * sum;
                *c = match self.start {
                    RawStart::Beta(0.0) => sum,
                    RawStart::Beta(beta) => beta * *c + sum,
                    RawStart::Bias(row) => *row.add(j) + sum,
                };
            }
        }
    }
}
