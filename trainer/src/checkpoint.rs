//! Checkpoints: everything that a run needs to go on as if it had not stopped. No random state exists, so none is saved.
//!
//! ```text
//! OUTPUT/checkpoints/step-000100/   parameters.safetensors  optimizer.safetensors  state.json  DONE
//! ```
//!
//! A checkpoint is written under a temporary name, synced and renamed, `DONE` last. A folder without `DONE` is not whole
//! and is passed over.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::data::batch::Cursor;
use crate::model::params::Flat;
use crate::optimizer::Optimizer;
use crate::{Error, Result};

/// Where a run stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Where the training rows go on.
    pub cursor: Cursor,
    /// Tokens encoded so far.
    pub tokens: u64,
    /// Consecutive steps whose loss or gradient was not finite.
    pub nonfinite: u64,
    /// The best value of the deciding metric, and its step.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub stale: u64,
    /// What must not change between parts of a run.
    pub identity: Identity,
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// When.
    pub step: u64,
    /// How good.
    pub value: f64,
}

/// What makes two runs the same run: with another of these, going on would silently train something else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The configuration's seed.
    pub seed: u64,
    /// Rows per optimizer step.
    pub batch_size: usize,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// A digest of all rows and of what their order depends on.
    pub data: String,
    /// Trained elements.
    pub parameters: usize,
}

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    best: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Those under `output`, of which the newest `keep` and the best stay.
    pub fn new(output: &Path, keep: usize) -> Self {
        Self { folder: output.join("checkpoints"), best: output.join("best"), keep: keep.max(1) }
    }

    /// Writes the state after `state.step`, then forgets checkpoints that are no longer needed.
    pub fn save(&self, state: &State, flat: &Flat, optimizer: &Optimizer) -> Result<PathBuf> {
        let path = self.folder.join(name(state.step));
        let draft = self.folder.join(format!(".{}.tmp", name(state.step)));
        if is_whole(&path) {
            return Ok(path);
        }
        clear(&draft)?;
        clear(&path)?;
        fs::create_dir_all(&draft).map_err(Error::io("create", &draft))?;
        let written = write(&draft, state, flat, optimizer)
            .and_then(|()| fs::rename(&draft, &path).map_err(Error::io("rename", &draft)))
            .and_then(|()| sync(&self.folder));
        if let Err(error) = written {
            // A full disk must not stay full of what it could not hold.
            let _ = fs::remove_dir_all(&draft);
            return Err(error);
        }
        self.prune()?;
        Ok(path)
    }

    /// Makes `best` point to the checkpoint of `step`.
    pub fn mark_best(&self, step: u64) -> Result<()> {
        let draft = self.best.with_extension("tmp");
        let _ = fs::remove_file(&draft);
        let target = Path::new("checkpoints").join(name(step));
        std::os::unix::fs::symlink(&target, &draft).map_err(Error::io("link", &draft))?;
        fs::rename(&draft, &self.best).map_err(Error::io("rename", &draft))
    }

    /// The newest whole checkpoint, and its state. Broken ones are passed over with a warning.
    pub fn newest(&self) -> Result<Option<(PathBuf, State)>> {
        for step in self.steps()?.into_iter().rev() {
            let path = self.folder.join(name(step));
            if is_whole(&path) {
                return Ok(Some((path.clone(), read_state(&path)?)));
            }
            tracing::warn!(
                "{} has no DONE: it was not written to the end and is passed over",
                path.display()
            );
        }
        Ok(None)
    }

    /// The checkpoint that `best` points to.
    pub fn best(&self) -> Option<PathBuf> {
        self.best.canonicalize().ok().filter(|path| is_whole(path))
    }

    /// The folder of a checkpoint by `last`, `best` or `step-N`.
    pub fn find(&self, which: &str) -> Result<PathBuf> {
        let found = match which {
            "last" => self.newest()?.map(|(path, _)| path),
            "best" => self.best(),
            _ => which
                .strip_prefix("step-")
                .and_then(|step| step.parse().ok())
                .map(|step| self.folder.join(name(step)))
                .filter(|path| is_whole(path)),
        };
        found.ok_or_else(|| {
            let steps: Vec<String> =
                self.steps().unwrap_or_default().iter().map(|step| format!("step-{step}")).collect();
            let there = if steps.is_empty() { "none".to_owned() } else { steps.join(", ") };
            Error::file(&self.folder, format!("no checkpoint `{which}`; there are {there}"))
        })
    }

    fn prune(&self) -> Result<()> {
        let best = self.best();
        let whole: Vec<PathBuf> = self
            .steps()?
            .into_iter()
            .map(|step| self.folder.join(name(step)))
            .filter(|path| is_whole(path))
            .collect();
        let spare = whole.len().saturating_sub(self.keep);
        for path in &whole[..spare] {
            if path.canonicalize().ok() != best {
                fs::remove_dir_all(path).map_err(Error::io("remove", path))?;
            }
        }
        Ok(())
    }

    /// Steps that have a folder, whole or not, ascending.
    fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read", &self.folder)(error)),
        };
        let mut steps: Vec<u64> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }
}

/// Reads moments and parameters back to where they were.
pub fn restore(path: &Path, flat: &Flat, optimizer: &Optimizer) -> Result<()> {
    flat.read(flat.values(), &path.join("parameters.safetensors"), "")?;
    let moments = path.join("optimizer.safetensors");
    flat.read(&optimizer.first, &moments, "exp_avg.")?;
    flat.read(&optimizer.second, &moments, "exp_avg_sq.")
}

fn write(folder: &Path, state: &State, flat: &Flat, optimizer: &Optimizer) -> Result<()> {
    let tensors = |buffer, prefix: &'static str| {
        flat.named(buffer).map(move |named| named.map(|(name, tensor)| (format!("{prefix}{name}"), tensor)))
    };
    let parameters: HashMap<String, Tensor> = tensors(flat.values(), "").collect::<Result<_>>()?;
    save(&parameters, &folder.join("parameters.safetensors"))?;
    let moments: HashMap<String, Tensor> = tensors(&optimizer.first, "exp_avg.")
        .chain(tensors(&optimizer.second, "exp_avg_sq."))
        .collect::<Result<_>>()?;
    save(&moments, &folder.join("optimizer.safetensors"))?;
    let json = serde_json::to_vec_pretty(state).map_err(|error| Error::file(folder, error.to_string()))?;
    put(&folder.join("state.json"), &json)?;
    sync(folder)?;
    put(&folder.join("DONE"), b"")?;
    sync(folder)
}

fn save(tensors: &HashMap<String, Tensor>, path: &Path) -> Result<()> {
    candle_core::safetensors::save(tensors, path)
        .map_err(|error| Error::file(path, format!("cannot be written: {error}\nhint: is the disk full?")))?;
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io("sync", path))
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(Error::io("sync", folder))
}

fn clear(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join("state.json");
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::file(&path, format!("is not the state of a run: {error}")))
}

fn is_whole(path: &Path) -> bool {
    path.join("DONE").is_file()
}

fn name(step: u64) -> String {
    format!("step-{step:06}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::params::{Parameter, Visit};
    use candle_core::Device;
    use kernels::adamw::AdamW;

    fn flat(values: [f32; 3]) -> Flat {
        let mut a = Parameter::frozen(Tensor::from_slice(&values[..2], (1, 2), &Device::Cpu).unwrap());
        let mut b = Parameter::frozen(Tensor::from_slice(&values[2..], 1, &Device::Cpu).unwrap());
        let walk = |visit: &mut dyn Visit| {
            visit.parameter("a.weight", &mut a)?;
            visit.parameter("a.bias", &mut b)
        };
        Flat::adopt(walk, |_| true).unwrap()
    }

    fn optimizer(flat: &Flat) -> Optimizer {
        let rule = AdamW { learning_rate: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        Optimizer::new(flat, rule, false, None).unwrap()
    }

    fn state(step: u64) -> State {
        State { step, tokens: 7, ..State::default() }
    }

    #[test]
    fn what_was_saved_comes_back() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 3);
        let (from, to) = (flat([1.0, 2.0, 3.0]), flat([0.0; 3]));
        let (moments, empty) = (optimizer(&from), optimizer(&to));
        moments.second.one_set().unwrap();
        checkpoints.save(&state(4), &from, &moments).unwrap();
        let (path, read) = checkpoints.newest().unwrap().unwrap();
        restore(&path, &to, &empty).unwrap();
        assert_eq!(read, state(4));
        assert_eq!(to.values().to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(empty.second.to_vec1::<f32>().unwrap(), [1.0; 3]);
        assert_eq!(empty.first.to_vec1::<f32>().unwrap(), [0.0; 3]);
    }

    #[test]
    fn the_newest_few_and_the_best_are_kept() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 2);
        let flat = flat([1.0, 2.0, 3.0]);
        let optimizer = optimizer(&flat);
        for step in 1..=5 {
            checkpoints.save(&state(step), &flat, &optimizer).unwrap();
            if step == 2 {
                checkpoints.mark_best(2).unwrap();
            }
        }
        assert_eq!(checkpoints.steps().unwrap(), [2, 4, 5]);
        assert!(checkpoints.find("best").unwrap().ends_with("step-000002"));
        assert!(checkpoints.find("last").unwrap().ends_with("step-000005"));
        assert!(checkpoints.find("step-4").is_ok());
        let message = checkpoints.find("step-3").unwrap_err().to_string();
        assert!(message.contains("no checkpoint `step-3`; there are step-2, step-4, step-5"), "{message}");
    }

    #[test]
    fn a_checkpoint_without_done_is_passed_over() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 3);
        let flat = flat([1.0, 2.0, 3.0]);
        assert!(checkpoints.newest().unwrap().is_none());
        checkpoints.save(&state(1), &flat, &optimizer(&flat)).unwrap();
        let broken = checkpoints.save(&state(2), &flat, &optimizer(&flat)).unwrap();
        fs::remove_file(broken.join("DONE")).unwrap();
        assert_eq!(checkpoints.newest().unwrap().unwrap().1.step, 1);
        checkpoints.save(&state(2), &flat, &optimizer(&flat)).unwrap();
        assert_eq!(checkpoints.newest().unwrap().unwrap().1.step, 2);
    }
}
