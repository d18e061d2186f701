//! What the trainer needs from the machine: files, devices, signals and the terminal.

// Files and folders that are complete or absent.
pub(crate) mod atomic;
// The command line of this process, for messages.
pub mod command;
// A GPU, or the CPU.
pub mod device;
// Heartbeats for the launcher and for other ranks.
pub mod heartbeat;
// NumPy files of float32 rows.
pub mod npy;
// Progress bars, or lines where there is no terminal.
pub mod progress;
// Safetensors files.
pub(crate) mod safetensors;
// TERM, INT and USR1.
pub mod signals;
