//! The lines of the charts: the steps of a run column by column. Long runs are averaged in portions.

use serde_json::{Map, Value};

/// The values of a step that have a chart.
const COLUMNS: [&str; 7] =
    ["loss", "grad_norm", "learning_rate", "tokens_per_second", "memory", "gpu_memory", "masked"];

type Step = Map<String, Value>;

/// The columns of the steps, each as long as the column `step`: at most `points` numbers, which are means
/// over portions. A value that is no number does not count; the mean is null if a portion has none.
pub(super) fn columns(steps: &[Step], points: usize) -> Map<String, Value> {
    let portions = portions(steps, points);
    let last = |portion: &&[Step]| portion.last().and_then(|step| step["step"].as_u64()).unwrap_or(0);
    let mut columns = Map::new();
    columns.insert("step".into(), portions.iter().map(last).collect());
    for name in COLUMNS {
        columns.insert(name.into(), means(&portions, |step| step.get(name)));
    }
    columns
}

/// The loss of each data set by its name, in the same portions.
pub(super) fn losses(steps: &[Step], points: usize) -> Map<String, Value> {
    let portions = portions(steps, points);
    let mut losses = Map::new();
    for name in steps.iter().filter_map(|step| step.get("losses")?.as_object()).flat_map(Map::keys) {
        if !losses.contains_key(name) {
            losses.insert(name.clone(), means(&portions, |step| step.get("losses")?.get(name)));
        }
    }
    losses
}

fn portions(steps: &[Step], points: usize) -> Vec<&[Step]> {
    steps.chunks(steps.len().div_ceil(points).max(1)).collect()
}

fn means<'a>(portions: &[&'a [Step]], of: impl Fn(&'a Step) -> Option<&'a Value>) -> Value {
    let mean = |portion: &&'a [Step]| {
        let values: Vec<f64> = portion.iter().filter_map(|step| of(step)?.as_f64()).collect();
        if values.is_empty() {
            Value::Null
        } else {
            Value::from(values.iter().sum::<f64>() / values.len() as f64)
        }
    };
    portions.iter().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn steps() -> Vec<Step> {
        let step = |n: u64, loss: Value, losses: Value| {
            json!({"step": n, "loss": loss, "losses": losses}).as_object().unwrap().clone()
        };
        vec![
            step(1, json!(4.0), json!({"a": 4.0})),
            step(2, json!(null), json!({"a": 2.0, "b": 1.0})),
            step(3, json!(null), json!({})),
            step(4, json!(null), json!({"b": 3.0})),
            step(5, json!(1.5), json!({"b": null})),
        ]
    }

    #[test]
    fn short_runs_are_shown_step_by_step() {
        let columns = columns(&steps(), 5);
        assert_eq!(columns["step"], json!([1, 2, 3, 4, 5]));
        assert_eq!(columns["loss"], json!([4.0, null, null, null, 1.5]));
        assert_eq!(columns["masked"], json!([null, null, null, null, null]));
        let losses = losses(&steps(), 5);
        assert_eq!(losses["a"], json!([4.0, 2.0, null, null, null]));
        assert_eq!(losses["b"], json!([null, 1.0, null, 3.0, null]));
    }

    #[test]
    fn long_runs_are_shown_by_means() {
        let columns = columns(&steps(), 3);
        assert_eq!((&columns["step"], &columns["loss"]), (&json!([2, 4, 5]), &json!([4.0, null, 1.5])));
        assert_eq!(losses(&steps(), 3)["b"], json!([1.0, 3.0, null]));
        assert_eq!(super::columns(&[], 3)["step"], json!([]));
    }
}
