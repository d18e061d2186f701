//! GradCache (Gao et al. 2021): a batch of any size in the memory of one chunk.
//!
//! The loss needs all embeddings of the batch at once, but no activations; so every chunk is encoded first, and once the loss
//! has said what it wants of each embedding, chunk after chunk runs backward. A chunk whose tape fits in memory keeps it from
//! the first pass; only the others are encoded a second time. Dropout is a function of step and sequence, so the second
//! time gives the first one's masks without anything being kept.

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

/// How a batch is cut and how much of it is kept.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Of one chunk.
    pub chunk: Limit,
    /// Bytes of tapes kept between the passes.
    pub activation_memory: u64,
}

/// A batch between the passes.
pub struct Encoded {
    chunks: Vec<(Chunk, Option<Tape>)>,
    order: Tensor, // (N) row of `embeddings` → row in the order of the chunks
    dropout_key: Option<DropoutKey>,
}

/// First pass: the sequences `members` of a batch → their embeddings (N, D) in that order, and what the second pass needs.
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
        // A rank without a sequence: there are more ranks than texts.
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
    /// Second pass: d(embeddings) (N, D) → the gradients of everything trained. Chunks run in the order of the first pass whatever
    /// was kept, so that the order of every sum, and with it every bit, is the same with any amount of memory.
    pub fn backward(self, model: &Model, d: &Tensor, gradients: &Gradients) -> Result<()> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let in_chunks = d.zeros_like()?.index_add(&self.order, d, 0)?; // undoes the order
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

/// `pass(0)`, `pass(1)`, …: on a CPU two at a time, because threads that wait for one chunk's op find work in the other's.
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

/// What the gradient is multiplied by on its way through a model in f16, whose numbers end at 6e-8, and by after it, (1) each: the
/// power of two that brings the largest element of d(embeddings) near 1. A function of d alone, so there is no scale to adapt or to
/// save; and found where d is.
fn f16_scale(d: &Tensor) -> Result<(Tensor, Tensor)> {
    const MOST: i32 = 60;
    let powers: Vec<f32> = (-MOST..=MOST).map(|exponent| (exponent as f32).exp2()).collect(); // rising
    let powers = Tensor::new(powers, d.device())?;
    let below = powers.broadcast_le(&d.abs()?.max_all()?)?.to_dtype(DType::F32)?.sum_all()?;
    // As many powers as are not above the largest element: the last of them is the one.
    let place = (below - 1.0)?.clamp(0f32, 2.0 * MOST as f32)?.to_dtype(DType::U32)?.reshape(1)?;
    let mirrored = (f64::from(2 * MOST) - &place.to_dtype(DType::F32)?)?.to_dtype(DType::U32)?;
    Ok((powers.index_select(&mirrored, 0)?, powers.index_select(&place, 0)?))
}

/// What each chunk keeps within `bytes`, given the bytes that a token takes on a tape of inputs and on a whole one. Inputs come
/// first, because they spare most a byte; the first chunks come first, because they have the longest texts, whose attention costs most
/// to compute again, and none after one that does not fit: what is kept must be gone when a chunk is first encoded again.
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
