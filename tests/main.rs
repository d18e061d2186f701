//! The system tests, one binary.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what fails is a test that fails; what is skipped says so"
)]

// Adapters of PEFT go on here.
mod adapters;
// Embeddings and metrics, against sentence-transformers on the same model.
mod evaluate;
// Written folders open again and embed alike.
mod export;
// Bad input, full disks, losses that are not finite.
mod faults;
// A GPU that is not there.
mod gpu;
// How a batch is cut, ordered and kept changes nothing.
mod gradcache;
// The same under mpirun.
mod mpi;
// The same numbers as transformers, PEFT and sentence-transformers.
mod parity;
// A run that was stopped goes on as if it had not been.
mod resume;
// Ranks change how long a run takes, never what it computes.
mod world;
