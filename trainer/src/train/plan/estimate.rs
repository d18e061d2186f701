//! What a configuration tells of its run before the data exists: what is missing, and an upper bound of the cost.

use std::fmt;

use super::cost::state_bytes;
use super::{Lengths, lengths, options};
use crate::config::{Batching, Config, WeightInit};
use crate::model::{Model, Options, locate};
use crate::train::memory::format_bytes;
use crate::train::scaling::Workload;
use crate::{Error, Result, hub};

/// Checks that all data files of the configuration exist. Files on the hub are not checked; they are downloaded when they are
/// opened.
///
/// # Errors
/// Files are missing: the message lists all of them with their place in the configuration.
pub fn check_inputs(config: &Config) -> Result<()> {
    let train = config.data.train.iter().enumerate();
    let train = train.map(|(i, set)| (format!("data.train.{i}.path"), set.path.as_path()));
    let sets = config.evaluation.sets.iter().enumerate();
    let sets = sets.map(|(i, set)| (format!("evaluation.sets.{i}.path"), set.path.as_path()));
    let missing: Vec<String> = train
        .chain(sets)
        .filter(|(_, path)| !hub::is_data_set(path) && matches!(path.try_exists(), Ok(false)))
        .map(|(field, path)| config.error(&field, format!("there is no {}", path.display())).to_string())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let hint =
        "paths are relative to the working directory; the first lines of a recipe say where to get its data";
    Err(Error::Usage(format!("{}\nhint: {hint}", missing.join("\n"))))
}

/// An upper bound of the cost of a run, from its configuration and the shapes of its model alone.
pub struct CostEstimate<'a> {
    config: &'a Config,
    parameters: usize,
    trained: usize,
    state_bytes: u64,
    lengths: Lengths,
    /// The work of a step that is divided among ranks, with every text at its maximum length.
    pub workload: Workload,
    /// Rows per epoch and steps of the run; none unless every data set has `samples`.
    planned: Option<(u64, u64)>,
}

impl<'a> CostEstimate<'a> {
    /// Reads the model's configuration, not its weights.
    ///
    /// # Errors
    /// The model is not found, or does not fit the configuration.
    pub fn new(config: &'a Config) -> Result<Self> {
        let folder = locate::model(&config.model.path, WeightInit::Random)?;
        let mut options = Options { shapes_only: true, ..options(config) };
        options.model.init = WeightInit::Random;
        let model = Model::open(folder, &options)?;
        let lengths = lengths(config, &model)?;
        let trained = model.flat().len();
        Ok(Self {
            config,
            parameters: model.parameter_count(),
            trained,
            state_bytes: state_bytes(&model),
            lengths,
            workload: Workload { lengths: longest(config, lengths), width: model.embedding_dim(), trained },
            planned: planned(config),
        })
    }
}

/// Tokens of each sequence of a step, with every text at its maximum length.
fn longest(config: &Config, lengths: Lengths) -> Vec<usize> {
    let rows = config.training.batch_size;
    let documents = rows * (1 + config.data.negatives);
    [vec![lengths.query; rows], vec![lengths.document; documents]].concat()
}

/// Rows per epoch and steps of the run, if every data set has `samples`.
fn planned(config: &Config) -> Option<(u64, u64)> {
    let rows =
        |set: &crate::config::DataSet| set.samples.map(|rows| (rows as f64 * set.weight).round() as u64);
    let rows: Vec<u64> = config.data.train.iter().map(rows).collect::<Option<_>>()?;
    let all: u64 = rows.iter().sum();
    let batch = config.training.batch_size as u64;
    let batches = match config.data.batching {
        Batching::Mixed => all.div_ceil(batch),
        Batching::PerDataset => rows.iter().map(|rows| rows.div_ceil(batch)).sum(),
    };
    let steps = batches * config.training.epochs;
    Some((all, config.training.max_steps.unwrap_or(steps)))
}

impl fmt::Display for CostEstimate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config { name, output, model, data, training, .. } = self.config;
        writeln!(f, "run        {name} → {}", output.display())?;
        let (all, trained) = (self.parameters as f64 / 1e6, self.trained as f64 / 1e6);
        writeln!(f, "model      {}: {all:.1} M parameters, {trained:.2} M trained", model.path)?;
        writeln!(f, "memory     {} for parameters and moments", format_bytes(self.state_bytes))?;
        let documents = 1 + data.negatives;
        let step = self.workload.lengths.iter().sum::<usize>() as f64;
        writeln!(
            f,
            "tokens     at most {step:.0} per step: {} rows, each with a query of {} and {documents} documents of {}",
            training.batch_size, self.lengths.query, self.lengths.document
        )?;
        match self.planned {
            Some((rows, steps)) => {
                let sets = data.train.len();
                writeln!(
                    f,
                    "data       {rows} rows per epoch, if all {sets} data sets have their `samples`"
                )?;
                writeln!(f, "steps      {steps}, at most {:.2} M tokens in total", step * steps as f64 / 1e6)
            }
            None => writeln!(
                f,
                "steps      unknown until the rows are counted at the start of the run; `samples` of every data set fixes them"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.yaml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path, &[]).unwrap()
    }

    #[test]
    fn all_missing_files_are_listed_at_once() {
        let here = tempfile::tempdir().unwrap();
        std::fs::write(here.path().join("rows.jsonl"), "").unwrap();
        let config = config(&format!(
            "model: {{path: m}}\ndata:\n  train:\n    - {{path: no/rows.jsonl}}\n    - {{path: {}/rows.jsonl}}\n    \
             - {{path: hf://datasets/org/set/rows.jsonl}}\nevaluation:\n  sets:\n    - {{path: no/set}}\n",
            here.path().display()
        ));
        let error = check_inputs(&config).unwrap_err().to_string();
        let lines: Vec<&str> = error.lines().collect();
        let ends = [
            "run.yaml:4: data.train.0.path: there is no no/rows.jsonl",
            "run.yaml:9: evaluation.sets.0.path: there is no no/set",
        ];
        assert_eq!(lines.len(), 3, "{error}");
        for (line, end) in lines.iter().zip(ends) {
            assert!(line.ends_with(end), "{error}");
        }
    }

    #[test]
    fn steps_follow_from_the_samples() {
        let sets =
            "data:\n  train:\n    - {path: a, samples: 100}\n    - {path: b, samples: 10, weight: 2.5}\n";
        let of = |more: &str| planned(&config(&format!("model: {{path: m}}\n{sets}{more}")));
        assert_eq!(of("training: {batch_size: 50, epochs: 2}"), Some((125, 6)));
        assert_eq!(of("  batching: per_dataset\ntraining: {batch_size: 50, epochs: 2}"), Some((125, 6)));
        assert_eq!(of("  batching: per_dataset\ntraining: {batch_size: 20}"), Some((125, 7)));
        assert_eq!(of("training: {batch_size: 50, epochs: 2, max_steps: 4}"), Some((125, 4)));
        assert_eq!(of("    - {path: c}\n"), None);
    }
}
