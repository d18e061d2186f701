//! Compiles the .cu files with nvcc for A100 (sm_80) and H100 (sm_90) if the feature `cuda` is on.
//!
//! The report of ptxas about registers and spills is written to `ptxas.txt` in the target folder. A kernel
//! that spills registers fails the build. The script also lists the functions that NVIDIA's libraries export,
//! for src/gpu/libraries.c.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::{env, fs};

const STEMS: [&str; 10] =
    ["activation", "adamw", "attention", "dropout", "embedding", "infonce", "linear", "norm", "pool", "rope"];

/// The libraries in the order of libraries.rs, each with its status code for "not supported" or the closest
/// one.
const LIBRARIES: [(&str, u32); 6] =
    [("cuda", 801), ("cublas", 15), ("cublasLt", 15), ("curand", 203), ("nvrtc", 11), ("nccl", 3)];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    // The cfg `gpu` means that ops can run as kernels, on a GPU or on the emulator.
    println!("cargo::rustc-check-cfg=cfg(gpu)");
    if ["CARGO_FEATURE_CUDA", "CARGO_FEATURE_EMULATOR"].iter().any(|name| env::var_os(name).is_some()) {
        println!("cargo::rustc-cfg=gpu");
    }
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
    for file in fs::read_dir("src").map_err(|error| format!("src: {error}"))?.flatten() {
        if file.path().extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
            println!("cargo::rerun-if-changed={}", file.path().display());
        }
    }
    for name in ["CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let mut objects = Vec::new();
    let home = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(env::var_os);
    let home = home.map_or_else(|| PathBuf::from("/usr/local/cuda"), PathBuf::from);
    list(&home, &out.join("libraries.inc"))?;
    for stem in ["libraries", "unused"] {
        let (source, object) = (format!("src/gpu/{stem}.c"), out.join(format!("{stem}.o")));
        println!("cargo::rerun-if-changed={source}");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-I"]);
        run(compiler.arg(&out).args(["-c", &source, "-o"]).arg(&object))?;
        objects.push(object);
    }
    let mut report = String::new();
    // Two at a time, because each takes a core and a gigabyte of memory.
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

    println!("cargo::rustc-env=LODESTONE_CUDA={}", version()?);

    let library = out.join("liblodestone_kernels.a");
    if library.exists() {
        fs::remove_file(&library).map_err(|error| format!("{}: {error}", library.display()))?;
    }
    let archived = Command::new("ar").arg("crs").arg(&library).args(&objects).status();
    if !archived.is_ok_and(|status| status.success()) {
        return Err("`ar` cannot archive the objects of the kernels".to_owned());
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    // The whole archives, so that the linker takes the symbols of libraries.c, unused.c and the CUDA runtime
    // from them and does not look for them in other libraries.
    println!("cargo::rustc-link-lib=static:+whole-archive=lodestone_kernels");
    for folder in ["lib64", "lib"] {
        println!("cargo::rustc-link-search=native={}", home.join(folder).display());
    }
    println!("cargo::rustc-link-lib=static:+whole-archive=cudart_static");
    for name in ["stdc++", "dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib=dylib={name}");
    }
    Ok(())
}

/// Writes a list of the functions that NVIDIA's libraries export to `path`.
fn list(home: &Path, path: &Path) -> Result<(), String> {
    let mut folders: Vec<PathBuf> =
        ["lib64", "lib", "lib64/stubs", "lib/stubs"].iter().map(|folder| home.join(folder)).collect();
    folders.extend(env::split_paths(&env::var_os("LIBRARY_PATH").unwrap_or_default()));
    folders
        .extend(["/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"].map(PathBuf::from));
    let mut list = String::new();
    for (number, (name, status)) in LIBRARIES.iter().enumerate() {
        let file = format!("lib{name}.so");
        let found =
            folders.iter().map(|folder| folder.join(&file)).find(|path| path.exists()).ok_or_else(|| {
                format!("{file} was not found, but is needed to link; `scripts/cuda.sh COMMAND` provides it")
            })?;
        let dynamic = run(Command::new("readelf").args(["-d", "-W"]).arg(&found))?;
        let soname = dynamic
            .lines()
            .find(|line| line.contains("(SONAME)"))
            .and_then(|line| line.split_once('[')?.1.split_once(']'))
            .ok_or_else(|| format!("{}: the library has no soname", found.display()))?
            .0;
        list.push_str(&format!("LIBRARY({number}, \"{soname}\", {status})\n"));
        let exported = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&found))?;
        for line in exported.lines() {
            // A line is like `0000000000001119 T cublasCreate_v2@@libcublas.so.13`. Only C functions are
            // listed.
            let plain = line.split('@').next().unwrap_or_default();
            if let [_, "T" | "W", entry] = plain.split_whitespace().collect::<Vec<_>>()[..]
                && ["cu", "nvrtc", "nccl"].iter().any(|start| entry.starts_with(start))
                && entry.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            {
                list.push_str(&format!("ENTRY({number}, {entry})\n"));
            }
        }
    }
    fs::write(path, list).map_err(|error| format!("{}: {error}", path.display()))
}

/// The version of nvcc, such as `13.0`.
fn version() -> Result<String, String> {
    let said = run(Command::new("nvcc").arg("--version"))?;
    let release = said.split_once("release ").and_then(|(_, rest)| rest.split_once(','));
    Ok(release.ok_or_else(|| format!("`nvcc --version` printed no version, but:\n{said}"))?.0.to_owned())
}

/// Runs a command and returns its output.
fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.output().map_err(|error| format!("{name}: {error}"))?;
    if !done.status.success() {
        return Err(format!("{name}: {}", String::from_utf8_lossy(&done.stderr)));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Starts nvcc for one .cu file.
fn compile(stem: &str, object: &Path) -> Result<Child, String> {
    let mut nvcc = Command::new("nvcc");
    nvcc.args(["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Werror", "all-warnings", "-Xptxas", "-v"]);
    for capability in ["80", "90"] {
        nvcc.arg(format!("-gencode=arch=compute_{capability},code=sm_{capability}"));
    }
    // PTX, which the driver compiles for newer GPUs.
    nvcc.arg("-gencode=arch=compute_90,code=compute_90");
    nvcc.arg("-c").arg("-o").arg(object).arg(format!("src/{stem}.cu"));
    nvcc.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(|error| {
        format!("the feature `cuda` needs nvcc ({error}); `scripts/cuda.sh COMMAND` provides it")
    })
}

/// The kernels that spill registers, each with the line of ptxas.
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
