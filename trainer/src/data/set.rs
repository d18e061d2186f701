//! One data set of a mixture: which of its rows are used, and what a step sees of one.

use std::path::PathBuf;

use xxhash_rust::xxh3::xxh3_64;

use super::batch::RowId;
use super::permutation::Permutation;
use super::reader::Source;
use super::row::Row;
use crate::config::{Config, DataSet, LossKind, RowKind};
use crate::{Error, Result, hub};

/// What the orders are drawn for.
const SUBSET: u64 = 1;
const WINDOW: u64 = 2;

/// One data set of the mixture.
pub struct Set {
    /// What it is called.
    pub name: String,
    /// Its file or folder.
    pub path: PathBuf,
    /// What its rows are.
    pub kind: RowKind,
    /// How they are judged.
    pub loss: LossKind,
    /// Put before each query.
    pub query_prompt: String,
    /// Put before each positive and negative.
    pub document_prompt: String,
    /// Rows that are used.
    pub samples: u64,
    /// Rows seen in an epoch: round(samples · weight).
    pub rows: u64,
    pub(super) source: Source,
    chosen: Chosen,
    /// Whether a row's positives and negatives take turns.
    turns: bool,
    /// With a weight that is not whole an epoch sees a window of the samples; this scatters it over the file.
    window: Option<Permutation>,
    seed: u64,
    number: u64,
}

/// Which rows are used.
enum Chosen {
    All,
    /// The first of this order.
    First(Permutation),
    /// These, ascending.
    Listed(Vec<u64>),
}

/// A row as one step sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Where it came from.
    pub row: RowId,
    /// What is searched with.
    pub query: String,
    /// Which of `known` is the positive of this step.
    pub positive: usize,
    /// Every positive of the row.
    pub known: Vec<String>,
    /// The negatives of this step, at most `data.negatives`.
    pub negatives: Vec<String>,
    /// What the data say of the positive and each negative, where the loss asks.
    pub scores: Vec<f32>,
    /// The classes of a labelled row and of its negatives.
    pub classes: Option<Classes>,
}

/// What a labelled row and its negatives are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Of the query and its positive.
    pub own: u32,
    /// Of each negative.
    pub negatives: Vec<u32>,
}

impl Set {
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
        let name = if set.name.is_empty() { plain_name(set) } else { set.name.clone() };
        let kind = source.kind();
        let loss = match (kind, set.loss) {
            (RowKind::Similarity, None) => LossKind::CoSent,
            _ => asked,
        };
        if let Some(wrong) = loss.misfit(kind) {
            let key = if set.loss.is_some() { field("loss") } else { "loss.kind".to_owned() };
            return Err(config.error(&key, format!("data set {name}: {wrong}")));
        }
        if loss.needs_negatives() && config.data.negatives == 0 {
            return Err(
                config.error("data.negatives", format!("expected at least 1 for the loss `{loss}`, found 0"))
            );
        }
        let none = config.data.negatives == 0 || (kind != RowKind::Labelled && !source.negatives());
        if loss == LossKind::InfoNce && !config.loss.in_batch_negatives && none {
            let message = format!(
                "data set {name} has no negatives, and loss.in_batch_negatives is false: its loss would always be 0\n\
                 hint: `trainer mine` finds some, and data.negatives takes them"
            );
            return Err(config.error("loss.in_batch_negatives", message));
        }
        let dropped = source.dropped();
        if dropped.negatives > 0 {
            let at = source.error(dropped.first, "the first");
            tracing::warn!(
                "data set {name}: {} negatives are also a positive of their row and are left out ({at})",
                dropped.negatives
            );
        }
        let (samples, chosen) = choose(config, index, &name, set.samples, &source);
        let rows = (samples as f64 * set.weight).round() as u64;
        if rows == 0 {
            let message = format!("{} of {samples} rows is no row at all", set.weight);
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
            turns: config.data.shuffle,
            window,
            seed: config.seed,
            number: index as u64,
        })
    }

    /// What stands at place `within` of the set's rows in an epoch.
    pub(super) fn example(&self, dataset: u32, epoch: u64, within: u64, negatives: usize) -> Result<Example> {
        let turn = epoch * self.rows + within;
        // How often this sample was seen before: its positives and negatives take turns, but not in the order of the file.
        let pass = if self.turns { turn / self.samples } else { 0 };
        let mut sample = turn % self.samples;
        if let Some(window) = &self.window {
            sample = window.at(sample);
        }
        let row = match &self.chosen {
            Chosen::All => sample,
            Chosen::First(order) => order.at(sample),
            Chosen::Listed(rows) => rows[sample as usize],
        };
        let id = RowId { dataset, row };
        let texts = self.source.row(row)?;
        match self.kind {
            RowKind::Labelled => self.labelled(id, texts.query, pass, negatives),
            _ => Ok(plain(id, texts, pass, negatives)),
        }
    }

    /// A labelled row with others: one of its class, `count` of other classes.
    fn labelled(&self, row: RowId, query: String, pass: u64, count: usize) -> Result<Example> {
        let gone = || self.source.error(row.row, "has lost its class");
        let labels = self.source.labels().ok_or_else(gone)?;
        let drawn = labels.draw(row.row, count, self.seed, self.number, pass);
        let text = |other: u64| Ok::<_, Error>(self.source.row(other)?.query);
        // The same text may stand in the file twice: it is no answer to itself, and no negative of itself either.
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
        let known = vec![positive];
        Ok(Example { row, query, positive: 0, known, negatives, scores: Vec::new(), classes: Some(classes) })
    }
}

/// A row with its own texts, of which some take turns.
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
    Example { row, query, positive, known: positives, negatives, scores, classes: None }
}

/// How many rows are used, and which.
fn choose(config: &Config, index: usize, name: &str, wanted: Option<u64>, source: &Source) -> (u64, Chosen) {
    let lonely = source.labels().map_or(0, |labels| labels.lonely());
    if lonely > 0 {
        tracing::warn!(
            "data set {name}: {lonely} rows are the only ones of their class: they are negatives only"
        );
    }
    let all = source.len() - lonely;
    let samples = wanted.unwrap_or(all).min(all);
    if let Some(wanted) = wanted.filter(|wanted| *wanted > samples) {
        tracing::warn!("data set {name}: {wanted} samples are asked for, all its {samples} rows are used");
    }
    let set = index as u64;
    let chosen = match source.labels() {
        _ if samples == source.len() => Chosen::All,
        Some(labels) => Chosen::Listed(labels.sample(samples, config.seed, set)),
        None => {
            let order = Permutation::new(all, config.seed, &[SUBSET, set]);
            if config.data.shuffle {
                Chosen::First(order)
            } else {
                let mut rows: Vec<u64> = (0..samples).map(|place| order.at(place)).collect();
                rows.sort_unstable();
                Chosen::Listed(rows)
            }
        }
    };
    (samples, chosen)
}

/// The file's name without its endings.
fn plain_name(set: &DataSet) -> String {
    let name = set.path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_owned()
}

impl Example {
    /// The texts that no other row of the batch may have. What was drawn as a negative for a labelled row is not among them: another
    /// might have been, and the classes say whose negative it is.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        let own = [self.query.as_str(), self.known[self.positive].as_str()];
        let negatives: &[String] = if self.classes.is_some() { &[] } else { &self.negatives };
        own.into_iter().chain(negatives.iter().map(String::as_str))
    }

    pub(super) fn keys(&self) -> Vec<u64> {
        self.texts().map(|text| xxh3_64(text.as_bytes())).collect()
    }
}
