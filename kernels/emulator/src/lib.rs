//! The CUDA kernels of the crate `kernels`, compiled for a CPU: see `emulator.hpp`. The build script does the work; `kernels`
//! declares the entries, because it also declares those of the GPU.
