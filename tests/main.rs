//! The system tests, one binary.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a helper that fails must fail the test; skipped tests print why"
)]

// Training continues PEFT adapters.
mod adapters;
// A training step equals that of candle's autograd.
mod autograd;
// The losses of short runs, which are kept in `expected/`.
mod curves;
// Links, YAML and the table of contents of the documents.
mod docs;
// A whole run on the emulated GPU.
mod emulated;
// Embeddings and metrics against sentence-transformers.
mod evaluate;
// Exported folders open again and give the same embeddings.
mod export;
// Bad input, full disks, losses that are not finite.
mod faults;
// Embeddings and norms that are not trained.
mod frozen;
// A GPU that does not exist.
mod gpu;
// Chunks, order and saved activations do not change the result.
mod gradcache;
// Rows of every kind, each with its loss.
mod kinds;
// Training under mpirun.
mod mpi;
// Numbers against transformers, PEFT and sentence-transformers.
mod parity;
// `split`, `mine` and `nano`.
mod prepare;
// all-MiniLM-L6-v2 and questions of real users.
mod real;
// The HTML report in a browser, and `compare`.
mod report;
// A resumed run equals an uninterrupted one.
mod resume;
// The modules of the trainer use only those above them.
mod modules;
// Evaluation during training, and early stopping.
mod stopping;
// A table becomes a trained model by the commands that `trainer init` prints.
mod init;
// The number of ranks does not change the result.
mod world;
