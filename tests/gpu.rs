//! A GPU that is asked for and cannot be had, and a program for GPUs where there is none.

use std::path::Path;
use std::process::Output;

use tests::{config, golden, metrics, program, stderr, write_config};

fn train(place: &Path, device: Option<&str>) -> Output {
    let config = config(&golden("bert"), &golden("bert").join("rows.jsonl"), &place.join("run"));
    let mut command = program("trainer");
    command.args(["train"]).arg(write_config(place, &config));
    // As on a machine without a GPU, whatever this one has.
    command.env("CUDA_VISIBLE_DEVICES", "").env_remove("LODESTONE_DEVICE");
    device.map(|device| command.env("LODESTONE_DEVICE", device));
    command.output().unwrap()
}

#[test]
fn a_gpu_that_cannot_be_had_is_said_before_anything_is_written() {
    for (device, word) in
        [("cuda", "LODESTONE_DEVICE is `cuda`, but "), ("tpu", "`tpu`, expected cpu or cuda")]
    {
        let place = tempfile::tempdir().unwrap();
        let output = train(place.path(), Some(device));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(word), "{said}");
        assert_eq!(said.matches("ERROR").count() + said.matches("error:").count(), 1, "{said}");
        assert!(!place.path().join("run").exists());
    }
}

#[test]
fn a_program_for_gpus_trains_where_there_is_none() {
    if !cfg!(feature = "cuda") {
        return println!(
            "skipped: a program for GPUs without one, because this build is not for GPUs (--features cuda)"
        );
    }
    let place = tempfile::tempdir().unwrap();
    let output = train(place.path(), None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("no GPU can be used, so this runs on the CPU"), "{}", stderr(&output));
    let of_gpu = metrics(&place.path().join("run"));
    let place = tempfile::tempdir().unwrap();
    assert!(train(place.path(), Some("cpu")).status.success());
    let losses =
        |lines: &[serde_json::Value]| lines.iter().map(|line| line["loss"].clone()).collect::<Vec<_>>();
    assert_eq!(losses(&of_gpu), losses(&metrics(&place.path().join("run"))));
}
