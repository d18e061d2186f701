//! Trains text-embedding models. The modules stand in the order of a run; each uses only those above it.

/// The commands.
pub mod cli;
/// What the user wrote.
pub mod config;
/// Rows, tokens, batches.
pub mod data;
/// Texts to embeddings, with a model as it is.
pub mod embed;
pub mod error;
/// How good a model is.
pub mod eval;
/// Model folders that other programs open.
pub mod export;
/// Encoders with a written backward.
pub mod model;

pub use error::{Error, Result};
