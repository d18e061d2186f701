//! `data`: the rows that the model learns from.

use std::collections::BTreeSet;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::check::Check;
use crate::config::{Batching, ColumnNames, LossKind, RowKind};

/// The training data.
///
/// ```yaml
/// data:
///   train:
///     - {path: data/questions.csv, columns: {query: Question, positive: Answer}}
///     - {path: hf://datasets/sentence-transformers/all-nli/triplet/train-00000-of-00001.parquet, samples: 50000}
///   negatives: 3
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// The data sets. Required: at least one.
    pub train: Vec<DataSet>,
    /// Maximum number of hard negatives of a row that are used in a step. Of a row with fewer, all are used.
    pub negatives: usize,
    /// Whether a batch has rows of several data sets. In a mixed batch each row has the loss of its data set, and its candidates
    /// are texts of rows with the same loss.
    pub batching: Batching,
    /// Draw a new order of the rows for every epoch, from `seed`. If false, rows come in the order of the files.
    pub shuffle: bool,
    /// Avoid duplicate texts within a batch: a row that would repeat a text is deferred to a later batch.
    /// Rows that are still deferred at the end of the epoch are used anyway. While 65,536 rows are deferred,
    /// the next row is used even if it repeats a text.
    pub no_duplicates: bool,
}

impl Data {
    /// The prompt that all data sets share, if they do and it is not empty.
    pub fn common_prompt<'a>(&'a self, of: impl Fn(&'a DataSet) -> &'a String) -> Option<&'a str> {
        let first = of(self.train.first()?);
        self.train
            .iter()
            .all(|set| of(set) == first)
            .then_some(first.as_str())
            .filter(|prompt| !prompt.is_empty())
    }

    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        check.that(
            !self.train.is_empty(),
            "train",
            "missing: expected at least one data set with a `path`",
        )?;
        let mut names = BTreeSet::new();
        for (i, set) in self.train.iter().enumerate() {
            let check = check.section(&format!("train.{i}"));
            set.check(&check)?;
            let unique = set.name.is_empty() || names.insert(&set.name);
            check.that(unique, "name", &format!("`{}` is also the name of an earlier data set", set.name))?;
        }
        Ok(())
    }
}

impl Default for Data {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            negatives: 5,
            batching: Batching::Mixed,
            shuffle: true,
            no_duplicates: true,
        }
    }
}

/// A data set of `data.train`: a file of rows, and how they are used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataSet {
    /// Name of the data set in messages. Default: the name of the file without its endings.
    pub name: String,
    /// File of rows (.jsonl, .csv, .tsv or .parquet, each also .gz or .zst), BEIR folder, or file of a data set on the hub
    /// (`hf://datasets/ORG/NAME/FILE`). Required.
    pub path: PathBuf,
    /// Names of the columns. Default: columns are recognised by their usual names.
    pub columns: Columns,
    /// What a row holds. Default: recognised by the columns.
    pub kind: Option<RowKind>,
    /// Loss of these rows. Default: cosent for similarity rows, else `loss.kind`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<LossKind>,
    /// Number of rows to use: a random subset drawn from `seed`, stratified by class for labelled rows. Default: all rows.
    pub samples: Option<u64>,
    /// Text put before each query.
    pub query_prompt: String,
    /// Text put before each positive and negative.
    pub document_prompt: String,
    /// How many times each row is used per epoch; an epoch has round(samples × weight) rows of this set. Above 0.
    pub weight: f64,
}

impl Default for DataSet {
    fn default() -> Self {
        Self {
            name: String::new(),
            path: PathBuf::new(),
            columns: Columns::default(),
            kind: None,
            loss: None,
            samples: None,
            query_prompt: String::new(),
            document_prompt: String::new(),
            weight: 1.0,
        }
    }
}

impl DataSet {
    fn check(&self, check: &Check) -> Result<()> {
        let path = !self.path.as_os_str().is_empty();
        check.that(path, "path", "missing: expected a file or a BEIR folder")?;
        check.that(self.samples != Some(0), "samples", "expected at least 1 row, found 0")?;
        check.positive("weight", self.weight)?;
        match self.kind.zip(self.loss).and_then(|(kind, loss)| loss.misfit(kind)) {
            Some(misfit) => Err(check.error("loss", &misfit)),
            None => Ok(()),
        }
    }
}

/// Names of the columns of a data set. A column that is not named here is recognised by its usual names: query, anchor,
/// question, premise; positive, answer, document, passage, hypothesis; negative, negatives; and so on.
///
/// ```yaml
/// data:
///   train:
///     - path: data/faq.csv
///       columns: {query: Frage, positive: Antwort, negatives: [falsch_1, falsch_2]}
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Columns {
    /// Column of the query.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// Column of the positive, a text that answers the query. A value is a text or a list of texts. To use
    /// several columns, list their names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positive: Option<ColumnNames>,
    /// Column of the hard negatives, texts that do not answer the query. A value is a text or a list of
    /// texts. To use several columns, list their names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negatives: Option<ColumnNames>,
    /// Column of the text of a labelled row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Column of the class of a labelled row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Column of the first text of a similarity row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentence1: Option<String>,
    /// Column of the second text of a similarity row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentence2: Option<String>,
    /// Column of the score of a similarity row. For the losses margin_mse and kl: column of a teacher's
    /// scores, a list in the order [positive, negative, …].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<String>,
}
