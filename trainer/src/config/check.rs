//! What the checks of a section share: conditions on a value, with the error for the person who wrote it.

use super::Origins;
use crate::{Error, Result};

/// Checks of one section. Keys are relative to it.
pub(super) struct Check<'a> {
    origins: &'a Origins,
    section: String,
}

impl<'a> Check<'a> {
    /// Checks of the section `section`, dotted.
    pub(super) fn new(origins: &'a Origins, section: &str) -> Self {
        Self { origins, section: section.to_owned() }
    }

    /// Checks of a section inside this one.
    pub(super) fn section(&self, key: &str) -> Self {
        Self::new(self.origins, &format!("{}.{key}", self.section))
    }

    /// An error about the value of `key`.
    pub(super) fn error(&self, key: &str, message: &str) -> Error {
        self.origins.error(&format!("{}.{key}", self.section), message)
    }

    pub(super) fn that(&self, holds: bool, key: &str, message: &str) -> Result<()> {
        if holds { Ok(()) } else { Err(self.error(key, message)) }
    }

    pub(super) fn at_least_1(&self, key: &str, value: u64) -> Result<()> {
        self.that(value >= 1, key, "expected at least 1, found 0")
    }

    pub(super) fn positive(&self, key: &str, value: f64) -> Result<()> {
        let holds = value > 0.0 && value.is_finite();
        self.that(holds, key, &format!("expected a number above 0, found {value}"))
    }

    pub(super) fn non_negative(&self, key: &str, value: f64) -> Result<()> {
        let holds = value >= 0.0 && value.is_finite();
        self.that(holds, key, &format!("expected 0 or above, found {value}"))
    }

    /// A number in [0, 1).
    pub(super) fn probability(&self, key: &str, value: f64) -> Result<()> {
        let holds = (0.0..1.0).contains(&value);
        self.that(holds, key, &format!("expected 0 or above and below 1, found {value}"))
    }
}
