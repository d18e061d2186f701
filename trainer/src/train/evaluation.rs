//! Evaluation during a run: when it is due, and the scores of all sets.

use serde_json::{Map, Value};

use crate::Result;
use crate::comm::World;
use crate::config::Interval;
use crate::eval::embed::Embedder;
use crate::eval::{Examples, nano};
use crate::model::Model;
use crate::train::checkpoint::State;
use crate::train::plan::Plan;
use crate::train::run_log::RunLog;

/// The scores of all evaluation sets, and a few examples of each set.
pub(super) struct AllScores {
    pub(super) scores: Map<String, Value>,
    pub(super) examples: Vec<(String, Examples)>,
}

/// Whether the model is evaluated where the run stands: before the first step, after the last, and every
/// `evaluation.every` steps or epochs.
pub(super) fn is_due(plan: &Plan, state: &State) -> bool {
    state.step == 0 || state.step == plan.steps || every(plan.config.evaluation.every, state)
}

/// Whether the run has just done a multiple of `every` steps, or an epoch. 0 steps: never.
pub(super) fn every(every: Interval, state: &State) -> bool {
    match every {
        Interval::Steps(steps) => steps > 0 && state.step.is_multiple_of(steps),
        Interval::Epoch => state.step > 0 && state.cursor.position == 0,
    }
}

/// Evaluates the model on all sets, records the scores and updates the best evaluation; true if this is the best so far.
pub(super) fn run(
    plan: &Plan,
    model: &Model,
    world: &World,
    state: &mut State,
    log: &mut Option<RunLog>,
) -> Result<bool> {
    let output = evaluate(plan, model, world)?;
    let value = plan.selection_metric(&output.scores);
    let best = state.selection.update_best(state.step, &plan.config.evaluation.metric, value);
    state.evaluated = Some(state.step);
    if let Some(log) = log
        && !output.scores.is_empty()
    {
        if let Some(value) = value {
            tracing::info!("step {}: {} {value:.4}", state.step, plan.config.evaluation.metric);
        }
        log.evaluation(state.step, output, best)?;
    }
    Ok(best)
}

/// Computes the scores of all sets, their texts shared among the ranks. All ranks return the scores of rank 0, so that
/// all take the same decisions.
fn evaluate(plan: &Plan, model: &Model, world: &World) -> Result<AllScores> {
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
        let output = set.evaluate(&embedder)?;
        of_sets.push(output.scores);
        examples.push((set.name().to_owned(), output.examples));
    }
    let means = nano::mean_scores(plan.sets.iter().map(|(set, _)| set).zip(&of_sets));
    let (names, values): (Vec<String>, Vec<f64>) = of_sets.into_iter().chain([means]).flatten().unzip();
    let values = world.all_gather(&values)?.swap_remove(0);
    let scores = names.into_iter().zip(values.into_iter().map(Value::from)).collect();
    Ok(AllScores { scores, examples })
}
