//! What sentence-transformers computed (tests/golden/metrics.json, written by scripts/reference/metrics.py).

use candle_core::{Device, Tensor};
use serde_json::Value;

use super::Scores;
use super::retrieval::Retrieval;
use crate::Result;

pub(super) fn read() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/metrics.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(super) fn matrix(value: &Value) -> Vec<Vec<f32>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A collection whose texts are the numbers of rows, and the rows: of queries, of documents.
pub(super) fn retrieval(golden: &Value) -> (Retrieval, Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let (queries, documents) = (matrix(&golden["queries"]), matrix(&golden["documents"]));
    let ids: Vec<String> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let relevant = (0..queries.len())
        .map(|query| {
            let of_query: Vec<String> =
                serde_json::from_value(golden["relevant"][format!("q{query}")].clone()).unwrap();
            let index = |id: &String| ids.iter().position(|other| other == id).unwrap() as u32;
            of_query.iter().map(index).collect()
        })
        .collect();
    let numbers = |count: usize| (0..count).map(|i| i.to_string()).collect();
    (Retrieval::new(numbers(queries.len()), numbers(documents.len()), &ids, relevant), queries, documents)
}

/// The same names in the same order, the same values.
pub(super) fn assert_scores(scores: &Scores, golden: &Value) {
    let name = golden["name"].as_str().unwrap();
    let expected = golden["scores"].as_object().unwrap();
    let names: Vec<_> = scores.iter().map(|(metric, _)| format!("{name}_{metric}")).collect();
    assert_eq!(names, expected.keys().cloned().collect::<Vec<_>>());
    for ((metric, score), expected) in scores.iter().zip(expected.values()) {
        // Accuracies of triplets are a mean in f32 there.
        assert!((score - expected.as_f64().unwrap()).abs() < 1e-6, "{metric}: {score}, expected {expected}");
    }
}

/// Texts that stand for the rows of a matrix: `a0`, `a1`, …
pub(super) fn texts(letter: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{letter}{i}")).collect()
}

/// The rows that such texts stand for, among matrices by their letters: (texts, D).
pub(super) fn rows(matrices: &[(&str, Vec<Vec<f32>>)], texts: &[String]) -> Result<Tensor> {
    let row = |text: &String| {
        let (_, matrix) = matrices.iter().find(|(letter, _)| text.starts_with(letter)).unwrap();
        matrix[text[1..].parse::<usize>().unwrap()].clone()
    };
    let rows: Vec<_> = texts.iter().map(row).collect();
    Ok(Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu)?)
}

/// The first line of a CSV file with these columns.
pub(super) fn csv_header(columns: Vec<(String, String)>) -> String {
    let headings: Vec<_> = columns.into_iter().map(|(heading, _)| heading).collect();
    format!("epoch,steps,{}", headings.join(","))
}
