//! Where the sequences of a chunk lie in its packed tensors.

use std::ops::Range;

/// How the T tokens of a chunk divide into N sequences, laid end to end without padding.
///
/// There is no attention mask anywhere: an op that must not look across sequences takes the packing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    offsets: Vec<usize>, // (N+1)
    numbers: Vec<u32>,   // (N)
    #[cfg(feature = "cuda")]
    copies: crate::gpu::Copies<4>,
}

impl Packing {
    /// `lengths` are the tokens of each sequence; `numbers` its number in the global batch, which is what
    /// dropout depends on, so that neither chunks nor ranks change a mask.
    ///
    /// # Panics
    /// If the two differ in length: that is a bug of the caller, no input reaches it.
    pub fn new(lengths: &[usize], numbers: Vec<u32>) -> Self {
        assert_eq!(lengths.len(), numbers.len(), "one number a sequence");
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

    /// What kernels need of it, where they are.
    #[cfg(feature = "cuda")]
    pub(crate) fn copies(&self) -> &crate::gpu::Copies<4> {
        &self.copies
    }

    /// T, the tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.offsets[self.numbers.len()]
    }

    /// N.
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

    /// The number of sequence `n` in the global batch.
    pub fn number(&self, n: usize) -> u32 {
        self.numbers[n]
    }

    /// The tokens of the longest sequence; 0 without sequences.
    pub fn longest(&self) -> usize {
        self.ranges().map(|r| r.len()).max().unwrap_or(0)
    }

    /// The sequence that holds token `t`, and the token's position in it.
    pub fn locate(&self, t: usize) -> (usize, usize) {
        // Empty sequences share an offset: the last one that starts at or before t holds it.
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
