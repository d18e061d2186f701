//! A run as a GPU computes it, by the kernels' own source on the emulator, beside the same run on a CPU: through plan, step,
//! GradCache, model, loss and AdamW.

use serde_json::{Value, json};
use tests::{config, golden, metrics, program, stderr, write_config};

/// Loss and norm of the gradient, step by step.
fn run(device: &str, name: &str, change: impl Fn(&mut Value)) -> Vec<[f64; 2]> {
    let place = tempfile::tempdir().unwrap();
    let mut config = config(&golden(name), &golden(name).join("rows.jsonl"), &place.path().join("run"));
    config["model"]["dropout"] = 0.1.into();
    // Chunks are encoded twice, and gradients are longer than this.
    config["training"]["activation_memory"] = 0.into();
    config["training"]["max_grad_norm"] = 0.01.into();
    config["training"]["max_steps"] = 2.into();
    change(&mut config);
    let mut command = program("trainer");
    command.arg("train").arg(write_config(place.path(), &config)).env("LODESTONE_DEVICE", device);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let lines = metrics(&place.path().join("run"));
    lines.iter().map(|line| ["loss", "grad_norm"].map(|of| line[of].as_f64().unwrap())).collect()
}

#[test]
fn runs_have_the_losses_and_norms_of_a_cpu() {
    if !cfg!(feature = "emulator") {
        return println!("skipped: runs on the emulator, which this build has not (--features emulator)");
    }
    // Sums in another order, through two layers; in half precision some roundings fall to the other side.
    for (dtype, tolerance) in [("f32", 1e-4), ("bf16", 3e-2), ("f16", 3e-3)] {
        for (name, lora) in [("bert", Value::Null), ("mistral", json!({"rank": 4, "dropout": 0.1}))] {
            let change = |config: &mut Value| {
                config["model"]["dtype"] = dtype.into();
                config["lora"] = lora.clone();
            };
            let (emulated, cpu) = (run("emulator", name, change), run("cpu", name, change));
            assert_eq!(cpu.len(), 2);
            for (step, (got, want)) in emulated.iter().zip(&cpu).enumerate() {
                println!("{name} {dtype}, step {}: {got:?}, on a CPU {want:?}", step + 1);
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() < tolerance * want.abs(), "{name} {dtype}: {got} and {want}");
                }
            }
        }
    }
}
