//! metrics.jsonl: what a run measured, one object a line, flushed with each line; and the same for TensorBoard.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::eval::{self, nano};
use crate::system::atomic;
use crate::train::tensorboard::Events;
use crate::{Error, Result};

/// One optimizer step.
#[derive(Clone, Debug, Serialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// Epochs done, a fraction.
    pub epoch: f64,
    /// Mean over the rows of the batch.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// The rate that was used.
    pub learning_rate: f64,
    /// Rows of the batch.
    pub rows: usize,
    /// Tokens that were encoded: each text of the batch once, without padding.
    pub tokens: usize,
    /// Of the step alone.
    pub seconds: f64,
    /// tokens / seconds.
    pub tokens_per_second: f64,
    /// Mean over the rows of each data set that has any in the batch, by its name.
    pub losses: Map<String, Value>,
    /// Share of the candidates that rows leave out of their negatives, because they are known to answer the query.
    pub masked: f64,
}

/// The open file.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: Option<Events>,
}

impl Metrics {
    /// Opens OUTPUT/metrics.jsonl to append. Lines after step `done`, and evaluations after step `evaluated`, are dropped first: a
    /// run that was killed had gone further than its last checkpoint, and will write them again.
    pub fn open(output: &Path, done: u64, evaluated: Option<u64>, tensorboard: bool) -> Result<Self> {
        let path = output.join("metrics.jsonl");
        if path.exists() {
            trim(&path, done, evaluated)?;
        }
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(Error::write("open", &path))?;
        let events = if tensorboard { Some(Events::create(output)?) } else { None };
        Ok(Self { path, file, events })
    }

    /// Appends a step.
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        let line = serde_json::to_string(step).map_err(|error| Error::file(&self.path, error.to_string()))?;
        self.line(&line)?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let scalars = [
            ("train/loss", step.loss),
            ("train/grad_norm", step.grad_norm),
            ("train/learning_rate", step.learning_rate),
            ("train/epoch", step.epoch),
            ("train/tokens_per_second", step.tokens_per_second),
            ("train/masked", step.masked),
        ];
        let losses = numbers("losses", &step.losses);
        let losses = losses.iter().map(|(name, loss)| (name.as_str(), *loss));
        events.scalars(step.step, scalars.into_iter().chain(losses))
    }

    /// Appends the scores of an evaluation after `step` steps.
    pub fn evaluation(&mut self, step: u64, scores: &Map<String, Value>) -> Result<()> {
        self.line(&json!({ "step": step, "eval": scores }).to_string())?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let named = numbers("eval", scores);
        events.scalars(step, named.iter().map(|(name, value)| (name.as_str(), *value)))
    }

    fn line(&mut self, line: &str) -> Result<()> {
        writeln!(self.file, "{line}")
            .and_then(|()| self.file.flush())
            .map_err(Error::write("write", &self.path))
    }
}

/// The numbers among `values`, their names below `place`.
fn numbers(place: &str, values: &Map<String, Value>) -> Vec<(String, f64)> {
    values.iter().filter_map(|(name, value)| Some((format!("{place}/{name}"), value.as_f64()?))).collect()
}

/// Leaves what a run does not write again that goes on after `done` steps and the evaluation after `evaluated`.
fn trim(path: &Path, done: u64, evaluated: Option<u64>) -> Result<()> {
    let reader = BufReader::new(File::open(path).map_err(Error::read("open", path))?);
    let mut kept = String::new();
    for line in reader.lines() {
        let line = line.map_err(Error::read("read", path))?;
        // A line that was cut off by a kill is no JSON.
        let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
        let last = if value.get("eval").is_some() { evaluated } else { Some(done) };
        if value["step"].as_u64().is_some_and(|step| Some(step) <= last) {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    atomic::write(path, kept)
}

/// What metrics.jsonl tells of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Its steps as they were written.
    pub steps: Vec<Map<String, Value>>,
    /// The scores of its evaluations, each after so many steps.
    pub evaluations: Vec<(u64, Map<String, Value>)>,
}

impl History {
    /// Reads metrics.jsonl; nothing where there is no such file. The last line may have been cut off by a kill.
    ///
    /// # Errors
    /// Another line is no JSON, or tells of no step.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::read("read", path)(error)),
        };
        let mut history = Self::default();
        for (number, line) in text.split_inclusive('\n').enumerate() {
            let wrong =
                |message: String| Error::Row { path: path.to_owned(), line: number as u64 + 1, message };
            let mut line = match serde_json::from_str::<Map<String, Value>>(line) {
                Ok(line) => line,
                Err(_) if !line.ends_with('\n') || line.trim().is_empty() => continue,
                Err(error) => return Err(wrong(format!("is not what a run writes: {error}"))),
            };
            let Some(step) = line.get("step").and_then(Value::as_u64) else {
                return Err(wrong("has no `step`".into()));
            };
            match line.remove("eval") {
                Some(Value::Object(scores)) => history.evaluations.push((step, scores)),
                Some(_) => return Err(wrong("`eval` is no object".into())),
                None => history.steps.push(line),
            }
        }
        Ok(Some(history))
    }

    /// The scores after so many steps.
    pub fn scores_at(&self, step: u64) -> Option<&Map<String, Value>> {
        self.evaluations.iter().rev().find(|(other, _)| *other == step).map(|(_, scores)| scores)
    }

    /// The step whose parameters a run ends with: that of the best evaluation if `patience` evaluations since were not better,
    /// else the last.
    pub fn selected_step(&self, metric: &str, patience: Option<u64>) -> u64 {
        let last = self.steps.last().and_then(|step| step["step"].as_u64()).unwrap_or(0);
        let evaluated = self.evaluations.last().map_or(0, |(step, _)| *step);
        self.stopped_early_at(metric, patience).unwrap_or(last.max(evaluated))
    }

    /// The step of the best evaluation, where early stopping ended the run.
    pub fn stopped_early_at(&self, metric: &str, patience: Option<u64>) -> Option<u64> {
        let mut best: Option<(u64, f64)> = None;
        let mut evaluations_without_improvement = 0;
        let of_trained = self.evaluations.iter().filter(|(step, _)| *step > 0);
        for (step, value) in
            of_trained.filter_map(|(step, scores)| Some((*step, selection_metric(scores, metric)?)))
        {
            if best.is_some_and(|(_, best)| !eval::is_better(metric, value, best)) {
                evaluations_without_improvement += 1;
            } else {
                (best, evaluations_without_improvement) = (Some((step, value)), 0);
            }
        }
        let (step, _) = best?;
        (evaluations_without_improvement >= patience?).then_some(step)
    }
}

/// Whether one of the metrics `names` is called so, or is a set's metric of that name.
pub fn has_metric<'a>(mut names: impl Iterator<Item = &'a str>, metric: &str) -> bool {
    names.any(|name| name == metric || is_of_set(name, metric))
}

fn is_of_set(name: &str, metric: &str) -> bool {
    name.strip_suffix(metric).is_some_and(|set| set.ends_with('_'))
}

/// The value that decides between evaluations: the metric's mean over the sets that have it, or the metric that is called so in
/// full. Nothing where no set has it.
pub fn selection_metric(scores: &Map<String, Value>, metric: &str) -> Option<f64> {
    if let Some(value) = scores.get(metric) {
        return value.as_f64();
    }
    let of_sets = |name: &str| is_of_set(name, metric) && !nano::is_mean_metric(name);
    let values: Vec<f64> =
        scores.iter().filter(|(name, _)| of_sets(name)).filter_map(|(_, value)| value.as_f64()).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_what_comes_after_the_checkpoint_and_what_was_cut_off() {
        let output = tempfile::tempdir().unwrap();
        let path = output.path().join("metrics.jsonl");
        let kept = "{\"step\":0,\"eval\":{}}\n{\"step\":1}\n{\"step\":2}\n";
        fs::write(&path, format!("{kept}{{\"step\":2,\"eval\":{{}}}}\n{{\"step\":3}}\n{{\"st")).unwrap();
        let mut metrics = Metrics::open(output.path(), 2, Some(0), false).unwrap();
        metrics.evaluation(2, &Map::from_iter([("x".to_owned(), json!(0.5))])).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{kept}{{\"step\":2,\"eval\":{{\"x\":0.5}}}}\n"));
    }

    #[test]
    fn a_run_is_read_back_but_for_what_was_cut_off() {
        let output = tempfile::tempdir().unwrap();
        let path = output.path().join("metrics.jsonl");
        assert_eq!(History::read(&path).unwrap(), None);
        let lines = "{\"step\":0,\"eval\":{\"a\":0.5}}\n{\"step\":1,\"loss\":null}\n{\"step\":1,\"eval\":{\"a\":1}}\n";
        fs::write(&path, format!("{lines}{{\"st")).unwrap();
        let history = History::read(&path).unwrap().unwrap();
        assert_eq!(history.steps.len(), 1);
        assert_eq!(history.steps[0]["loss"], Value::Null);
        assert_eq!(
            history.evaluations.iter().map(|(step, scores)| (*step, &scores["a"])).collect::<Vec<_>>(),
            [(0, &json!(0.5)), (1, &json!(1))]
        );
        assert_eq!(history.scores_at(1).unwrap()["a"], 1);
        assert!(history.scores_at(2).is_none());
        for (text, expected) in [
            ("{\"st\n{\"step\":1}\n", "metrics.jsonl:1: is not what a run writes"),
            ("{\"step\":1}\n{\"loss\":1}\n", "metrics.jsonl:2: has no `step`"),
            ("{\"step\":1,\"eval\":2}\n", "metrics.jsonl:1: `eval` is no object"),
        ] {
            fs::write(&path, text).unwrap();
            let error = History::read(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_run_ends_with_its_best_step_if_it_was_stopped_early() {
        let scores = |value: f64| {
            json!({"a_m": value, "b_m": value, "NanoBEIR_mean_m": 9.0}).as_object().unwrap().clone()
        };
        // What the run began with is none of its steps, however good it is.
        let evaluations = [0.9, 0.4, 0.3, 0.2].iter().zip([0, 10, 20, 30]);
        let history = History {
            steps: vec![json!({"step": 30}).as_object().unwrap().clone()],
            evaluations: evaluations.map(|(value, step)| (step, scores(*value))).collect(),
        };
        assert_eq!(history.selected_step("m", None), 30);
        assert_eq!(history.selected_step("m", Some(3)), 30);
        assert_eq!(history.selected_step("m", Some(2)), 10);
        assert_eq!(history.selected_step("other", Some(2)), 30);
        assert_eq!(selection_metric(&scores(0.5), "m"), Some(0.5));
        assert_eq!(selection_metric(&scores(0.5), "NanoBEIR_mean_m"), Some(9.0));
        assert_eq!(selection_metric(&scores(0.5), "a_m"), Some(0.5));
        assert_eq!(selection_metric(&scores(f64::NAN), "m"), None);
    }
}
