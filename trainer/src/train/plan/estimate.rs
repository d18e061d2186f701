//! What a configuration says of its run before the data is there: what is missing, and what the run would cost at most.

use std::fmt;

use super::{Lengths, lengths, options, state_bytes};
use crate::config::{Batching, Config, WeightInit};
use crate::model::{Model, Options, locate};
use crate::train::memory::format_bytes;
use crate::train::scaling::Workload;
use crate::{Error, Result, hub};

/// Whether all data that the configuration names is there. What is on the hub is asked for when it is needed.
///
/// # Errors
/// Some are not: all of them, each with its place in the configuration.
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
        "paths are relative to the working directory; a recipe's first lines say where its data comes from";
    Err(Error::Usage(format!("{}\nhint: {hint}", missing.join("\n"))))
}

/// A run as far as its configuration and the shape of its model tell.
pub struct CostEstimate<'a> {
    config: &'a Config,
    elements: usize,
    trained: usize,
    state: u64,
    lengths: Lengths,
    /// What ranks share of a step, where every text is as long as it may be: no step has more.
    pub workload: Workload,
    /// Rows an epoch and steps of the run, where every data set says its `samples`.
    planned: Option<(u64, u64)>,
}

impl<'a> CostEstimate<'a> {
    /// Looks at the model's configuration, not at its weights.
    ///
    /// # Errors
    /// The model cannot be had, or does not fit the configuration.
    pub fn new(config: &'a Config) -> Result<Self> {
        let folder = locate::model(&config.model.path, WeightInit::Random)?;
        let mut options = Options { shapes_only: true, ..options(config) };
        options.model.init = WeightInit::Random;
        let model = Model::open(folder, &options)?;
        let lengths = lengths(config, &model)?;
        let (elements, trained) = (model.parameter_count(), model.flat().len());
        let workload = Workload { lengths: longest(config, lengths), width: model.embedding_dim(), trained };
        let state = state_bytes(&model);
        Ok(Self { config, elements, trained, state, lengths, workload, planned: planned(config) })
    }
}

/// Tokens of a step's queries and documents at most.
fn longest(config: &Config, lengths: Lengths) -> Vec<usize> {
    let rows = config.training.batch_size;
    let documents = rows * (1 + config.data.negatives);
    [vec![lengths.query; rows], vec![lengths.document; documents]].concat()
}

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
        let (all, trained) = (self.elements as f64 / 1e6, self.trained as f64 / 1e6);
        writeln!(f, "model      {}: {all:.1} M parameters, {trained:.2} M trained", model.path)?;
        writeln!(f, "memory     {} for parameters and moments", format_bytes(self.state))?;
        let documents = 1 + data.negatives;
        let step = self.workload.lengths.iter().sum::<usize>() as f64;
        write!(
            f,
            "tokens     at most {step:.0} a step: {} rows with a query of {}",
            training.batch_size, self.lengths.query
        )?;
        writeln!(f, " and {documents} documents of {}", self.lengths.document)?;
        match self.planned {
            Some((rows, steps)) => {
                let sets = data.train.len();
                writeln!(
                    f,
                    "data       {rows} rows an epoch, where all {sets} data sets have what is asked of them"
                )?;
                writeln!(f, "steps      {steps}, at most {:.2} M tokens in all", step * steps as f64 / 1e6)
            }
            None => writeln!(
                f,
                "steps      as many as the rows make, which are counted when the run starts; `samples` fixes them"
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
    fn all_that_is_missing_is_told_at_once() {
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
