//! Training data: from rows on disk to batches of token ids.
//!
//! `reader` opens files and leaves their rows on disk; `mixture` chooses the rows of each step as a pure
//! function of the seed and a cursor; `tokenize` turns texts into token ids; `builder` assembles batches,
//! whose tokenising is divided among ranks by `partition`; `loader` does all of that on background threads, a
//! few batches ahead. `split` divides a file into training and evaluation parts.
pub mod batch;
pub mod builder;
#[cfg(test)]
mod fixtures;
pub mod labels;
pub mod loader;
pub mod mixture;
pub(crate) mod permutation;
pub mod reader;
pub(crate) mod recognise;
pub mod row;
pub mod set;
pub mod partition;
pub mod split;
pub mod tokenize;
