//! Trains text-embedding models. The modules stand in the order of a run; each uses only those above it.

pub mod error;
/// What the user wrote.
pub mod config;
/// Rows, tokens, batches.
pub mod data;
/// Encoders with a written backward.
pub mod model;
/// Texts to embeddings, with a model as it is.
pub mod embed;
/// How good a model is.
pub mod eval;
/// Model folders that other programs open.
pub mod export;
/// The commands.
pub mod cli;

pub use error::{Error, Result};
