//! Measures one optimizer step in the shape of the zeta recipe on a GPU: Mistral-7B with random weights, LoRA
//! of rank 8 with dropout on all linear layers, 1024 queries and 6144 documents with the lengths of the
//! recipe. Uses `train/step.rs`.
//!
//! ```text
//! zeta [layers] [rows] [chunk tokens] [dtype]     default: 32 1024 16384 bf16
//! ```
//!
//! A smaller step runs first. Prints seconds, tokens per second, useful FLOP/s (6 per matrix parameter and
//! token), and peak memory, which must be within 10 % of what the plan predicts.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark reports")]

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use trainer::comm::World;
use trainer::config::{self, Dtype, WeightInit};
use trainer::data::batch::{Batch, CsrIndices, Cursor, LossTable, RowId, Sequence};
use trainer::model::chunk::Limit;
use trainer::model::{Model, ModelFolder, Options};
use trainer::train::gradcache::Budget;
use trainer::train::memory;
use trainer::train::setup::StepSettings;
use trainer::train::step::Stepper;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Documents per row: a positive and five negatives.
const DOCUMENTS: usize = 6;

fn main() -> ExitCode {
    match measure() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<()> {
    // `cargo bench` adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let number = |at: usize, default: usize| words.get(at).map_or(Ok(default), |word| word.parse::<usize>());
    let (layers, rows, chunk) = (number(0, 32)?, number(1, 1024)?, number(2, 16_384)?);
    let dtype = match words.get(3).map(String::as_str) {
        None | Some("bf16") => Dtype::Bf16,
        Some("f16") => Dtype::F16,
        Some("f32") => Dtype::F32,
        Some(other) => return Err(format!("dtype `{other}`, expected f32, bf16 or f16").into()),
    };
    let device = trainer::system::device::current()?;
    if !device.is_cuda() {
        return Err("this benchmark needs a GPU, and there is none".into());
    }

    let place = tempfile::tempdir()?;
    let settings = serde_json::json!({
        "architectures": ["MistralModel"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 4096, "sliding_window": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "vocab_size": 32000, "initializer_range": 0.02,
    });
    std::fs::write(place.path().join("config.json"), settings.to_string())?;
    let lora = config::Lora { alpha: Some(32.0), dropout: Some(0.1), ..config::Lora::default() };
    let options = Options {
        model: config::Model {
            init: WeightInit::Random,
            dtype,
            max_query_length: Some(192),
            max_document_length: Some(512),
            ..config::Model::default()
        },
        lora: Some(&lora),
        trained: true,
        seed: 42,
        shapes_only: false,
    };
    let start = Instant::now();
    let model = Model::open(ModelFolder::open(place.path())?, &options)?;
    device.synchronize()?;
    let (weights, _) = kernels::memory_usage(&device)?;
    println!(
        "Mistral-7B's shape, {layers} layers: {:.2} G parameters, {} on the GPU, drawn in {:.0} s",
        model.parameter_count() as f64 / 1e9,
        memory::format_bytes(weights),
        start.elapsed().as_secs_f64()
    );

    let batch = batch(rows)?;
    let budget = Budget { chunk: Limit::Tokens(chunk), activation_memory: 0 };
    let activations =
        memory::step_bytes(&model, batch.tokens(), batch.sequences.len(), chunk, budget.activation_memory);
    // Gradients and moments are added to the weights.
    let predicted = weights + 12 * model.flat().len() as u64 + activations;
    let training = config::Training {
        learning_rate: 1e-4,
        schedule: config::ScheduleKind::Constant,
        warmup_steps: Some(0),
        ..config::Training::default()
    };
    let loss = config::Loss { temperature: 0.02, ..config::Loss::default() };
    let settings = StepSettings { training: &training, loss: &loss, seed: 42, steps: 2, budget };
    let mut stepper = Stepper::new(&model, &settings, World::solo())?;
    // The first step also loads kernels, builds tables and takes memory from the driver.
    stepper.step(&self::batch(rows.div_ceil(32))?, 1)?;
    device.synchronize()?;
    kernels::reset_peak_memory(&device)?;
    let start = Instant::now();
    let outcome = stepper.step(&batch, 2)?;
    device.synchronize()?;
    let seconds = start.elapsed().as_secs_f64();
    let (_, peak) = kernels::memory_usage(&device)?;

    let tokens = batch.tokens() as f64;
    // Query, key, value, output; gate, up, down.
    let per_layer = 4096.0 * (4096.0 * 2.0 + 1024.0 * 2.0) + 3.0 * 4096.0 * 14336.0;
    let useful = 6.0 * per_layer * layers as f64 * tokens;
    println!("step       {seconds:.2} s, {rows} rows, {tokens} tokens in chunks of {chunk}");
    println!("rate       {:.0} tokens/s, {:.0} useful TFLOP/s", tokens / seconds, useful / seconds / 1e12);
    println!(
        "memory     {} at most, {} predicted",
        memory::format_bytes(peak),
        memory::format_bytes(predicted)
    );
    println!("loss       {:.4}, norm of the gradient {:.4}", outcome.loss, outcome.grad_norm);
    println!("epoch      {:.1} h for one million rows at this rate", seconds * 1e6 / rows as f64 / 3600.0);
    let ratio = peak as f64 / predicted as f64;
    if !(0.9..1.1).contains(&ratio) {
        return Err(format!("peak memory is {ratio:.2} of the prediction, expected 0.9 to 1.1").into());
    }
    Ok(())
}

/// Returns the first rows of a batch of the recipe: random tokens with the lengths of its texts.
fn batch(rows: usize) -> Result<Batch> {
    let lengths: serde_json::Value =
        serde_json::from_str(include_str!("../../kernels/benches/lengths.json"))?;
    let of = |name: &str, count: usize| -> Result<Vec<usize>> {
        let all = lengths[name].as_array().ok_or("lengths.json lacks a list")?;
        let some = all.iter().cycle().take(count).filter_map(serde_json::Value::as_u64);
        Ok(some.map(|length| length as usize).collect())
    };
    let lengths = [of("queries", rows)?, of("documents", DOCUMENTS * rows)?].concat();
    let mut state = 1u32;
    let mut token = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % 32_000
    };
    let sequences: Vec<Sequence> =
        lengths.iter().map(|&n| Sequence { ids: (0..n).map(|_| token()).collect(), skip: 0 }).collect();
    let numbers = |range: std::ops::Range<usize>| range.map(|n| n as u32).collect::<Vec<u32>>();
    let none = CsrIndices { offsets: vec![0; rows + 1], columns: Vec::new() };
    let table = LossTable {
        rows: numbers(0..rows),
        queries: numbers(0..rows),
        candidates: numbers(rows..sequences.len()),
        positives: numbers(0..rows),
        excluded: none.clone(),
        own: none,
        ..LossTable::default()
    };
    let rows = (0..rows as u64).map(|row| RowId { dataset: 0, row }).collect();
    Ok(Batch { sequences, tables: vec![table], rows, cursor: Cursor::default(), epoch: 0.0 })
}
