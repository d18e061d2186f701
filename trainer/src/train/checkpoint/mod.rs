//! Checkpoints: everything that a run needs to go on as if it had not stopped. No random state exists, so none is saved.
//!
//! ```text
//! OUTPUT/checkpoints/step-000100/   parameters.safetensors  optimizer.safetensors  state.json  DONE
//! ```
//!
//! A checkpoint is written under a temporary name, synced and renamed, `DONE` last. A folder without `DONE` is not whole
//! and is passed over. The first rank writes, in the background; all ranks compare their bits before, and a resumed run gets
//! those that were written, or none.

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
    pub evaluations_without_improvement: u64,
    /// The step of the last evaluation.
    #[serde(default)]
    pub evaluated: Option<u64>,
    /// What must not change between parts of a run.
    pub identity: Identity,
    /// Of parameters and moments; none in a run that has just begun.
    #[serde(default)]
    pub digest: Option<String>,
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

impl Identity {
    /// What this one has otherwise than `other`, in words.
    pub fn differences(&self, other: &Self) -> String {
        let fields = [
            ("seed", self.seed.to_string(), other.seed.to_string()),
            ("batch_size", self.batch_size.to_string(), other.batch_size.to_string()),
            ("rows or order of rows", self.data.clone(), other.data.clone()),
            ("trained numbers", self.parameters.to_string(), other.parameters.to_string()),
        ];
        let differ = fields.iter().filter(|(_, own, others)| own != others);
        differ.map(|(what, own, others)| format!("{what} {own}, not {others}")).collect::<Vec<_>>().join("; ")
    }

    /// Whether a run with this one can go on as the other, which may have another number of steps.
    pub fn is_compatible_with(&self, other: &Self) -> bool {
        *other == Self { steps: other.steps, ..self.clone() }
    }
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

    /// Writes a snapshot, then forgets checkpoints that are no longer needed.
    ///
    /// # Errors
    /// The disk is full, or cannot be written.
    pub fn save(&self, snapshot: &Snapshot) -> Result<PathBuf> {
        let step = snapshot.state.step;
        let path = self.folder.join(name(step));
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

    /// Makes `best` point to the checkpoint of `step`.
    pub fn mark_best(&self, step: u64) -> Result<()> {
        atomic::symlink(&Path::new("checkpoints").join(name(step)), &self.best)
    }

    /// The newest whole checkpoint, and its state. Broken ones are passed over with a warning.
    pub fn newest(&self) -> Result<Option<(PathBuf, State)>> {
        for step in self.steps()?.into_iter().rev() {
            let path = self.folder.join(name(step));
            if is_complete(&path) {
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
        self.best.canonicalize().ok().filter(|path| is_complete(path))
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
                .filter(|path| is_complete(path)),
        };
        found.ok_or_else(|| {
            let steps: Vec<String> =
                self.steps().unwrap_or_default().iter().map(|step| format!("step-{step}")).collect();
            let there = if steps.is_empty() { "none".to_owned() } else { steps.join(", ") };
            Error::file(&self.folder, format!("no checkpoint `{which}`; there are {there}"))
        })
    }

    /// Whether the disk has room for so many bytes, before hours of writing end in the middle.
    fn check_free_space(&self, bytes: u64) -> Result<()> {
        // Names, shapes and blocks of the file system.
        let bytes = bytes + bytes / 64 + (64 << 10);
        let disk = rustix::fs::statvfs(&self.folder)
            .map_err(|error| Error::write("find the free space of", &self.folder)(error.into()))?;
        let free = disk.f_bavail * disk.f_frsize;
        if free >= bytes {
            return Ok(());
        }
        let message = format!(
            "a checkpoint takes {}, the disk has {} free\nhint: make room and --resume; `checkpoint.keep` says how many are kept",
            format_bytes(bytes),
            format_bytes(free)
        );
        Err(Error::file(&self.folder, message))
    }

    /// Removes what a run that was killed had begun to write.
    fn remove_unfinished(&self) -> Result<()> {
        let entries = fs::read_dir(&self.folder).map_err(Error::read("read", &self.folder))?;
        for entry in entries.flatten() {
            if atomic::is_temporary(&entry.file_name()) {
                atomic::remove_all(&entry.path())?;
            }
        }
        Ok(())
    }

    fn prune(&self) -> Result<()> {
        let best = self.best();
        let whole: Vec<PathBuf> = self
            .steps()?
            .into_iter()
            .map(|step| self.folder.join(name(step)))
            .filter(|path| is_complete(path))
            .collect();
        let spare = whole.len().saturating_sub(self.keep);
        for path in whole[..spare].iter().filter(|path| path.canonicalize().ok() != best) {
            atomic::remove_dir(path)?;
        }
        Ok(())
    }

    /// Steps that have a folder, whole or not, ascending.
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

/// Reads moments and parameters back to where they were.
///
/// # Errors
/// A file cannot be read, is of another model, or does not hold what was written.
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
                "its tensors are not those that were written: digest {found}, written {written}\n\
                 hint: the disk has lost bits, or a file was changed; without this folder the run goes on from the one before"
            );
            Err(Error::file(path, message))
        }
        _ => Ok(()),
    }
}

/// As state.json has it.
pub fn format_digest(digest: u64) -> String {
    format!("{digest:016x}")
}

fn write(folder: &Path, snapshot: &Snapshot) -> Result<()> {
    let Snapshot { state, flat, values, first, second } = snapshot;
    let named = |buffer, prefix: &'static str| {
        flat.named(buffer).map(move |named| named.map(|(name, tensor)| (format!("{prefix}{name}"), tensor)))
    };
    let parameters = named(values, "").collect::<Result<Vec<_>>>()?;
    safetensors::write(&folder.join("parameters.safetensors"), &parameters)?;
    let moments = named(first, "exp_avg.").chain(named(second, "exp_avg_sq."));
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
        .map_err(|error| Error::file(&path, format!("is not the state of a run: {error}")))
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
    use crate::model::params::{Parameter, ParameterKind, ParameterVisitor};
    use candle_core::{Device, Tensor};
    use kernels::adamw::AdamW;

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
        let rule = AdamW { learning_rate: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        Optimizer::new(flat, rule, false, None).unwrap()
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
        let message = checkpoints.find("step-3").unwrap_err().to_string();
        assert!(message.contains("no checkpoint `step-3`; there are step-2, step-4, step-5"), "{message}");
    }

    #[test]
    fn what_was_left_half_removed_is_no_checkpoint_and_goes_with_the_next() {
        let output = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(output.path(), 1);
        let flat = flat([1.0, 2.0, 3.0]);
        let path = save(&checkpoints, 1, &flat, &optimizer(&flat));
        // Where the end of the process found it: renamed, and without some of its files.
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
    fn a_checkpoint_without_done_is_passed_over() {
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
        assert!(message.contains("not those that were written"), "{message}");
    }

    #[test]
    fn the_writer_goes_on_with_the_bits_of_the_snapshot() {
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
