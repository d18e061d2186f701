//! Compares two models on the same sets: the metrics of both, their difference and its confidence interval.

use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::Result;
use crate::eval::{self, Bootstrap, CONFIDENCE, EvalOutput, EvalSet, Scores, nano};
use crate::system::atomic;
use crate::system::progress::Progress;

/// A metric of the base and the tuned model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MetricDelta {
    /// The metric of the base model.
    pub base: f64,
    /// The metric of the tuned model.
    pub tuned: f64,
    /// tuned − base.
    pub delta: f64,
    /// The lower end of the confidence interval of delta.
    pub low: f64,
    /// The upper end of that interval.
    pub high: f64,
}

/// The comparison of two models, set by set.
#[derive(Clone, Debug)]
pub struct Comparison {
    sets: Vec<SetComparison>,
}

#[derive(Clone, Debug)]
struct SetComparison {
    /// The heading of the table: `scifact, 300 queries`.
    title: String,
    name: String,
    count: usize,
    /// The metrics by name. The names begin with that of the set.
    lines: Vec<(String, MetricDelta)>,
}

impl Comparison {
    /// Compares the outputs of two models on `sets`. If there are Nano sets, their means are compared, too.
    pub fn new(sets: &[EvalSet], base: &[EvalOutput], tuned: &[EvalOutput], bootstrap: Bootstrap) -> Self {
        let mut progress = Progress::new("resamples", (bootstrap.resamples * sets.len()) as u64, 0);
        let mut comparisons = Vec::new();
        // The sum over the Nano sets of the differences in each resample.
        let mut nano_sums: Vec<Vec<f64>> = Vec::new();
        for (number, ((set, base), tuned)) in sets.iter().zip(base).zip(tuned).enumerate() {
            let differences =
                bootstrap.differences(number, &base.items, &tuned.items, |done| progress.advance(done));
            if nano::is_nano(set) {
                match nano_sums.is_empty() {
                    true => nano_sums.clone_from(&differences),
                    false => nano_sums
                        .iter_mut()
                        .flatten()
                        .zip(differences.iter().flatten())
                        .for_each(|(sum, difference)| *sum += difference),
                }
            }
            comparisons.push(SetComparison {
                title: format!("{}, {} {}", set.name(), base.items.count(), set.item_noun()),
                name: set.name().to_owned(),
                count: base.items.count(),
                lines: lines(&base.scores, &tuned.scores, &differences),
            });
        }
        let mean =
            |of: &[EvalOutput]| nano::mean_scores(sets.iter().zip(of.iter().map(|output| &output.scores)));
        let (base, tuned) = (mean(base), mean(tuned));
        if !base.is_empty() {
            let count = sets.iter().filter(|set| nano::is_nano(set)).count();
            nano_sums.iter_mut().flatten().for_each(|sum| *sum /= count as f64);
            let name = nano::MEAN_PREFIX.to_owned();
            let lines = lines(&base, &tuned, &nano_sums);
            comparisons.push(SetComparison { title: format!("{name}, {count} sets"), name, count, lines });
        }
        Self { sets: comparisons }
    }

    /// Writes `folder`/compare.json. `base` and `tuned` are the models' paths or ids.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, folder: &Path, base: &str, tuned: &str, bootstrap: Bootstrap) -> Result<()> {
        let sets: Map<String, Value> =
            self.sets.iter().map(|set| (set.name.clone(), set.count.into())).collect();
        let metrics: Map<String, Value> =
            self.lines().map(|(name, line)| (name.to_owned(), json!(line))).collect();
        let all = json!({
            "base": base,
            "tuned": tuned,
            "confidence": CONFIDENCE,
            "resamples": bootstrap.resamples,
            "seed": bootstrap.seed,
            "sets": sets,
            "metrics": metrics,
        });
        atomic::write(&folder.join("compare.json"), format!("{all:#}\n"))
    }

    /// The metrics of all sets by name.
    pub fn lines(&self) -> impl Iterator<Item = (&str, MetricDelta)> {
        self.sets.iter().flat_map(|set| &set.lines).map(|(name, line)| (name.as_str(), *line))
    }
}

fn lines(base: &Scores, tuned: &Scores, differences: &[Vec<f64>]) -> Vec<(String, MetricDelta)> {
    let line = |((name, base), of_metric): ((&str, f64), &Vec<f64>)| {
        let tuned = tuned.get(name).unwrap_or(f64::NAN);
        let (low, high) = eval::confidence_interval(of_metric);
        (name.to_owned(), MetricDelta { base, tuned, delta: tuned - base, low, high })
    };
    base.iter().zip(differences).map(line).collect()
}

/// Writes a table for each set.
impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let metric = |set: &SetComparison, name: &str| name[set.name.len() + 1..].to_owned();
        for (number, set) in self.sets.iter().enumerate() {
            let longest = set.lines.iter().map(|(name, _)| metric(set, name).len()).max().unwrap_or(0);
            let width = longest.max(set.title.chars().count());
            let interval = format!("{:.0} % interval", CONFIDENCE * 100.0);
            let between = if number > 0 { "\n" } else { "" };
            writeln!(f, "{between}{:width$}    base   tuned        Δ  {interval:>18}", set.title)?;
            for (name, MetricDelta { base, tuned, delta, low, high }) in &set.lines {
                let name = metric(set, name);
                writeln!(
                    f,
                    "{name:width$}  {base:6.4}  {tuned:6.4}  {delta:+7.4}  [{low:+7.4}, {high:+7.4}]"
                )?;
            }
        }
        Ok(())
    }
}
