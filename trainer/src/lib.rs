//! Trains text-embedding models. The modules stand in the order of a run; each uses only those above it.

// Errors, for the person at the terminal.
pub mod error;
// Files, devices, signals and the terminal.
pub mod system;
// The configuration that the user wrote.
pub mod config;
// Files of the Hugging Face hub.
pub mod hub;
// Rows, tokens, batches.
pub mod data;
// Encoders with a backward pass written by hand.
pub mod model;
// Embeddings in, loss and gradient out.
pub mod loss;
// The ranks of a run.
pub mod comm;
// Evaluation of a model on held-out texts.
pub mod eval;
// Hard negatives, and small evaluation sets.
pub mod mine;
// Model folders that sentence-transformers and other programs can open.
pub mod export;
// From a plan to a trained model.
pub mod train;
// The commands.
pub mod cli;

pub use error::{Error, Result};
