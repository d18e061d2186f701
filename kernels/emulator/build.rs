//! Compiles the .cu files for the emulator, and three of them a second time without one of their barriers.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Kernels with one `__syncthreads();` removed: prefix of the entries, file and index of the barrier, and
/// stem to compile.
const MUTANTS: [(&str, &str, usize, &str); 3] = [
    ("mutant_a", "common.cuh", 0, "norm"),
    ("mutant_b", "attention.cu", 0, "attention"),
    ("mutant_c", "attention.cu", 3, "attention"),
];

fn main() {
    let sources = Path::new("../src");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=emulator.hpp");
    println!("cargo::rerun-if-changed=emulator.cpp");
    println!("cargo::rerun-if-changed=faults.cu");

    let files: Vec<(String, String)> = fs::read_dir(sources)
        .expect("the crate's sources")
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let kernel = name.ends_with(".cu") || name.ends_with(".cuh");
            kernel.then(|| (fs::read_to_string(sources.join(&name)).expect("a readable source"), name))
        })
        .map(|(text, name)| (name, text))
        .collect();
    for (name, _) in &files {
        println!("cargo::rerun-if-changed={}", sources.join(name).display());
    }

    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(".").define("EMULATOR", None).warnings(true).extra_warnings(true);
    build.flag_if_supported("-Wno-unknown-pragmas").flag_if_supported("-Wno-maybe-uninitialized");
    build.flag_if_supported("-Wno-missing-field-initializers").flag_if_supported("-Wno-unused-function");
    // Fibers jump between stacks, which fortified longjmp reports as an error. A higher level takes longer to
    // compile than it saves in the tests.
    build.flag("-U_FORTIFY_SOURCE").opt_level(1).file("emulator.cpp");
    let write = |folder: &Path, name: &str, text: &str| {
        let path = folder.join(name);
        // An unchanged file keeps its modification time, so that its object is not compiled again.
        if fs::read_to_string(&path).ok().as_deref() != Some(text) {
            fs::write(&path, text).expect("a file in OUT_DIR");
        }
        path
    };
    // Each stem gets its own namespace, because kernels of different stems have the same names.
    let wrap = |prefix: &str, namespace: &str, stem: &str| {
        format!(
            "#define PREFIX {prefix}\n#include \"emulator.hpp\"\nnamespace {namespace} {{\n#include \"{stem}.cu\"\n}}\n"
        )
    };
    let plain = out.join("kernels");
    fs::create_dir_all(&plain).expect("a folder in OUT_DIR");
    for (name, text) in &files {
        write(&plain, name, text);
        if let Some(stem) = name.strip_suffix(".cu") {
            build.file(write(
                &plain,
                &format!("{stem}.cpp"),
                &wrap("emulated_", &format!("of_{stem}"), stem),
            ));
        }
    }
    let faults = fs::read_to_string("faults.cu").expect("the kernels with faults");
    write(&plain, "faults.cu", &faults);
    build.file(write(&plain, "faults.cpp", &wrap("emulated_", "of_faults", "faults")));
    for (mutant, mutated, barrier, stem) in MUTANTS {
        let folder = out.join(mutant);
        fs::create_dir_all(&folder).expect("a folder in OUT_DIR");
        for (name, text) in &files {
            let text = if name == mutated { without_barrier(text, barrier) } else { text.clone() };
            write(&folder, name, &text);
        }
        let prefix = format!("{mutant}_");
        build.file(write(&folder, &format!("{mutant}.cpp"), &wrap(&prefix, mutant, stem)));
    }
    build.compile("emulated_kernels");
}

fn without_barrier(text: &str, which: usize) -> String {
    const BARRIER: &str = "__syncthreads();";
    let (at, _) = text.match_indices(BARRIER).nth(which).expect("as many barriers as are mutated");
    format!("{}{}", &text[..at], &text[at + BARRIER.len()..])
}
