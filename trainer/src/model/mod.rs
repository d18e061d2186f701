//! model
pub mod folder;

pub use folder::{Folder, Pooling};
