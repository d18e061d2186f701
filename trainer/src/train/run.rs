//! A run from its plan to the trained model: the loop around the optimizer steps.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kernels::adamw;
use serde_json::{Map, Value};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::World;
use crate::data::batch::Batch;
use crate::export::{self, TrainedRun};
use crate::model::Model;
use crate::system::atomic;
use crate::system::command;
use crate::system::heartbeat;
use crate::system::progress::Progress;
use crate::system::signals::Signals;
use crate::train::checkpoint::{self, Checkpoints, Snapshot, State, Writer};
use crate::train::evaluation;
use crate::train::metrics::History;
use crate::train::plan::Plan;
use crate::train::report::{self, facts::Facts};
use crate::train::run_log::{RecentLoss, RunLog, step_metrics};
use crate::train::selection::Best;
use crate::train::step::{Outcome, Stepper};
use crate::{Error, Result};

/// A run that is ready for its next step.
pub struct Run {
    plan: Plan,
    model: Model,
    state: State,
    resumed: Option<PathBuf>,
    checkpoints: Checkpoints,
    signals: Signals,
    world: World,
}

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Optimizer steps done.
    pub steps: u64,
    /// The step whose parameters are in OUTPUT/model.
    pub selected_step: u64,
    /// The best evaluation; none without evaluation sets.
    pub best: Option<Best>,
    /// Scores of the base model, before the first step; empty without evaluation sets.
    pub before: Map<String, Value>,
    /// Scores after `selected_step`.
    pub after: Map<String, Value>,
    /// Mean loss over the rows of the last steps; none if no step was done.
    pub loss: Option<f64>,
    /// OUTPUT/report.html; none if it could not be written.
    pub report: Option<PathBuf>,
    /// Duration of this run, since its last resume.
    pub duration: Duration,
}

impl Run {
    /// Does everything that can fail before the first step: reads the model, claims the output folder and finds the newest
    /// checkpoint. Rank 0 does so for all ranks, which compare what they are about to train.
    ///
    /// # Errors
    /// The output folder already holds a run and `resume` is false; the checkpoint belongs to another run; the ranks have
    /// different configurations, data or models; a file cannot be read or written.
    pub fn prepare(plan: Plan, resume: bool, world: World) -> Result<Self> {
        let output = &plan.config.output;
        let checkpoints = Checkpoints::new(output, plan.config.checkpoint.keep);
        if world.is_rank_zero() && !resume && holds_run(output) {
            return Err(Error::file(
                output,
                "already holds a run\nhint: `--resume` continues it; another `output` starts a new one",
            ));
        }
        let model = plan.model()?;
        let identity = plan.identity(&model);
        let (state, resumed) = match if resume && world.is_rank_zero() { checkpoints.newest()? } else { None }
        {
            Some((path, mut state)) if state.identity.is_compatible_with(&identity) => {
                if state.identity.steps != identity.steps {
                    tracing::warn!(
                        "the checkpoint {} was written by a run of {} steps, this run has {}; the learning-rate schedule \
                         follows the new length",
                        path.display(),
                        state.identity.steps,
                        identity.steps
                    );
                    state.identity = identity.clone();
                }
                (state, Some(path))
            }
            Some((path, state)) => {
                return Err(Error::file(
                    path,
                    format!(
                        "belongs to another run: {}\nhint: another `output` starts a new one",
                        state.identity.differences(&identity)
                    ),
                ));
            }
            None => (State { identity: identity.clone(), ..State::default() }, None),
        };
        if world.is_rank_zero() {
            claim(output)?;
        }
        let json = |error: serde_json::Error| Error::file(output, format!("the state of the run: {error}"));
        let all = (plan.rank_invariant()?, &identity, model.flat().entries().len(), model.frozen_digest()?);
        world
            .assert_same("configuration, data or model", xxh3_64(&serde_json::to_vec(&all).map_err(json)?))?;
        let of_first = world.broadcast_bytes(serde_json::to_vec(&state).map_err(json)?)?;
        let state =
            if world.is_rank_zero() { state } else { serde_json::from_slice(&of_first).map_err(json)? };
        Ok(Self { plan, model, state, resumed, checkpoints, signals: Signals::listen()?, world })
    }

    /// Trains to the end and writes OUTPUT/model, or stops at a signal.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a signal, once the checkpoint is written; a loss, gradient or parameter is not finite; a row
    /// cannot be read; a file cannot be written; another rank has failed.
    pub fn train(mut self) -> Result<Summary> {
        let started = Instant::now();
        let output = self.plan.config.output.clone();
        if self.world.is_rank_zero() {
            let mut config = self.plan.resolved();
            if let (Some(section), Some(settings)) = (&mut config.lora, self.model.lora()) {
                settings.write_into(section);
            }
            let config = config.to_yaml()?;
            atomic::write(&output.join("config.yaml"), config)?;
        }
        let facts = match self.world.is_rank_zero() {
            true => Some(Facts::start(&output, &self.plan, &self.world, self.resumed.is_some())?),
            false => None,
        };
        let done = self.steps(&output);
        let written = facts.map_or(Ok(()), |facts| facts.finish(&output, started.elapsed().as_secs_f64()));
        let loss = done?;
        written?;
        let State { step, selection, .. } = self.state;
        let selected_step = selection.selected_step(&self.plan.config.evaluation, step);
        let mut summary =
            Summary { steps: step, selected_step, best: selection.best, loss, ..Summary::default() };
        if !self.world.is_rank_zero() {
            return Ok(summary);
        }
        let history = History::read(&output.join("metrics.jsonl"))?.unwrap_or_default();
        summary.before = history.scores_at(0).cloned().unwrap_or_default();
        summary.after = history.scores_at(selected_step).cloned().unwrap_or_default();
        if selected_step != step {
            self.model.load_parameters(&self.checkpoints.find("best")?.join("parameters.safetensors"))?;
            heartbeat::record_work();
        }
        let config = &self.plan.config;
        let trained =
            TrainedRun { config, step: selected_step, before: &summary.before, after: &summary.after };
        let options = export::Options { merge: false, replace: true };
        export::write_run(&mut self.model, &trained, options, &output.join("model"))?;
        // The model is written; a report that fails can be written again.
        summary.report = report::write(std::slice::from_ref(&output), None)
            .inspect_err(|error| {
                tracing::warn!("no report: {error}\nhint: trainer report {}", output.display());
            })
            .ok();
        summary.duration = started.elapsed();
        Ok(summary)
    }

    /// Does all steps that are left, with evaluations and checkpoints; returns the mean loss of the last steps.
    fn steps(&mut self, output: &Path) -> Result<Option<f64>> {
        let Self { plan, model, state, resumed, checkpoints, signals, world } = self;
        let config = &plan.config;
        let mut stepper = Stepper::new(model, &plan.step_settings(), world.clone())?;
        if let Some(path) = resumed {
            checkpoint::restore(path, state, model.flat(), &stepper.optimizer)?;
            if state.selection.best.is_some_and(|best| best.step == state.step) {
                // The run may have been killed after it wrote the checkpoint, before it linked OUTPUT/best.
                checkpoints.mark_best(state.step)?;
            }
            tracing::info!("resumed after step {} from {}", state.step, path.display());
        }
        // All ranks start from the bits of rank 0, wherever they were read.
        for buffer in [model.flat().values(), &stepper.optimizer.exp_avg, &stepper.optimizer.exp_avg_sq] {
            world.broadcast(buffer)?;
        }
        let mut log =
            if world.is_rank_zero() { Some(RunLog::open(output, state, &config.logging)?) } else { None };
        let mut writer = Writer::new(checkpoints.clone());
        if evaluation::is_due(plan, state) && state.evaluated != Some(state.step) {
            // The base model before the first step, or the evaluation that was skipped when a signal stopped
            // the run at this step.
            let best = evaluation::run(plan, model, world, state, &mut log)?;
            if best && world.is_rank_zero() {
                checkpoints.mark_best(state.step)?;
            }
        }

        let mut progress = Progress::new("step", plan.steps, state.step);
        let mut loss = RecentLoss::default();
        for partial in plan.batches(state, world.shard())? {
            if state.selection.stops_early(&config.evaluation) {
                break;
            }
            let mut partial = partial?;
            let sequences = world.all_gather_sequences(partial.take_sequences(), partial.partition())?;
            let batch = partial.finish(sequences);
            let step = state.step + 1;
            let started = Instant::now();
            let outcome = stepper.step(&batch, step)?;
            let seconds = started.elapsed().as_secs_f64();

            state.nonfinite = if outcome.applied { 0 } else { state.nonfinite + 1 };
            if state.nonfinite >= config.training.max_nonfinite.max(1) {
                return Err(nonfinite(plan, &batch, &outcome, step));
            }
            state.step = step;
            state.tokens += batch.tokens() as u64;
            state.cursor = batch.cursor.clone();
            loss.add(outcome.loss, batch.rows.len());
            progress.step(step, loss.mean().unwrap_or(outcome.loss), batch.tokens(), seconds);
            if let Some(log) = &mut log {
                log.step(&step_metrics(plan, &batch, &outcome, step, seconds), step == plan.steps)?;
            }

            writer.check()?;
            let signal = world.any_signal(signals.requested())?;
            let best = signal.is_none()
                && evaluation::is_due(plan, state)
                && evaluation::run(plan, model, world, state, &mut log)?;
            let early = state.selection.stops_early(&config.evaluation);
            let last = step == plan.steps || signal.is_some() || early;
            if best || last || evaluation::every(config.checkpoint.every, state) {
                save(&stepper, state, &mut writer, best, last)?;
            }
            if let Some(signal) = signal {
                writer.finish()?;
                // The launcher may end all ranks as soon as one ends.
                world.barrier()?;
                let checkpoint = checkpoints.path(step);
                return Err(Error::Stopped { signal, step, checkpoint, resume: resume_command() });
            }
        }
        if state.selection.stops_early(&config.evaluation)
            && let Some(Best { step, value }) = state.selection.best
        {
            tracing::info!(
                "early stopping at step {}: no improvement in {} evaluations (best: step {step}, {value:.4})",
                state.step,
                state.selection.evaluations_without_improvement
            );
        }
        writer.finish()?;
        world.barrier()?;
        Ok(loss.mean())
    }
}

/// Starts to write a checkpoint, after all ranks have compared their bits and every number was found finite. `best`: it is the
/// best so far. `last`: no step follows.
fn save(stepper: &Stepper, state: &mut State, writer: &mut Writer, best: bool, last: bool) -> Result<()> {
    let started = Instant::now();
    let (flat, optimizer) = (stepper.model.flat(), &stepper.optimizer);
    let buffers = [flat.values(), &optimizer.exp_avg, &optimizer.exp_avg_sq];
    for (what, buffer) in ["a parameter", "a first moment", "a second moment"].into_iter().zip(buffers) {
        // An update with a finite gradient can overflow; the checkpoints written before stay usable.
        if !adamw::all_finite(buffer)? {
            let rows = "hint: use a smaller `training.learning_rate` or `training.max_grad_norm`".to_owned();
            return Err(Error::NonFinite { step: state.step, what, rows });
        }
    }
    let digest = checkpoint::digest(&buffers)?;
    stepper.world.assert_same("parameters or moments", digest)?;
    state.digest = Some(checkpoint::format_digest(digest));
    if stepper.world.is_rank_zero() {
        writer.save(Snapshot::take(state, flat, optimizer, last)?, best)?;
    }
    tracing::debug!("training waited {:.3} s for a checkpoint", started.elapsed().as_secs_f64());
    Ok(())
}

/// The error for a step that is not finite. It names the rows whose loss is not finite, or all rows of the batch if only the
/// gradient is not.
fn nonfinite(plan: &Plan, batch: &Batch, outcome: &Outcome, step: u64) -> Error {
    const SHOWN: usize = 10;
    let what = if outcome.loss.is_finite() { "the gradient norm" } else { "the loss" };
    let bad = |row: &usize| outcome.loss.is_finite() || !outcome.losses[*row].is_finite();
    let rows: Vec<usize> = (0..batch.rows.len()).filter(bad).collect();
    let mut shown: Vec<String> =
        rows.iter().take(SHOWN).map(|&row| plan.mixture.error(batch.rows[row], "").to_string()).collect();
    if rows.len() > SHOWN {
        shown.push(format!("and {} more", rows.len() - SHOWN));
    }
    Error::NonFinite { step, what, rows: shown.join("\n") }
}

/// The command line that continues this run: the one that started it, with `--resume`.
fn resume_command() -> String {
    let command = command::line();
    if command.split(' ').any(|word| word == "--resume") { command } else { format!("{command} --resume") }
}

/// Whether a folder has files of a run.
fn holds_run(output: &Path) -> bool {
    ["config.yaml", "metrics.jsonl", "checkpoints", "model"].iter().any(|name| output.join(name).exists())
}

/// Creates the output folder and checks that files can be written there, before any work is done.
fn claim(output: &Path) -> Result<()> {
    let folder = output.join("checkpoints");
    let refused =
        |action: &str, error: std::io::Error| Error::file(&folder, format!("cannot {action}: {error}"));
    fs::create_dir_all(&folder).map_err(|error| refused("create", error))?;
    let probe = folder.join(".probe");
    fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe)).map_err(|error| refused("write to", error))
}
