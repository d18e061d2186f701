//! GradCache (Gao et al. 2021): a batch of any size in the memory of one chunk.
//!
//! The loss needs the embeddings of the whole batch at once, but not the activations. So all chunks are encoded first; then the loss
//! computes the gradient of every embedding; then the chunks run backward one after another. A chunk keeps its activations (its
//! tape) from the first pass if they fit in memory; otherwise they are recomputed. Dropout is a function of step and sequence, so
//! recomputing gives the same masks and the same bits.

use std::iter;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Tensor};
use kernels::precision::Precision;

use crate::Result;
use crate::data::batch::Sequence;
use crate::model::chunk::{self, Chunk, Limit};
use crate::model::params::Gradients;
use crate::model::pass::{DropoutKey, Saved};
use crate::model::{Model, Tape};
use crate::system::device;
use crate::system::heartbeat;

/// Size of the chunks, and memory for saved activations.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Maximum size of a chunk.
    pub chunk: Limit,
    /// Bytes of activations that are kept between the two passes.
    pub activation_memory: u64,
}

/// A batch between the two passes.
pub struct Encoded {
    chunks: Vec<(Chunk, Option<Tape>)>,
    order: Tensor, // (N) row of the embeddings → row in the order of the chunks
    dropout_key: Option<DropoutKey>,
}

/// First pass: the sequences `members` of a batch → their embeddings (N, D) in that order, and what the second pass needs.
///
/// # Errors
/// There is not enough memory.
pub fn encode(
    model: &Model,
    sequences: &[Sequence],
    members: &[usize],
    budget: Budget,
    dropout_key: Option<DropoutKey>,
) -> Result<(Tensor, Encoded)> {
    let cuts = chunk::cut(sequences, members, budget.chunk);
    let [inputs, whole] = [Saved::LayerInputs, Saved::All].map(|keep| model.tape_bytes_per_token(keep));
    let keeps = choose_saved(&cuts, sequences, budget.activation_memory, inputs, whole);
    let mut place = vec![0u32; sequences.len()];
    for (placed, &member) in cuts.iter().flatten().enumerate() {
        place[member] = placed as u32;
    }
    let passes = run_two_at_a_time(cuts.len(), |n| {
        let chunk = Chunk::pack(sequences, cuts[n].clone(), model.pooling())?;
        let (e, tape) = model.forward(&chunk, dropout_key, keeps[n])?;
        heartbeat::record_work();
        Ok((e, (chunk, tape)))
    })?;
    let (embeddings, chunks): (Vec<_>, Vec<_>) = passes.into_iter().unzip();
    let order: Vec<u32> = members.iter().map(|&member| place[member]).collect();
    if members.is_empty() {
        // There are more ranks than sequences, and this one has none.
        let device = device::current()?;
        let order = kernels::upload(&order, &device)?;
        let nothing = kernels::zeros((0, model.embedding_dim()), DType::F32, &device)?;
        return Ok((nothing, Encoded { chunks, order, dropout_key }));
    }
    let embeddings = Tensor::cat(&embeddings, 0)?;
    let order = kernels::upload(&order, embeddings.device())?;
    let embeddings = embeddings.index_select(&order, 0)?;
    Ok((embeddings, Encoded { chunks, order, dropout_key }))
}

impl Encoded {
    /// Second pass: adds the gradients of all trained parameters, given d(embeddings) (N, D). Chunks run in the order of the first
    /// pass, whatever was kept, so that every sum has the same order and the same bits with any amount of memory.
    /// In f16 the gradients must be zero before, because the whole buffer is scaled at the end.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn backward(self, model: &Model, d: &Tensor, gradients: &Gradients) -> Result<()> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let in_chunks = d.zeros_like()?.index_add(&self.order, d, 0)?; // in the order of the chunks
        let scale = (model.precision() == Precision::F16).then(|| f16_scale(d)).transpose()?;
        let in_chunks = match &scale {
            Some((up, _)) => in_chunks.broadcast_mul(up)?,
            None => in_chunks,
        };
        let mut start = 0;
        for (chunk, tape) in self.chunks {
            let de = in_chunks.narrow(0, start, chunk.members.len())?;
            start += chunk.members.len();
            let tape = match tape {
                Some(tape) => tape,
                None => model.recompute(&chunk, self.dropout_key)?,
            };
            model.backward(&chunk, tape, &de, self.dropout_key, gradients)?;
            heartbeat::record_work();
        }
        if let Some((_, down)) = &scale {
            gradients.scale(down)?;
        }
        Ok(())
    }
}

/// Returns `pass(0)`, `pass(1)`, … `pass(count - 1)`. On a CPU two of them run at a time, because threads that wait for an op of
/// one chunk find work in the other.
fn run_two_at_a_time<R: Send>(count: usize, pass: impl Fn(usize) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let stream = || -> Result<Vec<(usize, R)>> {
        let numbers = iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|n| *n < count));
        numbers.map(|n| Ok((n, pass(n)?))).collect()
    };
    let mut done = Vec::with_capacity(count);
    if !kernels::on_gpu(&device::current()?) && rayon::current_num_threads() > 1 {
        let (one, other) = rayon::join(stream, stream);
        done.extend(one?);
        done.extend(other?);
    } else {
        done.extend(stream()?);
    }
    done.sort_unstable_by_key(|(n, _)| *n);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// Two factors, each a tensor (1), that multiply the gradient before and after the backward pass of a model
/// in f16, because the smallest number of f16 is 6e-8. The first is the power of two that brings the largest
/// element of d(embeddings) near 1, the second is its reciprocal. They depend on d alone, so there is no loss
/// scale to adapt or to save, and they are computed on the device of d.
fn f16_scale(d: &Tensor) -> Result<(Tensor, Tensor)> {
    const LIMIT: i32 = 60;
    let powers: Vec<f32> = (-LIMIT..=LIMIT).map(|exponent| (exponent as f32).exp2()).collect(); // ascending
    let powers = Tensor::new(powers, d.device())?;
    let count = powers.broadcast_le(&d.abs()?.max_all()?)?.to_dtype(DType::F32)?.sum_all()?;
    // `count` powers are at most the largest element, so the largest of them has the index `count` − 1. Its
    // reciprocal has the same index from the other end.
    let index = (count - 1.0)?.clamp(0f32, 2.0 * LIMIT as f32)?.to_dtype(DType::U32)?.reshape(1)?;
    let reciprocal = (f64::from(2 * LIMIT) - &index.to_dtype(DType::F32)?)?.to_dtype(DType::U32)?;
    Ok((powers.index_select(&reciprocal, 0)?, powers.index_select(&index, 0)?))
}

/// Chooses what each chunk saves within `bytes` bytes. A token takes `inputs` bytes on a tape of layer inputs and `whole` bytes on
/// a whole tape. Layer inputs come first, because they spare the most recomputation per byte. The first chunks come first, because
/// they have the longest texts, whose attention is the most expensive. After the first chunk that does not fit no other saves
/// anything: all saved activations must be free again before a chunk is recomputed.
fn choose_saved(
    cuts: &[Vec<usize>],
    sequences: &[Sequence],
    bytes: u64,
    inputs: usize,
    whole: usize,
) -> Vec<Saved> {
    let mut keeps = vec![Saved::None; cuts.len()];
    let mut left = bytes;
    for (keep, price) in [(Saved::LayerInputs, inputs), (Saved::All, whole - inputs)] {
        for (kept, cut) in keeps.iter_mut().zip(cuts) {
            let tokens: usize = cut.iter().map(|&member| sequences[member].ids.len()).sum();
            match left.checked_sub((tokens * price) as u64) {
                Some(rest) => (*kept, left) = (keep, rest),
                None => return keeps,
            }
        }
    }
    keeps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_element_is_brought_near_one_by_powers_of_two() {
        let device = candle_core::Device::Cpu;
        let scale = |d: &[f32]| {
            let (up, down) = super::f16_scale(&Tensor::new(d, &device).unwrap()).unwrap();
            (up.to_vec1::<f32>().unwrap()[0], down.to_vec1::<f32>().unwrap()[0])
        };
        for (largest, exponent) in [
            (1.0, 0),
            (1.999, 0),
            (2.0, 1),
            (3e-8, -25),
            (0.75, -1),
            (0.0, -60),
            (1e30, 60),
            (f32::INFINITY, 60),
        ] {
            let power = (exponent as f32).exp2();
            assert_eq!(scale(&[0.1 * largest, -largest, 0.0]), (power.recip(), power), "{largest}");
        }
    }

    #[test]
    fn the_first_chunks_keep_their_tapes_as_long_as_they_fit() {
        use Saved::{All, LayerInputs};
        let sequences: Vec<Sequence> =
            [4, 3, 2, 1].iter().map(|&n| Sequence { ids: vec![0; n], skip: 0 }).collect();
        let cuts = [vec![0], vec![1], vec![2, 3]]; // of 4, 3 and 3 tokens
        let keeps = |bytes| super::choose_saved(&cuts, &sequences, bytes, 10, 15);
        assert_eq!(keeps(39), [Saved::None; 3]);
        assert_eq!(keeps(40), [LayerInputs, Saved::None, Saved::None]);
        assert_eq!(keeps(99), [LayerInputs, LayerInputs, Saved::None]);
        assert_eq!(keeps(119), [LayerInputs; 3]);
        assert_eq!(keeps(120), [All, LayerInputs, LayerInputs]);
        assert_eq!(keeps(150), [All; 3]);
    }
}
