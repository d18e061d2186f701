//! OUTPUT/run.json: when, where and by which version a run was computed. The report shows it.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::comm::World;
use crate::system::{atomic, device};
use crate::train::memory;
use crate::train::plan::Plan;
use crate::{Error, Result};

const FILE: &str = "run.json";

/// What is known about a run besides its configuration and its metrics. A field is empty or 0 if the system
/// does not provide its value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The version and the commit of the trainer.
    pub version: String,
    /// When the run was started for the first time, in seconds since 1970 (UTC).
    pub started: u64,
    /// How often it was started: 1 and the number of times it was resumed.
    pub starts: u64,
    /// Wall time in seconds, of all starts that ended in an orderly way.
    pub seconds: f64,
    /// The first rank's host.
    pub host: String,
    /// The operating system and its version.
    pub system: String,
    /// The processor's model.
    pub processor: String,
    /// Threads that each rank computes with on a CPU.
    pub threads: usize,
    /// The models of the GPUs of the first rank's host; empty if the run computes on CPUs.
    pub gpus: Vec<String>,
    /// Ranks of the run.
    pub ranks: usize,
    /// Parameters of the model.
    pub parameters: usize,
    /// Parameters that are trained.
    pub trained: usize,
    /// The largest amount of host memory that the first rank has held, in bytes.
    pub peak_memory: u64,
}

impl Facts {
    /// Describes this process and its run, and writes that. What an earlier start of the same run wrote is
    /// continued.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn start(output: &Path, plan: &Plan, world: &World, resumed: bool) -> Result<Self> {
        let earlier = if resumed { Self::read(output).unwrap_or_default() } else { Self::default() };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let facts = Self {
            version: concat!(env!("CARGO_PKG_VERSION"), ", commit ", env!("LODESTONE_COMMIT")).to_owned(),
            started: if earlier.started > 0 { earlier.started } else { now },
            starts: earlier.starts + 1,
            seconds: earlier.seconds,
            host: first_line("/proc/sys/kernel/hostname"),
            system: format!(
                "{} {} {}",
                std::env::consts::OS,
                first_line("/proc/sys/kernel/osrelease"),
                std::env::consts::ARCH
            ),
            processor: processor(),
            threads: rayon::current_num_threads(),
            gpus: if device::current()?.is_cpu() { Vec::new() } else { gpus() },
            ranks: world.size(),
            parameters: plan.cost.parameters,
            trained: plan.cost.trained,
            peak_memory: earlier.peak_memory,
        };
        facts.write(output)?;
        Ok(facts)
    }

    /// Adds the wall time and the peak memory of this start, which ends after `seconds`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self, output: &Path, seconds: f64) -> Result<()> {
        self.seconds += seconds;
        self.peak_memory = self.peak_memory.max(memory::peak().unwrap_or(0));
        self.write(output)
    }

    /// What a run wrote; nothing if there is no such file or another version wrote it.
    pub fn read(output: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(output.join(FILE)).ok()?).ok()
    }

    fn write(&self, output: &Path) -> Result<()> {
        let path = output.join(FILE);
        let text =
            serde_json::to_string_pretty(self).map_err(|error| Error::file(&path, error.to_string()))?;
        atomic::write(&path, text + "\n")
    }
}

fn first_line(path: &str) -> String {
    fs::read_to_string(path).ok().and_then(|text| Some(text.lines().next()?.to_owned())).unwrap_or_default()
}

/// The model of the first processor that the system lists: `AMD EPYC 9654 96-Core Processor`.
fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(String::new, |(_, name)| name.trim().to_owned())
}

/// The models of this host's GPUs, as NVIDIA's driver tells them.
fn gpus() -> Vec<String> {
    let Ok(folders) = fs::read_dir("/proc/driver/nvidia/gpus") else { return Vec::new() };
    let model =
        |text: String| text.lines().find_map(|line| Some(line.strip_prefix("Model:")?.trim().to_owned()));
    let mut gpus: Vec<String> = folders
        .filter_map(|folder| model(fs::read_to_string(folder.ok()?.path().join("information")).ok()?))
        .collect();
    gpus.sort();
    gpus
}
