//! The ops of a training step on packed sequences, each with its forward and its backward pass.
//!
//! An op takes tensors and returns tensors. It knows nothing about models, batches or ranks. Each op is one
//! file or one folder that holds its formula, forward, backward and tests; the CUDA kernel (`.cu`) has the
//! same name. Activations have the shape `(T, D)`: the T tokens of a chunk's N sequences are concatenated
//! without padding, and [`Packing`] holds the boundaries of the sequences.
//!
//! A backward function returns the gradients of activations. It *adds* the gradients of parameters to tensors
//! that the caller passes (`dw`), because the chunks of a batch accumulate into the same buffer.
//!
//! Letters in shapes: T tokens, N sequences, B rows, M candidates, D hidden size, H heads, G key-value heads,
//! K head size, F feed-forward size, V vocabulary, P positions, R rank of LoRA, I and O the input and output
//! size of a linear layer.

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
mod device;
#[cfg(any(test, gpu))]
mod gpu;
mod matmul;
mod rows;
mod simd;
mod tensor;
#[cfg(test)]
mod testing;
mod tile;

pub use device::{on_gpu, upload, zeros};
#[cfg(feature = "cuda")]
pub use gpu::cuda::{device_count, free_memory, memory_usage, open_device, reset_peak_memory};
#[cfg(feature = "cuda")]
pub use gpu::libraries::{cuda_version, open_nccl};
#[cfg(feature = "emulator")]
pub use gpu::use_emulator;
pub use packing::Packing;
