//! Every command line in the documents parses.

use std::fs;
use std::path::Path;

use clap::Parser;

use super::Arguments;

/// The commands in ```sh blocks of the README and docs/ that run `launch` or `trainer`: file, line, words.
fn commands() -> Vec<(String, Vec<String>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut pages = vec![root.join("README.md")];
    pages.extend(fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path()));
    let mut found = Vec::new();
    for page in pages.iter().filter(|page| page.extension().is_some_and(|end| end == "md")) {
        let text = fs::read_to_string(page).unwrap();
        for block in text.split("```sh\n").skip(1) {
            for line in block.split("```").next().unwrap().lines() {
                let words = words(line);
                let program = words.iter().position(|word| ["launch", "trainer"].contains(&word.as_str()));
                if let Some(program) = program {
                    found.push((format!("{}: {line}", page.display()), words[program..].to_vec()));
                }
            }
        }
    }
    assert!(found.len() > 20, "found only {} commands", found.len());
    found
}

/// The words of a line, as a shell splits them.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), _) if c == open => quote = None,
            (None, ' ') => words.push(String::new()),
            _ => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn every_command_of_a_document_parses() {
    for (place, words) in commands() {
        let arguments = match words[0].as_str() {
            "launch" => {
                let arguments = Arguments::try_parse_from(&words).unwrap_or_else(|e| panic!("{place}\n{e}"));
                let job = arguments.job().unwrap_or_else(|e| panic!("{place}\n{e}"));
                std::iter::once("trainer".into()).chain(job.command).collect()
            }
            _ => words.into_iter().map(Into::into).collect::<Vec<std::ffi::OsString>>(),
        };
        if let Err(error) = trainer::cli::command().try_get_matches_from(arguments) {
            panic!("{place}\n{error}");
        }
    }
}
