//! Examples: some items of a set with what a model makes of them, for people to read in the report.

use serde::{Deserialize, Serialize};

/// Items of a set that are kept as examples.
const ITEMS: usize = 300;
/// Characters of a text that are kept.
const LENGTH: usize = 240;

/// Some items of a set, and what their values are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Examples {
    /// The name of the items' values: `nDCG@10`.
    pub measure: String,
    /// Whether a lower value is better.
    pub lower_is_better: bool,
    /// The items, in the order of the set.
    pub items: Vec<Example>,
}

/// A query with what it finds, a triplet, a scored pair or a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// The query, the anchor or the first text. Long texts are cut.
    pub text: String,
    /// How well the model does on it; NaN, which is null in JSON, where that is undefined.
    #[serde(deserialize_with = "number_or_nan")]
    pub value: f64,
    /// What else is worth saying: `2 relevant documents, the first at rank 3`.
    pub note: String,
    /// The texts that it is compared with.
    pub candidates: Vec<Candidate>,
}

/// A text that a query, an anchor or a first text is compared with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Long texts are cut.
    pub text: String,
    /// Its cosine similarity; NaN, which is null in JSON, where that is undefined or not computed.
    #[serde(deserialize_with = "number_or_nan")]
    pub cosine: f64,
    /// Whether it is a right answer.
    pub relevant: bool,
}

fn number_or_nan<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

impl Examples {
    /// Those [`spread`] over `count` items. `example` makes one from the item's number.
    pub(super) fn new(
        measure: &str,
        lower_is_better: bool,
        count: usize,
        example: impl Fn(usize) -> Example,
    ) -> Self {
        let items = spread(count).map(example).collect();
        Self { measure: measure.to_owned(), lower_is_better, items }
    }
}

/// The numbers of at most 300 of `count` items, ascending, spread evenly over all of them.
pub(super) fn spread(count: usize) -> impl Iterator<Item = usize> {
    let kept = ITEMS.min(count);
    (0..kept).map(move |n| n * count / kept)
}

impl Candidate {
    /// A candidate with its text cut.
    pub(super) fn new(text: &str, cosine: f64, relevant: bool) -> Self {
        Self { text: shortened(text), cosine, relevant }
    }
}

/// A text on one line, at most 240 characters of it.
pub(super) fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", line[..end].trim_end()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(shortened(" a\n b\tc "), "a b c");
        let long = "ü".repeat(LENGTH);
        assert_eq!(shortened(&long), long);
        assert_eq!(shortened(&format!("{long}x")), format!("{long}…"));
    }

    #[test]
    fn items_are_spread_evenly_over_a_large_set() {
        let numbers = |count| spread(count).collect::<Vec<_>>();
        assert_eq!(numbers(3), [0, 1, 2]);
        assert!(numbers(0).is_empty());
        let many = numbers(750);
        assert_eq!((many.len(), &many[..4], many[ITEMS - 1]), (ITEMS, &[0, 2, 5, 7][..], 747));
    }

    #[test]
    fn a_value_that_is_no_number_is_read_back() {
        let example = Example {
            text: "a".into(),
            value: f64::NAN,
            note: String::new(),
            candidates: vec![Candidate::new("b", f64::NEG_INFINITY, true)],
        };
        let json = serde_json::to_string(&example).unwrap();
        assert!(json.contains(r#""value":null"#) && json.contains(r#""cosine":null"#), "{json}");
        let read: Example = serde_json::from_str(&json).unwrap();
        assert!(read.value.is_nan() && read.candidates[0].cosine.is_nan() && read.candidates[0].relevant);
    }
}
