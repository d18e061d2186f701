//! `evaluation`: how the model is measured during the run.

use std::collections::BTreeSet;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::check::Check;
use crate::config::{EvaluationKind, Interval};

/// Evaluation during the run, and early stopping. The model is always evaluated before the first and after the last step.
///
/// ```yaml
/// evaluation:
///   every: 500
///   metric: cosine_ndcg@10
///   patience: 5
///   sets:
///     - {name: scifact, path: data/scifact, kind: retrieval}
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluation {
    /// Number of steps between evaluations, or `epoch`. 0 evaluates only before and after the training.
    pub every: Interval,
    /// The evaluation sets.
    pub sets: Vec<EvaluationSet>,
    /// Metric that decides which step is the best and when the training stops early. Give its name without
    /// the name of a set: it is averaged over the sets that have it.
    pub metric: String,
    /// Stop the training after this number of evaluations without a better `metric` (early stopping). Default: no early stopping.
    pub patience: Option<u64>,
    /// Write the model of the best evaluation to OUTPUT/model, instead of the model of the last step. After early stopping it is
    /// always the best one. Needs `sets`.
    pub load_best: bool,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self {
            every: Interval::Steps(0),
            sets: Vec::new(),
            metric: "cosine_ndcg@10".to_owned(),
            patience: None,
            load_best: false,
        }
    }
}

/// An evaluation set of `evaluation.sets`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationSet {
    /// First part of the names of its metrics. Default: the name of the folder or file.
    pub name: String,
    /// BEIR folder, file of rows, or file of a data set on the hub (`hf://datasets/ORG/NAME/FILE`). Required.
    pub path: PathBuf,
    /// What is measured. Default: similarity for a file with columns of similarity rows, else retrieval.
    pub kind: Option<EvaluationKind>,
    /// Which `qrels/SPLIT.tsv` of a BEIR folder is used. Default: test, else dev, else the only one.
    pub split: Option<String>,
    /// Text put before each query. Default: the prompt that all data sets of `data.train` share, else what the model folder says.
    pub query_prompt: Option<String>,
    /// Text put before each document. Default: the prompt that all data sets of `data.train` share, else what the model folder says.
    pub document_prompt: Option<String>,
}

impl Evaluation {
    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        let mut names = BTreeSet::new();
        for (i, set) in self.sets.iter().enumerate() {
            let check = check.section(&format!("sets.{i}"));
            let path = !set.path.as_os_str().is_empty();
            check.that(path, "path", "missing: expected a folder or a file")?;
            let unique = set.name.is_empty() || names.insert(&set.name);
            let message = format!("`{}` is also the name of an earlier set, expected another name", set.name);
            check.that(unique, "name", &message)?;
        }
        check.that(!self.metric.is_empty(), "metric", "expected a metric, as cosine_ndcg@10")?;
        let message =
            "expected at least one of evaluation.sets, found none: without evaluations there is no best step";
        check.that(!self.load_best || !self.sets.is_empty(), "load_best", message)?;
        check.that(self.patience != Some(0), "patience", "expected at least 1 evaluation, found 0")
    }
}
