//! Rows, tokens, batches: what the model learns from, in the order it learns it.
//!
//! Files are opened by `reader`, which keeps the rows on disk; `mixture` decides which rows make the next step, as a pure
//! function of the seed and a cursor; `share` deals work to ranks; `tokenize` turns texts into tokens; `builder` puts a batch together; `loader` does
//! all of that in the background, a few batches ahead.
pub mod batch;
pub mod builder;
#[cfg(test)]
mod fixtures;
pub mod labels;
pub mod loader;
pub mod mixture;
pub(crate) mod permutation;
pub mod reader;
pub mod row;
pub mod set;
pub mod share;
pub mod split;
pub mod tokenize;
