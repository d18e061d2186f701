//! How good a model is, on sets of texts kept apart for that.
//!
//! Metrics, their names and the CSV files are those of sentence-transformers 6.

mod pairwise;
mod retrieval;

#[cfg(test)]
mod golden;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::{Error, Result};

/// Metrics by name, in the order in which they are shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores(Vec<(String, f64)>);

impl Scores {
    /// The metric of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.iter().find(|(other, _)| *other == name).map(|(_, score)| score)
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
