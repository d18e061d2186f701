//! The whole way from rows to metrics, against sentence-transformers on the same tiny model.

use std::path::{Path, PathBuf};

use serde_json::Value;
use trainer::config::{EvaluationKind, EvaluationSet};
use trainer::eval::EvalSet;
use trainer::eval::embed::{LoadedModel, Role};
use trainer::model::Options;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

#[test]
fn scores_are_those_of_sentence_transformers() {
    let expected: Value = serde_json::from_slice(&std::fs::read(golden("metrics.json")).unwrap()).unwrap();
    let opened = LoadedModel::open(golden("bert").to_str().unwrap(), &Options::default()).unwrap();
    for (kind, name) in [(EvaluationKind::Retrieval, "retrieval"), (EvaluationKind::Triplet, "triplet")] {
        let path = golden("bert").join("rows.jsonl");
        let set = EvalSet::open(&EvaluationSet { path, kind, ..EvaluationSet::default() }).unwrap();
        let scores = set.evaluate(&opened.embedder()).unwrap().scores;
        let expected = expected["folder"][name].as_object().unwrap();
        assert_eq!(scores.iter().count(), expected.len());
        for (metric, score) in scores.iter() {
            let expected = expected[metric].as_f64().unwrap();
            assert!((score - expected).abs() < 1e-6, "{metric}: {score}, expected {expected}");
        }
    }
}

#[test]
fn embeddings_come_in_the_order_of_the_texts_whatever_the_chunks() {
    let opened = LoadedModel::open(golden("bert").to_str().unwrap(), &Options::default()).unwrap();
    let texts = ["seven planets", "a", "iron is a metal; and so is tin, and zinc", "a", "", "seven planets"];
    let mut embedder = opened.embedder();
    let alone: Vec<Vec<f32>> = texts
        .iter()
        .map(|text| embedder.encode(&[text], Role::Text).unwrap().to_vec2::<f32>().unwrap().remove(0))
        .collect();
    for chunk_tokens in [1, 7, 4096] {
        embedder.chunk_tokens = chunk_tokens;
        let together = embedder.encode(&texts, Role::Text).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!((&together[0], &together[1]), (&together[5], &together[3]));
        for (one, other) in alone.iter().flatten().zip(together.iter().flatten()) {
            assert!((one - other).abs() < 1e-6, "{one} alone, {other} in chunks of {chunk_tokens}");
        }
    }
}
