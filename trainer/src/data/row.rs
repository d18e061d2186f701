//! One training row, and how it is put together from a file's columns.

use std::collections::BTreeMap;

use crate::config::{Columns, DataSet, LossKind, RowKind};

/// Texts that belong together. None is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// What is searched with; the text of a labelled row; the first text of a similarity row.
    pub query: String,
    /// What answers it, at least one; the second text of a similarity row. A labelled row has none: they are drawn from its class.
    pub positives: Vec<String>,
    /// What does not. None is also a positive.
    pub negatives: Vec<String>,
    /// How similar the two texts of a similarity row are; or, where the loss follows a teacher, its scores of the positive and
    /// each negative.
    pub scores: Vec<f32>,
    /// The class of a labelled row.
    pub label: Option<String>,
    /// Negatives that were left out, because they are also a positive of the row.
    pub dropped: usize,
}

/// What a file has in one column of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// The column is not there, or null.
    Missing,
    Text(String),
    List(Vec<String>),
}

/// Which columns make a row, as indices into the file's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Roles {
    kind: RowKind,
    loss: Option<LossKind>,
    query: usize,
    positives: Vec<usize>,
    negatives: Vec<usize>,
    /// A label, a score or scores: numbers are welcome there.
    value: Option<usize>,
}

/// How columns are understood: what the configuration says, else the usual names.
#[derive(Clone, Debug, Default)]
pub(super) struct Schema {
    columns: Columns,
    kind: Option<RowKind>,
    loss: Option<LossKind>,
    /// Whether every row must be an answer: a column that may say otherwise is refused.
    answers: bool,
}

const QUERY: [&str; 5] = ["query", "anchor", "question", "premise", "sentence1"];
const POSITIVE: [&str; 8] =
    ["positive", "positives", "pos", "answer", "document", "passage", "hypothesis", "sentence2"];
const NEGATIVE: [&str; 3] = ["negatives", "negative", "neg"];
const TEXT: [&str; 2] = ["text", "sentence"];
const LABEL: [&str; 2] = ["label", "labels"];
const FIRST: [&str; 5] = ["sentence1", "s1", "text1", "query", "anchor"];
const SECOND: [&str; 6] = ["sentence2", "s2", "text2", "positive", "document", "passage"];
const SCORE: [&str; 4] = ["score", "similarity", "similarityscore", "label"];
const TEACHER: [&str; 5] = ["scores", "score", "teacherscores", "labels", "label"];

impl Schema {
    pub(super) fn new(set: &DataSet) -> Self {
        Self { columns: set.columns.clone(), kind: set.kind, loss: set.loss, answers: false }
    }

    /// For rows of which each is an answer, as a command line names them.
    pub(super) fn answers(kind: RowKind) -> Self {
        Self { kind: Some(kind), answers: true, ..Self::default() }
    }

    /// For the rows after one of this kind: a file has rows of one kind.
    pub(super) fn of_kind(mut self, kind: RowKind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// What the rows are, where that is settled.
    pub(super) fn kind(&self) -> Option<RowKind> {
        self.kind
    }

    /// Finds the parts of a row among a file's column names.
    pub(super) fn roles(&self, names: &[&str]) -> Result<Roles, String> {
        let Self { columns, loss, .. } = self;
        let kind = self.kind_by(names)?;
        let one = |part: &str, chosen: &Option<String>, aliases: &[&str]| match chosen {
            Some(name) => named(part, name, names),
            None => usual(part, aliases, names),
        };
        let roles = |query, positives, negatives, value| Roles {
            kind,
            loss: *loss,
            query,
            positives,
            negatives,
            value,
        };
        match kind {
            RowKind::Labelled => {
                let text = one("text", &columns.text, &TEXT)?;
                let label = one("label", &columns.label, &LABEL)?;
                return Ok(roles(text, Vec::new(), Vec::new(), Some(label)));
            }
            RowKind::Similarity => {
                let first = one("sentence1", &columns.sentence1, &FIRST)?;
                let second = one("sentence2", &columns.sentence2, &SECOND)?;
                let score = one("score", &columns.score, &SCORE)?;
                return Ok(roles(first, vec![second], Vec::new(), Some(score)));
            }
            RowKind::Pairs | RowKind::Triplets => {}
        }
        let query = one("query", &columns.query, &QUERY)?;
        let positives = match &columns.positive {
            Some(chosen) => all_named("positive", &chosen.0, names)?,
            None => vec![usual("positive", &POSITIVE, names)?],
        };
        let negatives = match &columns.negatives {
            Some(chosen) => chosen.0.iter().filter_map(|name| position(name, names)).collect(),
            None => negatives(names)?,
        };
        if kind == RowKind::Triplets && negatives.is_empty() {
            return Err(format!("`kind: triplets` needs a column of negatives, {}", found(names)));
        }
        let value = match loss {
            Some(loss) if loss.distils() => Some(one("score", &columns.score, &TEACHER)?),
            _ => None,
        };
        Ok(roles(query, positives, negatives, value))
    }

    /// What the configuration says, else what the columns look like.
    fn kind_by(&self, names: &[&str]) -> Result<RowKind, String> {
        let Columns { query, positive, text, label, sentence1, sentence2, score, .. } = &self.columns;
        let distils = self.loss.is_some_and(LossKind::distils);
        let any = |aliases: &[&str]| names.iter().any(|name| aliases.iter().any(|alias| is(name, alias)));
        let column = |aliases: &[&str]| names.iter().find(|name| aliases.iter().any(|alias| is(name, alias)));
        if let Some(kind) = self.kind {
            let scored = any(&FIRST[..3]) && any(&SECOND[..3]);
            return match column(if scored { &["label", "score"] } else { &["label"] }) {
                Some(name) if self.answers => Err(format!(
                    "has a column `{name}` beside two texts, which may say that one does not answer the other\n\
                     hint: keep the rows that do, without that column"
                )),
                _ => Ok(kind),
            };
        }
        if text.is_some() || label.is_some() {
            return Ok(RowKind::Labelled);
        }
        if sentence1.is_some() || sentence2.is_some() || score.is_some() && !distils {
            return Ok(RowKind::Similarity);
        }
        if distils || query.is_some() && positive.is_some() {
            return Ok(RowKind::Pairs);
        }
        if self.loss == Some(LossKind::CoSent) || any(&FIRST[..3]) && any(&SECOND[..3]) && any(&SCORE[..3]) {
            return Ok(RowKind::Similarity);
        }
        if any(&TEXT) && any(&LABEL) && !any(&QUERY) && !any(&POSITIVE) {
            return Ok(RowKind::Labelled);
        }
        // Beside negatives a score is only what they were chosen by.
        let alone =
            self.columns.negatives.is_none() && negatives(names).is_ok_and(|negatives| negatives.is_empty());
        match column(if alone { &["label", "score"] } else { &["label"] }) {
            Some(name) => Err(format!(
                "has a column `{name}` beside two texts, which may mean several things\n\
                 hint: `kind: pairs` in the configuration takes every row as a pair, whatever its {name}; \
                 `kind: similarity` takes it as the score of how similar they are"
            )),
            None => Ok(RowKind::Pairs),
        }
    }
}

impl Schema {
    /// As [`Self::roles`], for names that hold for all rows: every column that the configuration names must be there.
    pub(super) fn header(&self, names: &[&str]) -> Result<Roles, String> {
        for (part, chosen) in [("positive", &self.columns.positive), ("negatives", &self.columns.negatives)] {
            for name in chosen.iter().flat_map(|chosen| &chosen.0) {
                named(part, name, names)?;
            }
        }
        self.roles(names)
    }

    /// What is wrong where no row at all has negatives.
    pub(super) fn without_negatives(&self) -> Result<(), String> {
        match &self.columns.negatives {
            Some(chosen) => Err(format!(
                "no row has a column `{}`, which the configuration names for the negatives",
                chosen.0.join("` or `")
            )),
            None => Ok(()),
        }
    }
}

/// What rows with these columns are, if nothing else is said.
pub(super) fn usual_kind(names: &[&str]) -> Result<RowKind, String> {
    Schema::default().kind_by(names)
}

/// The columns of the two texts of a scored pair and of its score.
pub(crate) fn similarity_columns(names: &[&str]) -> Result<[usize; 3], String> {
    let schema = Schema { kind: Some(RowKind::Similarity), ..Schema::default() };
    let Roles { query, positives, value, .. } = schema.roles(names)?;
    match (positives.as_slice(), value) {
        ([second], Some(score)) => Ok([query, *second, score]),
        _ => Err(format!("has no columns of two texts and a score; {}", found(names))),
    }
}

/// The columns that hold a row's texts, whatever its kind: what a model may see of it.
pub(crate) fn text_columns(names: &[&str]) -> Result<Vec<usize>, String> {
    let pair = Schema { kind: Some(RowKind::Pairs), ..Schema::default() }.roles(names);
    pair.map(|roles| [vec![roles.query], roles.positives, roles.negatives].concat()).or_else(|wrong| {
        let alone = ["text", "sentence", "s1", "s2", "text1", "text2"];
        let places = (0..names.len()).filter(|&i| alone.iter().any(|alias| is(names[i], alias)));
        let places: Vec<usize> = places.collect();
        if places.is_empty() { Err(wrong) } else { Ok(places) }
    })
}

/// Whether a file's `name` is the usual `alias`, in any case and spelling of its words' gaps.
fn is(name: &str, alias: &str) -> bool {
    name.trim()
        .chars()
        .filter(|c| !matches!(c, '_' | '-' | ' '))
        .map(|c| c.to_ascii_lowercase())
        .eq(alias.chars())
}

fn position(wanted: &str, names: &[&str]) -> Option<usize> {
    names.iter().position(|name| *name == wanted)
}

fn found(names: &[&str]) -> String {
    if names.is_empty() { "found no columns".to_owned() } else { format!("found {}", names.join(", ")) }
}

fn named(part: &str, wanted: &str, names: &[&str]) -> Result<usize, String> {
    position(wanted, names).ok_or_else(|| {
        format!("has no column `{wanted}`, which the configuration names for the {part}; {}", found(names))
    })
}

fn all_named(part: &str, wanted: &[String], names: &[&str]) -> Result<Vec<usize>, String> {
    // One of several may be absent from a row, not all.
    let places: Vec<usize> = wanted.iter().filter_map(|name| position(name, names)).collect();
    match (places.is_empty(), wanted) {
        (false, _) => Ok(places),
        (true, [one, ..]) => named(part, one, names).map(|place| vec![place]),
        (true, []) => Err(format!("the configuration names no column for the {part}; {}", found(names))),
    }
}

/// The one column with a usual name; the first of `aliases` is the part's own name and wins over the others.
fn usual(part: &str, aliases: &[&str], names: &[&str]) -> Result<usize, String> {
    if let Some(place) = names.iter().position(|name| is(name, aliases[0])) {
        return Ok(place);
    }
    let places: Vec<usize> =
        (0..names.len()).filter(|i| aliases.iter().any(|alias| is(names[*i], alias))).collect();
    match places.as_slice() {
        [place] => Ok(*place),
        [] => Err(format!(
            "has no column for the {part}, expected one of {}; {}\n\
             hint: `columns: {{{part}: NAME}}` in the configuration names another",
            aliases.join(", "),
            found(names)
        )),
        several => Err(format!(
            "has several columns that could be the {part}: {}\n\
             hint: `columns: {{{part}: NAME}}` in the configuration says which",
            several.iter().map(|i| names[*i]).collect::<Vec<_>>().join(", ")
        )),
    }
}

/// `negatives`, `negative` or `neg`, else `negative_1`, `negative_2`, … in the order of their numbers.
fn negatives(names: &[&str]) -> Result<Vec<usize>, String> {
    if names.iter().any(|name| NEGATIVE.iter().any(|alias| is(name, alias))) {
        return usual("negatives", &NEGATIVE, names).map(|place| vec![place]);
    }
    let numbered: BTreeMap<u64, usize> = names
        .iter()
        .enumerate()
        .filter_map(|(i, name)| {
            let bare = name.trim().to_ascii_lowercase().replace(['_', '-', ' '], "");
            Some((bare.strip_prefix("negative").or(bare.strip_prefix("neg"))?.parse().ok()?, i))
        })
        .collect();
    Ok(numbered.into_values().collect())
}

impl Roles {
    /// What the rows are.
    pub(super) fn kind(&self) -> RowKind {
        self.kind
    }

    /// Whether there are columns of negatives.
    pub(super) fn has_negatives(&self) -> bool {
        !self.negatives.is_empty()
    }

    /// Whether a column holds negatives.
    pub(super) fn negatives(&self, column: usize) -> bool {
        self.negatives.contains(&column)
    }

    /// Whether a column holds a label or scores, which may be numbers.
    pub(super) fn value(&self, column: usize) -> bool {
        self.value == Some(column)
    }

    /// Puts a row together from its cells, each taken once.
    pub(super) fn row(
        &self,
        names: &[&str],
        mut cell: impl FnMut(usize) -> Result<Cell, String>,
    ) -> Result<Row, String> {
        let mut one = |column: usize| match cell(column)? {
            Cell::Text(text) => check_text(&text, names[column]).map(|()| text),
            Cell::Missing => Err(format!("`{}` is missing", names[column])),
            Cell::List(_) => Err(format!("`{}` is a list, expected one text", names[column])),
        };
        let mut row = Row { query: one(self.query)?, ..Row::default() };
        if self.kind == RowKind::Labelled {
            row.label = self.value.map(one).transpose()?;
            return Ok(row);
        }
        let mut texts = |columns: &[usize]| -> Result<Vec<String>, String> {
            let mut all = Vec::new();
            for column in columns {
                let before = all.len();
                match cell(*column)? {
                    Cell::Text(text) => all.push(text),
                    Cell::List(texts) => all.extend(texts),
                    Cell::Missing => {}
                }
                for text in &all[before..] {
                    check_text(text, names[*column])?;
                }
            }
            Ok(all)
        };
        row.positives = texts(&self.positives)?;
        if row.positives.is_empty() {
            return Err(format!("has no positive: `{}` is missing or empty", names[self.positives[0]]));
        }
        row.negatives = texts(&self.negatives)?;
        if let Some(column) = self.value {
            let (name, positives, negatives) = (names[column], row.positives.len(), row.negatives.len());
            row.scores = scores(name, cell(column)?)?;
            match row.scores.len() {
                _ if positives > 1 => {
                    return Err(format!("has {positives} positives, where `{name}` scores one"));
                }
                count if count == 1 + negatives => {}
                // Differences between the positive's score and the negatives'.
                count if count == negatives && self.kind != RowKind::Similarity => {
                    row.scores = [0.0].into_iter().chain(row.scores.iter().map(|margin| -margin)).collect();
                }
                count if self.kind == RowKind::Similarity => {
                    return Err(format!("`{name}` has {count} numbers, expected one"));
                }
                count => {
                    return Err(format!(
                        "`{name}` has {count} numbers for a positive and {negatives} negatives, expected {} scores or {negatives} differences",
                        negatives + 1
                    ));
                }
            }
        }
        self.drop_positives(&mut row);
        match self.loss {
            Some(loss)
                if self.kind != RowKind::Similarity && loss.needs_negatives() && row.negatives.is_empty() =>
            {
                Err(match row.dropped {
                    0 => format!("has no negative, which the loss `{loss}` needs"),
                    _ => format!("has no negative but its positive, and the loss `{loss}` needs one"),
                })
            }
            _ => Ok(row),
        }
    }

    /// Leaves out negatives that are also positives.
    fn drop_positives(&self, row: &mut Row) {
        let keep: Vec<bool> = row.negatives.iter().map(|text| !row.positives.contains(text)).collect();
        row.dropped = keep.iter().filter(|keep| !**keep).count();
        if row.dropped > 0 {
            let mut of_text = keep.iter();
            row.negatives.retain(|_| of_text.next() == Some(&true));
            let mut of_score = [true].iter().chain(&keep);
            row.scores.retain(|_| of_score.next() == Some(&true));
        }
    }
}

/// A number, or a list of them, all finite.
fn scores(name: &str, cell: Cell) -> Result<Vec<f32>, String> {
    let number = |text: &str| match text.trim().parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(number) => Err(format!("`{name}` is {number}, expected a finite number")),
        Err(_) => Err(format!("`{name}` is `{text}`, expected a number")),
    };
    match cell {
        Cell::Missing => Err(format!("`{name}` is missing")),
        Cell::List(texts) => texts.iter().map(|text| number(text)).collect(),
        Cell::Text(text) => match text.trim().strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(list) => list.split(',').map(number).collect(),
            None => Ok(vec![number(&text)?]),
        },
    }
}

fn check_text(text: &str, name: &str) -> Result<(), String> {
    if text.trim().is_empty() { Err(format!("`{name}` has an empty text")) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
