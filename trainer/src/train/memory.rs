//! Memory: how much is free, how a run divides it, and how much a step needs.

use std::fs;

use crate::model::Model;
use crate::model::pass::Saved;

/// Bytes this process may still use: the free memory of its GPU if it has one; else the memory that the system or the control
/// group has available, divided by the number of `ranks` on this host.
pub fn available(ranks: usize) -> u64 {
    #[cfg(feature = "cuda")]
    if let Ok(device) = crate::system::device::current()
        && let Ok(free) = kernels::free_memory(&device)
    {
        return free;
    }
    let system = proc_bytes("/proc/meminfo", "MemAvailable:").unwrap_or(u64::MAX);
    let number =
        |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    let group = number("memory.max")
        .map_or(u64::MAX, |max| max.saturating_sub(number("memory.current").unwrap_or(0)));
    // Neither source exists: assume a small machine.
    let available = match system.min(group) {
        u64::MAX => 4 << 30,
        known => known,
    };
    available / ranks.max(1) as u64
}

/// Peak resident memory of this process so far, in bytes; none where the system does not tell.
pub fn peak() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM:")
}

/// Peak memory that this process has used on its GPU so far, in bytes; none on a CPU.
pub fn gpu_peak() -> Option<u64> {
    #[cfg(feature = "cuda")]
    return kernels::memory_usage(&crate::system::device::current().ok()?).ok().map(|(_, peak)| peak);
    #[cfg(not(feature = "cuda"))]
    None
}

/// The bytes of a line `KEY: N kB` of a file of /proc.
fn proc_bytes(path: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `mi_option_purge_delay` of mimalloc.h; libmimalloc-sys has no name for it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Tells mimalloc, the allocator of the programs, to keep freed memory instead of returning it to the system.
///
/// The next step needs the same memory again, and the system would clear every page that was returned, which takes up to a
/// fifth of the time of a step.
pub fn keep_pages() {
    // SAFETY: sets a number that the allocator reads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// Default of `training.chunk_tokens`: on a CPU the activations of one layer stay in the caches, on a GPU the chunk is large
/// enough to use all of it.
pub fn default_chunk_tokens() -> usize {
    if on_gpu() { 16_384 } else { 1024 }
}

/// Default limit of `training.activation_memory`, in bytes, for a model whose parameters, gradients and moments take
/// `state_bytes`: no limit on a GPU; max(512 MiB, 1.5 × `state_bytes`) on a CPU, where twice as much memory makes a step only
/// a few per cent faster (benches/RESULTS.md).
pub fn default_activation_memory(state_bytes: u64) -> u64 {
    if on_gpu() { u64::MAX } else { (512 << 20).max(state_bytes / 2 * 3) }
}

/// Whether this process computes on a GPU.
pub fn on_gpu() -> bool {
    crate::system::device::current().is_ok_and(|device| kernels::on_gpu(&device))
}

/// Bytes of activations during the backward pass of a chunk of `tokens` tokens: the chunk's tape and the temporary tensors of
/// one layer.
pub fn chunk_bytes(model: &Model, tokens: usize) -> u64 {
    let tape = model.tape_bytes_per_token(Saved::All) as u64 * tokens as u64;
    tape + layer_bytes(model, tokens)
}

/// Temporary tensors in the backward pass of one layer: twice the tape of the layer, for gradients of the saved tensors and for
/// recomputed ones.
fn layer_bytes(model: &Model, tokens: usize) -> u64 {
    2 * model.tape_bytes_per_token(Saved::All) as u64 * tokens as u64 / model.layers().max(1) as u64
}

/// Peak bytes of activations in a step over a batch of `tokens` tokens in `sequences` sequences, encoded in chunks of `chunk`
/// tokens, with `activation_memory` bytes for saved activations. They are assigned to chunks as in [`super::gradcache`]: first
/// the inputs of the layers, then whole tapes.
///
/// Chunks with saved activations run backward first, so their memory is free before the first chunk is recomputed. The
/// embeddings (f32) of the batch are counted three times: the embeddings, their gradient, and the gradient in the order of the
/// chunks.
pub fn step_bytes(
    model: &Model,
    tokens: usize,
    sequences: usize,
    chunk: usize,
    activation_memory: u64,
) -> u64 {
    let chunk = chunk.clamp(1, tokens.max(1));
    let bytes_of_chunk = |keep| (model.tape_bytes_per_token(keep) * chunk) as u64;
    let (inputs, whole) = (bytes_of_chunk(Saved::LayerInputs), bytes_of_chunk(Saved::All));
    let chunks = tokens.div_ceil(chunk) as u64;
    let with_inputs = chunks.min(activation_memory / inputs.max(1));
    let left = activation_memory - with_inputs * inputs;
    let with_all = if with_inputs == chunks { chunks.min(left / (whole - inputs).max(1)) } else { 0 };
    let saved = (with_inputs * inputs + with_all * (whole - inputs))
        .min((model.tape_bytes_per_token(Saved::All) * tokens) as u64);
    let recomputed = if with_inputs < chunks { chunk_bytes(model, chunk) } else { 0 };
    // From saved inputs the tape of a layer is recomputed before the layer runs backward.
    let layer = layer_bytes(model, chunk);
    let layer = if with_all == 0 { layer + layer / 2 } else { layer };
    let embeddings = 3 * size_of::<f32>() * sequences * model.embedding_dim();
    (saved + layer).max(recomputed) + embeddings as u64
}

/// Formats an amount of memory in the largest unit that fits: `1.5 GiB`.
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
    fn bytes_are_formatted_in_the_largest_unit_that_fits() {
        assert_eq!(format_bytes(0), "0.0 KiB");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes(3 << 30), "3.0 GiB");
        assert_eq!(format_bytes((1 << 30) - 1), "1024.0 MiB");
    }

    #[test]
    fn some_memory_is_available_and_some_is_used() {
        assert!(available(1) > 1 << 20);
        assert!(available(4) < available(1));
        assert!(peak().unwrap() > 1 << 20);
    }
}
