//! The HTML report of one or more runs: one file that needs no network and no other file.

mod differences;
pub mod facts;
mod moved;
mod run_data;
mod series;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::system::atomic;
use crate::{Error, Result};

/// Writes the report of one or more runs to `output` and returns its path. By default the report of one run
/// is OUTPUT/report.html, that of several runs `report.html` in the working directory.
///
/// # Errors
/// A folder holds no run, its files are not what a run writes, or the report cannot be written.
pub fn write(runs: &[PathBuf], output: Option<&Path>) -> Result<PathBuf> {
    let path = match (output, runs) {
        (_, []) => return Err(Error::Usage("expected the folder of a run".into())),
        (Some(path), _) => path.to_owned(),
        (None, [run]) => run.join("report.html"),
        (None, _) => PathBuf::from("report.html"),
    };
    let described = runs.iter().map(|run| run_data::describe(run)).collect::<Result<Vec<_>>>()?;
    let differences = differences::between(&described);
    let html = page(&json!({ "runs": with_unique_names(described), "differences": differences }));
    atomic::write(&path, html)?;
    Ok(path)
}

/// The template with its parts and the data put in.
fn page(data: &Value) -> String {
    // No text of a run may end the script element that it is in.
    let data = data.to_string().replace('<', "\\u003c");
    let parts = [
        ("{{style}}", include_str!("style.css")),
        ("{{chart}}", include_str!("chart.js")),
        ("{{page}}", include_str!("page.js")),
        // Last, so that no text of the data is replaced by another part.
        ("{{data}}", data.as_str()),
    ];
    let template = include_str!("page.html").to_owned();
    parts.iter().fold(template, |page, (place, part)| page.replacen(place, part.trim_end(), 1))
}

/// Replaces names that several runs have by their folders.
fn with_unique_names(mut runs: Vec<Value>) -> Vec<Value> {
    let names: Vec<Value> = runs.iter().map(|run| run["name"].clone()).collect();
    for run in &mut runs {
        if names.iter().filter(|name| **name == run["name"]).count() > 1 {
            run["name"] = run["folder"].clone();
        }
    }
    runs
}
