//! The system tests, one binary.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what fails is a test that fails; what is skipped says so"
)]

// Adapters of PEFT go on here.
mod adapters;
// The losses of short runs, kept in `expected/`.
mod curves;
// The kernels of a GPU, emulated, through a whole run.
mod emulated;
// Embeddings and metrics, against sentence-transformers on the same model.
mod evaluate;
// Written folders open again and embed alike.
mod export;
// Bad input, full disks, losses that are not finite.
mod faults;
// Embeddings and norms that are not trained.
mod frozen;
// A GPU that is not there.
mod gpu;
// How a batch is cut, ordered and kept changes nothing.
mod gradcache;
// Rows of every kind, each with its loss.
mod kinds;
// The same under mpirun.
mod mpi;
// The same numbers as transformers, PEFT and sentence-transformers.
mod parity;
// Rows divided, negatives mined, small sets made.
mod prepare;
// The page of a run, in a browser; models compared.
mod report;
// all-MiniLM-L6-v2 and questions that people asked.
mod real;
// A run that was stopped goes on as if it had not been.
mod resume;
// Evaluation while a run trains, and its end.
mod stopping;
// Ranks change how long a run takes, never what it computes.
mod world;
