//! One data set of the training data: which of its rows are used, and which texts of a row a step uses.

use std::path::PathBuf;

use xxhash_rust::xxh3::xxh3_64;

use super::batch::RowId;
use super::permutation::Permutation;
use super::reader::{self, Source};
use super::row::Row;
use crate::config::{Config, DataSet, LossKind, RowKind};
use crate::{Error, Result, hub};

/// First number of the `purpose` of each [`Permutation`], as in `mixture.rs`.
const SUBSET: u64 = 1;
const WINDOW: u64 = 2;

/// One open data set of `data.train`.
pub struct TrainSet {
    /// The name in messages.
    pub name: String,
    /// The file or folder.
    pub path: PathBuf,
    /// The kind of its rows.
    pub kind: RowKind,
    /// The loss of its rows.
    pub loss: LossKind,
    /// Prompt before each query.
    pub query_prompt: String,
    /// Prompt before each positive and negative.
    pub document_prompt: String,
    /// Number of rows that are used.
    pub samples: u64,
    /// Number of rows per epoch: round(samples · weight).
    pub rows: u64,
    pub(super) source: Source,
    chosen: Subset,
    /// Whether later uses of a row take its other positives and negatives.
    rotates: bool,
    /// With a weight that is not an integer, an epoch uses some of the samples once more than the others.
    /// This permutation spreads them over the file.
    window: Option<Permutation>,
    seed: u64,
    number: u64,
}

/// Which rows of a data set are used.
enum Subset {
    All,
    /// The first `samples` rows of this order.
    First(Permutation),
    /// These, ascending.
    Listed(Vec<u64>),
}

/// A row as one step uses it.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Origin of the row.
    pub row: RowId,
    /// The query.
    pub query: String,
    /// Index in `positives` of the one that this step uses.
    pub positive: usize,
    /// All positives of the row.
    pub positives: Vec<String>,
    /// Negatives that this step uses, at most `data.negatives`.
    pub negatives: Vec<String>,
    /// Scores of the positive and of each negative, if the loss uses them.
    pub scores: Vec<f32>,
    /// Classes of a labelled row and of its negatives.
    pub classes: Option<Classes>,
}

/// Classes of a labelled row and of its negatives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Class of the query and its positive.
    pub own: u32,
    /// Class of each negative.
    pub negatives: Vec<u32>,
}

impl TrainSet {
    pub(super) fn open(config: &Config, index: usize, set: &DataSet) -> Result<Self> {
        let field = |key: &str| format!("data.train.{index}.{key}");
        let path =
            hub::data_file(&set.path).map_err(|error| config.error(&field("path"), error.to_string()))?;
        let asked = set.loss.unwrap_or(config.loss.kind);
        let resolved = DataSet { path, loss: Some(asked), ..set.clone() };
        let source = Source::open(&resolved).map_err(|error| match error {
            Error::Read { path, action: "open", source } if path == set.path => {
                config.error(&field("path"), format!("cannot open {}: {source}", path.display()))
            }
            other => other,
        })?;
        let name = if set.name.is_empty() { reader::stem(&set.path) } else { set.name.clone() };
        let kind = source.kind();
        let loss = set.loss.unwrap_or_else(|| LossKind::for_rows(kind, asked));
        if let Some(wrong) = loss.misfit(kind) {
            let key = if set.loss.is_some() { field("loss") } else { "loss.kind".to_owned() };
            return Err(config.error(&key, format!("data set {name}: {wrong}")));
        }
        if loss.traits().needs_negatives && config.data.negatives == 0 {
            return Err(
                config.error("data.negatives", format!("expected at least 1 for the loss `{loss}`, found 0"))
            );
        }
        let none = config.data.negatives == 0 || (kind != RowKind::Labelled && !source.negatives());
        if loss.traits().in_batch_negatives && !config.loss.in_batch_negatives && none {
            let message = format!(
                "data set {name} has no negatives and loss.in_batch_negatives is false, so its loss would always be 0\n\
                 hint: find negatives with `trainer mine` and set data.negatives, or set loss.in_batch_negatives"
            );
            return Err(config.error("loss.in_batch_negatives", message));
        }
        let dropped = source.dropped_negatives();
        if dropped.negatives > 0 {
            let at = source.error(dropped.first, "the first");
            tracing::warn!(
                "data set {name}: left out {} negatives that are also a positive of their row ({at})",
                dropped.negatives
            );
        }
        let (samples, chosen) = choose(config, index, &name, set.samples, &source);
        let rows = (samples as f64 * set.weight).round() as u64;
        if rows == 0 {
            let message =
                format!("{} × {samples} rows rounds to 0 rows per epoch, expected at least 1", set.weight);
            return Err(config.error(&field("weight"), message));
        }
        let window = (config.data.shuffle && !rows.is_multiple_of(samples))
            .then(|| Permutation::new(samples, config.seed, &[WINDOW, index as u64]));
        Ok(Self {
            name,
            path: set.path.clone(),
            kind,
            loss,
            query_prompt: set.query_prompt.clone(),
            document_prompt: set.document_prompt.clone(),
            samples,
            rows,
            source,
            chosen,
            rotates: config.data.shuffle,
            window,
            seed: config.seed,
            number: index as u64,
        })
    }

    /// The row at place `within` of the set's rows in an epoch.
    pub(super) fn example(&self, dataset: u32, epoch: u64, within: u64, negatives: usize) -> Result<Example> {
        let turn = epoch * self.rows + within;
        // Number of earlier uses of this sample. Without shuffling a row always uses its first positive and
        // negatives.
        let pass = if self.rotates { turn / self.samples } else { 0 };
        let mut sample = turn % self.samples;
        if let Some(window) = &self.window {
            sample = window.at(sample);
        }
        let row = match &self.chosen {
            Subset::All => sample,
            Subset::First(order) => order.at(sample),
            Subset::Listed(rows) => rows[sample as usize],
        };
        let id = RowId { dataset, row };
        let texts = self.source.row(row)?;
        match self.kind {
            RowKind::Labelled => self.labelled(id, texts.query, pass, negatives),
            _ => Ok(plain(id, texts, pass, negatives)),
        }
    }

    /// A labelled row with a positive of its class and `count` negatives of other classes.
    fn labelled(&self, row: RowId, query: String, pass: u64, count: usize) -> Result<Example> {
        let gone = || self.source.error(row.row, "has no class");
        let labels = self.source.labels().ok_or_else(gone)?;
        let drawn = labels.draw(row.row, count, self.seed, self.number, pass);
        let text = |other: u64| Ok::<_, Error>(self.source.row(other)?.query);
        // A file may contain a text twice. A text is its own positive only if all the drawn ones equal it,
        // and never its own negative.
        let mut positive = None;
        for other in drawn.positives {
            let found = text(other)?;
            let same = found == query;
            positive = Some(found);
            if !same {
                break;
            }
        }
        let positive = positive.ok_or_else(gone)?;
        let mut classes = Classes { own: labels.of(row.row), negatives: Vec::new() };
        let mut negatives = Vec::new();
        for other in drawn.negatives {
            if negatives.len() == count {
                break;
            }
            let found = text(other)?;
            if found != query && found != positive && !negatives.contains(&found) {
                classes.negatives.push(labels.of(other));
                negatives.push(found);
            }
        }
        let positives = vec![positive];
        Ok(Example {
            row,
            query,
            positive: 0,
            positives,
            negatives,
            scores: Vec::new(),
            classes: Some(classes),
        })
    }
}

/// A row with its own texts; use number `pass` takes the next of its positives and of its negatives.
fn plain(row: RowId, texts: Row, pass: u64, count: usize) -> Example {
    let Row { query, positives, mut negatives, mut scores, .. } = texts;
    let positive = (pass % positives.len() as u64) as usize;
    if negatives.len() > count {
        let first = (pass % negatives.len() as u64) as usize * count % negatives.len();
        negatives.rotate_left(first);
        negatives.truncate(count);
        if let [_, of_negatives @ ..] = scores.as_mut_slice() {
            of_negatives.rotate_left(first);
            scores.truncate(1 + count);
        }
    }
    Example { row, query, positive, positives, negatives, scores, classes: None }
}

/// The number of rows that are used, and which.
fn choose(config: &Config, index: usize, name: &str, wanted: Option<u64>, source: &Source) -> (u64, Subset) {
    let singleton_rows = source.labels().map_or(0, |labels| labels.singleton_rows());
    if singleton_rows > 0 {
        tracing::warn!(
            "data set {name}: {singleton_rows} rows are the only one of their class and serve as negatives only"
        );
    }
    let all = source.len() - singleton_rows;
    let samples = wanted.unwrap_or(all).min(all);
    if let Some(wanted) = wanted.filter(|wanted| *wanted > samples) {
        tracing::warn!(
            "data set {name}: uses all {samples} rows, fewer than the {wanted} samples of the configuration"
        );
    }
    let set = index as u64;
    let chosen = match source.labels() {
        _ if samples == source.len() => Subset::All,
        Some(labels) => Subset::Listed(labels.sample(samples, config.seed, set)),
        None => {
            let order = Permutation::new(all, config.seed, &[SUBSET, set]);
            if config.data.shuffle {
                Subset::First(order)
            } else {
                let mut rows: Vec<u64> = (0..samples).map(|place| order.at(place)).collect();
                rows.sort_unstable();
                Subset::Listed(rows)
            }
        }
    };
    (samples, chosen)
}

impl Example {
    /// The texts that no other row of the batch may repeat. Negatives drawn for a labelled row are not among
    /// them, because the classes tell of which rows they are negatives.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        let own = [self.query.as_str(), self.positives[self.positive].as_str()];
        let negatives: &[String] = if self.classes.is_some() { &[] } else { &self.negatives };
        own.into_iter().chain(negatives.iter().map(String::as_str))
    }

    /// Hashes of [`Self::texts`].
    pub(super) fn keys(&self) -> Vec<u64> {
        self.texts().map(|text| xxh3_64(text.as_bytes())).collect()
    }
}
