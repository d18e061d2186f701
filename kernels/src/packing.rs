//! Boundaries of the sequences in the packed tensors of a chunk.

use std::ops::Range;

#[cfg(any(test, gpu))]
pub(crate) mod gpu;

/// Boundaries of the N sequences in the T tokens of a chunk, which are concatenated without padding.
///
/// It takes the place of an attention mask: an op that must not mix sequences takes the packing as an
/// argument. flash-attn calls the same offsets `cu_seqlens`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    offsets: Vec<usize>, // (N+1)
    numbers: Vec<u32>,   // (N)
    #[cfg(feature = "cuda")]
    copies: crate::gpu::Copies<4>,
}

impl Packing {
    /// Creates a packing from the number of tokens of each sequence and from its index in the global batch.
    ///
    /// Dropout depends on the index in the global batch, so that a mask is the same for all chunk sizes and
    /// rank counts.
    ///
    /// # Panics
    /// If `lengths` and `numbers` have different lengths. Only a bug of the caller can cause that, no input
    /// can.
    pub fn new(lengths: &[usize], numbers: Vec<u32>) -> Self {
        assert_eq!(
            lengths.len(),
            numbers.len(),
            "`lengths` and `numbers` have one element for each sequence"
        );
        let mut offsets = Vec::with_capacity(lengths.len() + 1);
        offsets.push(0);
        let mut end = 0;
        for length in lengths {
            end += length;
            offsets.push(end);
        }
        Self {
            offsets,
            numbers,
            #[cfg(feature = "cuda")]
            copies: crate::gpu::Copies::default(),
        }
    }

    /// Copies of the index arrays on the GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn copies(&self) -> &crate::gpu::Copies<4> {
        &self.copies
    }

    /// T, the number of tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.offsets[self.numbers.len()]
    }

    /// N, the number of sequences.
    pub fn sequences(&self) -> usize {
        self.numbers.len()
    }

    /// The rows of sequence `n` in a packed tensor.
    pub fn range(&self, n: usize) -> Range<usize> {
        self.offsets[n]..self.offsets[n + 1]
    }

    /// The rows of every sequence, in order.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.offsets.windows(2).map(|w| w[0]..w[1])
    }

    /// The index of sequence `n` in the global batch.
    pub fn number(&self, n: usize) -> u32 {
        self.numbers[n]
    }

    /// The number of tokens of the longest sequence; 0 without sequences.
    pub fn longest(&self) -> usize {
        self.ranges().map(|r| r.len()).max().unwrap_or(0)
    }

    /// The sequence that contains token `t`, and the position of the token in that sequence, both from 0.
    pub fn locate(&self, t: usize) -> (usize, usize) {
        // Empty sequences share an offset, so the last sequence that starts at or before t contains it.
        let n = self.offsets.partition_point(|&start| start <= t) - 1;
        (n, t - self.offsets[n])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_located_past_empty_sequences() {
        let packing = Packing::new(&[2, 0, 3], vec![7, 8, 9]);
        assert_eq!((packing.tokens(), packing.sequences(), packing.longest()), (5, 3, 3));
        assert_eq!(
            (0..5).map(|t| packing.locate(t)).collect::<Vec<_>>(),
            [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
        );
        assert_eq!(packing.range(1), 2..2);
    }

    #[test]
    fn no_sequences_have_no_tokens() {
        let packing = Packing::new(&[], vec![]);
        assert_eq!((packing.tokens(), packing.sequences(), packing.longest()), (0, 0, 0));
    }
}
