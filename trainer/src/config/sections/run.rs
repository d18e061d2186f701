//! `checkpoint` and `logging`: what a run writes while it trains.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::Interval;
use crate::config::check::Check;

/// Checkpoints, from which `--resume` continues a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Number of steps between checkpoints, or `epoch`. The best and the last step always have one.
    pub every: Interval,
    /// Number of checkpoints that are kept, besides the best one.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: Interval::Steps(500), keep: 3 }
    }
}

impl Checkpoint {
    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        let expected = "expected a number of steps from 1, or `epoch`, found 0";
        check.that(self.every != Interval::Steps(0), "every", expected)?;
        check.at_least_1("keep", self.keep as u64)
    }
}

/// Metrics of the training steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Logging {
    /// Number of steps between lines of `metrics.jsonl`.
    pub every: u64,
    /// Write event files for TensorBoard.
    pub tensorboard: bool,
}

impl Default for Logging {
    fn default() -> Self {
        Self { every: 1, tensorboard: true }
    }
}

impl Logging {
    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        check.at_least_1("every", self.every)
    }
}
