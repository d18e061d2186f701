//! data
pub mod batch;
pub mod tokenize;
