//! Evaluation: how good a model is on texts that it is not trained on.
//!
//! Metrics, their names and the CSV files are those of sentence-transformers 6. Each kind of evaluation has a
//! file here, which describes it in a `static KIND` and implements `Task` for its sets; `EvalSpec::of`
//! lists all kinds.

mod bootstrap;
pub mod compare;
pub mod embed;
pub mod examples;
mod item_scores;
mod loss;
pub mod nano;
mod retrieval;
pub mod samples;
mod scores;
mod similarity;
mod triplet;

#[cfg(test)]
mod golden;

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

pub use self::bootstrap::{Bootstrap, CONFIDENCE, confidence_interval};
pub use self::examples::Examples;
pub use self::item_scores::ItemScores;
pub use self::scores::{Scores, is_better, lower_is_better};
use crate::config::{Config, EvaluationKind, EvaluationSet, RowKind};
use crate::data::reader;
use crate::eval::embed::Embedder;
use crate::{Error, Result, hub};

/// What is known about a kind of evaluation without any set of it.
pub(crate) struct EvalSpec {
    /// What the items of a set are: `queries`.
    items: &'static str,
    /// The metric to look at first, without a set's name: `cosine_ndcg@10`.
    pub(crate) primary_metric: &'static str,
    /// The names of all metrics without a set's name, in their order.
    metric_names: fn() -> Vec<String>,
    /// The CSV file that sentence-transformers writes, if it does.
    csv: Option<CsvFile>,
    /// Reads a set at a path that exists. The configuration is that of the run, or the default one.
    open: fn(&Path, &EvaluationSet, &Config) -> Result<Box<dyn Task>>,
}

/// A CSV file of sentence-transformers.
struct CsvFile {
    /// How its name begins.
    prefix: &'static str,
    /// The headings of its columns, each with the name of the metric below it.
    columns: fn() -> Vec<(String, String)>,
}

impl EvalSpec {
    /// The description of a kind.
    pub(crate) fn of(kind: EvaluationKind) -> &'static Self {
        match kind {
            EvaluationKind::Retrieval => &retrieval::KIND,
            EvaluationKind::Triplet => &triplet::KIND,
            EvaluationKind::Similarity => &similarity::KIND,
            EvaluationKind::Loss => &loss::KIND,
        }
    }
}

/// The texts of a set, and what a good model does with them.
trait Task: fmt::Debug + Send + Sync {
    /// Embeds the texts and computes the metrics, without the set's name.
    fn evaluate(&self, embedder: &Embedder) -> Result<EvalOutput>;
}

/// A set of texts that models are evaluated on.
///
/// ```
/// use trainer::config::{Config, EvaluationKind, EvaluationSet};
/// use trainer::eval::EvalSet;
/// use trainer::eval::embed::LoadedModel;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert");
/// let loaded = LoadedModel::open(folder, &trainer::model::Options::default())?;
/// # let path = std::path::Path::new(folder).join("rows.jsonl");
/// let set = EvaluationSet { path, kind: Some(EvaluationKind::Triplet), ..EvaluationSet::default() };
/// let output = EvalSet::open(&set, &Config::default())?.evaluate(&loaded.embedder())?;
/// assert!(output.scores.get("rows_cosine_accuracy") > Some(0.0));
/// # Ok::<(), trainer::Error>(())
/// ```
#[derive(Debug)]
pub struct EvalSet {
    name: String,
    kind: EvaluationKind,
    task: Box<dyn Task>,
}

/// The result of a model on a set.
#[derive(Clone, Debug)]
pub struct EvalOutput {
    /// The metrics by name. [`EvalSet::evaluate`] puts the set's name before each.
    pub scores: Scores,
    /// What each query, triplet, pair or row contributes to the metrics.
    pub items: ItemScores,
    /// Some of the items, for people to read.
    pub examples: Examples,
}

impl EvalOutput {
    fn new(items: ItemScores, examples: Examples) -> Self {
        Self { scores: items.scores(), items, examples }
    }
}

impl EvalSet {
    /// Reads a set into memory. By default its name is that of its folder or file without endings, and its
    /// kind the one that its columns imply.
    ///
    /// `kind: loss` takes the loss, the batch size and the number of negatives from `config`; other kinds do
    /// not use it.
    ///
    /// # Errors
    /// There is no such set; a row is malformed; the qrels name an id that has no text; the corpus has one
    /// document.
    pub fn open(set: &EvaluationSet, config: &Config) -> Result<Self> {
        let path = &hub::data_file(&set.path)?;
        if !path.exists() {
            return Err(Error::file(path, "no such evaluation set"));
        }
        let kind = match set.kind {
            Some(kind) => kind,
            None => kind_of(path)?,
        };
        let name = if set.name.is_empty() { default_name(path) } else { set.name.clone() };
        Ok(Self { name, kind, task: (EvalSpec::of(kind).open)(path, set, config)? })
    }

    /// The name of the set, with which the names of its metrics begin.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is measured.
    pub fn kind(&self) -> EvaluationKind {
        self.kind
    }

    /// Embeds the set's texts and computes the metrics.
    ///
    /// # Errors
    /// As [`Embedder::encode`].
    pub fn evaluate(&self, embedder: &Embedder) -> Result<EvalOutput> {
        let mut output = self.task.evaluate(embedder)?;
        output.scores =
            output.scores.into_iter().map(|(metric, score)| (self.metric_name(&metric), score)).collect();
        Ok(output)
    }

    /// The names in [`EvalOutput::scores`], in their order.
    pub fn metric_names(&self) -> impl Iterator<Item = String> {
        (EvalSpec::of(self.kind).metric_names)().into_iter().map(|metric| self.metric_name(&metric))
    }

    /// The metric to look at first: `scifact_cosine_ndcg@10`.
    pub fn primary_metric(&self) -> String {
        self.metric_name(EvalSpec::of(self.kind).primary_metric)
    }

    fn metric_name(&self, metric: &str) -> String {
        format!("{}_{metric}", self.name)
    }

    /// What its items are: `queries`.
    pub fn item_noun(&self) -> &'static str {
        EvalSpec::of(self.kind).items
    }

    /// Adds a row to sentence-transformers' CSV file for this set in `folder`, if it has one for the set's
    /// kind. Epoch and steps are −1, which is what it writes outside of a training.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append_csv(&self, folder: &Path, scores: &Scores) -> Result<()> {
        let Some(CsvFile { prefix, columns }) = &EvalSpec::of(self.kind).csv else { return Ok(()) };
        let path = folder.join(format!("{prefix}_{}_results.csv", self.name));
        append_csv_row(&path, &self.name, &columns(), scores)
    }
}

/// The kind of a set by its columns, as training infers it: scored pairs are similarity, other rows and
/// folders retrieval.
fn kind_of(path: &Path) -> Result<EvaluationKind> {
    if path.is_dir() {
        return Ok(EvaluationKind::Retrieval);
    }
    match reader::kind_of(path)? {
        Ok(RowKind::Similarity) => Ok(EvaluationKind::Similarity),
        Ok(RowKind::Labelled) => Err(Error::file(
            path,
            "has labelled rows (a text and a label), for which there is no metric\n\
             hint: `kind: loss` computes the training loss on them",
        )),
        // If the columns are ambiguous, reading them as pairs gives an error that says so.
        Ok(RowKind::Pairs | RowKind::Triplets) | Err(_) => Ok(EvaluationKind::Retrieval),
    }
}

/// Refuses a folder, for a kind whose sets are files.
fn expect_file(path: &Path, kind: EvaluationKind) -> Result<()> {
    if path.is_dir() {
        return Err(Error::file(path, format!("is a folder; a set of kind {kind} is a file of rows")));
    }
    Ok(())
}

/// Adds a row to a CSV file. `columns` are its headings, each with the metric of the set `name`
/// below it.
fn append_csv_row(path: &Path, name: &str, columns: &[(String, String)], scores: &Scores) -> Result<()> {
    let mut text = String::new();
    if !path.exists() {
        let headings: Vec<_> = columns.iter().map(|(heading, _)| heading.as_str()).collect();
        text = format!("epoch,steps,{}\n", headings.join(","));
    }
    text.push_str("-1,-1");
    for (_, metric) in columns {
        let score = scores.get(&format!("{name}_{metric}")).unwrap_or(f64::NAN);
        text.push_str(&if score.is_nan() { ",nan".to_owned() } else { format!(",{score:?}") });
    }
    text.push('\n');
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(Error::write("write", path))
}

/// The name of a file or folder without its endings: `data/qa/pairs.en.jsonl.gz` → `pairs.en`.
fn default_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if path.is_file() {
        return reader::stem(&path);
    }
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, kind: Option<EvaluationKind>) -> Result<EvalSet> {
        let set = EvaluationSet { path: path.to_owned(), kind, ..EvaluationSet::default() };
        EvalSet::open(&set, &Config::default())
    }

    #[test]
    fn the_csv_has_a_heading_once_and_a_row_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs.en.jsonl");
        let rows = "{\"query\": \"q\", \"positive\": \"p\"}\n{\"query\": \"r\", \"positive\": \"o\"}\n";
        std::fs::write(&path, rows).unwrap();
        let set = open(&path, None).unwrap();
        assert_eq!((set.name(), set.primary_metric().as_str()), ("pairs.en", "pairs.en_cosine_ndcg@10"));
        let scores: Scores =
            [("pairs.en_cosine_accuracy@1".to_owned(), 1.0), ("pairs.en_cosine_ndcg@10".into(), 0.25)]
                .into_iter()
                .collect();
        set.append_csv(folder.path(), &scores).unwrap();
        set.append_csv(folder.path(), &scores).unwrap();
        let csv = std::fs::read_to_string(
            folder.path().join("Information-Retrieval_evaluation_pairs.en_results.csv"),
        )
        .unwrap();
        let lines: Vec<_> = csv.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("epoch,steps,cosine-Accuracy@1,"));
        assert!(lines[1].starts_with("-1,-1,1.0,nan,"), "{}", lines[1]);
        assert_eq!(lines[1], lines[2]);
        assert_eq!(lines[0].split(',').count(), lines[1].split(',').count());
    }

    #[test]
    fn a_set_must_be_there_and_of_its_kind() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(&folder.path().join("no"), None).unwrap_err().to_string();
        assert!(error.contains("no such evaluation set"), "{error}");
        let error = open(folder.path(), Some(EvaluationKind::Triplet)).unwrap_err().to_string();
        assert!(error.contains("is a folder; a set of kind triplet"), "{error}");
    }

    #[test]
    fn the_kind_follows_from_the_columns() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            open(&path, None).map(|set| set.kind())
        };
        assert_eq!(kind("pairs.csv", "question,answer\na,b\nc,d\n").unwrap(), EvaluationKind::Retrieval);
        let scored = "sentence1,sentence2,score\na,b,1\nc,d,0\n";
        assert_eq!(kind("scored.csv", scored).unwrap(), EvaluationKind::Similarity);
        let triplets = "{\"query\": \"a\", \"positive\": \"b\", \"negative\": \"c\"}\n\
                        {\"query\": \"d\", \"positive\": \"e\", \"negative\": \"f\"}\n";
        assert_eq!(kind("triplets.jsonl", triplets).unwrap(), EvaluationKind::Retrieval);
        let error = kind("labelled.csv", "text,label\na,1\nb,2\n").unwrap_err().to_string();
        assert!(error.contains("labelled rows") && error.contains("`kind: loss`"), "{error}");
        let error = kind("judged.csv", "question,answer,label\na,b,1\nc,d,0\n").unwrap_err().to_string();
        assert!(error.contains("has a column `label` beside two texts"), "{error}");
    }
}
