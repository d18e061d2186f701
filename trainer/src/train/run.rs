//! A run from its plan to the trained model: what happens around the steps.

use std::fs;
use std::path::Path;
use std::time::Instant;

use kernels::adamw::{self, AdamW};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::World;
use crate::config::Interval;
use crate::data::batch::Batch;
use crate::eval::embed::Embedder;
use crate::eval::samples::{EvaluationSamples, SamplesFile};
use crate::eval::{self, Examples, nano};
use crate::export::{self, TrainedRun};
use crate::loss::Losses;
use crate::model::Model;
use crate::model::params::Gradients;
use crate::system::atomic;
use crate::system::heartbeat;
use crate::system::progress::Progress;
use crate::system::signals::Signals;
use crate::train::checkpoint;
use crate::train::checkpoint::{Best, Checkpoints, Snapshot, State, Writer};
use crate::train::metrics::{self, History, Metrics};
use crate::train::optimizer::Optimizer;
use crate::train::plan::Plan;
use crate::train::report::{self, facts::Facts};
use crate::train::step::{Outcome, Stepper};
use crate::{Error, Result};

/// A run that is ready for its next step.
pub struct Run {
    plan: Plan,
    model: Model,
    state: State,
    resumed: Option<std::path::PathBuf>,
    checkpoints: Checkpoints,
    signals: Signals,
    world: World,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Optimizer steps done.
    pub steps: u64,
    /// Scores before the first step; empty without evaluation sets, or if that was before a resume.
    pub before: Map<String, Value>,
    /// Scores after the last.
    pub after: Map<String, Value>,
    /// The step whose parameters are in OUTPUT/model.
    pub selected_step: u64,
}

impl Run {
    /// Everything that can fail before anything is started: the model is read, the output folder claimed, the newest
    /// checkpoint found. The first rank does so for all; they compare what they will train.
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
                        "{} is of a run of {} steps, this one has {}: the learning rate goes on as in a run of so many",
                        path.display(),
                        state.identity.steps,
                        identity.steps
                    );
                    state.identity = identity.clone();
                }
                // Checkpoints of old do not say; they were written after the evaluation.
                state.evaluated.get_or_insert(state.step);
                (state, Some(path))
            }
            Some((path, state)) => {
                return Err(Error::file(
                    path,
                    format!(
                        "belongs to another run: the configuration has {}\nhint: another `output` starts a new one",
                        identity.differences(&state.identity)
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

    /// Trains to the end, or until a signal asks for a stop.
    pub fn train(mut self) -> Result<Summary> {
        let output = self.plan.config.output.clone();
        if self.world.is_rank_zero() {
            let mut config = self.plan.resolved();
            if let (Some(section), Some(settings)) = (&mut config.lora, self.model.lora()) {
                settings.write_into(section);
            }
            let config = config.to_yaml()?;
            atomic::write(&output.join("config.yaml"), config)?;
        }
        let started = Instant::now();
        let facts = match self.world.is_rank_zero() {
            true => Some(Facts::start(&output, &self.plan, &self.world, self.resumed.is_some())?),
            false => None,
        };
        let trained = self.steps(&output);
        let written = facts.map_or(Ok(()), |facts| facts.finish(&output, started.elapsed().as_secs_f64()));
        let mut summary = trained?;
        written?;
        let early = self.stopped_early_at();
        summary.selected_step = early.unwrap_or(summary.selected_step);
        if !self.world.is_rank_zero() {
            return Ok(summary);
        }
        let history = History::read(&output.join("metrics.jsonl"))?.unwrap_or_default();
        summary.before = history.scores_at(0).cloned().unwrap_or_default();
        summary.after = history.scores_at(summary.selected_step).cloned().unwrap_or_default();
        if early.is_some() {
            // Early stopping says that what came after the best evaluation was not worth having.
            self.model.load_parameters(&self.checkpoints.find("best")?.join("parameters.safetensors"))?;
            heartbeat::record_work();
        }
        let (config, step) = (&self.plan.config, summary.selected_step);
        let trained = TrainedRun { config, step, before: &summary.before, after: &summary.after };
        let options = export::Options { merge: false, replace: true };
        export::write_run(&mut self.model, &trained, options, &output.join("model"))?;
        if let Err(error) = report::write(std::slice::from_ref(&output), None) {
            // The model is there, and the report can be written again.
            tracing::warn!("no report: {error}\nhint: trainer report {}", output.display());
        }
        Ok(summary)
    }

    fn steps(&mut self, output: &Path) -> Result<Summary> {
        let Self { plan, model, state, resumed, checkpoints, signals, world } = self;
        let config = &plan.config;
        let training = &config.training;
        let (beta1, beta2) = training.betas;
        let rule = AdamW {
            learning_rate: training.learning_rate,
            beta1,
            beta2,
            epsilon: training.epsilon,
            weight_decay: training.weight_decay,
        };
        let clip = Some(training.max_grad_norm).filter(|&norm| norm > 0.0);
        let mut stepper = Stepper {
            model,
            gradients: Gradients::zeros(model.flat())?,
            optimizer: Optimizer::new(model.flat(), rule, training.decay_all, clip)?,
            losses: Losses::new(&config.loss, model.normalize()),
            schedule: plan.schedule,
            budget: plan.budget,
            seed: config.seed,
            world: world.clone(),
        };
        if let Some(path) = resumed {
            checkpoint::restore(path, state, model.flat(), &stepper.optimizer)?;
            if state.best.is_some_and(|best| best.step == state.step) {
                // A kill may have come between the checkpoint and its link.
                checkpoints.mark_best(state.step)?;
            }
            tracing::info!("resumed after step {} from {}", state.step, path.display());
        }
        // Every rank begins with the first one's bits, wherever they were read.
        for buffer in [model.flat().values(), &stepper.optimizer.exp_avg, &stepper.optimizer.exp_avg_sq] {
            world.broadcast(buffer)?;
        }
        let mut log = match world.is_rank_zero() {
            true => Some(RunLog {
                metrics: Metrics::open(output, state.step, state.evaluated, config.logging.tensorboard)?,
                samples: SamplesFile::open(output, state.step)?,
            }),
            false => None,
        };
        let mut writer = Writer::new(checkpoints.clone());
        let mut summary = Summary::default();
        if evaluation_due(plan, state.step) && state.evaluated != Some(state.step) {
            // A stop does not wait for the evaluation that its step asks for.
            let best = evaluate(plan, model, world, state, &mut log)?;
            if best && world.is_rank_zero() {
                checkpoints.mark_best(state.step)?;
            }
        }

        let mut progress = Progress::new("step", plan.steps, state.step);
        for partial in plan.batches(state, world.shard())? {
            if let Some(stale) = stale(plan, state) {
                let step = state.step;
                tracing::info!("no better evaluation in the last {stale}: stopped early after step {step}");
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
            if state.nonfinite >= training.max_nonfinite.max(1) {
                return Err(nonfinite(plan, &batch, &outcome, step));
            }
            state.step = step;
            state.tokens += batch.tokens() as u64;
            state.cursor = batch.cursor.clone();
            let line = line(plan, &batch, &outcome, step, seconds);
            progress.step(step, line.loss, line.tokens, seconds);
            if let Some(log) = &mut log
                && (step % config.logging.every.max(1) == 0 || step == plan.steps)
            {
                log.metrics.step(&line)?;
            }

            writer.check()?;
            let stop = world.any_signal(signals.requested())?;
            let due = checkpoint_due(plan, &batch, step);
            let mut best = false;
            if stop.is_none() && evaluation_due(plan, step) {
                best = evaluate(plan, model, world, state, &mut log)?;
            }
            let ends = step == plan.steps || stop.is_some() || stale(plan, state).is_some();
            if due || best || ends {
                save(&stepper, state, &mut writer, best, ends)?;
            }
            if let Some(signal) = stop {
                writer.finish()?;
                // Whoever started the ranks may end all when one ends.
                world.barrier()?;
                return Err(Error::Stopped { signal, step });
            }
        }
        writer.finish()?;
        world.barrier()?;
        summary.steps = state.step;
        summary.selected_step = state.step;
        Ok(summary)
    }

    /// The best step, where early stopping ended the run there.
    fn stopped_early_at(&self) -> Option<u64> {
        stale(&self.plan, &self.state)?;
        self.state.best.map(|best| best.step)
    }
}

/// Begins to write a checkpoint, if all ranks hold the same bits and every number is one. `ends`: no step follows.
fn save(stepper: &Stepper, state: &mut State, writer: &mut Writer, best: bool, ends: bool) -> Result<()> {
    let started = Instant::now();
    let (flat, optimizer) = (stepper.model.flat(), &stepper.optimizer);
    let buffers = [flat.values(), &optimizer.exp_avg, &optimizer.exp_avg_sq];
    for (what, buffer) in ["a parameter", "a first moment", "a second moment"].into_iter().zip(buffers) {
        // A finite gradient can still lead there, and the last good checkpoint is worth more than this one.
        if !adamw::all_finite(buffer)? {
            let rows = "hint: a smaller `training.learning_rate`, or `training.max_grad_norm`".to_owned();
            return Err(Error::NonFinite { step: state.step, what, rows });
        }
    }
    let digest = checkpoint::digest(&buffers)?;
    stepper.world.assert_same("parameters or moments", digest)?;
    state.digest = Some(checkpoint::format_digest(digest));
    if stepper.world.is_rank_zero() {
        writer.save(Snapshot::take(state, flat, optimizer, ends)?, best)?;
    }
    tracing::debug!("a checkpoint held up the training for {:.3} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Whether the model is measured after `step` steps: before the first, every so often, and after the last.
fn evaluation_due(plan: &Plan, step: u64) -> bool {
    step == 0 || step == plan.steps || every(plan.config.evaluation.every, step)
}

/// Evaluations since the best one, where they are so many that the run ends.
fn stale(plan: &Plan, state: &State) -> Option<u64> {
    plan.config
        .evaluation
        .patience
        .filter(|&patience| state.evaluations_without_improvement >= patience)
        .map(|_| state.evaluations_without_improvement)
}

/// Counts an evaluation; true if it is the best so far. The model that the run began with is none of its results.
fn update_best(state: &mut State, metric: &str, value: Option<f64>) -> bool {
    let Some(value) = value.filter(|_| state.step > 0) else { return false };
    if state.best.is_some_and(|best| !eval::is_better(metric, value, best.value)) {
        state.evaluations_without_improvement += 1;
        return false;
    }
    state.best = Some(Best { step: state.step, value });
    state.evaluations_without_improvement = 0;
    true
}

/// Where the first rank tells what it finds.
struct RunLog {
    metrics: Metrics,
    samples: SamplesFile,
}

/// What an evaluation found.
struct Found {
    scores: Map<String, Value>,
    examples: Vec<(String, Examples)>,
}

/// Measures the model, counts that, and writes it down; true if it is the best so far.
fn evaluate(
    plan: &Plan,
    model: &Model,
    world: &World,
    state: &mut State,
    log: &mut Option<RunLog>,
) -> Result<bool> {
    let found = measure(plan, model, world)?;
    let metric = &plan.config.evaluation.metric;
    let best = update_best(state, metric, plan.selection_metric(&found.scores));
    state.evaluated = Some(state.step);
    tell(plan, log, found, state.step, best)?;
    Ok(best)
}

/// The scores of all sets, shared among the ranks; all get the first one's, and decide alike.
fn measure(plan: &Plan, model: &Model, world: &World) -> Result<Found> {
    let (mut of_sets, mut examples) = (Vec::new(), Vec::new());
    for (set, prompts) in &plan.sets {
        let embedder = Embedder {
            model,
            tokenizer: &plan.tokenizer,
            query_prompt: &prompts.query,
            document_prompt: &prompts.document,
            text_prompt: &prompts.text,
            max_query_length: plan.lengths.query,
            max_document_length: plan.lengths.document,
            chunk_tokens: plan.embed_tokens,
            world: world.clone(),
        };
        let measured = set.evaluate(&embedder)?;
        of_sets.push(measured.scores);
        examples.push((set.name().to_owned(), measured.examples));
    }
    let means = nano::mean_scores(plan.sets.iter().map(|(set, _)| set).zip(&of_sets));
    let (names, values): (Vec<String>, Vec<f64>) = of_sets.into_iter().chain([means]).flatten().unzip();
    let values = world.all_gather(&values)?.swap_remove(0);
    let scores = names.into_iter().zip(values.into_iter().map(Value::from)).collect();
    Ok(Found { scores, examples })
}

/// Writes down an evaluation after `step` steps.
fn tell(plan: &Plan, log: &mut Option<RunLog>, found: Found, step: u64, best: bool) -> Result<()> {
    let (Some(RunLog { metrics, samples }), false) = (log, found.scores.is_empty()) else { return Ok(()) };
    metrics.evaluation(step, &found.scores)?;
    samples.record(EvaluationSamples { step, best, sets: found.examples })?;
    if let Some(value) = plan.selection_metric(&found.scores) {
        tracing::info!("step {step}: {} {value:.4}", plan.config.evaluation.metric);
    }
    Ok(())
}

fn line(plan: &Plan, batch: &Batch, outcome: &Outcome, step: u64, seconds: f64) -> metrics::StepMetrics {
    let tokens = batch.tokens();
    metrics::StepMetrics {
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

fn checkpoint_due(plan: &Plan, batch: &Batch, step: u64) -> bool {
    match plan.config.checkpoint.every {
        Interval::Steps(steps) => every(steps, step),
        Interval::Epoch => batch.epoch.fract() == 0.0,
    }
}

fn every(steps: u64, step: u64) -> bool {
    steps > 0 && step.is_multiple_of(steps)
}

/// Names the rows whose loss is not finite; where only the gradient is not, all of the batch.
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

/// Whether a folder has traces of a run.
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
