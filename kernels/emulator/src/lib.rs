//! The CUDA kernels of the crate `kernels`, compiled for a CPU; see `emulator.hpp`.
//!
//! The build script compiles them. The crate `kernels` declares their entry functions together with those of
//! the GPU.
