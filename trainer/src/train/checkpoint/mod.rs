//! Checkpoints: everything that a run needs to continue exactly where it stopped. There is no random state to save: all random
//! numbers are functions of the seed and the step.
//!
//! ```text
//! OUTPUT/checkpoints/step-000100/   parameters.safetensors  optimizer.safetensors  state.json  DONE
//! ```
//!
//! A checkpoint is written into a temporary folder, synced and renamed, `DONE` last. A folder without `DONE` is incomplete and is
//! skipped with a warning. Rank 0 writes, in the background. All ranks compare their bits before a checkpoint is written, and a
//! digest of these bits is compared when a run is resumed.

mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::writer::{Snapshot, Writer, digest};
use crate::data::batch::Cursor;
use crate::model::params::FlatParameters;
use crate::system::atomic;
use crate::system::heartbeat;
use crate::system::safetensors;
use crate::train::memory::format_bytes;
use crate::train::optimizer::Optimizer;
use crate::train::selection::Selection;
use crate::{Error, Result};

/// The state of a run after a step: the content of state.json.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Position in the training rows.
    pub cursor: Cursor,
    /// Tokens encoded so far.
    pub tokens: u64,
    /// Consecutive steps whose loss or gradient was not finite.
    pub nonfinite: u64,
    /// The best evaluation, for early stopping and `evaluation.load_best`.
    pub selection: Selection,
    /// The step of the last evaluation.
    pub evaluated: Option<u64>,
    /// What must not change when the run is resumed.
    pub identity: Identity,
    /// Digest of parameters and moments; none in a run that has just begun.
    pub digest: Option<String>,
}

/// What makes two runs the same run: if one of these values changes, a resumed run would silently train something else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The configuration's seed.
    pub seed: u64,
    /// Rows per optimizer step.
    pub batch_size: usize,
    /// Optimizer steps of the whole run. This one may change.
    pub steps: u64,
    /// Digest of all training rows and of what decides their order.
    pub data: String,
    /// Number of trained parameters.
    pub parameters: usize,
}

impl Identity {
    /// Says in words what has changed from `self`, of a checkpoint, to `new`, of the configuration.
    pub fn differences(&self, new: &Self) -> String {
        let changed = |what: &str, old: u64, new: u64| {
            (old != new).then(|| format!("{what} was {old}, the configuration has {new}"))
        };
        let data =
            (self.data != new.data).then(|| "the training data changed since this checkpoint".to_owned());
        let differences = [
            changed("seed", self.seed, new.seed),
            changed("training.batch_size", self.batch_size as u64, new.batch_size as u64),
            changed("the number of trained parameters", self.parameters as u64, new.parameters as u64),
            data,
        ];
        differences.into_iter().flatten().collect::<Vec<_>>().join("; ")
    }

    /// Whether a run with this identity can be resumed as `other`. Only the number of steps may differ.
    pub fn is_compatible_with(&self, other: &Self) -> bool {
        *other == Self { steps: other.steps, ..self.clone() }
    }
}

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    best: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The checkpoints in OUTPUT/checkpoints, of which the newest `keep` and the best are kept.
    pub fn new(output: &Path, keep: usize) -> Self {
        Self { folder: output.join("checkpoints"), best: output.join("best"), keep: keep.max(1) }
    }

    /// Writes a snapshot, then deletes checkpoints that are no longer needed. Returns its folder.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn save(&self, snapshot: &Snapshot) -> Result<PathBuf> {
        let path = self.path(snapshot.state.step);
        if is_complete(&path) {
            return Ok(path);
        }
        self.remove_unfinished()?;
        atomic::remove_dir(&path)?;
        self.check_free_space(snapshot.bytes())?;
        atomic::write_dir(&path, |folder| write(folder, snapshot))?;
        self.prune()?;
        Ok(path)
    }

    /// Makes the link OUTPUT/best point to the checkpoint of `step`.
    pub fn mark_best(&self, step: u64) -> Result<()> {
        atomic::symlink(&Path::new("checkpoints").join(name(step)), &self.best)
    }

    /// The newest complete checkpoint and its state. Incomplete ones are skipped with a warning.
    pub fn newest(&self) -> Result<Option<(PathBuf, State)>> {
        for step in self.steps()?.into_iter().rev() {
            let path = self.path(step);
            if is_complete(&path) {
                return Ok(Some((path.clone(), read_state(&path)?)));
            }
            tracing::warn!("{} has no DONE: it was not written completely and is skipped", path.display());
        }
        Ok(None)
    }

    /// The folder of the checkpoint of `step`, which need not exist.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(name(step))
    }

    /// The checkpoint that OUTPUT/best points to.
    pub fn best(&self) -> Option<PathBuf> {
        self.best.canonicalize().ok().filter(|path| is_complete(path))
    }

    /// The folder of the checkpoint `last`, `best` or `step-N`.
    ///
    /// # Errors
    /// There is no such checkpoint; the message lists those that exist.
    pub fn find(&self, which: &str) -> Result<PathBuf> {
        let found = match which {
            "last" => self.newest()?.map(|(path, _)| path),
            "best" => self.best(),
            _ => which
                .strip_prefix("step-")
                .and_then(|step| step.parse().ok())
                .map(|step| self.path(step))
                .filter(|path| is_complete(path)),
        };
        found.ok_or_else(|| {
            let mut steps = self.steps().unwrap_or_default();
            steps.retain(|&step| is_complete(&self.path(step)));
            let steps: Vec<String> = steps.iter().map(|step| format!("step-{step}")).collect();
            let there = if steps.is_empty() { "none".to_owned() } else { steps.join(", ") };
            Error::file(&self.folder, format!("no checkpoint `{which}`; there are {there}"))
        })
    }

    /// Checks that the disk has room for `bytes` bytes, before anything is written.
    fn check_free_space(&self, bytes: u64) -> Result<()> {
        // More for names, shapes and the blocks of the file system.
        let bytes = bytes + bytes / 64 + (64 << 10);
        let disk = rustix::fs::statvfs(&self.folder)
            .map_err(|error| Error::write("find the free space of", &self.folder)(error.into()))?;
        let free = disk.f_bavail * disk.f_frsize;
        if free >= bytes {
            return Ok(());
        }
        let message = format!(
            "a checkpoint takes {}, the disk has {} free\nhint: free some space and --resume; `checkpoint.keep` is the number of checkpoints kept",
            format_bytes(bytes),
            format_bytes(free)
        );
        Err(Error::file(&self.folder, message))
    }

    /// Deletes the temporary folders of a run that was killed.
    fn remove_unfinished(&self) -> Result<()> {
        let entries = fs::read_dir(&self.folder).map_err(Error::read("read", &self.folder))?;
        for entry in entries.flatten() {
            if atomic::is_temporary(&entry.file_name()) {
                atomic::remove_all(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Deletes all complete checkpoints but the newest `keep` and the best.
    fn prune(&self) -> Result<()> {
        let best = self.best();
        let complete: Vec<PathBuf> =
            self.steps()?.into_iter().map(|step| self.path(step)).filter(|path| is_complete(path)).collect();
        let surplus = complete.len().saturating_sub(self.keep);
        for path in complete[..surplus].iter().filter(|path| path.canonicalize().ok() != best) {
            atomic::remove_dir(path)?;
        }
        Ok(())
    }

    /// The steps that have a folder, complete or not, ascending.
    fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::read("read", &self.folder)(error)),
        };
        let mut steps: Vec<u64> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }
}

/// Reads parameters and moments from the checkpoint `path`.
///
/// # Errors
/// A file cannot be read or belongs to another model; the digest is not the one in `state`.
pub fn restore(path: &Path, state: &State, flat: &FlatParameters, optimizer: &Optimizer) -> Result<()> {
    let moments = path.join("optimizer.safetensors");
    for (buffer, file, prefix) in [
        (flat.values(), &path.join("parameters.safetensors"), ""),
        (&optimizer.exp_avg, &moments, "exp_avg."),
        (&optimizer.exp_avg_sq, &moments, "exp_avg_sq."),
    ] {
        flat.read(buffer, file, prefix)?;
        heartbeat::record_work();
    }
    let found = format_digest(digest(&[flat.values(), &optimizer.exp_avg, &optimizer.exp_avg_sq])?);
    match &state.digest {
        Some(written) if *written != found => {
            let message = format!(
                "the tensors changed after they were written: their digest is {found}, expected {written}\n\
                 hint: the disk is faulty or a file was edited; delete this folder to resume from the checkpoint before"
            );
            Err(Error::file(path, message))
        }
        _ => Ok(()),
    }
}

/// Formats a digest as in state.json: 16 hexadecimal digits.
pub fn format_digest(digest: u64) -> String {
    format!("{digest:016x}")
}

fn write(folder: &Path, snapshot: &Snapshot) -> Result<()> {
    let Snapshot { state, flat, values, exp_avg, exp_avg_sq } = snapshot;
    let named = |buffer, prefix: &'static str| {
        flat.named(buffer).map(move |named| named.map(|(name, tensor)| (format!("{prefix}{name}"), tensor)))
    };
    let parameters = named(values, "").collect::<Result<Vec<_>>>()?;
    safetensors::write(&folder.join("parameters.safetensors"), &parameters)?;
    let moments = named(exp_avg, "exp_avg.").chain(named(exp_avg_sq, "exp_avg_sq."));
    safetensors::write(&folder.join("optimizer.safetensors"), &moments.collect::<Result<Vec<_>>>()?)?;
    let json = serde_json::to_vec_pretty(state).map_err(|error| Error::file(folder, error.to_string()))?;
    atomic::write_flushed(&folder.join("state.json"), json)?;
    atomic::sync_dir(folder)?;
    // DONE is written last: without it the checkpoint counts as incomplete.
    atomic::write_flushed(&folder.join("DONE"), "")?;
    atomic::sync_dir(folder)
}

fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join("state.json");
    let text = fs::read_to_string(&path).map_err(Error::read("read", &path))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::file(&path, format!("expected the state of a run: {error}")))
}

fn is_complete(path: &Path) -> bool {
    path.join("DONE").is_file()
}

fn name(step: u64) -> String {
    format!("step-{step:06}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Training;
    use crate::model::params::{Parameter, ParameterKind, ParameterVisitor};
    use candle_core::{Device, Tensor};

    fn flat(values: [f32; 3]) -> FlatParameters {
        let a = Tensor::from_slice(&values[..2], (1, 2), &Device::Cpu).unwrap();
        let b = Tensor::from_slice(&values[2..], 1, &Device::Cpu).unwrap();
        let mut a = Parameter::new(a, ParameterKind::Weight);
        let mut b = Parameter::new(b, ParameterKind::Bias);
        let walk = |visit: &mut dyn ParameterVisitor| {
            visit.parameter("a.weight", &mut a)?;
            visit.parameter("a.bias", &mut b)
        };
        FlatParameters::flatten(walk, |_| true).unwrap()
    }

    fn optimizer(flat: &FlatParameters) -> Optimizer {
        Optimizer::new(flat, &Training::default()).unwrap()
    }

    fn state(step: u64) -> State {
        State { step, tokens: 7, ..State::default() }
    }

    fn save(checkpoints: &Checkpoints, step: u64, flat: &FlatParameters, optimizer: &Optimizer) -> PathBuf {
        fs::create_dir_all(&checkpoints.folder).unwrap();
        checkpoints.save(&Snapshot::take(&state(step), flat, optimizer, false).unwrap()).unwrap()
    }

    #[test]
    fn what_was_saved_comes_back() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 3);
        let (from, to) = (flat([1.0, 2.0, 3.0]), flat([0.0; 3]));
        let (moments, empty) = (optimizer(&from), optimizer(&to));
        moments.exp_avg_sq.one_set().unwrap();
        save(&checkpoints, 4, &from, &moments);
        let (path, read) = checkpoints.newest().unwrap().unwrap();
        restore(&path, &read, &to, &empty).unwrap();
        assert_eq!(read, state(4));
        assert_eq!(to.values().to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(empty.exp_avg_sq.to_vec1::<f32>().unwrap(), [1.0; 3]);
        assert_eq!(empty.exp_avg.to_vec1::<f32>().unwrap(), [0.0; 3]);
    }

    #[test]
    fn the_newest_few_and_the_best_are_kept() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 2);
        let flat = flat([1.0, 2.0, 3.0]);
        let optimizer = optimizer(&flat);
        for step in 1..=5 {
            save(&checkpoints, step, &flat, &optimizer);
            if step == 2 {
                checkpoints.mark_best(2).unwrap();
            }
        }
        assert_eq!(checkpoints.steps().unwrap(), [2, 4, 5]);
        assert!(checkpoints.find("best").unwrap().ends_with("step-000002"));
        assert!(checkpoints.find("last").unwrap().ends_with("step-000005"));
        assert!(checkpoints.find("step-4").is_ok());
        // An incomplete checkpoint is not offered.
        fs::create_dir(checkpoints.path(3)).unwrap();
        let message = checkpoints.find("step-3").unwrap_err().to_string();
        assert!(message.contains("no checkpoint `step-3`; there are step-2, step-4, step-5"), "{message}");
    }

    #[test]
    fn what_was_left_half_removed_is_no_checkpoint_and_goes_with_the_next() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 1);
        let flat = flat([1.0, 2.0, 3.0]);
        let path = save(&checkpoints, 1, &flat, &optimizer(&flat));
        // As a process leaves it that was killed while it deleted the checkpoint.
        let half = checkpoints.folder.join(".step-000001.tmp");
        fs::rename(path, &half).unwrap();
        fs::remove_file(half.join("parameters.safetensors")).unwrap();
        assert!(half.join("DONE").is_file() && checkpoints.newest().unwrap().is_none());
        for step in [2, 3] {
            save(&checkpoints, step, &flat, &optimizer(&flat));
        }
        let left = fs::read_dir(&checkpoints.folder).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(left.collect::<Vec<_>>(), ["step-000003"]);
    }

    #[test]
    fn a_checkpoint_without_done_is_skipped() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 3);
        let flat = flat([1.0, 2.0, 3.0]);
        assert!(checkpoints.newest().unwrap().is_none());
        save(&checkpoints, 1, &flat, &optimizer(&flat));
        let broken = save(&checkpoints, 2, &flat, &optimizer(&flat));
        fs::remove_file(broken.join("DONE")).unwrap();
        assert_eq!(checkpoints.newest().unwrap().unwrap().1.step, 1);
        save(&checkpoints, 2, &flat, &optimizer(&flat));
        assert_eq!(checkpoints.newest().unwrap().unwrap().1.step, 2);
    }

    #[test]
    fn tensors_that_are_not_those_written_are_refused() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 3);
        let flat = flat([1.0, 2.0, 3.0]);
        let optimizer = optimizer(&flat);
        fs::create_dir_all(&checkpoints.folder).unwrap();
        let buffers = [flat.values(), &optimizer.exp_avg, &optimizer.exp_avg_sq];
        let digest = Some(format_digest(digest(&buffers).unwrap()));
        let state = State { digest, ..state(1) };
        let path = checkpoints.save(&Snapshot::take(&state, &flat, &optimizer, false).unwrap()).unwrap();
        restore(&path, &state, &flat, &optimizer).unwrap();
        let file = path.join("parameters.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        let message = restore(&path, &state, &flat, &optimizer).unwrap_err().to_string();
        assert!(message.contains("the tensors changed after they were written"), "{message}");
    }

    #[test]
    fn the_writer_writes_the_bits_of_the_snapshot() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 3);
        fs::create_dir_all(&checkpoints.folder).unwrap();
        fs::create_dir(checkpoints.folder.join(".step-000001.tmp")).unwrap();
        let flat = flat([1.0, 2.0, 3.0]);
        let optimizer = optimizer(&flat);
        let mut writer = Writer::new(checkpoints.clone());
        writer.save(Snapshot::take(&state(2), &flat, &optimizer, false).unwrap(), true).unwrap();
        flat.values().zero_set().unwrap();
        writer.finish().unwrap();
        let (path, read) = checkpoints.newest().unwrap().unwrap();
        restore(&path, &read, &flat, &optimizer).unwrap();
        assert_eq!(flat.values().to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(checkpoints.best(), Some(path.canonicalize().unwrap()));
        assert!(!checkpoints.folder.join(".step-000001.tmp").exists());
    }

    #[test]
    fn a_checkpoint_that_does_not_fit_is_not_begun() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 3);
        fs::create_dir_all(&checkpoints.folder).unwrap();
        checkpoints.check_free_space(1000).unwrap();
        let message = checkpoints.check_free_space(1 << 60).unwrap_err().to_string();
        assert!(message.contains("a checkpoint takes 1064960.0 TiB, the disk has"), "{message}");
    }
}
