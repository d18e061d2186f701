//! OUTPUT/samples.json: what a few queries found before the training, at its best evaluation and at its last.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::eval::rankings::Ranking;
use crate::{Error, Result};

/// The rankings of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// After which step.
    pub step: u64,
    /// Whether it is the best so far.
    pub best: bool,
    /// Sets with what their queries found.
    pub sets: Vec<(String, Vec<Ranking>)>,
}

/// The open file.
#[derive(Debug)]
pub struct Samples {
    path: PathBuf,
    evaluations: Vec<Evaluation>,
}

impl Samples {
    /// Opens OUTPUT/samples.json, where a run goes on that has done `done` steps.
    ///
    /// # Errors
    /// As [`read`].
    pub fn open(output: &Path, done: u64) -> Result<Self> {
        let mut evaluations = if done > 0 { read(output)? } else { Vec::new() };
        evaluations.retain(|evaluation| evaluation.step <= done);
        Ok(Self { path: output.join("samples.json"), evaluations })
    }

    /// Keeps the rankings of an evaluation, and of those before only the first and the best.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn record(&mut self, new: Evaluation) -> Result<()> {
        if new.sets.iter().all(|(_, rankings)| rankings.is_empty()) {
            return Ok(());
        }
        let kept = |old: &Evaluation| old.step < new.step && (old.step == 0 || (old.best && !new.best));
        self.evaluations.retain(kept);
        self.evaluations.push(new);
        let wrong = |error: serde_json::Error| Error::file(&self.path, error.to_string());
        let text = serde_json::to_string(&self.evaluations).map_err(wrong)?;
        let draft = self.path.with_extension("json.tmp");
        fs::write(&draft, text).map_err(Error::io("write", &draft))?;
        fs::rename(&draft, &self.path).map_err(Error::io("rename", draft))
    }
}

/// The evaluations of OUTPUT/samples.json, by step; none without the file.
///
/// # Errors
/// It cannot be read or is not what a run writes.
pub fn read(output: &Path) -> Result<Vec<Evaluation>> {
    let path = output.join("samples.json");
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| {
            Error::file(
                &path,
                format!("is not what a run writes: {error}\nhint: remove it; only sample rankings are lost"),
            )
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(step: u64, best: bool) -> Evaluation {
        let ranking = Ranking { query: "q".into(), relevant: 1, first: None, ndcg: 0.0, hits: Vec::new() };
        Evaluation { step, best, sets: vec![("set".into(), vec![ranking])] }
    }

    #[test]
    fn the_first_the_best_and_the_last_are_kept() {
        let output = tempfile::tempdir().unwrap();
        let steps = || -> Vec<(u64, bool)> {
            read(output.path()).unwrap().iter().map(|evaluation| (evaluation.step, evaluation.best)).collect()
        };
        let mut samples = Samples::open(output.path(), 0).unwrap();
        for (step, best) in [(0, true), (10, true), (20, true), (30, false), (40, false)] {
            samples.record(evaluation(step, best)).unwrap();
        }
        assert_eq!(steps(), [(0, true), (20, true), (40, false)]);

        // A run that goes on after step 30 has not seen step 40.
        let mut samples = Samples::open(output.path(), 30).unwrap();
        samples.record(evaluation(40, true)).unwrap();
        assert_eq!(steps(), [(0, true), (40, true)]);
        // A new run has seen nothing.
        Samples::open(output.path(), 0).unwrap().record(evaluation(0, true)).unwrap();
        assert_eq!(steps(), [(0, true)]);
    }

    #[test]
    fn sets_without_rankings_write_nothing() {
        let output = tempfile::tempdir().unwrap();
        let nothing = Evaluation { step: 0, best: true, sets: vec![("sts".into(), Vec::new())] };
        Samples::open(output.path(), 0).unwrap().record(nothing).unwrap();
        assert!(!output.path().join("samples.json").exists());
        assert!(read(output.path()).unwrap().is_empty());
        fs::write(output.path().join("samples.json"), "[{").unwrap();
        let error = read(output.path()).unwrap_err().to_string();
        assert!(error.contains("samples.json: is not what a run writes"), "{error}");
    }
}
