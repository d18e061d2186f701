//! `model.freeze` leaves parameters unchanged, and the others are trained.

use std::collections::BTreeSet;

use serde_json::json;
use tests::{config, golden, program, stderr, tensors, write_config};
use trainer::config::{self as sections, Freeze};
use trainer::model::{Model, ModelFolder, Options};

#[test]
fn model_freeze_selects_embeddings_and_norms_of_every_family() {
    for (family, embeddings, norms) in
        [("bert", 3, 10), ("mpnet", 2, 10), ("modernbert", 1, 9), ("mistral", 1, 5), ("qwen3", 1, 9)]
    {
        let trained = |freeze: &[Freeze]| -> BTreeSet<String> {
            let model = sections::Model { freeze: freeze.to_vec(), ..sections::Model::default() };
            let options = Options { model, trained: true, ..Options::default() };
            let model = Model::open(ModelFolder::open(&golden(family)).unwrap(), &options).unwrap();
            model.flat().entries().iter().map(|entry| entry.name.clone()).collect()
        };
        let all = trained(&[]);
        let without = |kind| all.difference(&trained(&[kind])).cloned().collect::<Vec<_>>();
        let (tables, norms_of_family) = (without(Freeze::Embeddings), without(Freeze::Norms));
        assert_eq!(tables.len(), embeddings, "{family}: {tables:?}");
        assert_eq!(norms_of_family.len(), norms, "{family}: {norms_of_family:?}");
        assert_eq!(
            trained(&[Freeze::Embeddings, Freeze::Norms]).len(),
            all.len() - tables.len() - norms_of_family.len()
        );
    }
}

#[test]
fn a_run_does_not_change_frozen_parameters() {
    for dtype in ["f32", "bf16"] {
        run_with_frozen_parameters(dtype);
    }
}

fn run_with_frozen_parameters(dtype: &str) {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("out");
    let mut config = config(&golden("bert"), &golden("bert").join("rows.jsonl"), &output);
    config["model"]["dtype"] = json!(dtype);
    config["model"]["freeze"] = json!(["embeddings", "norms"]);
    config["training"]["max_steps"] = json!(2);
    let ran = program("trainer").arg("train").arg(write_config(place.path(), &config)).output().unwrap();
    assert!(ran.status.success(), "{}", stderr(&ran));
    let (before, after) = (
        tensors(&golden("bert").join("model.safetensors")),
        tensors(&output.join("model/model.safetensors")),
    );
    let bits = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let trained = after.iter().filter(|(name, tensor)| {
        let was = before.iter().find(|(other, _)| other.ends_with(name.as_str())).unwrap().1;
        let same = bits(was) == bits(tensor);
        let frozen = name.contains("embeddings") || name.contains("LayerNorm");
        assert!(!frozen || same, "{name} was trained in {dtype}");
        !same
    });
    let changed = trained.count();
    assert!(changed > 20, "{changed} tensors were trained");
}
