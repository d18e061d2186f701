//! Chunks: some sequences of a batch as packed tensors, small enough for one pass through the encoder.

use std::ops::Range;

use candle_core::{Device, Tensor};
use kernels::Packing;

use crate::Result;
use crate::config::Pooling;
use crate::data::batch::Sequence;

/// Sequences laid end to end, without padding.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Token ids, u32 (T), on the CPU.
    pub ids: Tensor,
    /// Offsets of the sequences (N + 1).
    pub packing: Packing,
    /// Of each sequence (N), the tokens whose mean is the embedding.
    pub spans: Vec<Range<usize>>,
    /// Of each sequence (N), the index in the list that was cut.
    pub members: Vec<usize>,
}

impl Chunk {
    /// Packs the sequences of `all` with the indices `members`. The index of a sequence is also its number in
    /// the global batch, which selects its dropout masks.
    pub fn pack(all: &[Sequence], members: Vec<usize>, pooling: Pooling) -> Result<Self> {
        let lengths: Vec<usize> = members.iter().map(|&member| all[member].ids.len()).collect();
        let ids: Vec<u32> = members.iter().flat_map(|&member| all[member].ids.iter().copied()).collect();
        let packing = Packing::new(&lengths, members.iter().map(|&member| member as u32).collect());
        let spans = packing
            .ranges()
            .zip(&members)
            .map(|(range, &member)| match pooling {
                // If the prompt is the whole sequence, because the text was truncated, its last token
                // remains.
                Pooling::Mean => {
                    range.end.min(range.start + all[member].skip as usize).min(range.end - 1)..range.end
                }
                Pooling::Cls => range.start..range.start + 1,
                Pooling::LastToken => range.end - 1..range.end,
            })
            .collect();
        let tokens = ids.len();
        Ok(Self { ids: Tensor::from_vec(ids, tokens, &Device::Cpu)?, packing, spans, members })
    }
}

/// Cuts the sequences `members` into chunks of at most `limit`, and returns the indices of each chunk. The
/// longest come first, so that lengths in a chunk are similar and the first chunk needs the most memory. A
/// sequence longer than the limit has a chunk for itself.
pub fn cut(sequences: &[Sequence], members: &[usize], limit: Limit) -> Vec<Vec<usize>> {
    let mut order = members.to_vec();
    order.sort_by_key(|&member| (std::cmp::Reverse(sequences[member].ids.len()), member));
    let mut chunks: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for member in order {
        let length = sequences[member].ids.len();
        match chunks.last_mut() {
            Some(chunk) if limit.admits(tokens + length, chunk.len() + 1) => {
                chunk.push(member);
                tokens += length;
            }
            _ => {
                chunks.push(vec![member]);
                tokens = length;
            }
        }
    }
    chunks
}

/// Maximum size of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Number of tokens.
    Tokens(usize),
    /// Number of sequences.
    Sequences(usize),
}

impl Limit {
    fn admits(self, tokens: usize, sequences: usize) -> bool {
        match self {
            Self::Tokens(limit) => tokens <= limit,
            Self::Sequences(limit) => sequences <= limit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(lengths: &[usize]) -> Vec<Sequence> {
        lengths.iter().map(|&n| Sequence { ids: (0..n as u32).collect(), skip: 2 }).collect()
    }

    #[test]
    fn chunks_hold_every_sequence_once_and_keep_the_limit() {
        let all = sequences(&[5, 1, 9, 3, 3, 20, 1]);
        let members: Vec<usize> = (0..all.len()).collect();
        assert_eq!(cut(&all, &members, Limit::Tokens(10)), [vec![5], vec![2], vec![0, 3], vec![4, 1, 6]]);
        assert_eq!(cut(&all, &members, Limit::Sequences(3)), [vec![5, 2, 0], vec![3, 4, 1], vec![6]]);
        assert_eq!(cut(&all, &[], Limit::Tokens(10)), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn pooled_tokens_are_all_but_the_prompt_or_the_first_or_the_last() {
        let all = sequences(&[4, 1, 2]);
        let spans = |pooling| Chunk::pack(&all, vec![2, 0, 1], pooling).unwrap().spans;
        assert_eq!(spans(Pooling::Mean), [1..2, 4..6, 6..7]);
        assert_eq!(spans(Pooling::Cls), [0..1, 2..3, 6..7]);
        assert_eq!(spans(Pooling::LastToken), [1..2, 5..6, 6..7]);
        let chunk = Chunk::pack(&all, vec![2, 0, 1], Pooling::Mean).unwrap();
        assert_eq!(chunk.ids.to_vec1::<u32>().unwrap(), [0, 1, 0, 1, 2, 3, 0]);
        assert_eq!((chunk.packing.number(0), chunk.packing.number(1)), (2, 0));
    }
}
