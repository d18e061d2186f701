//! Records the commit and the features of the build, for `--version`.
//!
//! The commit is read from git's files, so that neither git nor a repository is needed. A development build does not run this
//! script again for a new commit, which would compile the crate again; it says so.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Features with the variable that cargo sets for each.
const FEATURES: [(&str, &str); 3] =
    [("cuda", "CARGO_FEATURE_CUDA"), ("mpi", "CARGO_FEATURE_MPI"), ("emulator", "CARGO_FEATURE_EMULATOR")];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = match git_folder(Path::new("..")) {
        None => None,
        Some(folder) => {
            // The log changes with every commit and checkout, HEAD itself only when another branch is checked out.
            for file in ["HEAD", "logs/HEAD"].map(|name| folder.join(name)) {
                if release && file.exists() {
                    println!("cargo::rerun-if-changed={}", file.display());
                }
            }
            commit(&folder)
        }
    };
    let commit = match commit {
        None => "unknown".to_owned(),
        Some(commit) if release => commit,
        Some(commit) => format!("{commit} or later (development build)"),
    };
    let features: Vec<&str> = FEATURES
        .into_iter()
        .filter(|(_, variable)| env::var_os(variable).is_some())
        .map(|(name, _)| name)
        .collect();
    let features = if features.is_empty() { "none".to_owned() } else { features.join(", ") };
    println!("cargo::rustc-env=LODESTONE_COMMIT={commit}");
    println!("cargo::rustc-env=LODESTONE_FEATURES={features}");
}

/// The folder with HEAD: `.git`, or in a worktree the folder that the file `.git` names.
fn git_folder(root: &Path) -> Option<PathBuf> {
    let git = root.join(".git");
    if git.is_dir() {
        return Some(git);
    }
    let text = fs::read_to_string(git).ok()?;
    Some(root.join(text.strip_prefix("gitdir:")?.trim()))
}

/// The first twelve digits of the commit that HEAD names.
fn commit(folder: &Path) -> Option<String> {
    let head = fs::read_to_string(folder.join("HEAD")).ok()?;
    let hash = match head.trim().strip_prefix("ref:") {
        None => head.trim().to_owned(),
        Some(name) => {
            let name = name.trim();
            // The branches of a worktree are in the folder of its repository.
            let shared = fs::read_to_string(folder.join("commondir"));
            let shared = shared.map_or(folder.to_owned(), |path| folder.join(path.trim()));
            match fs::read_to_string(shared.join(name)) {
                Ok(hash) => hash.trim().to_owned(),
                Err(_) => {
                    let packed = fs::read_to_string(shared.join("packed-refs")).ok()?;
                    let line = packed.lines().find(|line| line.split(' ').nth(1) == Some(name))?;
                    line.split(' ').next()?.to_owned()
                }
            }
        }
    };
    hash.get(..12).map(str::to_owned)
}
