//! What the first rank records of a run: metrics.jsonl, TensorBoard's event files and samples.json.

use std::collections::VecDeque;
use std::path::Path;

use serde_json::{Map, Value};

use crate::Result;
use crate::config::Logging;
use crate::data::batch::Batch;
use crate::eval::samples::{EvaluationSamples, SamplesFile};
use crate::train::checkpoint::State;
use crate::train::evaluation::AllScores;
use crate::train::metrics::{Metrics, StepMetrics};
use crate::train::plan::Plan;
use crate::train::step::Outcome;

/// The open files of a run.
pub(super) struct RunLog {
    metrics: Metrics,
    samples: SamplesFile,
    every: u64,
}

impl RunLog {
    /// Opens the files in `output`. Lines after `state` are dropped: the resumed run writes them again.
    pub(super) fn open(output: &Path, state: &State, logging: &Logging) -> Result<Self> {
        Ok(Self {
            metrics: Metrics::open(output, state.step, state.evaluated, logging.tensorboard)?,
            samples: SamplesFile::open(output, state.step)?,
            every: logging.every,
        })
    }

    /// Records every `logging.every`-th step, and the last one.
    pub(super) fn step(&mut self, step: &StepMetrics, last: bool) -> Result<()> {
        if last || step.step.is_multiple_of(self.every.max(1)) { self.metrics.step(step) } else { Ok(()) }
    }

    /// Records an evaluation after `step` steps.
    pub(super) fn evaluation(&mut self, step: u64, output: AllScores, best: bool) -> Result<()> {
        self.metrics.evaluation(step, &output.scores)?;
        self.samples.record(EvaluationSamples { step, best, sets: output.examples })
    }
}

/// The measurements of optimizer step `step`, which took `seconds`.
pub(super) fn step_metrics(
    plan: &Plan,
    batch: &Batch,
    outcome: &Outcome,
    step: u64,
    seconds: f64,
) -> StepMetrics {
    let tokens = batch.tokens();
    StepMetrics {
        step,
        epoch: batch.epoch,
        loss: outcome.loss,
        grad_norm: outcome.grad_norm,
        learning_rate: outcome.learning_rate,
        rows: batch.rows.len(),
        tokens,
        seconds,
        tokens_per_second: tokens as f64 / seconds,
        losses: losses(plan, batch, outcome),
        masked: batch.masked(plan.config.loss.in_batch_negatives),
    }
}

/// The mean loss of each data set's rows, in the order of the configuration.
fn losses(plan: &Plan, batch: &Batch, outcome: &Outcome) -> Map<String, Value> {
    let mut sums = vec![(0.0, 0.0); plan.mixture.sets().len()];
    for (row, &loss) in batch.rows.iter().zip(&outcome.losses) {
        let (sum, rows) = &mut sums[row.dataset as usize];
        *sum += f64::from(loss);
        *rows += 1.0;
    }
    let present = plan.mixture.sets().iter().zip(sums).filter(|(_, (_, rows))| *rows > 0.0);
    present.map(|(set, (sum, rows))| (set.name.clone(), Value::from(sum / rows))).collect()
}

/// The mean loss of the rows of the last steps. A short last batch has few candidates and so a small loss, which
/// alone would look like success.
#[derive(Debug, Default)]
pub(super) struct RecentLoss(VecDeque<(f64, usize)>);

impl RecentLoss {
    const STEPS: usize = 20;

    /// Adds a step with the mean loss of its `rows` rows; steps whose loss is not finite are left out.
    pub(super) fn add(&mut self, loss: f64, rows: usize) {
        if loss.is_finite() {
            self.0.push_back((loss * rows as f64, rows));
        }
        if self.0.len() > Self::STEPS {
            self.0.pop_front();
        }
    }

    /// The mean over the rows; none before the first step.
    pub(super) fn mean(&self) -> Option<f64> {
        let (sum, rows) =
            self.0.iter().fold((0.0, 0), |(sum, rows), (loss, count)| (sum + loss, rows + count));
        (rows > 0).then(|| sum / rows as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recent_loss_weighs_a_short_batch_by_its_rows() {
        let mut recent = RecentLoss::default();
        assert_eq!(recent.mean(), None);
        recent.add(f64::NAN, 64);
        recent.add(2.0, 63);
        recent.add(0.0, 1);
        assert_eq!(recent.mean(), Some(126.0 / 64.0));
        (0..RecentLoss::STEPS).for_each(|_| recent.add(1.0, 10));
        assert_eq!(recent.mean(), Some(1.0));
    }
}
