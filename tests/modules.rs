//! The modules of the trainer depend on each other in one direction: each uses only those that stand above it in `lib.rs`.

use std::fs;
use std::path::{Path, PathBuf};

/// The largest number of files and folders in `trainer/src`.
const MOST_ENTRIES: usize = 15;

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/src")
}

/// The modules of `lib.rs`, in their order.
fn modules() -> Vec<String> {
    let text = fs::read_to_string(source().join("lib.rs")).unwrap();
    let name = |line: &str| Some(line.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned());
    text.lines().filter_map(name).collect()
}

/// All files with code, without those of tests.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.file_stem().is_some_and(|name| name == "tests") {
            continue;
        } else if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
    found
}

/// The code of a file, without comments and without the test module at its end.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The names that follow `crate::` in some code: `crate::a::b`, `crate::{c, d::{e, f}}` → a, c, d.
fn used(code: &str) -> Vec<String> {
    let first_name = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut names = Vec::new();
    for text in code.split("crate::").skip(1) {
        let Some(group) = text.strip_prefix('{') else {
            names.push(first_name(text));
            continue;
        };
        let (mut depth, mut start) = (1, 0);
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && c == ',') {
                names.push(first_name(&group[start..i]));
                start = i + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    names
}

#[test]
fn each_module_uses_only_those_above_it() {
    let modules = modules();
    assert!(modules.len() > 10, "lib.rs lists its modules as `pub mod NAME;`");
    let place = |name: &str| modules.iter().position(|module| module == name);
    let mut wrong = Vec::new();
    for path in files(&source()) {
        let file = path.strip_prefix(source()).unwrap().to_owned();
        let own = file.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        let Some(at) = place(&own) else { continue };
        let below = used(&code(&path)).into_iter().filter(|name| place(name).is_some_and(|other| other > at));
        wrong.extend(below.map(|name| format!("{} uses {name}", file.display())));
    }
    assert!(wrong.is_empty(), "lib.rs lists these modules further down:\n{}", wrong.join("\n"));
}

#[test]
fn the_crate_has_few_top_level_modules() {
    let entries = fs::read_dir(source()).unwrap().count();
    assert!(entries <= MOST_ENTRIES, "trainer/src has {entries} entries, at most {MOST_ENTRIES} are allowed");
}

#[test]
fn names_after_crate_are_found() {
    let code = "use crate::a::b;\nuse crate::{c, d::{e, f},\n    g};\nlet x = crate::h(1);";
    assert_eq!(used(code), ["a", "c", "d", "g", "h"]);
}
