//! How good a model is, on sets of texts kept apart for that.
//!
//! Metrics, their names and the CSV files are those of sentence-transformers 6.

mod bootstrap;
pub mod compare;
pub mod embed;
mod item_scores;
pub mod nano;
pub(crate) mod open;
mod pairwise;
pub mod rankings;
mod retrieval;
pub mod samples;

#[cfg(test)]
mod golden;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use serde::ser::{Serialize, SerializeMap, Serializer};

pub use self::bootstrap::{Bootstrap, CONFIDENCE, confidence_interval};
pub use self::item_scores::ItemScores;
use self::pairwise::{Similarity, Triplets};
use self::rankings::Ranking;
use self::retrieval::Retrieval;
use crate::config::{EvaluationKind, EvaluationSet};
use crate::eval::embed::{Embedder, Role};
use crate::{Error, Result, hub};

/// Texts that a model is measured on.
#[derive(Debug)]
pub struct EvalSet {
    name: String,
    task: Task,
}

#[derive(Debug)]
enum Task {
    Retrieval(Retrieval),
    Triplets(Triplets),
    Similarity(Similarity),
}

/// What a model does on a set.
#[derive(Clone, Debug)]
pub struct EvalOutput {
    /// The metrics by name. [`EvalSet::evaluate`] puts the set's name before each.
    pub scores: Scores,
    /// What each query, triplet or pair adds to them.
    pub items: ItemScores,
    /// What a few queries find; nothing but for retrieval.
    pub rankings: Vec<Ranking>,
}

impl EvalOutput {
    fn new(items: ItemScores, rankings: Vec<Ranking>) -> Self {
        Self { scores: items.scores(), items, rankings }
    }
}

impl EvalSet {
    /// Reads a set into memory. Without a name it gets that of its folder or file.
    ///
    /// # Errors
    /// Nothing there, a malformed row, an id in the qrels that has no text, a corpus of one document.
    pub fn open(set: &EvaluationSet) -> Result<Self> {
        let path = &hub::data_file(&set.path)?;
        if !path.exists() {
            return Err(Error::file(path, "no such evaluation set"));
        }
        let task = match set.kind {
            EvaluationKind::Retrieval if path.is_dir() => {
                Task::Retrieval(open::beir(path, set.split.as_deref())?)
            }
            EvaluationKind::Retrieval => Task::Retrieval(open::pairs(path)?),
            kind if path.is_dir() => {
                return Err(Error::file(
                    path,
                    format!("is a folder; a set of kind {kind} is a file of rows"),
                ));
            }
            EvaluationKind::Triplet => Task::Triplets(open::triplets(path)?),
            EvaluationKind::Similarity => Task::Similarity(open::similarity(path)?),
        };
        let name = if set.name.is_empty() { default_name(path) } else { set.name.clone() };
        Ok(Self { name, task })
    }

    /// The first part of its metrics' names.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Embeds the set's texts and measures.
    ///
    /// # Errors
    /// As [`Embedder::encode`].
    pub fn evaluate(&self, embedder: &Embedder) -> Result<EvalOutput> {
        let mut output = match &self.task {
            Task::Retrieval(set) => {
                let mut documents = embedder.progress(Role::Document, set.documents());
                set.evaluate(|texts, role| match role {
                    Role::Document => embedder.encode_with_progress(texts, role, &mut documents),
                    _ => embedder.encode(texts, role),
                })
            }
            Task::Triplets(set) => set.evaluate(|texts, role| embedder.encode(texts, role)),
            Task::Similarity(set) => set.evaluate(|texts, role| embedder.encode(texts, role)),
        }?;
        let named = |(metric, score)| (format!("{}_{metric}", self.name), score);
        output.scores = output.scores.into_iter().map(named).collect();
        Ok(output)
    }

    /// What [`EvalOutput::scores`] will hold.
    pub fn metric_names(&self) -> impl Iterator<Item = String> {
        let names = match &self.task {
            Task::Retrieval(_) => retrieval::names(),
            Task::Triplets(_) => Triplets::names(),
            Task::Similarity(_) => Similarity::names().into(),
        };
        names.into_iter().map(|metric| format!("{}_{metric}", self.name))
    }

    /// What is counted in it.
    pub fn item_noun(&self) -> &'static str {
        match &self.task {
            Task::Retrieval(_) => "queries",
            Task::Triplets(_) => "triplets",
            Task::Similarity(_) => "pairs",
        }
    }

    /// The metric that stands for the others.
    pub fn primary_metric(&self) -> String {
        let metric = match &self.task {
            Task::Retrieval(_) => "cosine_ndcg@10",
            Task::Triplets(_) => "max_accuracy",
            Task::Similarity(_) => "spearman_cosine",
        };
        format!("{}_{metric}", self.name)
    }

    /// Adds a row to sentence-transformers' CSV file for this set in `folder`; epoch and steps are −1, as they are there
    /// outside of a training.
    pub fn append_csv(&self, folder: &Path, scores: &Scores) -> Result<()> {
        let (file, columns) = match &self.task {
            Task::Retrieval(_) => ("Information-Retrieval_evaluation", retrieval::columns()),
            Task::Triplets(_) => ("triplet_evaluation", Triplets::columns()),
            Task::Similarity(_) => ("similarity_evaluation", Similarity::columns()),
        };
        append_csv_row(
            &folder.join(format!("{file}_{}_results.csv", self.name)),
            &self.name,
            &columns,
            scores,
        )
    }
}

/// Adds a row to a CSV file: `columns` are its headings, each with the metric of `name` that stands below it.
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
        .map_err(Error::io("write", path))
}

/// `data/qa/pairs.en.jsonl.gz` → `pairs.en`.
fn default_name(path: &Path) -> String {
    let name =
        path.canonicalize().ok().as_deref().unwrap_or(path).file_name().unwrap_or_default().to_os_string();
    let mut name = name.to_string_lossy().into_owned();
    if path.is_file() {
        for ending in [".gz", ".zst", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"] {
            name.truncate(name.strip_suffix(ending).map_or(name.len(), str::len));
        }
    }
    name
}

/// Metrics by name, in the order in which they are shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores(Vec<(String, f64)>);

impl Scores {
    /// The metric of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.iter().find(|(other, _)| *other == name).map(|(_, score)| score)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, score)| (name.as_str(), *score))
    }
}

impl FromIterator<(String, f64)> for Scores {
    fn from_iter<I: IntoIterator<Item = (String, f64)>>(scores: I) -> Self {
        Self(scores.into_iter().collect())
    }
}

impl Extend<(String, f64)> for Scores {
    fn extend<I: IntoIterator<Item = (String, f64)>>(&mut self, scores: I) {
        self.0.extend(scores);
    }
}

impl IntoIterator for Scores {
    type Item = (String, f64);
    type IntoIter = std::vec::IntoIter<(String, f64)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// One JSON object; what is no number becomes null.
impl Serialize for Scores {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, score) in self.iter() {
            map.serialize_entry(name, &score)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(path: &Path, kind: EvaluationKind) -> Result<EvalSet> {
        EvalSet::open(&EvaluationSet { path: path.to_owned(), kind, ..EvaluationSet::default() })
    }

    #[test]
    fn scores_are_an_object_in_their_order() {
        let scores: Scores = [("z".to_owned(), 0.5), ("a".into(), f64::NAN)].into_iter().collect();
        assert_eq!(serde_json::to_string(&scores).unwrap(), r#"{"z":0.5,"a":null}"#);
        assert_eq!(scores.get("z"), Some(0.5));
        assert_eq!(scores.get("b"), None);
    }

    #[test]
    fn the_csv_has_a_heading_once_and_a_row_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs.en.jsonl");
        let rows = "{\"query\": \"q\", \"positive\": \"p\"}\n{\"query\": \"r\", \"positive\": \"o\"}\n";
        std::fs::write(&path, rows).unwrap();
        let set = set(&path, EvaluationKind::Retrieval).unwrap();
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
        let error = set(&folder.path().join("no"), EvaluationKind::Retrieval).unwrap_err().to_string();
        assert!(error.contains("no such evaluation set"), "{error}");
        let error = set(folder.path(), EvaluationKind::Triplet).unwrap_err().to_string();
        assert!(error.contains("is a folder; a set of kind triplet"), "{error}");
    }
}
