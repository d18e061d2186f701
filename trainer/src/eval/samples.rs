//! OUTPUT/samples.json: examples from the evaluations before the first step, of the best step and of the last
//! step.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::eval::Examples;
use crate::system::atomic;
use crate::{Error, Result};

/// The examples of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationSamples {
    /// The step after which the model was evaluated.
    pub step: u64,
    /// Whether it was the best evaluation until then.
    pub best: bool,
    /// The examples of each set, by the set's name.
    pub sets: Vec<(String, Examples)>,
}

/// OUTPUT/samples.json, to which a run adds its evaluations.
#[derive(Debug)]
pub struct SamplesFile {
    path: PathBuf,
    evaluations: Vec<EvaluationSamples>,
}

impl SamplesFile {
    /// Opens OUTPUT/samples.json for a run that continues after `done` steps. Later evaluations are dropped.
    ///
    /// # Errors
    /// As [`read`].
    pub fn open(output: &Path, done: u64) -> Result<Self> {
        let mut evaluations = if done > 0 { read(output)? } else { Vec::new() };
        evaluations.retain(|evaluation| evaluation.step <= done);
        Ok(Self { path: output.join("samples.json"), evaluations })
    }

    /// Writes the examples of an evaluation. Of earlier ones only the first and the best are kept.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn record(&mut self, new: EvaluationSamples) -> Result<()> {
        if new.sets.iter().all(|(_, examples)| examples.items.is_empty()) {
            return Ok(());
        }
        let kept =
            |old: &EvaluationSamples| old.step < new.step && (old.step == 0 || (old.best && !new.best));
        self.evaluations.retain(kept);
        self.evaluations.push(new);
        let wrong = |error: serde_json::Error| Error::file(&self.path, error.to_string());
        let text = serde_json::to_string(&self.evaluations).map_err(wrong)?;
        atomic::write(&self.path, text)
    }
}

/// Reads OUTPUT/samples.json: the evaluations in the order of their steps, none if there is no such file.
///
/// # Errors
/// The file cannot be read or is not what a run writes.
pub fn read(output: &Path) -> Result<Vec<EvaluationSamples>> {
    let path = output.join("samples.json");
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| {
            Error::file(
                &path,
                format!("is not what a run writes: {error}\nhint: remove it; only the examples of the report are lost"),
            )
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::read("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::examples::Example;

    fn evaluation(step: u64, best: bool) -> EvaluationSamples {
        let example = Example { text: "q".into(), value: 0.0, note: String::new(), candidates: Vec::new() };
        let examples = Examples { items: vec![example], ..Examples::default() };
        EvaluationSamples { step, best, sets: vec![("set".into(), examples)] }
    }

    #[test]
    fn the_first_the_best_and_the_last_are_kept() {
        let output = tempfile::tempdir().unwrap();
        let steps = || -> Vec<(u64, bool)> {
            read(output.path()).unwrap().iter().map(|evaluation| (evaluation.step, evaluation.best)).collect()
        };
        let mut samples = SamplesFile::open(output.path(), 0).unwrap();
        for (step, best) in [(0, true), (10, true), (20, true), (30, false), (40, false)] {
            samples.record(evaluation(step, best)).unwrap();
        }
        assert_eq!(steps(), [(0, true), (20, true), (40, false)]);

        // A run that is resumed after step 30 evaluates step 40 again.
        let mut samples = SamplesFile::open(output.path(), 30).unwrap();
        samples.record(evaluation(40, true)).unwrap();
        assert_eq!(steps(), [(0, true), (40, true)]);
        // A new run keeps nothing.
        SamplesFile::open(output.path(), 0).unwrap().record(evaluation(0, true)).unwrap();
        assert_eq!(steps(), [(0, true)]);
    }

    #[test]
    fn sets_without_examples_write_nothing() {
        let output = tempfile::tempdir().unwrap();
        let sets = vec![("sts".into(), Examples::default())];
        let nothing = EvaluationSamples { step: 0, best: true, sets };
        SamplesFile::open(output.path(), 0).unwrap().record(nothing).unwrap();
        assert!(!output.path().join("samples.json").exists());
        assert!(read(output.path()).unwrap().is_empty());
        fs::write(output.path().join("samples.json"), "[{").unwrap();
        let error = read(output.path()).unwrap_err().to_string();
        assert!(error.contains("samples.json: is not what a run writes"), "{error}");
    }
}
