//! Embeddings, losses and gradients equal those of transformers, PEFT and sentence-transformers on tiny
//! random models. The scripts in scripts/reference write the goldens, in f64.

use candle_core::{DType, Tensor};
use tests::{FAMILIES, golden_json, model_folder, relative_error, tensors};
use trainer::comm::World;
use trainer::config;
use trainer::data::batch::Sequence;
use trainer::model::chunk::Chunk;
use trainer::model::params::Gradients;
use trainer::model::pass::Saved;
use trainer::model::{Model, ModelFolder, Options};
use trainer::train::Run;

/// Relative error of f32 against f64, through two layers.
const CLOSE: f64 = 1e-5;

fn model(name: &str, adapted: bool, dtype: config::Dtype) -> (tempfile::TempDir, Model) {
    let folder = model_folder(name, adapted);
    let section = config::Model { dropout: Some(0.0), dtype, ..config::Model::default() };
    let options = Options { model: section, trained: true, ..Options::default() };
    let model = Model::open(ModelFolder::open(folder.path()).unwrap(), &options).unwrap();
    (folder, model)
}

fn sequences(name: &str) -> Vec<Sequence> {
    let golden = golden_json(name, "golden.json");
    let ids = |sequence: &serde_json::Value| {
        sequence["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    golden["sequences"].as_array().unwrap().iter().map(|s| Sequence { ids: ids(s), skip: 0 }).collect()
}

/// Compares hidden states and embeddings of a ragged batch, and the gradient of Σ embeddings ∘ direction with
/// respect to every trained parameter.
fn compare_with_golden(name: &str, adapted: bool) {
    let (_folder, model) = model(name, adapted, config::Dtype::F32);
    let golden = tensors(&tests::golden(name).join("golden.safetensors"));
    let prefix = if adapted { "lora." } else { "" };
    let sequences = sequences(name);
    let members = (0..sequences.len()).collect();
    let chunk = Chunk::pack(&sequences, members, model.pooling()).unwrap();
    let (embeddings, tape) = model.forward(&chunk, None, Saved::All).unwrap();
    for (what, got) in [("hidden", model.hidden_states(&chunk).unwrap()), ("embeddings", embeddings)] {
        let error = relative_error(&got, &golden[&format!("{prefix}{what}")]);
        assert!(error < CLOSE, "{name}: {what} differ by {error:e}");
    }

    let gradients = Gradients::zeros(model.flat()).unwrap();
    let direction = golden["direction"].to_dtype(DType::F32).unwrap();
    model.backward(&chunk, tape.unwrap(), &direction, None, &gradients).unwrap();
    let prefix_of_gradient = if adapted { "lora.grad.base_model.model." } else { "grad." };
    let mut compared = 0;
    for named in model.flat().named(gradients.flat()) {
        let (parameter, gradient): (String, Tensor) = named.unwrap();
        let want = &golden[&format!("{prefix_of_gradient}{parameter}")];
        let error = relative_error(&gradient, want);
        assert!(
            tests::is_zero(&parameter, name) || error < CLOSE,
            "{name}: the gradient of {parameter} differs by {error:e}"
        );
        compared += 1;
    }
    let expected = golden.keys().filter(|key| key.starts_with(prefix_of_gradient)).count();
    assert_eq!(compared, expected, "{name}: every parameter of the golden is trained");
}

/// Checks that errors in half precision, against f64, are at most twice those of transformers.
fn compare_half_precision(name: &str, adapted: bool, dtype: config::Dtype) {
    let (_folder, model) = model(name, adapted, dtype);
    let golden = tensors(&tests::golden(name).join("golden.safetensors"));
    let (prefix, which) = if adapted { ("lora.", "adapter") } else { ("", "whole") };
    let errors = &golden_json(name, "golden.json")["errors_of_transformers"][which][dtype.name()];
    let sequences = sequences(name);
    let chunk = Chunk::pack(&sequences, (0..sequences.len()).collect(), model.pooling()).unwrap();
    let (embeddings, tape) = model.forward(&chunk, None, Saved::All).unwrap();
    let gradients = Gradients::zeros(model.flat()).unwrap();
    let direction = golden["direction"].to_dtype(DType::F32).unwrap();
    model.backward(&chunk, tape.unwrap(), &direction, None, &gradients).unwrap();
    let prefix_of_gradient = if adapted { "lora.grad.base_model.model." } else { "grad." };
    let want: Vec<Tensor> = model
        .flat()
        .entries()
        .iter()
        .map(|entry| golden[&format!("{prefix_of_gradient}{}", entry.name)].flatten_all().unwrap())
        .collect();
    for (what, got, want) in [
        ("hidden", model.hidden_states(&chunk).unwrap(), &golden[&format!("{prefix}hidden")]),
        ("embeddings", embeddings, &golden[&format!("{prefix}embeddings")]),
        ("gradients", gradients.flat().clone(), &Tensor::cat(&want, 0).unwrap()),
    ] {
        let (error, theirs) = (relative_error(&got, want), errors[what].as_f64().unwrap());
        println!("{name} {which} {dtype}: {what} error {error:.1e}, of transformers {theirs:.1e}");
        assert!(
            error <= 2.0 * theirs,
            "{name} {which} {dtype}: {what} error {error:e}, of transformers {theirs:e}"
        );
        assert!(
            error > 0.0 && error > theirs / 100.0,
            "{name} {dtype}: {what} error {error:e}: nothing was rounded"
        );
    }
}

#[test]
fn errors_in_half_precision_are_at_most_twice_those_of_transformers() {
    for name in FAMILIES {
        for dtype in [config::Dtype::Bf16, config::Dtype::F16] {
            compare_half_precision(name, false, dtype);
            compare_half_precision(name, true, dtype);
        }
    }
}

#[test]
fn models_equal_those_of_transformers() {
    FAMILIES.iter().for_each(|name| compare_with_golden(name, false));
}

#[test]
fn models_with_adapters_equal_those_of_peft() {
    FAMILIES.iter().for_each(|name| compare_with_golden(name, true));
}

/// Compares losses and gradient norms of ten steps with those of MultipleNegativesRankingLoss in
/// sentence-transformers with AdamW of torch.
fn ten_steps(name: &str, adapted: bool) {
    let golden = golden_json(name, "train.json");
    let folder = model_folder(name, adapted);
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("run");
    let mut config = tests::config(folder.path(), &tests::golden(name).join("rows.jsonl"), &output);
    config["loss"]["temperature"] = golden["temperature"].clone();
    let path = tests::write_config(place.path(), &config);
    let config = config::Config::load(&path, &[]).unwrap();
    let plan = trainer::train::plan::Plan::resolve(config).unwrap();
    Run::prepare(plan, false, World::solo()).unwrap().train().unwrap();
    let metrics = tests::metrics(&output);
    assert_eq!(metrics.len(), 10);
    for (step, line) in metrics.iter().enumerate() {
        for (ours, theirs) in [("loss", "losses"), ("grad_norm", "grad_norms")] {
            let (got, want) = (line[ours].as_f64().unwrap(), golden[theirs][step].as_f64().unwrap());
            assert!(
                (got - want).abs() < 1e-4 * want.abs(),
                "{name}: {ours} of step {}: {got}, expected {want}",
                step + 1
            );
        }
    }
}

#[test]
fn ten_steps_of_bert_have_the_losses_of_sentence_transformers() {
    ten_steps("bert", false);
}

#[test]
fn ten_steps_of_mistral_with_adapters_have_the_losses_of_peft() {
    ten_steps("mistral", true);
}
