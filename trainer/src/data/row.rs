//! One training row, and how it is assembled from the columns of a file.

use std::collections::BTreeMap;

use crate::config::{Columns, DataSet, LossKind, RowKind, RowScores};

/// The texts of one row; none is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// The query; the text of a labelled row; the first text of a similarity row.
    pub query: String,
    /// Texts that answer the query, at least one; the second text of a similarity row. Empty for a labelled
    /// row, whose positives are drawn from its class.
    pub positives: Vec<String>,
    /// Texts that do not answer the query. None is also a positive.
    pub negatives: Vec<String>,
    /// Similarity of the two texts of a similarity row; or, for distillation, a teacher's scores of the
    /// positive and of each negative.
    pub scores: Vec<f32>,
    /// The class of a labelled row.
    pub label: Option<String>,
    /// Number of negatives left out because they are also a positive of the row.
    pub dropped: usize,
}

/// The value of one column in one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// The column is absent or null.
    Missing,
    Text(String),
    List(Vec<String>),
}

/// The columns of a row's parts, as indices of the file's column names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Roles {
    kind: RowKind,
    loss: Option<LossKind>,
    query: usize,
    positives: Vec<usize>,
    negatives: Vec<usize>,
    /// Column of the label, the score or the scores, which may be numbers.
    value: Option<usize>,
}

/// Finds the parts of rows among column names: by the configuration, else by well-known names.
#[derive(Clone, Debug, Default)]
pub(super) struct Schema {
    columns: Columns,
    kind: Option<RowKind>,
    loss: Option<LossKind>,
    /// Whether every positive must answer its query, so that a column of labels or scores is refused.
    answers: bool,
}

pub(super) const QUERY: [&str; 5] = ["query", "anchor", "question", "premise", "sentence1"];
pub(super) const POSITIVE: [&str; 8] =
    ["positive", "positives", "pos", "answer", "document", "passage", "hypothesis", "sentence2"];
pub(super) const NEGATIVE: [&str; 3] = ["negatives", "negative", "neg"];
pub(super) const TEXT: [&str; 2] = ["text", "sentence"];
pub(super) const LABEL: [&str; 2] = ["label", "labels"];
// Columns with one of the first three names of each of the next three lists make the rows scored pairs. The
// last names of the lists occur in other kinds of rows, too.
pub(super) const FIRST: [&str; 5] = ["sentence1", "s1", "text1", "query", "anchor"];
pub(super) const SECOND: [&str; 6] = ["sentence2", "s2", "text2", "positive", "document", "passage"];
pub(super) const SCORE: [&str; 4] = ["score", "similarity", "similarityscore", "label"];
const TEACHER: [&str; 5] = ["scores", "score", "teacherscores", "labels", "label"];

impl Schema {
    pub(super) fn new(set: &DataSet) -> Self {
        Self { columns: set.columns.clone(), kind: set.kind, loss: set.loss, answers: false }
    }

    /// For rows of a known kind in which every positive answers its query.
    pub(super) fn answers(kind: RowKind) -> Self {
        Self { kind: Some(kind), answers: true, ..Self::default() }
    }

    /// The same schema for the other rows of a file whose first row is of this kind.
    pub(super) fn of_kind(mut self, kind: RowKind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// The kind of the rows, if it is known.
    pub(super) fn kind(&self) -> Option<RowKind> {
        self.kind
    }

    /// Finds the columns of a row's parts among column names.
    ///
    /// # Errors
    /// A column is missing or ambiguous.
    pub(super) fn roles(&self, names: &[&str]) -> Result<Roles, String> {
        let Self { columns, loss, .. } = self;
        let kind = self.infer_kind(names)?;
        let one = |part: &str, chosen: &Option<String>, aliases: &[&str]| match chosen {
            Some(name) => by_name(part, name, names),
            None => by_alias(part, aliases, names),
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
            Some(chosen) => all_by_name("positive", &chosen.0, names)?,
            None => vec![by_alias("positive", &POSITIVE, names)?],
        };
        let negatives = match &columns.negatives {
            Some(chosen) => chosen.0.iter().filter_map(|name| position(name, names)).collect(),
            None => negative_columns(names)?,
        };
        if kind == RowKind::Triplets && negatives.is_empty() {
            return Err(format!("`kind: triplets` needs a column of negatives, {}", found_columns(names)));
        }
        let value = match loss {
            Some(loss) if loss.traits().scores == RowScores::Teacher => {
                Some(one("score", &columns.score, &TEACHER)?)
            }
            _ => None,
        };
        Ok(roles(query, positives, negatives, value))
    }

    /// The kind of rows: as configured, else by the column names.
    fn infer_kind(&self, names: &[&str]) -> Result<RowKind, String> {
        let Columns { query, positive, text, label, sentence1, sentence2, score, .. } = &self.columns;
        let scores = self.loss.map(|loss| loss.traits().scores);
        let distils = scores == Some(RowScores::Teacher);
        let any =
            |aliases: &[&str]| names.iter().any(|name| aliases.iter().any(|alias| is_alias(name, alias)));
        let column =
            |aliases: &[&str]| names.iter().find(|name| aliases.iter().any(|alias| is_alias(name, alias)));
        if let Some(kind) = self.kind {
            let scored = any(&FIRST[..3]) && any(&SECOND[..3]);
            return match column(if scored { &["label", "score"] } else { &["label"] }) {
                Some(name) if self.answers => Err(format!(
                    "has a column `{name}` beside two texts, which looks like scored pairs\n\
                     hint: use kind `similarity` for scored pairs; for pairs and triplets keep the positive rows and drop the \
                     column"
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
        if scores == Some(RowScores::Pair) || any(&FIRST[..3]) && any(&SECOND[..3]) && any(&SCORE[..3]) {
            return Ok(RowKind::Similarity);
        }
        if any(&TEXT) && any(&LABEL) && !any(&QUERY) && !any(&POSITIVE) {
            return Ok(RowKind::Labelled);
        }
        // Next to negatives, a score is the one by which they were mined.
        let alone = self.columns.negatives.is_none()
            && negative_columns(names).is_ok_and(|negatives| negatives.is_empty());
        match column(if alone { &["label", "score"] } else { &["label"] }) {
            Some(name) => Err(format!(
                "has a column `{name}` beside two texts, which is ambiguous\n\
                 hint: `kind: similarity` uses it as the similarity of the texts; `kind: pairs` ignores it and uses every row \
                 as a positive pair"
            )),
            None => Ok(RowKind::Pairs),
        }
    }
}

impl Schema {
    /// Like [`Self::roles`], for a header: every column that the configuration names must exist.
    pub(super) fn header(&self, names: &[&str]) -> Result<Roles, String> {
        for (part, chosen) in [("positive", &self.columns.positive), ("negatives", &self.columns.negatives)] {
            for name in chosen.iter().flat_map(|chosen| &chosen.0) {
                by_name(part, name, names)?;
            }
        }
        self.roles(names)
    }

    /// Checks a file without any negatives.
    ///
    /// # Errors
    /// The configuration names a column for them.
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

/// The kind of rows with these columns, where nothing is configured.
pub(super) fn usual_kind(names: &[&str]) -> Result<RowKind, String> {
    Schema::default().infer_kind(names)
}

/// The columns of the two texts of a scored pair and of its score.
pub(crate) fn similarity_columns(names: &[&str]) -> Result<[usize; 3], String> {
    let schema = Schema { kind: Some(RowKind::Similarity), ..Schema::default() };
    let Roles { query, positives, value, .. } = schema.roles(names)?;
    match (positives.as_slice(), value) {
        ([second], Some(score)) => Ok([query, *second, score]),
        _ => Err(format!("has no columns of two texts and a score; {}", found_columns(names))),
    }
}

/// The columns that hold texts of a row, of whatever kind.
pub(crate) fn text_columns(names: &[&str]) -> Result<Vec<usize>, String> {
    let pair = Schema { kind: Some(RowKind::Pairs), ..Schema::default() }.roles(names);
    pair.map(|roles| [vec![roles.query], roles.positives, roles.negatives].concat()).or_else(|wrong| {
        let alone = ["text", "sentence", "s1", "s2", "text1", "text2"];
        let places = (0..names.len()).filter(|&i| alone.iter().any(|alias| is_alias(names[i], alias)));
        let places: Vec<usize> = places.collect();
        if places.is_empty() { Err(wrong) } else { Ok(places) }
    })
}

/// Whether a column's name equals `alias`, ignoring case, spaces, `_` and `-`.
pub(super) fn is_alias(name: &str, alias: &str) -> bool {
    name.trim()
        .chars()
        .filter(|c| !matches!(c, '_' | '-' | ' '))
        .map(|c| c.to_ascii_lowercase())
        .eq(alias.chars())
}

fn position(wanted: &str, names: &[&str]) -> Option<usize> {
    names.iter().position(|name| *name == wanted)
}

fn found_columns(names: &[&str]) -> String {
    if names.is_empty() { "found no columns".to_owned() } else { format!("found {}", names.join(", ")) }
}

fn by_name(part: &str, wanted: &str, names: &[&str]) -> Result<usize, String> {
    position(wanted, names).ok_or_else(|| {
        format!(
            "has no column `{wanted}`, which the configuration names for the {part}; {}",
            found_columns(names)
        )
    })
}

fn all_by_name(part: &str, wanted: &[String], names: &[&str]) -> Result<Vec<usize>, String> {
    // One of several may be absent from a row, not all.
    let places: Vec<usize> = wanted.iter().filter_map(|name| position(name, names)).collect();
    match (places.is_empty(), wanted) {
        (false, _) => Ok(places),
        (true, [one, ..]) => by_name(part, one, names).map(|place| vec![place]),
        (true, []) => {
            Err(format!("the configuration names no column for the {part}; {}", found_columns(names)))
        }
    }
}

/// The only column with one of the well-known names `aliases`, or the one with the first of these, which
/// takes precedence.
fn by_alias(part: &str, aliases: &[&str], names: &[&str]) -> Result<usize, String> {
    if let Some(place) = names.iter().position(|name| is_alias(name, aliases[0])) {
        return Ok(place);
    }
    let places: Vec<usize> =
        (0..names.len()).filter(|i| aliases.iter().any(|alias| is_alias(names[*i], alias))).collect();
    match places.as_slice() {
        [place] => Ok(*place),
        [] => Err(format!(
            "has no column for the {part}, expected one of {}; {}\n\
             hint: `columns: {{{part}: NAME}}` in the configuration names another",
            aliases.join(", "),
            found_columns(names)
        )),
        several => Err(format!(
            "has several columns that could be the {part}: {}\n\
             hint: `columns: {{{part}: NAME}}` in the configuration says which",
            several.iter().map(|i| names[*i]).collect::<Vec<_>>().join(", ")
        )),
    }
}

/// The column `negatives`, `negative` or `neg`, else `negative_1`, `negative_2`, … in the order of their
/// numbers.
pub(super) fn negative_columns(names: &[&str]) -> Result<Vec<usize>, String> {
    if names.iter().any(|name| NEGATIVE.iter().any(|alias| is_alias(name, alias))) {
        return by_alias("negatives", &NEGATIVE, names).map(|place| vec![place]);
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
    /// The kind of the rows.
    pub(super) fn kind(&self) -> RowKind {
        self.kind
    }

    /// Whether there are columns for negatives.
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

    /// Assembles a row from its cells. `cell` is called once for each column that the row uses.
    ///
    /// # Errors
    /// A text is missing, empty or a list; scores are not finite numbers or do not fit the texts; a negative
    /// is missing that the loss needs.
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
                    return Err(format!(
                        "has {positives} positives, expected one with the scores in `{name}`"
                    ));
                }
                count if count == 1 + negatives => {}
                // The scores are margins: the positive's score minus each negative's.
                count if count == negatives && self.kind != RowKind::Similarity => {
                    row.scores = [0.0].into_iter().chain(row.scores.iter().map(|margin| -margin)).collect();
                }
                count if self.kind == RowKind::Similarity => {
                    return Err(format!("`{name}` has {count} numbers, expected one"));
                }
                count => {
                    return Err(format!(
                        "`{name}` has {count} numbers for a positive and {negatives} negatives, expected {} scores or \
                         {negatives} margins",
                        negatives + 1
                    ));
                }
            }
        }
        self.drop_positives(&mut row);
        match self.loss {
            Some(loss)
                if self.kind != RowKind::Similarity
                    && loss.traits().needs_negatives
                    && row.negatives.is_empty() =>
            {
                Err(match row.dropped {
                    0 => format!("has no negative, which the loss `{loss}` needs"),
                    _ => format!(
                        "has no negative that differs from its positive, which the loss `{loss}` needs"
                    ),
                })
            }
            _ => Ok(row),
        }
    }

    /// Removes negatives that are also positives, and their scores.
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

/// The number or numbers in a cell.
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
