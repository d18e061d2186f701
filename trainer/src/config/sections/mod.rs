//! The sections of a configuration, one file each: keys, defaults, and the checks of their values.
//!
//! The doc comment of a key is its text in docs/configuration.md, in the JSON Schema and in `trainer config`. It says what the
//! key does and gives its unit. The default value is printed from the code; a default that depends on something else (`None`
//! in the code) stands in the comment after `Default:`.

mod data;
mod evaluation;
mod loss;
mod model;
mod run;
mod training;

pub use data::{Columns, Data, DataSet};
pub use evaluation::{Evaluation, EvaluationSet};
pub use loss::{Loss, Matryoshka};
pub use model::{Lora, Model};
pub use run::{Checkpoint, Logging};
pub use training::Training;
