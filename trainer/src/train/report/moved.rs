//! The examples whose values changed most between two evaluations.

use serde_json::{Value, json};

use crate::eval::Examples;
use crate::eval::examples::Example;
use crate::eval::samples::EvaluationSamples;

/// Examples shown of those that improved, and of those that declined.
const SHOWN: usize = 6;

/// Smaller changes are none.
const SMALL: f64 = 1e-6;

/// For each set that both the evaluation before the first step and that after step `selected` have: the
/// examples that improved most and those that declined most, the largest change first, and how many of each
/// there are.
pub(super) fn moved(evaluations: &[EvaluationSamples], selected: u64) -> Vec<Value> {
    let at = |step: u64| evaluations.iter().find(|evaluation| evaluation.step == step);
    let (Some(base), Some(tuned)) = (at(0), at(selected).filter(|_| selected > 0)) else { return Vec::new() };
    let of_set = |(name, base): &(String, Examples)| {
        let (_, tuned) = tuned.sets.iter().find(|(other, _)| other == name)?;
        of_set(name, base, tuned)
    };
    base.sets.iter().filter_map(of_set).collect()
}

fn of_set(name: &str, base: &Examples, tuned: &Examples) -> Option<Value> {
    let sign = if base.lower_is_better { -1.0 } else { 1.0 };
    let mut pairs: Vec<(f64, &Example, &Example)> = base
        .items
        .iter()
        .zip(&tuned.items)
        // A set that was changed between two starts of a run has other items.
        .filter(|(before, after)| before.text == after.text)
        .map(|(before, after)| (sign * (after.value - before.value), before, after))
        .filter(|(gain, ..)| gain.is_finite())
        .collect();
    if pairs.is_empty() {
        return None;
    }
    pairs.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    let improved = pairs.iter().filter(|(gain, ..)| *gain > SMALL).count();
    let declined = pairs.iter().filter(|(gain, ..)| *gain < -SMALL).count();
    let show = |(_, before, after): &(f64, &Example, &Example)| json!({ "before": before, "after": after });
    Some(json!({
        "set": name,
        "measure": base.measure,
        "lower_is_better": base.lower_is_better,
        "count": pairs.len(),
        "improved": { "count": improved, "shown": pairs.iter().take(improved.min(SHOWN)).map(show).collect::<Vec<_>>() },
        "declined": { "count": declined, "shown": pairs.iter().rev().take(declined.min(SHOWN)).map(show).collect::<Vec<_>>() },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(values: &[f64], lower_is_better: bool) -> Examples {
        let example = |(n, value): (usize, &f64)| Example {
            text: n.to_string(),
            value: *value,
            note: String::new(),
            candidates: Vec::new(),
        };
        Examples {
            measure: "m".into(),
            lower_is_better,
            items: values.iter().enumerate().map(example).collect(),
        }
    }

    fn texts(moved: &Value, side: &str) -> Vec<String> {
        let shown = moved[side]["shown"].as_array().unwrap();
        shown.iter().map(|pair| pair["before"]["text"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_largest_changes_in_both_directions_come_first() {
        let before = [0.5, 0.5, 0.5, f64::NAN, 0.5, 0.5];
        let after = [0.6, 0.5, 0.1, 0.5, 1.0, 0.4];
        let moved = of_set("s", &examples(&before, false), &examples(&after, false)).unwrap();
        assert_eq!(texts(&moved, "improved"), ["4", "0"]);
        assert_eq!(texts(&moved, "declined"), ["2", "5"]);
        assert_eq!((&moved["count"], &moved["improved"]["count"]), (&json!(5), &json!(2)));
        let moved = of_set("s", &examples(&before, true), &examples(&after, true)).unwrap();
        assert_eq!(texts(&moved, "improved"), ["2", "5"]);
    }

    #[test]
    fn an_evaluation_is_compared_with_that_before_the_first_step() {
        let evaluation = |step, values: &[f64]| EvaluationSamples {
            step,
            best: true,
            sets: vec![("s".into(), examples(values, false))],
        };
        let all = [evaluation(0, &[0.0; 9]), evaluation(5, &[1.0; 9])];
        let moved = super::moved(&all, 5);
        assert_eq!((moved.len(), texts(&moved[0], "improved").len()), (1, SHOWN));
        assert_eq!(moved[0]["improved"]["count"], 9);
        assert!(super::moved(&all, 0).is_empty() && super::moved(&all, 6).is_empty());
        assert!(super::moved(&all[1..], 5).is_empty());
    }
}
