//! What the plan says a step takes, against what it allocates. A program of its own, because it counts every allocation.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::adamw::AdamW;
use trainer::comm::World;
use trainer::config::{self, Init};
use trainer::data::batch::{Batch, Cursor, Lists, RowId, Sequence, Table};
use trainer::gradcache::Budget;
use trainer::loss::Losses;
use trainer::memory;
use trainer::model::chunk::Limit;
use trainer::model::params::Gradients;
use trainer::model::{Folder, Model, Options};
use trainer::optimizer::Optimizer;
use trainer::schedule::Schedule;
use trainer::step::Stepper;

/// The system's allocator, counting.
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

    // Not by `alloc`, which would touch every page.
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

/// Tests take turns: what one allocates, another would count.
static TURN: Mutex<()> = Mutex::new(());

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Mistral-7B's proportions, a sixteenth as wide, and 12 of its layers.
fn model() -> (tempfile::TempDir, Model) {
    let place = tempfile::tempdir().unwrap();
    let settings = serde_json::json!({
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 896,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 1000,
    });
    std::fs::write(place.path().join("config.json"), settings.to_string()).unwrap();
    let lora = config::Lora::default();
    let options = Options {
        model: config::Model { init: Init::Random, ..config::Model::default() },
        lora: Some(&lora),
        trained: true,
        seed: 1,
        dry: false,
    };
    let model = Model::open(Folder::open(place.path()).unwrap(), &options).unwrap();
    (place, model)
}

/// `rows` pairs of texts of 64 tokens.
fn batch(rows: usize) -> Batch {
    let sequences: Vec<Sequence> = (0..2 * rows as u32)
        .map(|n| Sequence { ids: (0..64).map(|t| (n * 64 + t) * 7919 % 1000).collect(), skip: 0 })
        .collect();
    let none = Lists { offsets: vec![0; rows + 1], columns: Vec::new() };
    let numbers = |range: std::ops::Range<u32>| range.collect::<Vec<u32>>();
    let rows = rows as u32;
    Batch {
        sequences,
        tables: vec![Table {
            rows: numbers(0..rows),
            queries: numbers(0..rows),
            candidates: numbers(rows..2 * rows),
            positives: numbers(0..rows),
            excluded: none.clone(),
            own: none,
            ..Table::default()
        }],
        rows: (0..rows.into()).map(|row| RowId { dataset: 0, row }).collect(),
        cursor: Cursor::default(),
        epoch: 0.0,
    }
}

#[test]
fn a_step_takes_what_the_plan_says_within_a_tenth() {
    let _turn = TURN.lock().unwrap();
    let (_place, model) = model();
    for (rows, chunk) in [(16, 2048), (64, 2048), (32, 4096)] {
        let batch = batch(rows);
        let before = LIVE.load(Ordering::Relaxed);
        let rule = AdamW { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let mut stepper = Stepper {
            model: &model,
            gradients: Gradients::zeros(model.flat()).unwrap(),
            optimizer: Optimizer::new(model.flat(), rule, false, Some(1.0)).unwrap(),
            losses: Losses::default(),
            schedule: Schedule { shape: config::Schedule::Constant, peak: 1e-4, warmup: 0, total: 2 },
            budget: Budget { chunk: Limit::Tokens(chunk), tapes: 0 },
            seed: 1,
            world: World::solo(),
        };
        PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
        stepper.step(&batch, 1).unwrap();
        let measured = (PEAK.load(Ordering::Relaxed) - before) as f64;
        let predicted = (12 * model.flat().len()) as f64 + memory::of_chunk(&model, chunk) as f64;
        let ratio = measured / predicted;
        assert!(
            (0.9..1.1).contains(&ratio),
            "{rows} rows in chunks of {chunk}: {measured} bytes, {predicted} planned"
        );
    }
}

#[test]
fn a_chunk_of_mistral_7b_fits_80_gb_beside_its_weights() {
    let _turn = TURN.lock().unwrap();
    let place = tempfile::tempdir().unwrap();
    let settings = serde_json::json!({
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 32000,
    });
    std::fs::write(place.path().join("config.json"), settings.to_string()).unwrap();
    let lora = config::Lora::default();
    let options = Options {
        model: config::Model { init: Init::Random, ..config::Model::default() },
        lora: Some(&lora),
        trained: true,
        seed: 1,
        dry: true,
    };
    let model = Model::open(Folder::open(place.path()).unwrap(), &options).unwrap();
    assert_eq!(model.layers(), 32);
    let weights = 2 * model.elements() as u64 + 16 * model.flat().len() as u64;
    // Here, on a CPU, elements are of four bytes.
    let all = weights + memory::of_chunk(&model, 16_384) / 2;
    assert!((14_000_000_000..15_500_000_000).contains(&weights), "{weights}");
    assert!(all < 72_000_000_000, "{all} bytes, of 80 GB, whose driver and products want some too");
}
