//! The documents: their links resolve, and their YAML passes the loader. (launcher/src/args.rs parses their command lines.)

use std::fs;
use std::path::{Path, PathBuf};

use trainer::config::Config;

/// Every Markdown file that people read: in the root, docs/ and benches/.
fn documents() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for folder in [root.clone(), root.join("docs"), root.join("benches")] {
        let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths.into_iter().filter(|path| path.extension().is_some_and(|end| end == "md")) {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    assert!(found.len() > 15, "found only {} documents", found.len());
    found
}

/// The targets of `[text](target)` outside of code.
fn links(text: &str) -> Vec<String> {
    let mut inside = false;
    let mut targets = Vec::new();
    for line in text.lines() {
        inside ^= line.trim_start().starts_with("```");
        if inside || line.starts_with("    ") {
            continue;
        }
        // Every second piece is `code`.
        let prose: String = line.split('`').step_by(2).collect();
        for after in prose.split("](").skip(1) {
            targets.push(after.split(')').next().unwrap().to_owned());
        }
    }
    targets
}

/// The anchor that GitHub and mdBook give a heading.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn every_link_of_a_document_resolves() {
    let mut count = 0;
    for (path, text) in documents() {
        for link in links(&text).into_iter().filter(|link| !link.starts_with("http")) {
            count += 1;
            let (file, section) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link} does not exist", path.display());
            if !section.is_empty() {
                let target = fs::read_to_string(&target).unwrap();
                let found = target.lines().any(|line| line.starts_with('#') && anchor(line) == section);
                assert!(found, "{}: {link} has no such heading", path.display());
            }
        }
    }
    assert!(count > 40, "found only {count} links");
}

#[test]
fn the_book_lists_every_page_of_docs() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let summary = fs::read_to_string(docs.join("SUMMARY.md")).unwrap();
    for (path, _) in documents() {
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.parent().unwrap().ends_with("docs") && name != "SUMMARY.md" {
            assert!(summary.contains(&format!("({name})")), "SUMMARY.md lacks {name}");
        }
    }
}

#[test]
fn every_yaml_of_a_document_passes_the_loader() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("page.yaml");
    // What a fragment need not repeat.
    let rest = ["model.path=some/model", "data.train.0.path=rows.jsonl"].map(str::to_owned);
    let mut count = 0;
    for (path, text) in documents() {
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap();
            fs::write(&file, block).unwrap();
            if let Err(error) = Config::load(&file, &rest) {
                panic!("{}: {error}\n{block}", path.display());
            }
            count += 1;
        }
    }
    assert!(count >= 8, "found only {count} pieces of YAML");
}
