//! all-MiniLM-L6-v2 (folder LODESTONE_MINILM) with rows of MedQuAD (folder LODESTONE_SHARED) equals
//! sentence-transformers (scripts/reference/minilm.py).

use std::env::var_os;
use std::fs;
use std::path::PathBuf;

use candle_core::Tensor;
use serde_json::{Value, json};
use tests::{golden, metrics, minilm, program, relative_error, stderr, write_config};
use trainer::eval::embed::{LoadedModel, Role};
use trainer::model::Options;

fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden("minilm.json")).unwrap()).unwrap()
}

#[test]
fn minilm_embeds_as_in_sentence_transformers() {
    let Some(model) = minilm() else { return };
    let expected = expected();
    let texts: Vec<String> = serde_json::from_value(expected["texts"].clone()).unwrap();
    let wanted: Vec<Vec<f32>> = serde_json::from_value(expected["first_dims"].clone()).unwrap();
    let opened = LoadedModel::open(model.to_str().unwrap(), &Options::default()).unwrap();
    let embeddings = opened.embedder().encode(&texts, Role::Text).unwrap(); // (N, D)
    assert_eq!(embeddings.dims(), [texts.len(), 384]);
    let found = embeddings.narrow(1, 0, wanted[0].len()).unwrap();
    let wanted = Tensor::new(wanted, found.device()).unwrap();
    assert!(relative_error(&found, &wanted) < 1e-5, "{found} is not {wanted}");
}

#[test]
fn real_questions_have_the_losses_and_gradients_of_torch() {
    let Some(model) = minilm() else { return };
    let Some(shared) = var_os("LODESTONE_SHARED").map(PathBuf::from) else {
        println!("skipped: rows of MedQuAD (LODESTONE_SHARED does not name their folder)");
        return;
    };
    let expected = expected();
    let steps = expected["steps"].as_array().unwrap();
    let batch = expected["batch_size"].as_u64().unwrap();
    let place = tempfile::tempdir().unwrap();
    let rows = shared.join("data/qa-medquad/pairs.jsonl.gz");
    let mut config = tests::config(&model, &rows, &place.path().join("out"));
    config["model"]["max_query_length"] = expected["max_length"].clone();
    config["model"]["max_document_length"] = expected["max_length"].clone();
    config["loss"]["temperature"] = expected["temperature"].clone();
    // A learning rate so small that no step changes the loss of the next.
    config["training"] = json!({
        "batch_size": batch, "max_steps": steps.len(), "learning_rate": 1e-12, "weight_decay": 0,
        "max_grad_norm": 0
    });
    let ran = program("trainer").arg("train").arg(write_config(place.path(), &config)).output().unwrap();
    assert!(ran.status.success(), "{}", stderr(&ran));
    let found = metrics(&place.path().join("out"));
    assert_eq!(found.len(), steps.len());
    for (found, expected) in found.iter().zip(steps) {
        for (name, tolerance) in [("loss", 1e-5), ("grad_norm", 1e-4)] {
            let (found, expected) = (found[name].as_f64().unwrap(), expected[name].as_f64().unwrap());
            assert!((found / expected - 1.0).abs() < tolerance, "{name} {found}, expected {expected}");
        }
    }
}
