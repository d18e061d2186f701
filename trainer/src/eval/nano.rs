//! Means over Nano sets, as `NanoBEIREvaluator` in sentence-transformers 6.
//!
//! Retrieval sets whose names begin with `Nano` (NanoSciFact, NanoNQ, …) are Nano sets.
//! `NanoBEIR_mean_METRIC` is the mean of a metric over them.

use std::path::Path;

use super::{EvalSet, Scores, append_csv_row, retrieval};
use crate::Result;
use crate::config::EvaluationKind;

/// The first part of the names of the means.
pub const MEAN_PREFIX: &str = "NanoBEIR_mean";

/// Whether a metric is a mean over Nano sets rather than that of one set.
pub fn is_mean_metric(metric: &str) -> bool {
    metric.starts_with(MEAN_PREFIX)
}

/// The means over the Nano sets among `sets`, which come with their scores. Empty if there are no Nano sets.
pub fn mean_scores<'a>(sets: impl IntoIterator<Item = (&'a EvalSet, &'a Scores)>) -> Scores {
    let nano: Vec<_> = sets.into_iter().filter(|(set, _)| is_nano(set)).collect();
    let columns = nano.first().map(|(set, scores)| {
        scores.iter().filter_map(|(name, _)| name.strip_prefix(&format!("{}_", set.name))).collect::<Vec<_>>()
    });
    let of = |metric: &str| {
        let values = nano
            .iter()
            .map(|(set, scores)| scores.get(&format!("{}_{metric}", set.name)).unwrap_or(f64::NAN));
        (format!("{MEAN_PREFIX}_{metric}"), values.sum::<f64>() / nano.len() as f64)
    };
    columns.unwrap_or_default().into_iter().map(of).collect()
}

/// The names of the metrics that [`mean_scores`] returns for these sets.
pub fn mean_metric_names<'a>(mut sets: impl Iterator<Item = &'a EvalSet>) -> Vec<String> {
    let names = if sets.any(is_nano) { retrieval::metric_names() } else { Vec::new() };
    names.into_iter().map(|metric| format!("{MEAN_PREFIX}_{metric}")).collect()
}

/// Whether a set is a Nano set.
pub fn is_nano(set: &EvalSet) -> bool {
    set.kind == EvaluationKind::Retrieval && set.name.starts_with("Nano")
}

/// Adds a row to `folder`/NanoBEIR_evaluation_mean_results.csv.
///
/// # Errors
/// The file cannot be written.
pub fn append_csv(folder: &Path, means: &Scores) -> Result<()> {
    append_csv_row(
        &folder.join("NanoBEIR_evaluation_mean_results.csv"),
        MEAN_PREFIX,
        &retrieval::csv_columns(),
        means,
    )
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::eval::Task;
    use crate::eval::embed::Role;
    use crate::eval::golden;
    use crate::eval::triplet::Triplets;

    fn named(name: &str, kind: EvaluationKind, task: impl Task + 'static) -> EvalSet {
        EvalSet { name: name.to_owned(), kind, task: Box::new(task) }
    }

    /// The golden retrieval sets and their scores.
    fn measured() -> Vec<(EvalSet, Scores)> {
        let golden = golden::read();
        let names: Vec<String> = serde_json::from_value(golden["nano"]["sets"].clone()).unwrap();
        let of = |(collection, name): (&serde_json::Value, &String)| {
            let (set, queries, documents) = golden::retrieval(collection);
            let found = set.evaluate_with(|texts, role| {
                let rows = if role == Role::Query { &queries } else { &documents };
                let picked: Vec<f32> =
                    texts.iter().flat_map(|text| rows[text.parse::<usize>().unwrap()].clone()).collect();
                Ok(Tensor::from_vec(picked, (texts.len(), rows[0].len()), &Device::Cpu)?)
            });
            let scores = found.unwrap().scores;
            let scores =
                scores.into_iter().map(|(metric, score)| (format!("{name}_{metric}"), score)).collect();
            (named(name, EvaluationKind::Retrieval, set), scores)
        };
        golden["retrieval"].as_array().unwrap().iter().zip(&names).map(of).collect()
    }

    #[test]
    fn the_mean_is_that_of_sentence_transformers() {
        let golden = &golden::read()["nano"];
        let sets = measured();
        let means = mean_scores(sets.iter().map(|(set, scores)| (set, scores)));
        let all: Vec<(&str, f64)> =
            sets.iter().flat_map(|(_, scores)| scores.iter()).chain(means.iter()).collect();
        let expected = golden["scores"].as_object().unwrap();
        assert_eq!(
            all.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>()
        );
        for (name, score) in all {
            assert!((score - expected[name].as_f64().unwrap()).abs() < 1e-6, "{name}: {score}");
        }
        assert!(means.get(golden["primary"].as_str().unwrap()).is_some());

        let folder = tempfile::tempdir().unwrap();
        append_csv(folder.path(), &means).unwrap();
        let csv = std::fs::read_to_string(folder.path().join(golden["csv_name"].as_str().unwrap())).unwrap();
        let lines: Vec<_> = csv.lines().collect();
        assert_eq!((lines.len(), lines[0]), (2, golden["csv_header"].as_str().unwrap()));
        assert!(!lines[1].contains("nan"), "{csv}");
    }

    #[test]
    fn only_retrieval_sets_with_a_nano_name_belong_to_it() {
        let mut sets = measured();
        let expected = mean_scores(sets.iter().map(|(set, scores)| (set, scores)));
        let other: Scores = [("NanoNli_cosine_accuracy".to_owned(), 1.0)].into_iter().collect();
        sets.insert(0, (named("NanoNli", EvaluationKind::Triplet, Triplets::default()), other));
        let (retrieval, ..) = golden::retrieval(&golden::read()["retrieval"][1]);
        let scores = [("nano_cosine_ndcg@10".to_owned(), 1.0)].into_iter().collect();
        sets.push((named("nano", EvaluationKind::Retrieval, retrieval), scores));
        assert_eq!(mean_scores(sets.iter().map(|(set, scores)| (set, scores))), expected);
        assert!(mean_scores(sets[..1].iter().map(|(set, scores)| (set, scores))).is_empty());
        assert!(is_mean_metric("NanoBEIR_mean_cosine_ndcg@10") && !is_mean_metric("NanoNQ_cosine_ndcg@10"));
    }
}
