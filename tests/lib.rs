//! Helpers for the system tests: goldens, configurations and the programs.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a helper that fails must fail the test; skipped tests print why"
)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

/// The tiny random models in tests/golden, one of each family.
pub const FAMILIES: [&str; 11] = [
    "bert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "distilbert",
    "modernbert",
    "mistral",
    "llama",
    "qwen2",
    "qwen3",
    "gemma3",
];

/// The path of a folder in tests/golden.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// Reads a JSON file of a golden folder.
pub fn golden_json(name: &str, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name).join(file)).unwrap()).unwrap()
}

/// Reads all tensors of a safetensors file.
pub fn tensors(path: &Path) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// A copy of a golden model folder, with its adapter if `adapted`.
pub fn model_folder(name: &str, adapted: bool) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    copy(&golden(name), place.path());
    if adapted {
        copy(&golden(name).join("adapter"), place.path());
    }
    place
}

/// Copies a model folder with the folders of its modules, but not that of its adapter.
pub fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_file() {
            std::fs::copy(entry.path(), target).unwrap();
        } else if entry.file_name().to_str().unwrap().starts_with(|c: char| c.is_ascii_digit()) {
            // A module of sentence-transformers.
            std::fs::create_dir_all(&target).unwrap();
            copy(&entry.path(), &target);
        }
    }
}

/// Whether a parameter's gradient is zero apart from rounding. A key bias adds the same to every score of a
/// query, unless rotary positions follow.
pub fn is_zero(parameter: &str, family: &str) -> bool {
    let rotary = ["mistral", "llama", "qwen2", "qwen3", "gemma3", "modernbert"].contains(&family);
    !rotary && ["key.bias", "attn.k.bias", "k_lin.bias"].iter().any(|name| parameter.ends_with(name))
}

/// Relative error ‖a − b‖ / ‖b‖, or ‖a‖ if b is zero.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    // On a GPU the tensors may have half precision.
    let values = |t: &Tensor| {
        t.flatten_all().unwrap().to_dtype(candle_core::DType::F32).unwrap().to_vec1::<f32>().unwrap()
    };
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let norm = |x: f64| x.sqrt();
    let difference = norm(a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum());
    let size = norm(b.iter().map(|&b| f64::from(b).powi(2)).sum());
    if size == 0.0 { difference } else { difference / size }
}

/// A command for a program of this workspace, built with the features of the tests; `examples/NAME` names
/// an example.
pub fn program(name: &str) -> Command {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        // target/PROFILE/deps/system-… → target/PROFILE
        let test = std::env::current_exe().unwrap();
        let folder = test.ancestors().nth(2).unwrap().to_owned();
        let mut build = Command::new(env!("CARGO"));
        // Variables that cargo sets for a test would rebuild `ring` and its dependents, which takes half a
        // minute.
        let of_package = |(name, _): &(OsString, _)| {
            ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix))
        };
        for (name, _) in std::env::vars_os().filter(of_package) {
            build.env_remove(name);
        }
        build.args(["build", "--quiet", "--locked", "--workspace", "--bins", "--examples"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let features = [
            (cfg!(feature = "cuda"), "trainer/cuda,launcher/cuda"),
            (cfg!(feature = "emulator"), "trainer/emulator"),
            (cfg!(feature = "mpi"), "trainer/mpi,launcher/mpi"),
        ];
        for (_, names) in features.iter().filter(|(built, _)| *built) {
            build.args(["--features", names]);
        }
        assert!(build.status().unwrap().success(), "the programs do not build");
        folder
    });
    let mut command = Command::new(folder.join(name));
    command.env_remove("RUST_LOG");
    command
}

/// The folder of all-MiniLM-L6-v2 that LODESTONE_MINILM names; without it prints that the test is skipped.
pub fn minilm() -> Option<PathBuf> {
    let folder = std::env::var_os("LODESTONE_MINILM").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: all-MiniLM-L6-v2 (LODESTONE_MINILM does not name its folder)");
    }
    folder
}

/// The standard error of a program.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A configuration that trains a model folder on `rows` in about a second, without dropout and shuffling.
pub fn config(model: &Path, rows: &Path, output: &Path) -> Value {
    json!({
        "output": output,
        "model": {"path": model, "max_query_length": 24, "max_document_length": 24, "dropout": 0.0},
        "data": {"train": [{"path": rows}], "negatives": 1, "shuffle": false, "no_duplicates": false},
        "loss": {"temperature": 0.05, "mask_known_positives": false},
        "training": {"batch_size": 4, "learning_rate": 1e-3, "decay_all": true, "chunk_tokens": 64},
        "logging": {"tensorboard": false},
    })
}

/// Writes a configuration (JSON is YAML) and returns its path.
pub fn write_config(folder: &Path, config: &Value) -> PathBuf {
    let path = folder.join("config.yaml");
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

/// Reads the lines of OUTPUT/metrics.jsonl.
pub fn metrics(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
