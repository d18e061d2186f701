//! The ops of a training step, each forward and backward, on packed sequences.
//!
//! Tensors in, tensors out; nothing here knows of models, batches or ranks. Every op is one stem, a file or a
//! folder: its formula, its forward, its backward and its tests, and the CUDA kernel beside it. Activations are
//! `(T, D)`: the T tokens of a chunk's N sequences end to end, without padding; [`Packing`] says where each
//! sequence lies.
//!
//! Gradients of parameters are *added* to the tensor that is given (`dw`), because the chunks of a batch
//! share it; gradients of activations are returned.
//!
//! Letters in shapes: T tokens, N sequences, B rows, M candidates, D width, H heads, G key-value heads,
//! K head width, F feed-forward width, V vocabulary, P positions, R rank of LoRA, I and O a linear's
//! input and output width.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod dropout;
pub mod embedding;
pub mod infonce;
pub mod linear;
pub mod lora;
pub mod norm;
pub mod packing;
pub mod pool;
pub mod precision;
pub mod rope;
pub mod topk;

mod block;
#[cfg(any(test, gpu))]
mod gpu;
mod matmul;
mod rows;
mod simd;
mod tensor;
#[cfg(test)]
mod testing;
mod tile;

#[cfg(feature = "cuda")]
pub use gpu::cuda::{devices, forget_peak, free, memory, open};
#[cfg(feature = "emulator")]
pub use gpu::emulate;
#[cfg(feature = "cuda")]
pub use gpu::libraries::{open_nccl, toolkit};
pub use packing::Packing;
pub use tensor::{upload, zeros};

/// Whether ops on tensors of `device` run as kernels of a GPU, which take and give tensors of half precision.
pub fn on_gpu(device: &candle_core::Device) -> bool {
    #[cfg(gpu)]
    return gpu::runs(device);
    #[cfg(not(gpu))]
    device.is_cuda()
}
