//! What a run costs, and how its memory is divided.

use crate::config::Training;
use crate::model::Model;
use crate::model::chunk::Limit;
use crate::model::pass::Saved;
use crate::train::gradcache::Budget;
use crate::train::memory;

/// The cost of a run, estimated from a sample of its rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Number of all parameters.
    pub parameters: usize,
    /// Number of trained parameters.
    pub trained: usize,
    /// Rank of the LoRA adapters; none if there are none.
    pub lora_rank: Option<usize>,
    /// Mean number of tokens of a batch.
    pub tokens: f64,
    /// Bytes of parameters, gradients and moments.
    pub state_bytes: u64,
    /// Peak bytes of activations in a step, saved ones included.
    pub activation_bytes: u64,
    /// Bytes that this process may use.
    pub available_bytes: u64,
}

impl Cost {
    /// Peak bytes of the run: those of a step, or those of reading the weights, which are f32 until they are rounded.
    pub fn peak_bytes(&self) -> u64 {
        (self.state_bytes + self.activation_bytes).max((size_of::<f32>() * self.parameters) as u64)
    }
}

/// Bytes of parameters, gradients and moments. Trained parameters, their gradients and two moments are f32.
pub(super) fn state_bytes(model: &Model) -> u64 {
    let trained = model.flat().len();
    (model.element_bytes() * (model.parameter_count() - trained) + 16 * trained) as u64
}

/// Divides `available` bytes: parameters and moments first, then one chunk, then as many saved activations as fit. A batch has
/// `tokens` tokens, in sequences of `lengths`, and is encoded by `ranks` ranks.
pub(super) fn divide_memory(
    training: &Training,
    model: &Model,
    tokens: f64,
    lengths: &[usize],
    ranks: usize,
    available: u64,
) -> (Budget, Cost) {
    let trained = model.flat().len();
    let model_bytes = state_bytes(model);
    // A checkpoint's copy of the trained parameters and moments is in the memory of the CPU.
    let state_bytes = model_bytes + if memory::on_gpu() { 0 } else { 12 * trained as u64 };
    let tape = model.tape_bytes_per_token(Saved::All) as u64;
    let free = (available / 10 * 8).saturating_sub(state_bytes);
    let chunk = match (training.chunk_tokens, training.chunk_size) {
        (Some(tokens), _) => Limit::Tokens(tokens),
        (None, Some(sequences)) => Limit::Sequences(sequences),
        // The backward pass of a chunk needs its tape and the temporary tensors of a layer.
        (None, None) => {
            let fitting = (free / (2 * tape).max(1)) as usize;
            Limit::Tokens(memory::default_chunk_tokens().min(fitting).max(64))
        }
    };
    let local_tokens = (tokens / ranks as f64).ceil() as usize;
    let chunk_tokens = match chunk {
        Limit::Tokens(limit) => limit.min(local_tokens),
        // The longest sequences may be in one chunk.
        Limit::Sequences(limit) => (limit * lengths.iter().max().copied().unwrap_or(0)).min(local_tokens),
    };
    let chunk_bytes = 2 * memory::chunk_bytes(model, chunk_tokens);
    let default = free.saturating_sub(chunk_bytes).min(memory::default_activation_memory(model_bytes));
    let activation_memory = training.activation_memory.map_or(default, |bytes| bytes.0);
    let activation_bytes =
        memory::step_bytes(model, local_tokens, lengths.len(), chunk_tokens, activation_memory);
    let cost = Cost {
        parameters: model.parameter_count(),
        trained,
        lora_rank: model.lora().map(|lora| lora.rank),
        tokens,
        state_bytes,
        activation_bytes,
        available_bytes: available,
    };
    (Budget { chunk, activation_memory }, cost)
}
