//! Trains text-embedding models. The modules stand in the order of a run; each uses only those above it.

// What went wrong, for the person at the terminal.
pub mod error;
// Signs of life, for those who wait.
pub mod pulse;
// A polite request to stop.
pub mod signals;
// Bars, or lines where there is no terminal.
pub mod progress;
// A GPU, or the CPU.
pub mod device;
// Folders that are there whole or not at all.
mod draft;
// What the user wrote.
pub mod config;
// Files of the Hugging Face hub.
pub mod hub;
// Rows, tokens, batches.
pub mod data;
// A file of rows, divided so that no text is in two parts.
pub mod split;
// Encoders with a written backward.
pub mod model;
// What is free, and how it is shared out.
pub mod memory;
// Embeddings in, loss and gradient out.
pub mod loss;
// The ranks of a run.
pub mod comm;
// A batch of any size in the memory of a chunk.
pub mod gradcache;
// The learning rate as a function of the step.
pub mod schedule;
// AdamW over the flat buffer.
pub mod optimizer;
// One optimizer step, on one screen.
pub mod step;
// Texts to embeddings, with a model as it is.
pub mod embed;
// Arrays of float32 rows on disk.
pub mod npy;
// Files of tensors, written with signs of life.
mod tensors;
// How good a model is.
pub mod eval;
// Documents that lie near a query and do not answer it.
pub mod mine;
// A small set that is nearly as hard as a large one.
pub mod nano;
// Everything a run needs to go on.
pub mod checkpoint;
// Model folders that other programs open.
pub mod export;
// Event files of TensorBoard.
pub mod tensorboard;
// What a run measured, line by line.
pub mod metrics;
// What a few queries find, before and after.
pub mod samples;
// Two models on the same sets.
pub mod compare;
// What more ranks would make of a run.
pub mod scaling;
// What a run will do.
pub mod plan;
// A page to look at runs.
pub mod report;
// A run, around its steps.
pub mod train;
// The commands.
pub mod cli;

pub use error::{Error, Result};
