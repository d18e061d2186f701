//! What the report shows of a run, from the files in its folder.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::facts::Facts;
use super::{moved, series};
use crate::config::Config;
use crate::eval::{EvalSpec, lower_is_better, nano, samples};
use crate::train::metrics::History;
use crate::train::selection::selection_metric;
use crate::{Error, Result};

/// Points of a line at most.
const POINTS: usize = 1500;

/// Steps at each end of a run over which the loss is averaged, if there are enough.
const LOSS_STEPS: usize = 10;

/// The data of a run's output folder.
///
/// # Errors
/// It holds no run, or its files are not what a run writes.
pub(super) fn describe(output: &Path) -> Result<Value> {
    let metrics_file = output.join("metrics.jsonl");
    let history = History::read(&metrics_file)?.ok_or_else(|| {
        Error::file(
            output,
            "has no metrics.jsonl, so it is not the folder of a run\n\
             hint: give the `output` of a configuration that was trained",
        )
    })?;
    if history.steps.is_empty() && history.evaluations.is_empty() {
        return Err(Error::file(metrics_file, "has no step and no evaluation yet"));
    }
    let folder = output.display().to_string();
    // The configuration of another version may not load. It is shown as it is, without what follows from its
    // values.
    let config_file = output.join("config.yaml");
    let text = fs::read_to_string(&config_file).ok();
    let known = Config::load(&config_file, &[]).unwrap_or_default();
    let name = match known.name.is_empty() {
        true => output.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned())),
        false => Some(known.name.clone()),
    };
    let metric = &known.evaluation.metric;
    let selected = history.selected_step(&known.evaluation);
    let value_at = |step: u64| history.scores_at(step).and_then(|scores| selection_metric(scores, metric));
    let sum = |name: &str| numbers(&history.steps, name).sum::<f64>();
    let facts = Facts::read(output);
    // A run in progress, or one that was killed, has not written the last values of its facts yet.
    let peak = |name: &str| numbers(&history.steps, name).fold(0.0, f64::max);
    let memory = facts.as_ref().map_or(0.0, |facts| facts.peak_memory as f64).max(peak("memory"));
    let times: Vec<f64> = numbers(&history.steps, "time").collect();
    let elapsed = times.last().zip(times.first()).map_or(0.0, |(last, first)| last - first);
    let seconds = facts.as_ref().map(|facts| facts.seconds).filter(|&seconds| seconds > 0.0);
    let evaluations: Vec<Value> =
        history.evaluations.iter().map(|(step, scores)| json!({ "step": step, "scores": scores })).collect();
    let mut lower: Vec<&String> = history.evaluations.iter().flat_map(|(_, scores)| scores.keys()).collect();
    lower.retain(|metric| lower_is_better(metric));
    lower.sort_unstable();
    lower.dedup();
    Ok(json!({
        "name": name.unwrap_or_else(|| folder.clone()),
        "folder": folder,
        "model": known.model.path,
        "config": text,
        "facts": facts,
        "wall_seconds": seconds.unwrap_or(elapsed),
        "peak_memory": memory,
        "peak_gpu_memory": peak("gpu_memory"),
        "sets": sets(&known),
        "metric": metric,
        "lower_is_better": lower_is_better(metric),
        "lower_metrics": lower,
        "selected": selected,
        "best": history.selection(metric).best,
        "before": value_at(0),
        "after": if selected > 0 { value_at(selected) } else { None },
        "loss": loss(&history.steps),
        "totals": {
            "steps": history.steps.last().and_then(|step| step["step"].as_u64()).unwrap_or(0),
            "logged": history.steps.len(),
            "tokens": sum("tokens"),
            "seconds": sum("seconds"),
        },
        "steps": series::columns(&history.steps, POINTS),
        "losses": series::losses(&history.steps, POINTS),
        "evaluations": evaluations,
        "moved": moved::moved(&samples::read(output)?, selected),
    }))
}

fn numbers<'a>(steps: &'a [Map<String, Value>], name: &'a str) -> impl Iterator<Item = f64> + 'a {
    steps.iter().filter_map(move |step| step.get(name)?.as_f64())
}

/// The evaluation sets with their primary metrics, and the mean of the Nano sets.
fn sets(config: &Config) -> Vec<Value> {
    let set = |name: &str, primary: &str| json!({ "name": name, "primary": primary });
    let mut sets: Vec<Value> = config
        .evaluation
        .sets
        .iter()
        .filter_map(|of_set| Some(set(&of_set.name, EvalSpec::of(of_set.kind?).primary_metric)))
        .collect();
    sets.push(set(nano::MEAN_PREFIX, "cosine_ndcg@10"));
    sets
}

/// The mean loss of the rows of the first steps and of the last: a single step, or a short last batch, says
/// little.
fn loss(steps: &[Map<String, Value>]) -> Option<Value> {
    let known: Vec<(f64, f64)> = steps
        .iter()
        .filter_map(|step| {
            Some((step["loss"].as_f64()?, step.get("rows").and_then(Value::as_f64).unwrap_or(1.0)))
        })
        .collect();
    let count = LOSS_STEPS.min(known.len().div_ceil(2));
    let mean = |steps: &[(f64, f64)]| {
        let rows: f64 = steps.iter().map(|(_, rows)| rows).sum();
        steps.iter().map(|(loss, rows)| loss * rows).sum::<f64>() / rows
    };
    (count > 0).then(|| {
        json!({ "first": mean(&known[..count]), "last": mean(&known[known.len() - count..]), "steps": count })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_of_a_short_last_batch_weighs_as_its_rows() {
        let step = |loss: f64, rows: u64| json!({"loss": loss, "rows": rows}).as_object().unwrap().clone();
        let steps = [step(4.0, 8), step(3.0, 8), step(2.0, 8), step(0.0, 2)];
        assert_eq!(loss(&steps), Some(json!({ "first": 3.5, "last": 1.6, "steps": 2 })));
        assert_eq!(loss(&steps[..1]), Some(json!({ "first": 4.0, "last": 4.0, "steps": 1 })));
        assert_eq!(loss(&[]), None);
    }
}
