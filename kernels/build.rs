//! With the feature `cuda`: compiles the .cu files with nvcc, for A100 (sm_80) and H100 (sm_90). Does nothing without it.
//!
//! What ptxas says of registers and spills is kept as `ptxas.txt` in the target folder; a kernel that spills fails the build.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::{env, fs};

const STEMS: [&str; 10] =
    ["activation", "adamw", "attention", "dropout", "embedding", "infonce", "linear", "norm", "pool", "rope"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=src");
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let mut report = String::new();
    let mut objects = Vec::new();
    // Two at a time: each takes a core and a gigabyte.
    for pair in STEMS.chunks(2) {
        let mut running = Vec::new();
        for stem in pair {
            let object = out.join(format!("{stem}.o"));
            running.push((stem, compile(stem, &object)?));
            objects.push(object);
        }
        for (stem, child) in running {
            let done = child.wait_with_output().map_err(|error| format!("nvcc: {error}"))?;
            let said = String::from_utf8_lossy(&done.stderr);
            if !done.status.success() {
                return Err(format!("nvcc cannot compile {stem}.cu:\n{said}"));
            }
            report.push_str(&format!("== {stem}.cu\n{said}"));
        }
    }
    // target/PROFILE/build/kernels-…/out → target/PROFILE
    if let Some(target) = out.ancestors().nth(3) {
        let path = target.join("ptxas.txt");
        fs::write(&path, &report).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let spills = spills(&report);
    if !spills.is_empty() {
        return Err(format!(
            "kernels spill registers; see ptxas.txt in the target folder:\n{}",
            spills.join("\n")
        ));
    }

    let library = out.join("liblodestone_kernels.a");
    if library.exists() {
        fs::remove_file(&library).map_err(|error| format!("{}: {error}", library.display()))?;
    }
    let archived = Command::new("ar").arg("crs").arg(&library).args(&objects).status();
    if !archived.is_ok_and(|status| status.success()) {
        return Err("`ar` cannot join the objects of the kernels".to_owned());
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=lodestone_kernels");
    let home = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(env::var_os);
    let home = home.map_or_else(|| PathBuf::from("/usr/local/cuda"), PathBuf::from);
    for folder in ["lib64", "lib"] {
        println!("cargo::rustc-link-search=native={}", home.join(folder).display());
    }
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}

fn compile(stem: &str, object: &Path) -> Result<Child, String> {
    let mut nvcc = Command::new("nvcc");
    nvcc.args(["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Werror", "all-warnings", "-Xptxas", "-v"]);
    for capability in ["80", "90"] {
        nvcc.arg(format!("-gencode=arch=compute_{capability},code=sm_{capability}"));
    }
    // For chips to come.
    nvcc.arg("-gencode=arch=compute_90,code=compute_90");
    nvcc.arg("-c").arg("-o").arg(object).arg(format!("src/{stem}.cu"));
    nvcc.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(|error| {
        format!(
            "the feature `cuda` needs nvcc, which cannot be run ({error}); scripts/cuda.sh COMMAND brings one"
        )
    })
}

/// The kernels that spill, with what ptxas says of it.
fn spills(report: &str) -> Vec<String> {
    let mut kernel = "";
    let mut all = Vec::new();
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            kernel = name;
        }
        let bytes = |part: &str| part.split_whitespace().next()?.parse::<usize>().ok();
        if line.split(',').filter(|part| part.contains("bytes spill")).filter_map(bytes).sum::<usize>() > 0 {
            all.push(format!("{kernel}: {}", line.trim()));
        }
    }
    all
}
