//! A chunk: some of a batch's sequences as packed tensors.

use std::ops::Range;

use candle_core::{Device, Tensor};
use kernels::Packing;

use crate::Result;
use crate::config::Pooling;
use crate::data::batch::Sequence;

/// Sequences laid end to end.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// (T) token ids.
    pub ids: Tensor,
    /// Where each sequence lies.
    pub packing: Packing,
    /// (N) the rows of each sequence whose mean is its embedding.
    pub spans: Vec<Range<usize>>,
    /// (N) the index of each sequence in the list that was cut.
    pub members: Vec<usize>,
}

impl Chunk {
    /// Packs the sequences `members` of `all`, whose index is also their number in the global batch.
    pub fn pack(all: &[Sequence], members: Vec<usize>, pooling: Pooling) -> Result<Self> {
        let lengths: Vec<usize> = members.iter().map(|&member| all[member].ids.len()).collect();
        let ids: Vec<u32> = members.iter().flat_map(|&member| all[member].ids.iter().copied()).collect();
        let packing = Packing::new(&lengths, members.iter().map(|&member| member as u32).collect());
        let spans = packing
            .ranges()
            .zip(&members)
            .map(|(range, &member)| match pooling {
                // A prompt that is all of a text (cut off, say) still leaves its last token.
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

/// Cuts a list of sequences into chunks of at most `limit`, the longest first, so that the chunks are alike and memory's peak comes
/// with the first one. A sequence that exceeds the limit alone is a chunk of its own.
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

/// How large a chunk may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Of so many tokens.
    Tokens(usize),
    /// Of so many sequences.
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
    fn pooling_looks_at_all_tokens_but_the_prompt_at_the_first_or_at_the_last() {
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
