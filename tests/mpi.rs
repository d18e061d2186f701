//! A run under mpirun has the losses of a run on one rank.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use tests::{golden, metrics, program, stderr, write_config};

/// The command `mpirun -np RANKS trainer`, or why it cannot run here.
fn mpirun(ranks: u32) -> Result<Command, &'static str> {
    if !cfg!(feature = "mpi") {
        return Err("this build has no MPI (cargo test --features mpi)");
    }
    let found = Command::new("mpirun").arg("--version").output();
    if !found.is_ok_and(|output| output.status.success()) {
        return Err("there is no mpirun (Debian: openmpi-bin)");
    }
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-np", &ranks.to_string()]);
    command.arg(program("trainer").get_program());
    Ok(command)
}

/// A configuration of fifty steps with dropout, hard negatives and masks.
fn config(place: &Path) -> std::path::PathBuf {
    std::fs::create_dir(place).unwrap();
    let mut config = tests::config(&golden("bert"), &golden("bert").join("rows.jsonl"), &place.join("out"));
    config["model"]["dropout"] = json!(0.1);
    config["lora"] = json!({"rank": 4, "alpha": 8, "dropout": 0.1});
    config["data"] = json!({"train": [{"path": golden("bert").join("rows.jsonl")}], "negatives": 2});
    config["loss"] = json!({"temperature": 0.05});
    config["training"] = json!({"batch_size": 4, "epochs": 5, "learning_rate": 1e-3, "chunk_tokens": 64});
    write_config(place, &config)
}

fn losses(config: &Path) -> Vec<f64> {
    metrics(&config.with_file_name("out")).iter().filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
fn ranks_of_mpirun_have_the_losses_of_one() {
    let place = tempfile::tempdir().unwrap();
    let one = config(&place.path().join("one"));
    assert!(program("trainer").args(["train", "--quiet"]).arg(&one).status().unwrap().success());
    for ranks in [2, 3, 4] {
        let mut command = match mpirun(ranks) {
            Ok(command) => command,
            Err(why) => return println!("skipped: ranks of mpirun, because {why}"),
        };
        let some = config(&place.path().join(ranks.to_string()));
        let output = command.args(["train", "--quiet"]).arg(&some).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let (some, one) = (losses(&some), losses(&one));
        assert_eq!((some.len(), one.len()), (50, 50));
        for (a, b) in some.iter().zip(&one) {
            assert!((a - b).abs() < 1e-5 * b.abs().max(0.1), "{ranks} ranks: {a} and {b}");
        }
    }
}

#[test]
fn a_wrong_configuration_is_status_2_under_mpirun_too() {
    let mut command = match mpirun(2) {
        Ok(command) => command,
        Err(why) => return println!("skipped: ranks of mpirun, because {why}"),
    };
    let output = command.args(["train", "/no/such/config.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn a_build_without_mpi_refuses_to_run_under_mpirun() {
    if cfg!(feature = "mpi") {
        return println!("skipped: a build without MPI, because this one has it");
    }
    let mut command = program("trainer");
    command.args(["train", "/no/such/config.yaml"]);
    let output = command.env("OMPI_COMM_WORLD_RANK", "1").env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--features mpi"), "{}", stderr(&output));
}
