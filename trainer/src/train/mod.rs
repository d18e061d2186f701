//! Training: from a plan to a trained model.
//!
//! `gradcache`, `schedule`, `optimizer` and `step` are the numerics of one optimizer step, `setup` builds them from a
//! configuration. `memory`, `scaling` and `plan` decide before the run what it does and what it costs. `run` is the loop around
//! the steps; the other modules evaluate, log, and write checkpoints and the report.

// A batch of any size in the memory of one chunk.
pub mod gradcache;
// The learning rate as a function of the step.
pub mod schedule;
// AdamW over the flat parameter buffer.
pub mod optimizer;
// One optimizer step, on one screen.
pub mod step;
// A stepper from the values of a configuration.
pub mod setup;
// Free memory, and what it is used for.
pub mod memory;
// Predicted time of a step on more ranks.
pub mod scaling;
// The best evaluation and early stopping.
pub mod selection;
// Everything that a run needs to be resumed.
pub mod checkpoint;
// What a run will do, checked before it starts.
pub mod plan;
// Event files of TensorBoard.
pub mod tensorboard;
// metrics.jsonl: one line per step and per evaluation.
pub mod metrics;
// The files that record a run.
mod run_log;
// Evaluation during a run.
mod evaluation;
// The HTML report of one or more runs.
pub mod report;
// The loop around the steps.
mod run;

pub use run::{Run, Summary};
