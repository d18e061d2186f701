//! metrics.jsonl: the measurements of a run, one JSON object a line, flushed with each line; the same numbers go to TensorBoard.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::config;
use crate::system::atomic;
use crate::train::memory;
use crate::train::selection::{self, Selection};
use crate::train::tensorboard::Events;
use crate::{Error, Result};

/// The measurements of one optimizer step.
#[derive(Clone, Debug, Serialize)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: u64,
    /// Epochs done after the step, a fraction.
    pub epoch: f64,
    /// Mean loss over the rows of the batch.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Rows of the batch.
    pub rows: usize,
    /// Encoded tokens: each text of the batch once, without padding.
    pub tokens: usize,
    /// Duration of the step alone, in seconds.
    pub seconds: f64,
    /// tokens / seconds.
    pub tokens_per_second: f64,
    /// Mean loss over the rows of each data set that has rows in the batch, by the name of the data set.
    pub losses: Map<String, Value>,
    /// Fraction of the candidates that are not used as negatives, because they are known to answer the query.
    pub masked: f64,
}

/// One line of metrics.jsonl: the measurements, when they were written, and the memory used so far.
#[derive(Debug, Serialize)]
struct Line<T> {
    #[serde(flatten)]
    content: T,
    /// Unix time in seconds.
    time: f64,
    /// Peak resident memory of this process, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<u64>,
    /// Peak memory of the GPU used by this process, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory: Option<u64>,
}

/// OUTPUT/metrics.jsonl and OUTPUT/tensorboard, open for writing.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: Option<Events>,
}

impl Metrics {
    /// Opens OUTPUT/metrics.jsonl to append. Lines of steps after `done`, and of evaluations after step `evaluated`, are removed
    /// first: a run that was killed had gone further than its last checkpoint, and the resumed run writes them again.
    ///
    /// # Errors
    /// The files cannot be read or written.
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
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn step(&mut self, step: &StepMetrics) -> Result<()> {
        self.append(step)?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let scalars = [
            ("train/loss", step.loss),
            ("train/grad_norm", step.grad_norm),
            ("train/learning_rate", step.learning_rate),
            ("train/epoch", step.epoch),
            ("train/tokens_per_second", step.tokens_per_second),
            ("train/masked", step.masked),
        ];
        let losses = named("losses", &step.losses);
        let losses = losses.iter().map(|(name, loss)| (name.as_str(), *loss));
        events.scalars(step.step, scalars.into_iter().chain(losses))
    }

    /// Appends the scores of an evaluation after `step` steps.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn evaluation(&mut self, step: u64, scores: &Map<String, Value>) -> Result<()> {
        self.append(json!({ "step": step, "eval": scores }))?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let named = named("eval", scores);
        events.scalars(step, named.iter().map(|(name, value)| (name.as_str(), *value)))
    }

    fn append(&mut self, content: impl Serialize) -> Result<()> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        // Microseconds, as far as an f64 is exact.
        let time = (time * 1e6).round() / 1e6;
        let (memory, gpu_memory) = (memory::peak(), memory::gpu_peak());
        let line = serde_json::to_string(&Line { content, time, memory, gpu_memory })
            .map_err(|error| Error::file(&self.path, error.to_string()))?;
        writeln!(self.file, "{line}")
            .and_then(|()| self.file.flush())
            .map_err(Error::write("write", &self.path))
    }
}

/// The values that are numbers, each with the name `PREFIX/NAME`.
fn named(prefix: &str, values: &Map<String, Value>) -> Vec<(String, f64)> {
    values.iter().filter_map(|(name, value)| Some((format!("{prefix}/{name}"), value.as_f64()?))).collect()
}

/// Keeps lines up to step `done`, and evaluations up to step `evaluated`; the resumed run writes the rest again.
fn trim(path: &Path, done: u64, evaluated: Option<u64>) -> Result<()> {
    let reader = BufReader::new(File::open(path).map_err(Error::read("open", path))?);
    let mut kept = String::new();
    for line in reader.lines() {
        let line = line.map_err(Error::read("read", path))?;
        // A line that a kill cut short is not JSON.
        let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
        let last = if value.get("eval").is_some() { evaluated } else { Some(done) };
        if value["step"].as_u64().is_some_and(|step| Some(step) <= last) {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    atomic::write(path, kept)
}

/// The content of metrics.jsonl.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The steps, as they were written.
    pub steps: Vec<Map<String, Value>>,
    /// The scores of each evaluation, with the number of steps done before it.
    pub evaluations: Vec<(u64, Map<String, Value>)>,
}

impl History {
    /// Reads metrics.jsonl; none if the file does not exist. The last line is skipped if a kill cut it short.
    ///
    /// # Errors
    /// The file cannot be read; another line is not JSON or has no `step`.
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
                Err(error) => return Err(wrong(format!("expected a line that a run has written: {error}"))),
            };
            let Some(step) = line.get("step").and_then(Value::as_u64) else {
                return Err(wrong("has no `step`".into()));
            };
            match line.remove("eval") {
                Some(Value::Object(scores)) => history.evaluations.push((step, scores)),
                Some(_) => return Err(wrong("`eval`: expected an object".into())),
                None => history.steps.push(line),
            }
        }
        Ok(Some(history))
    }

    /// The scores of the evaluation after `step` steps.
    pub fn scores_at(&self, step: u64) -> Option<&Map<String, Value>> {
        self.evaluations.iter().rev().find(|(other, _)| *other == step).map(|(_, scores)| scores)
    }

    /// The best evaluation by the selection metric, as the run has counted it.
    pub fn selection(&self, metric: &str) -> Selection {
        let mut selection = Selection::default();
        for (step, scores) in &self.evaluations {
            selection.update_best(*step, metric, selection::selection_metric(scores, metric));
        }
        selection
    }

    /// The step whose parameters OUTPUT/model holds.
    pub fn selected_step(&self, evaluation: &config::Evaluation) -> u64 {
        let last = self.steps.last().and_then(|step| step["step"].as_u64()).unwrap_or(0);
        let evaluated = self.evaluations.last().map_or(0, |(step, _)| *step);
        self.selection(&evaluation.metric).selected_step(evaluation, last.max(evaluated))
    }
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
        let new = text.strip_prefix(kept).unwrap();
        let line: Value = serde_json::from_str(new).unwrap();
        assert_eq!((&line["step"], &line["eval"]), (&json!(2), &json!({"x": 0.5})));
        assert!(
            line["time"].as_f64().unwrap() > 1.7e9 && line["memory"].as_u64().unwrap() > 1 << 20,
            "{new}"
        );
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
            ("{\"st\n{\"step\":1}\n", "metrics.jsonl:1: expected a line that a run has written"),
            ("{\"step\":1}\n{\"loss\":1}\n", "metrics.jsonl:2: has no `step`"),
            ("{\"step\":1,\"eval\":2}\n", "metrics.jsonl:1: `eval`: expected an object"),
        ] {
            fs::write(&path, text).unwrap();
            let error = History::read(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_selected_step_of_a_run_is_read_back() {
        let scores = |value: f64| json!({ "a_m": value }).as_object().unwrap().clone();
        let evaluations = [0.9, 0.4, 0.3, 0.2].iter().zip([0, 10, 20, 30]);
        let history = History {
            steps: vec![json!({"step": 30}).as_object().unwrap().clone()],
            evaluations: evaluations.map(|(value, step)| (step, scores(*value))).collect(),
        };
        let selected = |metric: &str, patience| {
            let metric = metric.to_owned();
            history.selected_step(&config::Evaluation { metric, patience, ..Default::default() })
        };
        assert_eq!([selected("m", None), selected("m", Some(3)), selected("other", Some(2))], [30; 3]);
        assert_eq!(selected("m", Some(2)), 10);
    }
}
