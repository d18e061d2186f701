//! OUTPUT/report.html: a run to look at, or several beside each other. One page that needs nothing else: no network, no other
//! file.

mod series;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::config::Config;
use crate::eval::rankings::Ranking;
use crate::eval::samples;
use crate::train::metrics::{self, History};
use crate::{Error, Result};

/// Points of a line at most.
const POINTS: usize = 1500;

/// Writes the report of one or several runs into the folder of the first.
///
/// # Errors
/// A folder holds no run, or its files are not what a run writes.
pub fn write(runs: &[PathBuf]) -> Result<PathBuf> {
    let of_runs = runs.iter().map(|run| describe(run)).collect::<Result<Vec<_>>>()?;
    let Some(first) = runs.first() else {
        return Err(Error::Usage("expected the folder of a run".into()));
    };
    let path = first.join("report.html");
    let draft = first.join(".report.html.tmp");
    fs::write(&draft, page(&json!({ "runs": distinct(of_runs) }))).map_err(Error::io("write", &draft))?;
    fs::rename(&draft, &path).map_err(Error::io("rename", draft))?;
    Ok(path)
}

/// The template with its parts put in.
fn page(data: &Value) -> String {
    // Nothing in a text may end the script that it stands in.
    let data = data.to_string().replace('<', "\\u003c");
    let parts = [
        ("{{style}}", include_str!("style.css")),
        ("{{chart}}", include_str!("chart.js")),
        ("{{page}}", include_str!("page.js")),
        // The last, so that no text of it is taken for another part's place.
        ("{{data}}", data.as_str()),
    ];
    let template = include_str!("page.html").to_owned();
    parts.iter().fold(template, |page, (place, part)| page.replacen(place, part.trim_end(), 1))
}

/// Runs of the same name are called by their folders.
fn distinct(mut runs: Vec<Value>) -> Vec<Value> {
    let names: Vec<Value> = runs.iter().map(|run| run["name"].clone()).collect();
    for run in &mut runs {
        if names.iter().filter(|name| **name == run["name"]).count() > 1 {
            run["name"] = run["folder"].clone();
        }
    }
    runs
}

/// All that the page shows of a run.
fn describe(output: &Path) -> Result<Value> {
    let history = History::read(&output.join("metrics.jsonl"))?.ok_or_else(|| {
        Error::file(
            output,
            "has no metrics.jsonl: it is no folder of a run\nhint: give the `output` of a configuration that was trained",
        )
    })?;
    if history.steps.is_empty() && history.evaluations.is_empty() {
        return Err(Error::file(output.join("metrics.jsonl"), "tells of no step and no evaluation yet"));
    }
    let folder = output.display().to_string();
    // A configuration of another version is shown as it is; its values are taken as far as they are known.
    let text = fs::read_to_string(output.join("config.yaml")).ok();
    let config = match text.is_some() {
        true => Config::load(&output.join("config.yaml"), &[]).ok(),
        false => None,
    };
    let known = config.clone().unwrap_or_default();
    let name = match known.name.is_empty() {
        true => output.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned())),
        false => Some(known.name.clone()),
    };
    let metric = &known.evaluation.metric;
    let chosen = history.selected_step(metric, known.evaluation.patience);
    let deciding =
        |step: u64| history.scores_at(step).and_then(|scores| metrics::selection_metric(scores, metric));
    let sum = |name: &str| history.steps.iter().filter_map(|step| step.get(name)?.as_f64()).sum::<f64>();
    let last = history.steps.last().and_then(|step| step["step"].as_u64());
    let evaluations: Vec<Value> =
        history.evaluations.iter().map(|(step, scores)| json!({ "step": step, "scores": scores })).collect();
    Ok(json!({
        "name": name.unwrap_or_else(|| folder.clone()),
        "folder": folder,
        "model": known.model.path,
        "config": text,
        "metric": metric,
        "chosen": chosen,
        "deciding": {
            "before": deciding(0),
            "after": if chosen > 0 { deciding(chosen) } else { None },
        },
        "totals": {
            "steps": last.unwrap_or(0),
            "logged": history.steps.len(),
            "tokens": sum("tokens"),
            "seconds": sum("seconds"),
        },
        "steps": series::columns(&history.steps, POINTS),
        "losses": series::losses(&history.steps, POINTS),
        "evaluations": evaluations,
        "samples": rankings(&samples::read(output)?, chosen),
    }))
}

/// For each set what queries found before and after.
fn rankings(evaluations: &[samples::Evaluation], chosen: u64) -> Vec<Value> {
    let of = |step: u64| evaluations.iter().find(|evaluation| evaluation.step == step);
    let (Some(base), Some(tuned)) = (of(0), of(chosen).filter(|_| chosen > 0)) else { return Vec::new() };
    let pair = |(set, base): &(String, Vec<Ranking>)| {
        let (_, tuned) = tuned.sets.iter().find(|(other, _)| other == set)?;
        (!base.is_empty()).then(|| json!({ "set": set, "base": base, "tuned": tuned }))
    };
    base.sets.iter().filter_map(pair).collect()
}
