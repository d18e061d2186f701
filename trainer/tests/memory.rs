//! Compares the memory that a plan predicts with what a step allocates. It is a separate program because its allocator counts
//! every allocation.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failure here fails the test, which prints what it measured"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use trainer::comm::World;
use trainer::config::{self, Config, Dtype, WeightInit};
use trainer::model::{Model, ModelFolder, Options};
use trainer::system::device;
use trainer::train::checkpoint::{Snapshot, State};
use trainer::train::memory;
use trainer::train::plan::Plan;
use trainer::train::step::Stepper;

/// The system's allocator, with a count of the allocated bytes.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it came.
#[expect(unsafe_code, reason = "an allocator is an unsafe trait")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as this was called.
        unsafe { System.alloc(layout) }
    }

    // Not through `alloc`, which would write to every page.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as this was called.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as this was called.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Tests run one at a time, because each counts all allocations of the process.
static TURN: Mutex<()> = Mutex::new(());

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A model folder of the Mistral family, with the golden model's tokenizer.
fn folder(width: usize, inner: usize, layers: usize, heads: [usize; 2], words: usize) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let settings = serde_json::json!({
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": words,
    });
    std::fs::write(place.path().join("config.json"), settings.to_string()).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/mistral");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden.join(name), place.path().join(name)).unwrap();
    }
    place
}

/// The plan of a run on `rows` pairs of texts of 64 tokens, with a model of Mistral-7B's proportions, a sixteenth as wide.
fn plan(place: &Path, layers: usize, rows: usize, more: serde_json::Value) -> Plan {
    let model = folder(256, 896, layers, [8, 2], 342);
    let text =
        |n: usize| (0..100).map(|i| char::from(b'a' + ((n * 31 + i * i * 7) % 26) as u8)).collect::<String>();
    let row = |n| serde_json::json!({"query": format!("{n} {}", text(n)), "positive": format!("{n} {}", text(n + 1))});
    let lines: Vec<String> = (0..rows).map(|n| row(n).to_string()).collect();
    std::fs::write(place.join("rows.jsonl"), lines.join("\n")).unwrap();
    let dtype = if memory::on_gpu() { "bf16" } else { "f32" };
    let mut config = serde_json::json!({
        "output": place.join("run"),
        "model": {"path": model.path(), "init": "random", "max_query_length": 64, "max_document_length": 64, "dtype": dtype},
        "data": {"train": [{"path": place.join("rows.jsonl")}], "negatives": 0, "no_duplicates": false},
        "training": {"batch_size": rows, "learning_rate": 1e-4},
    });
    for (section, values) in more.as_object().unwrap() {
        for (key, value) in values.as_object().unwrap() {
            config[section][key] = value.clone();
        }
    }
    std::fs::write(place.join("run.yaml"), config.to_string()).unwrap();
    Plan::resolve(Config::load(&place.join("run.yaml"), &[]).unwrap()).unwrap()
}

/// The measured peak of two steps, and the planned one.
fn peaks(layers: usize, rows: usize, more: serde_json::Value) -> (f64, f64) {
    let place = tempfile::tempdir().unwrap();
    let plan = plan(place.path(), layers, rows, more);
    let before = LIVE.load(Ordering::Relaxed);
    let model = plan.model().unwrap();
    let mut stepper = Stepper::new(&model, &plan.step_settings(), World::solo()).unwrap();
    let mut partial =
        plan.batches(&State::default(), World::solo().shard()).unwrap().next().unwrap().unwrap();
    let sequences = partial.take_sequences();
    let batch = partial.finish(sequences);
    assert_eq!(batch.tokens(), 128 * rows, "texts of 64 tokens");
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
    stepper.step(&batch, 1).unwrap();
    // A checkpoint is written while the next step runs.
    let snapshot = Snapshot::take(&State::default(), model.flat(), &stepper.optimizer, false).unwrap();
    let apart = if memory::on_gpu() { 12 * model.flat().len() } else { 0 };
    stepper.step(&batch, 2).unwrap();
    drop(snapshot);
    let measured = PEAK.load(Ordering::Relaxed) - before - apart;
    (measured as f64, plan.cost.peak_bytes() as f64)
}

#[test]
fn a_run_takes_what_its_plan_says_within_a_tenth() {
    let _turn = TURN.lock().unwrap();
    // The emulator of a GPU takes a minute for a thousand tokens.
    let (layers, rows) = if device::current().is_ok() && memory::on_gpu() { (4, 8) } else { (12, 64) };
    let chunk = 32 * rows;
    let lora = json!({"rank": 8, "dropout": 0.1});
    for (name, more) in [
        ("adapters", json!({"lora": lora, "training": {"chunk_tokens": chunk, "activation_memory": 0}})),
        (
            "adapters, inputs kept",
            json!({"lora": lora, "training": {"chunk_tokens": chunk, "activation_memory": rows << 21}}),
        ),
        (
            "adapters, all tapes kept",
            json!({"lora": lora, "training": {"chunk_tokens": chunk, "activation_memory": rows << 25}}),
        ),
        ("adapters, as many as usual", json!({"lora": lora, "training": {"chunk_tokens": chunk}})),
        (
            "adapters, by sequences",
            json!({"lora": lora, "training": {"chunk_size": chunk / 64, "activation_memory": 0}}),
        ),
        ("all parameters", json!({"training": {"chunk_tokens": chunk, "activation_memory": 0}})),
        (
            "all parameters, all tapes kept",
            json!({"training": {"chunk_tokens": chunk, "activation_memory": rows << 25}}),
        ),
    ] {
        let (measured, planned) = peaks(layers, rows, more);
        let ratio = measured / planned;
        println!("{name}: {:.1} MiB, {:.1} planned", measured / 1048576.0, planned / 1048576.0);
        assert!((0.9..1.1).contains(&ratio), "{name}: {measured} bytes, {planned} planned");
    }
}

/// The test runs on a CPU, where bf16 values take 4 bytes; on a GPU they take 2, which `halves` accounts for.
#[test]
fn a_chunk_of_mistral_7b_fits_80_gb_beside_its_weights() {
    let _turn = TURN.lock().unwrap();
    let place = folder(4096, 14336, 32, [32, 8], 32000);
    let lora = config::Lora::default();
    let options = Options {
        model: config::Model { init: WeightInit::Random, dtype: Dtype::Bf16, ..config::Model::default() },
        lora: Some(&lora),
        trained: true,
        seed: 1,
        shapes_only: true,
    };
    let model = Model::open(ModelFolder::open(place.path()).unwrap(), &options).unwrap();
    assert_eq!(model.layers(), 32);
    let halves = model.element_bytes() as u64 / 2;
    let weights = 2 * (model.parameter_count() - model.flat().len()) as u64 + 16 * model.flat().len() as u64;
    // 1024 rows of 7 texts; embeddings are f32 on a GPU, too.
    let embeddings = memory::step_bytes(&model, 0, 7 << 10, 16_384, 0);
    let step = memory::step_bytes(&model, 1 << 20, 0, 16_384, 0) / halves + embeddings;
    assert!((14_000_000_000..15_000_000_000).contains(&weights), "{weights}");
    assert!((48_000_000_000..56_000_000_000).contains(&step), "{step}");
    assert!(
        weights + step < 72_000_000_000,
        "{} bytes of 80 GB, of which the driver and the workspaces of products also need some",
        weights + step
    );
}
