//! Trains a model on pairs in memory and exports it.
//!
//! ```text
//! cargo run --release --example train_in_memory -- MODEL OUTPUT
//! ```
//!
//! Each step uses all pairs: the positives of the other queries are the negatives of a query (InfoNCE).
//! `trainer train` does the same with batches from files, evaluation and checkpoints.

#![expect(clippy::print_stdout, reason = "an example prints its results")]

use std::path::Path;

use serde_json::Map;
use trainer::Result;
use trainer::comm::World;
use trainer::config::Config;
use trainer::data::batch::{Batch, CsrIndices, Cursor, LossTable, RowId, Sequence};
use trainer::eval::embed::LoadedModel;
use trainer::export::{self, TrainedRun};
use trainer::model::Options;
use trainer::model::chunk::Limit;
use trainer::train::gradcache::Budget;
use trainer::train::setup::StepSettings;
use trainer::train::step::Stepper;

const PAIRS: [(&str, &str); 4] = [
    ("At which temperature does iron melt?", "The melting point of iron is 1538 °C."),
    ("Where does the Danube end?", "The Danube flows into the Black Sea."),
    ("Who discovered radium?", "Radium was discovered by Marie and Pierre Curie."),
    ("How high is the Matterhorn?", "The Matterhorn has a height of 4478 m."),
];
const STEPS: u64 = 20;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(output)) = (arguments.next(), arguments.next()) else {
        println!("train_in_memory MODEL OUTPUT");
        return Ok(());
    };
    let losses = train(&model, Path::new(&output))?;
    for (step, loss) in (1..).zip(losses) {
        println!("step {step}: loss {loss:.4}");
    }
    Ok(())
}

/// Trains all parameters of `model`, writes it to `output`, and returns the loss of each step.
fn train(model: &str, output: &Path) -> Result<Vec<f64>> {
    let mut config = Config::default();
    config.model.path = model.to_owned();
    config.training.learning_rate = 1e-3;
    let options =
        Options { model: config.model.clone(), trained: true, seed: config.seed, ..Options::default() };
    let mut loaded = LoadedModel::open(model, &options)?;
    let batch = batch(&loaded)?;
    let settings = StepSettings {
        training: &config.training,
        loss: &config.loss,
        seed: config.seed,
        steps: STEPS,
        // Chunks of 2048 tokens; up to 1 GB of activations are kept for the backward pass.
        budget: Budget { chunk: Limit::Tokens(2048), activation_memory: 1 << 30 },
    };
    let mut stepper = Stepper::new(&loaded.model, &settings, World::solo())?;
    let losses = (1..=STEPS).map(|step| Ok(stepper.step(&batch, step)?.loss)).collect::<Result<_>>()?;
    let no_scores = Map::new();
    let run = TrainedRun { config: &config, step: STEPS, before: &no_scores, after: &no_scores };
    export::write_run(&mut loaded.model, &run, export::Options::default(), output)?;
    Ok(losses)
}

/// Tokenises the pairs and lists what the loss compares: query i with all positives, of which i is its own.
fn batch(loaded: &LoadedModel) -> Result<Batch> {
    let folder = loaded.model.folder();
    let max_length = loaded.model.max_length();
    let tokenise = |texts: [&str; PAIRS.len()], prompt: &str| -> Result<Vec<Sequence>> {
        loaded.tokenizer.encode(&texts, prompt, max_length, folder.include_prompt)
    };
    let mut sequences = tokenise(PAIRS.map(|(query, _)| query), folder.query_prompt())?;
    sequences.extend(tokenise(PAIRS.map(|(_, positive)| positive), folder.document_prompt())?);
    let rows = PAIRS.len() as u32;
    let table = LossTable {
        rows: (0..rows).collect(),
        queries: (0..rows).collect(),
        candidates: (rows..2 * rows).collect(),
        positives: (0..rows).collect(),
        excluded: CsrIndices { offsets: vec![0; PAIRS.len() + 1], columns: vec![] },
        own: CsrIndices { offsets: (0..=rows).collect(), columns: (0..rows).collect() },
        ..LossTable::default()
    };
    let ids = (0..u64::from(rows)).map(|row| RowId { dataset: 0, row });
    Ok(Batch { sequences, tables: vec![table], rows: ids.collect(), cursor: Cursor::default(), epoch: 1.0 })
}

#[test]
fn the_loss_falls_and_the_exported_model_opens() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let losses = train(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert"), &output).unwrap();
    assert!(losses[STEPS as usize - 1] < 0.5 * losses[0], "{losses:?}");
    assert!(LoadedModel::open(output.to_str().unwrap(), &Options::default()).is_ok());
}
