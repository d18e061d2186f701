//! Training: from a plan to a trained model.
//!
//! `gradcache`, `schedule`, `optimizer` and `step` are the numerics of one optimizer step. `memory`, `plan` and `scaling` decide
//! before the run what it does and what it costs. `run` is the loop around the steps; it evaluates, writes checkpoints, metrics and
//! the report.

// A batch of any size in the memory of one chunk.
pub mod gradcache;
// The learning rate as a function of the step.
pub mod schedule;
// AdamW over the flat parameter buffer.
pub mod optimizer;
// One optimizer step, on one screen.
pub mod step;
// Free memory, and what it is used for.
pub mod memory;
// Everything that a run needs to be resumed.
pub mod checkpoint;
// Event files of TensorBoard.
pub mod tensorboard;
// metrics.jsonl: one line per step and per evaluation.
pub mod metrics;
// Predicted cost of a run on more ranks.
pub mod scaling;
// What a run will do, checked before it starts.
pub mod plan;
// The HTML report of one or more runs.
pub mod report;
mod run;

pub use run::{Run, Summary};
