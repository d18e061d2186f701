//! The configuration of a run: a YAML file, and `KEY=VALUE` overrides on the command line.
//!
//! [`Config`] mirrors the file key by key and knows nothing of data, models or memory; [`crate::train::plan`] works out what the
//! run will do. The error for an unknown key names the nearest known one, the error for a wrong value names file, line, field
//! and what was expected. [`mod@reference`] generates the documentation of the keys.

mod check;
mod origin;
mod overrides;
mod peers;
pub mod reference;
mod renamed;
mod sections;
mod values;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use origin::Origins;
pub use sections::{
    Checkpoint, Columns, Data, DataSet, Evaluation, EvaluationSet, Logging, Lora, Loss, Matryoshka, Model,
    Training,
};
pub use values::{
    Batching, Bytes, ColumnNames, Distance, Dtype, EvaluationKind, Freeze, Interval, LossKind, LossTraits,
    Pooling, RowKind, RowScores, ScheduleKind, Targets, WeightInit,
};

use self::check::Check;
use crate::{Error, Result};

/// The configuration of a training run, a YAML file. Every key has a default except `model.path` and `data.train`.
///
/// ```yaml
/// model: {path: sentence-transformers/all-MiniLM-L6-v2}
/// data: {train: [{path: data/pairs.jsonl}]}
/// training: {epochs: 1, batch_size: 64, learning_rate: 2.0e-5}
/// ```
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the run in messages and reports. Default: the name of the configuration file without its ending.
    pub name: String,
    /// Seed of everything that is drawn at random.
    pub seed: u64,
    /// Folder that the run writes, relative to the working directory. Default: `runs/NAME`.
    pub output: PathBuf,
    /// The encoder.
    pub model: Model,
    /// Low-rank adapters. Default: none, every parameter of the model is trained.
    pub lora: Option<Lora>,
    /// The training data.
    pub data: Data,
    /// The loss function.
    pub loss: Loss,
    /// Length of the run, batches and optimizer.
    pub training: Training,
    /// Evaluation during the run.
    pub evaluation: Evaluation,
    /// Checkpoints.
    pub checkpoint: Checkpoint,
    /// Metrics of the training steps.
    pub logging: Logging,
    #[serde(skip)]
    origins: Origins,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::new(),
            seed: 42,
            output: PathBuf::new(),
            model: Model::default(),
            lora: None,
            data: Data::default(),
            loss: Loss::default(),
            training: Training::default(),
            evaluation: Evaluation::default(),
            checkpoint: Checkpoint::default(),
            logging: Logging::default(),
            origins: Origins::default(),
        }
    }
}

impl Config {
    /// Reads the file `path`, applies `overrides` (`KEY=VALUE`, the key dotted, the value YAML) and checks every value that can be
    /// checked without opening another file.
    ///
    /// # Errors
    /// The file cannot be read or is not YAML, a key is unknown or given under two names, a value has the wrong type or is out of
    /// range, or two keys exclude each other.
    ///
    /// ```
    /// use trainer::config::Config;
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("run.yaml");
    /// std::fs::write(&path, "model: {path: org/model}\ndata: {train: [{path: pairs.jsonl}]}\n")?;
    /// let config = Config::load(&path, &["training.batch_size=32".to_owned()])?;
    /// assert_eq!((config.name.as_str(), config.training.batch_size), ("run", 32));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::read("read", path))?;
        let mut tree = origin::parse(path, &text)?;
        let mut origins = Origins::new(path, text);
        renamed::rename(&mut tree, &mut origins)?;
        for argument in overrides {
            origins.overridden(overrides::apply(&mut tree, argument)?);
        }
        // An override can bring a section that has former names.
        renamed::rename(&mut tree, &mut origins)?;
        let mut config: Self = serde_path_to_error::deserialize(tree).map_err(|e| origins.explain(&e))?;
        config.origins = origins;
        if config.name.is_empty() {
            config.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        }
        if config.output.as_os_str().is_empty() {
            config.output = Path::new("runs").join(&config.name);
        }
        config.check()?;
        Ok(config)
    }

    /// The configuration as YAML, with its default values. Loading it gives an equal configuration.
    ///
    /// # Errors
    /// A path is not UTF-8.
    pub fn to_yaml(&self) -> Result<String> {
        serde_yaml::to_string(self)
            .map_err(|e| Error::Bug(format!("the configuration cannot be written as YAML: {e}")))
    }

    /// Checks every section, in the order of the file.
    fn check(&self) -> Result<()> {
        let section = |name: &str| Check::new(&self.origins, name);
        self.model.check(&section("model"))?;
        if let Some(lora) = &self.lora {
            let message = "expected an empty list beside `lora`, which freezes the whole encoder";
            section("model").that(self.model.freeze.is_empty(), "freeze", message)?;
            lora.check(&section("lora"))?;
        }
        self.data.check(&section("data"))?;
        self.loss.check(&section("loss"))?;
        self.training.check(&section("training"))?;
        self.evaluation.check(&section("evaluation"))?;
        self.checkpoint.check(&section("checkpoint"))?;
        self.logging.check(&section("logging"))
    }

    /// An error about the value of `field` (dotted, `data.train.0.path`), with the place where it was written.
    pub fn error(&self, field: &str, message: impl Into<String>) -> Error {
        self.origins.error(field, message)
    }
}

#[cfg(test)]
mod recipes;
#[cfg(test)]
mod tests;
