//! Which step a run ends with: the selection metric, the best evaluation so far, and early stopping.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config;
use crate::eval::{self, nano};

/// The best evaluation so far, and the number of evaluations after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// The best evaluation; none before the first evaluation of a trained model.
    pub best: Option<Best>,
    /// Evaluations after the best one.
    pub evaluations_without_improvement: u64,
}

/// The step and the selection metric of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps done before the evaluation.
    pub step: u64,
    /// The selection metric.
    pub value: f64,
}

impl Selection {
    /// Counts an evaluation after `step` steps with the `value` of `metric`; returns true if it is the best so far. The base
    /// model (step 0) and evaluations without the selection metric do not count.
    pub fn update_best(&mut self, step: u64, metric: &str, value: Option<f64>) -> bool {
        let Some(value) = value.filter(|_| step > 0) else { return false };
        if self.best.is_some_and(|best| !eval::is_better(metric, value, best.value)) {
            self.evaluations_without_improvement += 1;
            return false;
        }
        *self = Self { best: Some(Best { step, value }), evaluations_without_improvement: 0 };
        true
    }

    /// Whether `evaluation.patience` evaluations in a row brought no improvement, so that the run ends.
    pub fn stops_early(&self, evaluation: &config::Evaluation) -> bool {
        evaluation.patience.is_some_and(|patience| self.evaluations_without_improvement >= patience)
    }

    /// Whether OUTPUT/model is the model of the best evaluation: after early stopping, or with `evaluation.load_best`.
    pub fn selects_best(&self, evaluation: &config::Evaluation) -> bool {
        self.best.is_some() && (evaluation.load_best || self.stops_early(evaluation))
    }

    /// The step whose parameters become OUTPUT/model: the best one or the last one.
    pub fn selected_step(&self, evaluation: &config::Evaluation, last: u64) -> u64 {
        let best = self.best.filter(|_| self.selects_best(evaluation));
        best.map_or(last, |best| best.step)
    }
}

/// Whether `metric` is one of the metrics `names`, or the metric of one of their sets (`SET_METRIC`).
pub fn has_metric<'a>(mut names: impl Iterator<Item = &'a str>, metric: &str) -> bool {
    names.any(|name| name == metric || is_of_set(name, metric))
}

fn is_of_set(name: &str, metric: &str) -> bool {
    name.strip_suffix(metric).is_some_and(|set| set.ends_with('_'))
}

/// The value by which evaluations are compared: the score named `metric`, else the mean of `SET_METRIC` over the sets
/// that have it. None where no set has it.
pub fn selection_metric(scores: &Map<String, Value>, metric: &str) -> Option<f64> {
    if let Some(value) = scores.get(metric) {
        return value.as_f64();
    }
    let of_sets = |name: &str| is_of_set(name, metric) && !nano::is_mean_metric(name);
    let values: Vec<f64> =
        scores.iter().filter(|(name, _)| of_sets(name)).filter_map(|(_, value)| value.as_f64()).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_ends_with_its_best_step_if_it_stops_early_or_loads_the_best() {
        let mut selection = Selection::default();
        // The base model does not count, however good it is.
        for (step, value) in [(0, 0.9), (10, 0.4), (20, 0.3), (30, 0.2)] {
            assert_eq!(selection.update_best(step, "m", Some(value)), step == 10);
        }
        assert!(!selection.update_best(40, "m", None));
        assert_eq!(selection.best, Some(Best { step: 10, value: 0.4 }));
        // A lower loss is better.
        let mut of_loss = Selection::default();
        for (step, value) in [(1, 0.7), (2, 0.3), (3, 0.5)] {
            of_loss.update_best(step, "loss", Some(value));
        }
        assert_eq!(of_loss.best, Some(Best { step: 2, value: 0.3 }));
        let selected = |patience, load_best| {
            let evaluation = config::Evaluation { patience, load_best, ..config::Evaluation::default() };
            selection.selected_step(&evaluation, 30)
        };
        assert_eq!([selected(None, false), selected(Some(3), false)], [30, 30]);
        assert_eq!([selected(Some(2), false), selected(None, true)], [10, 10]);
        let evaluation = config::Evaluation { load_best: true, ..config::Evaluation::default() };
        assert_eq!(Selection::default().selected_step(&evaluation, 30), 30);
    }

    #[test]
    fn the_selection_metric_is_a_score_by_its_name_or_the_mean_over_the_sets() {
        let scores = |value: f64| {
            json!({"a_m": value, "b_m": 2.0 * value, "NanoBEIR_mean_m": 9.0}).as_object().unwrap().clone()
        };
        assert_eq!(selection_metric(&scores(0.5), "m"), Some(0.75));
        assert_eq!(selection_metric(&scores(0.5), "NanoBEIR_mean_m"), Some(9.0));
        assert_eq!(selection_metric(&scores(0.5), "a_m"), Some(0.5));
        assert_eq!(selection_metric(&scores(f64::NAN), "m"), None);
        assert_eq!(selection_metric(&scores(0.5), "other"), None);
        let names = || ["a_m", "b_m"].into_iter();
        assert!(has_metric(names(), "m") && has_metric(names(), "a_m") && !has_metric(names(), "n"));
    }
}
