//! What the trainer needs from the machine: files, devices, signals and the terminal.

// Folders and files that are written whole or not at all.
pub(crate) mod atomic;
// A GPU, or the CPU.
pub mod device;
// Signs of life for the launcher and for other ranks.
pub mod heartbeat;
// Arrays of float32 rows on disk.
pub mod npy;
// Progress bars, or lines where there is no terminal.
pub mod progress;
// Files of named tensors.
pub(crate) mod safetensors;
// TERM, INT and USR1.
pub mod signals;
