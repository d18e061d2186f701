//! Memory: what is free, and how a run shares it out before its first step.

use std::fs;

use crate::model::Model;
use crate::model::pass::Saved;

/// Bytes this process may still use: of its GPU, where it has one; else its part of the system's available memory, or of what its
/// control group leaves, where `ranks` share this host.
pub fn available(ranks: usize) -> u64 {
    #[cfg(feature = "cuda")]
    if let Ok(device) = crate::system::device::current()
        && let Ok(free) = kernels::free_memory(&device)
    {
        return free;
    }
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let system = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .map_or(u64::MAX, |kib| kib * 1024);
    let number =
        |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    let group = number("memory.max")
        .map_or(u64::MAX, |max| max.saturating_sub(number("memory.current").unwrap_or(0)));
    // Nothing known: a laptop's worth.
    let known = match system.min(group) {
        u64::MAX => 4 << 30,
        known => known,
    };
    known / ranks.max(1) as u64
}

/// `mi_option_purge_delay` of mimalloc.h, which the bindings leave out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Tells mimalloc, the allocator of the programs, to keep what was freed.
///
/// What a step frees the next one takes again: given back to the system, its pages would be cleared again each time, a fifth of
/// the time of a step where that is slow.
pub fn keep_pages() {
    // SAFETY: sets a number that the allocator reads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// Tokens of a chunk, unless the configuration says: on a CPU as many as keep a layer's activations in the caches, on a GPU as
/// many as keep it busy.
pub fn default_chunk_tokens() -> usize {
    if on_gpu() { 16_384 } else { 1024 }
}

/// Bytes of tapes that are kept, unless the configuration says, where parameters, gradients and moments take `state_bytes` bytes. A GPU's
/// memory is the run's. On a CPU it is half as much again as those take, or half a GiB: beyond that twice the
/// memory buys a few per cent of speed (benches/RESULTS.md).
pub fn default_activation_memory(state_bytes: u64) -> u64 {
    if on_gpu() { u64::MAX } else { (512 << 20).max(state_bytes / 2 * 3) }
}

/// Whether this process computes on a GPU.
pub fn on_gpu() -> bool {
    crate::system::device::current().is_ok_and(|device| kernels::on_gpu(&device))
}

/// Bytes of activations when a chunk of `tokens` runs backward: its tape, and what the backward of one layer holds beside it.
pub fn chunk_bytes(model: &Model, tokens: usize) -> u64 {
    let tape = model.tape_bytes_per_token(Saved::All) as u64 * tokens as u64;
    tape + layer_bytes(model, tokens)
}

/// Twice a layer's tape: gradients as wide as what is kept, and what is computed again.
fn layer_bytes(model: &Model, tokens: usize) -> u64 {
    2 * model.tape_bytes_per_token(Saved::All) as u64 * tokens as u64 / model.layers().max(1) as u64
}

/// Bytes of activations at the peak of a step: of a batch of `tokens` in `sequences`, in chunks of `chunk` tokens, with `tapes` bytes
/// for tapes, which go to whole chunks as `gradcache` shares them out: inputs first.
///
/// Kept tapes are gone when a chunk is first encoded again, because theirs run backward before it. Embeddings are f32, and while a
/// chunk runs backward there are those of the batch, their gradient, and the same in the order of the chunks.
pub fn step_bytes(model: &Model, tokens: usize, sequences: usize, chunk: usize, tapes: u64) -> u64 {
    let chunk = chunk.clamp(1, tokens.max(1));
    let bytes_of_chunk = |keep| (model.tape_bytes_per_token(keep) * chunk) as u64;
    let (inputs, whole) = (bytes_of_chunk(Saved::LayerInputs), bytes_of_chunk(Saved::All));
    let chunks = tokens.div_ceil(chunk) as u64;
    let with_inputs = chunks.min(tapes / inputs.max(1));
    let left = tapes - with_inputs * inputs;
    let with_all = if with_inputs == chunks { chunks.min(left / (whole - inputs).max(1)) } else { 0 };
    let kept = (with_inputs * inputs + with_all * (whole - inputs))
        .min((model.tape_bytes_per_token(Saved::All) * tokens) as u64);
    let again = if with_inputs < chunks { chunk_bytes(model, chunk) } else { 0 };
    // Of inputs a layer's tape is made again before the layer runs backward.
    let layer = layer_bytes(model, chunk);
    let layer = if with_all == 0 { layer + layer / 2 } else { layer };
    let embeddings = 3 * size_of::<f32>() * sequences * model.embedding_dim();
    (kept + layer).max(again) + embeddings as u64
}

/// `1.5 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    ["KiB", "MiB", "GiB", "TiB"]
        .iter()
        .enumerate()
        .map(|(power, unit)| (bytes / 1024f64.powi(power as i32 + 1), unit))
        .take_while(|(amount, unit)| *amount >= 1.0 || **unit == "KiB")
        .last()
        .map_or_else(String::new, |(amount, unit)| format!("{amount:.1} {unit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_said_in_the_largest_unit_that_fits() {
        assert_eq!(format_bytes(0), "0.0 KiB");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes(3 << 30), "3.0 GiB");
        assert_eq!(format_bytes((1 << 30) - 1), "1024.0 MiB");
    }

    #[test]
    fn some_memory_is_available() {
        assert!(available(1) > 1 << 20);
        assert!(available(4) < available(1));
    }
}
