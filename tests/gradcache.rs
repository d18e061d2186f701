//! Chunks, order and saved activations do not change losses, gradients or embeddings.

use candle_core::Tensor;
use tests::{FAMILIES, model_folder, relative_error};
use trainer::comm::World;
use trainer::config;
use trainer::data::batch::{Batch, CsrIndices, Cursor, LossTable, RowId, Sequence};
use trainer::model::chunk::Limit;
use trainer::model::pass::Saved;
use trainer::model::{Model, ModelFolder, Options};
use trainer::train::gradcache::Budget;
use trainer::train::setup::StepSettings;
use trainer::train::step::Stepper;

const ROWS: usize = 12;

pub(crate) fn model(name: &str, adapted: bool, dropout: f64) -> (tempfile::TempDir, Model) {
    let folder = model_folder(name, false);
    let section = config::Model { dropout: Some(dropout), ..config::Model::default() };
    let lora = config::Lora { dropout: Some(dropout), ..config::Lora::default() };
    let lora = adapted.then_some(&lora);
    let options = Options { model: section, lora, trained: true, seed: 7, shapes_only: false };
    let model = Model::open(ModelFolder::open(folder.path()).unwrap(), &options).unwrap();
    if adapted {
        // B starts at zero, so A would have no gradient.
        let random = Tensor::rand(-0.1f32, 0.1, model.flat().len(), &candle_core::Device::Cpu).unwrap();
        model.flat().values().slice_set(&random, 0, 0).unwrap();
    }
    (folder, model)
}

/// A batch of rows with a query, a positive and a negative, of 1 to 60 tokens; its sequences are rotated by `turn`.
pub(crate) fn batch(turn: usize) -> Batch {
    let length = |i: usize| 1 + (i * i * 7 + i) % 60;
    let sequence = |i: usize| Sequence {
        ids: (0..length(i)).map(|t| 5 + ((t * 31 + i * 17) % 80) as u32).collect(),
        skip: 0,
    };
    let rotated: Vec<usize> = (0..3 * ROWS).map(|i| (i + turn) % (3 * ROWS)).collect();
    let place = |i: usize| rotated.iter().position(|&j| j == i).unwrap() as u32;
    let table = LossTable {
        rows: (0..ROWS as u32).collect(),
        queries: (0..ROWS).map(place).collect(),
        candidates: (ROWS..3 * ROWS).map(place).collect(),
        positives: (0..ROWS as u32).collect(),
        excluded: CsrIndices { offsets: vec![0; ROWS + 1], columns: vec![] },
        own: CsrIndices {
            offsets: (0..=ROWS as u32).map(|i| 2 * i).collect(),
            columns: (0..ROWS as u32).flat_map(|i| [i, i + ROWS as u32]).collect(),
        },
        ..LossTable::default()
    };
    Batch {
        sequences: rotated.iter().map(|&i| sequence(i)).collect(),
        tables: vec![table],
        rows: (0..ROWS as u64).map(|row| RowId { dataset: 0, row }).collect(),
        cursor: Cursor::default(),
        epoch: 1.0,
    }
}

/// The loss of each row and the gradient of one step.
pub(crate) fn step(
    model: &Model,
    batch: &Batch,
    chunk: Limit,
    activation_memory: u64,
    loss: &config::Loss,
) -> (Vec<f32>, Tensor) {
    let training = config::Training {
        learning_rate: 0.0,
        schedule: config::ScheduleKind::Constant,
        warmup_steps: Some(0),
        weight_decay: 0.0,
        max_grad_norm: 0.0,
        ..config::Training::default()
    };
    let budget = Budget { chunk, activation_memory };
    let settings = StepSettings { training: &training, loss, seed: 3, steps: 1, budget };
    let mut stepper = Stepper::new(model, &settings, World::solo()).unwrap();
    let outcome = stepper.step(batch, 1).unwrap();
    assert!(outcome.applied);
    (outcome.losses, stepper.gradients.flat().clone())
}

pub(crate) fn info_nce() -> config::Loss {
    config::Loss { temperature: 0.05, ..config::Loss::default() }
}

fn compare(a: &(Vec<f32>, Tensor), b: &(Vec<f32>, Tensor), what: &str) {
    for (a, b) in a.0.iter().zip(&b.0) {
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{what}: losses {a} and {b}");
    }
    let error = relative_error(&a.1, &b.1);
    assert!(error < 1e-5, "{what}: gradients differ by {error:e}");
}

#[test]
fn chunks_do_not_change_losses_or_gradients() {
    for (name, adapted) in FAMILIES.iter().flat_map(|name| [(name, false), (name, true)]) {
        let (_folder, model) = model(name, adapted, 0.1);
        let batch = batch(0);
        let whole = step(&model, &batch, Limit::Tokens(usize::MAX), u64::MAX, &info_nce());
        for limit in [Limit::Tokens(1), Limit::Tokens(256), Limit::Tokens(2048), Limit::Sequences(5)] {
            compare(&step(&model, &batch, limit, 0, &info_nce()), &whole, &format!("{name} {limit:?}"));
        }
    }
}

#[test]
fn tapes_kept_or_computed_twice_give_the_same_bits() {
    for (name, adapted) in FAMILIES.iter().flat_map(|name| [(name, false), (name, true)]) {
        let (_folder, model) = model(name, adapted, 0.1);
        let batch = batch(0);
        let tokens: usize = batch.sequences.iter().map(|sequence| sequence.ids.len()).sum();
        let [inputs, whole] =
            [Saved::LayerInputs, Saved::All].map(|keep| model.tape_bytes_per_token(keep) * tokens);
        let bits = |activation_memory| {
            let (losses, gradient) = step(&model, &batch, Limit::Tokens(128), activation_memory, &info_nce());
            (losses, gradient.to_vec1::<f32>().unwrap())
        };
        assert_eq!(bits(0), bits(u64::MAX), "{name}");
        for some in [inputs / 2, inputs, (inputs + whole) / 2] {
            assert_eq!(bits(0), bits(some as u64), "{name}, {some} bytes");
        }
    }
}

#[test]
fn the_order_of_a_batch_does_not_change_its_gradient() {
    for name in FAMILIES {
        // Dropout masks depend on a sequence's number in the batch, so the order may only change without dropout.
        let (_folder, model) = model(name, false, 0.0);
        let straight = step(&model, &batch(0), Limit::Tokens(200), u64::MAX, &info_nce());
        compare(&step(&model, &batch(17), Limit::Tokens(200), u64::MAX, &info_nce()), &straight, name);
    }
}

#[test]
fn every_trained_parameter_receives_a_gradient() {
    for (name, adapted) in FAMILIES.iter().flat_map(|name| [(name, false), (name, true)]) {
        let (_folder, model) = model(name, adapted, 0.0);
        let (_, gradient) = step(&model, &batch(0), Limit::Tokens(512), u64::MAX, &info_nce());
        for named in model.flat().named(&gradient) {
            let (parameter, gradient) = named.unwrap();
            let any = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().any(|&g| g != 0.0);
            assert!(any, "{name}: {parameter} has no gradient");
        }
    }
}

#[test]
fn small_gradients_survive_half_precision() {
    // The gradients are about 1e-8 per token, and the smallest number of f16 is 6e-8.
    let loss = config::Loss { temperature: 1e4, ..info_nce() };
    for (name, adapted) in [("bert", false), ("mistral", true)] {
        let gradient = |dtype| {
            let folder = model_folder(name, adapted);
            let section = config::Model { dropout: Some(0.0), dtype, ..config::Model::default() };
            let options = Options { model: section, trained: true, ..Options::default() };
            let model = Model::open(ModelFolder::open(folder.path()).unwrap(), &options).unwrap();
            step(&model, &batch(0), Limit::Tokens(300), 0, &loss).1
        };
        let want = gradient(config::Dtype::F32);
        for (dtype, most) in [(config::Dtype::F16, 0.02), (config::Dtype::Bf16, 0.1)] {
            let error = relative_error(&gradient(dtype), &want);
            assert!(error < most, "{name} {dtype}: {error:e}");
        }
    }
}

#[test]
fn a_text_embeds_alike_alone_and_in_any_chunk() {
    for name in FAMILIES {
        let (_folder, model) = model(name, false, 0.1);
        let sequences = batch(0).sequences;
        let alone: Vec<Tensor> =
            sequences.iter().map(|s| model.embed(std::slice::from_ref(s), usize::MAX).unwrap()).collect();
        let alone = Tensor::cat(&alone, 0).unwrap();
        for tokens in [1, 100, 333, usize::MAX] {
            let together = model.embed(&sequences, tokens).unwrap();
            let error = relative_error(&together, &alone);
            assert!(error < 1e-6, "{name} in chunks of {tokens}: {error:e}");
        }
    }
}

#[test]
fn the_loss_without_in_batch_negatives_is_that_of_each_row_alone() {
    let (_folder, model) = model("bert", false, 0.0);
    let mut batch = batch(0);
    let loss = config::Loss { in_batch_negatives: false, ..info_nce() };
    let together = step(&model, &batch, Limit::Tokens(512), u64::MAX, &loss);
    for i in 0..ROWS {
        let candidates = &batch.tables[0].candidates;
        let table = LossTable {
            rows: vec![0],
            queries: vec![batch.tables[0].queries[i]],
            candidates: vec![candidates[i], candidates[i + ROWS]],
            positives: vec![0],
            excluded: CsrIndices { offsets: vec![0, 0], columns: vec![] },
            own: CsrIndices { offsets: vec![0, 2], columns: vec![0, 1] },
            ..LossTable::default()
        };
        let alone = Batch { tables: vec![table], rows: vec![batch.rows[i]], ..batch.clone() };
        let (losses, _) = step(&model, &alone, Limit::Tokens(512), u64::MAX, &info_nce());
        assert!((losses[0] - together.0[i]).abs() < 1e-5, "row {i}: {} and {}", losses[0], together.0[i]);
    }
    batch.rows.truncate(ROWS);
}

#[test]
fn the_symmetric_loss_is_the_mean_of_both_directions() {
    let (_folder, model) = model("bert", false, 0.0);
    let mut forth = batch(0);
    // Positives only, so that both directions have the same shape.
    let table = &mut forth.tables[0];
    table.candidates.truncate(ROWS);
    table.own = CsrIndices { offsets: (0..=ROWS as u32).collect(), columns: (0..ROWS as u32).collect() };
    let turned =
        LossTable { queries: table.candidates.clone(), candidates: table.queries.clone(), ..table.clone() };
    let back = Batch { tables: vec![turned], ..forth.clone() };
    let run = |batch: &Batch, symmetric| {
        step(&model, batch, Limit::Tokens(512), u64::MAX, &config::Loss { symmetric, ..info_nce() })
    };
    let (both, forth, back) = (run(&forth, true), run(&forth, false), run(&back, false));
    for i in 0..ROWS {
        assert!((both.0[i] - (forth.0[i] + back.0[i]) / 2.0).abs() < 1e-5);
    }
    let mean = ((&forth.1 + &back.1).unwrap() / 2.0).unwrap();
    assert!(relative_error(&both.1, &mean) < 1e-5);
}
