//! What the user wrote: a YAML file and `KEY=VALUE` after it.
//!
//! [`Config`] mirrors the file key by key and knows nothing of data, models or memory; what the run will do is worked
//! out from it afterwards. Every key has a default except `model.path` and `data.train`. An unknown key is an error that
//! names the nearest known one, a wrong value one that names file, line, field and what was expected.

mod check;
mod origin;
mod overrides;
mod renamed;
mod sections;
mod values;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use origin::Origins;
pub use sections::{
    Checkpoint, Columns, Data, DataSet, Evaluation, EvaluationSet, Logging, Lora, Loss, Matryoshka, Model,
    Training,
};
pub use values::{
    Batching, Bytes, ColumnNames, Distance, Dtype, EvaluationKind, Freeze, Interval, LossKind, Pooling,
    RowKind, ScheduleKind, Targets, WeightInit,
};

use crate::{Error, Result};

/// A whole configuration file.
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
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What the run is called in messages and reports. Default: the name of the file, without its ending.
    pub name: String,
    /// Everything drawn at random follows from it. Default: 42.
    pub seed: u64,
    /// The folder that the run writes, relative to the working directory. Default: `runs/NAME`.
    pub output: PathBuf,
    /// The encoder.
    pub model: Model,
    /// Low-rank adapters. Default: absent, every parameter is trained.
    pub lora: Option<Lora>,
    /// What it learns from.
    pub data: Data,
    /// How it learns from it.
    pub loss: Loss,
    /// How long and how fast.
    pub training: Training,
    /// How good it is, meanwhile.
    pub evaluation: Evaluation,
    /// What is kept of a run that ends early.
    pub checkpoint: Checkpoint,
    /// What is told about it.
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
    /// Reads `path`, applies `overrides` (`KEY=VALUE`, the key dotted, the value YAML), checks every value that can be
    /// checked without opening another file.
    ///
    /// # Errors
    /// The file cannot be read or is not YAML; a key is unknown; a value has the wrong type or does not make sense; a
    /// feature is asked for that is not there.
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
        check::values(&config)?;
        Ok(config)
    }

    /// The resolved configuration as YAML: loading it gives the same again.
    ///
    /// # Errors
    /// A path is not UTF-8.
    pub fn to_yaml(&self) -> Result<String> {
        serde_yaml::to_string(self)
            .map_err(|e| Error::Bug(format!("the configuration cannot be written as YAML: {e}")))
    }

    /// An error about the value of `field` (dotted, `data.train.0.path`) that knows where it was written.
    pub fn error(&self, field: &str, message: impl Into<String>) -> Error {
        self.origins.error(field, message)
    }
}

#[cfg(test)]
mod recipes;
#[cfg(test)]
mod tests;
