//! One training row, and how it is put together from a file's columns.

use std::collections::BTreeMap;

use crate::config::{Columns, Kind};

/// Texts that belong together. None is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What is searched with.
    pub query: String,
    /// What answers it; at least one.
    pub positives: Vec<String>,
    /// What does not.
    pub negatives: Vec<String>,
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
    query: usize,
    positives: Vec<usize>,
    negatives: Vec<usize>,
}

/// How columns are understood: what the configuration says, else the usual names.
#[derive(Clone, Debug, Default)]
pub(super) struct Schema {
    columns: Columns,
    kind: Option<Kind>,
}

const QUERY: [&str; 5] = ["query", "anchor", "question", "premise", "sentence1"];
const POSITIVE: [&str; 8] =
    ["positive", "positives", "pos", "answer", "document", "passage", "hypothesis", "sentence2"];
const NEGATIVE: [&str; 3] = ["negatives", "negative", "neg"];

impl Schema {
    pub(super) fn new(columns: &Columns, kind: Option<Kind>) -> Self {
        Self { columns: columns.clone(), kind }
    }

    /// Finds the parts of a row among a file's column names.
    pub(super) fn roles(&self, names: &[&str]) -> Result<Roles, String> {
        let query = match &self.columns.query {
            Some(name) => named("query", name, names)?,
            None => usual("query", &QUERY, names)?,
        };
        let positives = match &self.columns.positive {
            Some(chosen) => all_named("positive", &chosen.0, names)?,
            None => vec![usual("positive", &POSITIVE, names)?],
        };
        let negatives = match &self.columns.negatives {
            Some(chosen) => chosen.0.iter().filter_map(|name| position(name, names)).collect(),
            None => negatives(names)?,
        };
        if self.kind == Some(Kind::Triplets) && negatives.is_empty() {
            return Err(format!("`kind: triplets` needs a column of negatives, {}", found(names)));
        }
        let chosen = self.kind.is_some() || (self.columns.query.is_some() && self.columns.positive.is_some());
        if let Some(name) = names.iter().find(|name| is(name, "label") || is(name, "score"))
            && !chosen
        {
            return Err(format!(
                "has a column `{name}`: labelled and scored rows are not supported yet\n\
                 hint: `kind: pairs` in the configuration takes every row as a pair, whatever its {name}"
            ));
        }
        Ok(Roles { query, positives, negatives })
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

/// The columns that hold a row's texts, whatever its kind: what a model may see of it.
pub(crate) fn text_columns(names: &[&str]) -> Result<Vec<usize>, String> {
    let pair = Schema { kind: Some(Kind::Pairs), ..Schema::default() }.roles(names);
    pair.map(|roles| [vec![roles.query], roles.positives, roles.negatives].concat()).or_else(|wrong| {
        let alone = ["text", "s1", "s2"];
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
    /// Whether there are columns of negatives.
    pub(super) fn has_negatives(&self) -> bool {
        !self.negatives.is_empty()
    }

    /// Whether a column holds negatives.
    pub(super) fn negatives(&self, column: usize) -> bool {
        self.negatives.contains(&column)
    }

    /// Puts a row together from its cells, each taken once.
    pub(super) fn row(
        &self,
        names: &[&str],
        mut cell: impl FnMut(usize) -> Result<Cell, String>,
    ) -> Result<Row, String> {
        let query = match cell(self.query)? {
            Cell::Text(text) => text,
            Cell::Missing => return Err(format!("`{}` is missing", names[self.query])),
            Cell::List(_) => return Err(format!("`{}` is a list, expected one text", names[self.query])),
        };
        check_text(&query, names[self.query])?;
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
        let positives = texts(&self.positives)?;
        if positives.is_empty() {
            return Err(format!("has no positive: `{}` is missing or empty", names[self.positives[0]]));
        }
        let negatives = texts(&self.negatives)?;
        Ok(Row { query, positives, negatives })
    }
}

fn check_text(text: &str, name: &str) -> Result<(), String> {
    if text.trim().is_empty() { Err(format!("`{name}` has an empty text")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Names;

    fn roles(names: &[&str]) -> Result<Roles, String> {
        Schema::default().roles(names)
    }

    fn made(query: usize, positives: &[usize], negatives: &[usize]) -> Roles {
        Roles { query, positives: positives.to_vec(), negatives: negatives.to_vec() }
    }

    #[test]
    fn the_usual_names_are_understood() {
        for (names, expected) in [
            (&["query", "positive", "negatives"][..], made(0, &[1], &[2])),
            (&["id", "Question", "Answer"], made(1, &[2], &[])),
            (&["anchor", "positive", "negative"], made(0, &[1], &[2])),
            (&["premise", "hypothesis"], made(0, &[1], &[])),
            (&["sentence1", "sentence2"], made(0, &[1], &[])),
            (&["sentence_1", "sentence_2"], made(0, &[1], &[])),
            (&["passage", "query"], made(1, &[0], &[])),
            (&["question", "document"], made(0, &[1], &[])),
            (&["query", "pos", "neg"], made(0, &[1], &[2])),
            (&["anchor", "positive", "negative_2", "negative_10", "negative_1"], made(0, &[1], &[4, 2, 3])),
            (&["query", "question", "positive", "document"], made(0, &[2], &[])),
        ] {
            assert_eq!(roles(names), Ok(expected), "{names:?}");
        }
    }

    #[test]
    fn texts_are_what_a_model_may_see() {
        for (names, expected) in [
            (&["id", "query", "positive", "answer"][..], &[1, 2][..]),
            (&["premise", "hypothesis", "label"], &[0, 1]),
            (&["negative_1", "query", "positive"], &[1, 2, 0]),
            (&["label", "text"], &[1]),
            (&["s1", "s2", "score"], &[0, 1]),
        ] {
            assert_eq!(text_columns(names), Ok(expected.to_vec()), "{names:?}");
        }
        assert!(text_columns(&["a", "b"]).unwrap_err().contains("found a, b"));
    }

    #[test]
    fn what_is_missing_or_ambiguous_is_listed() {
        let error = roles(&["text", "answer"]).unwrap_err();
        assert!(error.starts_with("has no column for the query, expected one of query, anchor,"), "{error}");
        assert!(error.contains("found text, answer\nhint: `columns: {query: NAME}`"), "{error}");
        let error = roles(&["query", "answer", "document"]).unwrap_err();
        assert!(
            error.starts_with("has several columns that could be the positive: answer, document\n"),
            "{error}"
        );
        assert!(roles(&[]).unwrap_err().contains("found no columns"));
        let error = roles(&["premise", "hypothesis", "label"]).unwrap_err();
        assert!(error.contains("labelled and scored rows are not supported yet"), "{error}");
        let pairs = Schema::new(&Columns::default(), Some(Kind::Pairs));
        assert_eq!(pairs.roles(&["premise", "hypothesis", "label"]), Ok(made(0, &[1], &[])));
        let triplets = Schema::new(&Columns::default(), Some(Kind::Triplets));
        assert!(triplets.roles(&["query", "positive"]).unwrap_err().contains("needs a column of negatives"));
    }

    #[test]
    fn the_configuration_settles_the_rest() {
        let columns = Columns {
            query: Some("Title".into()),
            positive: Some(Names(vec!["a".into(), "b".into()])),
            negatives: Some(Names(vec!["n".into()])),
            ..Columns::default()
        };
        let schema = Schema::new(&columns, None);
        assert_eq!(schema.roles(&["n", "b", "a", "Title", "label"]), Ok(made(3, &[2, 1], &[0])));
        assert_eq!(schema.roles(&["b", "Title"]), Ok(made(1, &[0], &[])));
        assert!(schema.header(&["n", "b", "a", "Title"]).is_ok());
        let error = schema.header(&["b", "a", "Title"]).unwrap_err();
        assert!(
            error.starts_with("has no column `n`, which the configuration names for the negatives"),
            "{error}"
        );
        let error = schema.roles(&["title", "a"]).unwrap_err();
        assert!(error.starts_with("has no column `Title`") && error.ends_with("found title, a"), "{error}");
    }
}
