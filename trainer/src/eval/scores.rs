//! Metrics by name, and which of two values of a metric is better.

use serde::ser::{Serialize, SerializeMap, Serializer};

/// Whether a lower value of a metric is better, which is so of losses. The metric's name may begin with a
/// set's: `dev_loss`.
pub fn lower_is_better(metric: &str) -> bool {
    metric == "loss" || metric.ends_with("_loss")
}

/// Whether `value` of a metric is better than `other`. Equal values are not, and NaN never is.
pub fn is_better(metric: &str, value: f64, other: f64) -> bool {
    if lower_is_better(metric) { value < other } else { value > other }
}

/// Metrics by name, in a fixed order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores(Vec<(String, f64)>);

impl Scores {
    /// The metric of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.iter().find(|(other, _)| *other == name).map(|(_, score)| score)
    }

    /// Whether there is no metric.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The metrics in their order.
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

/// Serializes as one JSON object in order. NaN becomes null.
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

    #[test]
    fn scores_are_an_object_in_their_order() {
        let scores: Scores = [("z".to_owned(), 0.5), ("a".into(), f64::NAN)].into_iter().collect();
        assert_eq!(serde_json::to_string(&scores).unwrap(), r#"{"z":0.5,"a":null}"#);
        assert_eq!(scores.get("z"), Some(0.5));
        assert_eq!(scores.get("b"), None);
    }

    #[test]
    fn a_lower_loss_and_a_higher_accuracy_are_better() {
        assert!(is_better("loss", 1.0, 2.0) && is_better("dev_loss", 1.0, 2.0));
        assert!(
            is_better("dev_cosine_accuracy", 2.0, 1.0) && !is_better("glossary_spearman_cosine", 1.0, 2.0)
        );
        assert!(!is_better("loss", 1.0, 1.0) && !is_better("m", 1.0, 1.0));
        assert!(!is_better("loss", f64::NAN, 1.0) && !is_better("m", f64::NAN, 1.0));
    }
}
