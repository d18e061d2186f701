//! metrics.jsonl: what a run measured, one object a line, flushed with each line; and the same for TensorBoard.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::tensorboard::Events;
use crate::{Error, Result};

/// One optimizer step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
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
}

/// The open file.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: Option<Events>,
}

impl Metrics {
    /// Opens OUTPUT/metrics.jsonl to append. Lines after step `done` are dropped first: a run that was killed had gone
    /// further than its last checkpoint, and will write them again.
    pub fn open(output: &Path, done: u64, tensorboard: bool) -> Result<Self> {
        let path = output.join("metrics.jsonl");
        if path.exists() {
            trim(&path, done)?;
        }
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
        let events = if tensorboard { Some(Events::create(output)?) } else { None };
        Ok(Self { path, file, events })
    }

    /// Appends a step.
    pub fn step(&mut self, step: &Step) -> Result<()> {
        let line = serde_json::to_string(step).map_err(|error| Error::file(&self.path, error.to_string()))?;
        self.line(&line)?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let scalars = [
            ("train/loss", step.loss),
            ("train/grad_norm", step.grad_norm),
            ("train/learning_rate", step.learning_rate),
            ("train/epoch", step.epoch),
            ("train/tokens_per_second", step.tokens_per_second),
        ];
        events.scalars(step.step, scalars)
    }

    /// Appends the scores of an evaluation after `step` steps.
    pub fn evaluation(&mut self, step: u64, scores: &Map<String, Value>) -> Result<()> {
        self.line(&json!({ "step": step, "eval": scores }).to_string())?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let named: Vec<(String, f64)> = scores
            .iter()
            .filter_map(|(name, value)| Some((format!("eval/{name}"), value.as_f64()?)))
            .collect();
        events.scalars(step, named.iter().map(|(name, value)| (name.as_str(), *value)))
    }

    fn line(&mut self, line: &str) -> Result<()> {
        writeln!(self.file, "{line}").and_then(|()| self.file.flush()).map_err(Error::io("write", &self.path))
    }
}

fn trim(path: &Path, done: u64) -> Result<()> {
    let reader = BufReader::new(File::open(path).map_err(Error::io("open", path))?);
    let mut kept = String::new();
    for line in reader.lines() {
        let line = line.map_err(Error::io("read", path))?;
        // A line that was cut off by a kill is no JSON.
        let step = serde_json::from_str::<Value>(&line).ok().and_then(|value| value["step"].as_u64());
        if step.is_some_and(|step| step <= done) {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    let draft = path.with_extension("jsonl.tmp");
    fs::write(&draft, kept).map_err(Error::io("write", &draft))?;
    fs::rename(&draft, path).map_err(Error::io("rename", &draft))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_what_comes_after_the_checkpoint_and_what_was_cut_off() {
        let output = tempfile::tempdir().unwrap();
        let path = output.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":0,\"eval\":{}}\n{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st")
            .unwrap();
        let mut metrics = Metrics::open(output.path(), 2, false).unwrap();
        metrics.evaluation(2, &Map::from_iter([("x".to_owned(), json!(0.5))])).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"step\":0,\"eval\":{}}\n{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"eval\":{\"x\":0.5}}\n"
        );
    }
}
