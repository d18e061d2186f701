//! What a few queries find, for people to look at.

use serde::{Deserialize, Serialize};

/// Queries of a set that are shown.
pub(super) const QUERIES: usize = 12;
/// Hits of a query that are shown.
pub(super) const HITS: usize = 5;
/// Characters of a text that are shown.
const LENGTH: usize = 240;

/// The best hits of a query.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    /// What is asked; long texts are cut.
    pub query: String,
    /// How many documents answer it.
    pub relevant: usize,
    /// The rank of the first that does, from 1, if it is among the hundred best.
    pub first: Option<usize>,
    /// nDCG@10.
    pub ndcg: f64,
    /// Best first.
    pub hits: Vec<Hit>,
}

/// A document in a ranking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hit {
    /// Long texts are cut.
    pub text: String,
    /// Cosine; −∞, and so null in JSON, where it is no number.
    #[serde(deserialize_with = "or_lowest")]
    pub score: f32,
    /// Whether it answers the query.
    pub relevant: bool,
}

fn or_lowest<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f32::NEG_INFINITY))
}

/// A text on one line, at most [`LENGTH`] characters of it.
pub(super) fn short(text: &str) -> String {
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
        assert_eq!(short(" a\n b\tc "), "a b c");
        let long = "ü".repeat(LENGTH);
        assert_eq!(short(&long), long);
        assert_eq!(short(&format!("{long}x")), format!("{long}…"));
    }

    #[test]
    fn a_score_that_is_no_number_is_read_back() {
        let hit = Hit { text: "a".into(), score: f32::NEG_INFINITY, relevant: true };
        let json = serde_json::to_string(&hit).unwrap();
        assert_eq!(json, r#"{"text":"a","score":null,"relevant":true}"#);
        assert_eq!(serde_json::from_str::<Hit>(&json).unwrap(), hit);
    }
}
