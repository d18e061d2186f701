//! The place in the file or on the command line where each value was written, for error messages.
//!
//! serde does not keep lines in the tree that it builds. So the line is looked up when an error needs it: a [`Probe`] reads the
//! file again, walks down to the field and stops there with an error, and this error has the line.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_path_to_error::Segment;
use serde_yaml::Value;

use super::{peers, reference};
use crate::{Error, Result};

/// The configuration file's text and the fields that the command line changed.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    path: PathBuf,
    text: String,
    /// Fields that the command line sets.
    overridden: Vec<Vec<String>>,
    /// Fields whose last part has another name in the file, with that name.
    renamed: Vec<(Vec<String>, &'static str)>,
}

/// Parses a file into a tree of values. An empty file is an empty mapping.
pub(super) fn parse(path: &Path, text: &str) -> Result<Value> {
    match serde_yaml::from_str(text) {
        Ok(Value::Null) => Ok(Value::Mapping(serde_yaml::Mapping::new())),
        Ok(tree @ Value::Mapping(_)) => Ok(tree),
        Ok(_) => Err(Error::file(path, "expected `key: value` lines, as `model:`, `data:`, `training:`")),
        Err(e) => {
            let line = e.location().map_or(1, |at| at.line() as u64);
            Err(Error::Row { path: path.to_owned(), line, message: format!("this is not YAML: {e}") })
        }
    }
}

impl Origins {
    pub(super) fn new(path: &Path, text: String) -> Self {
        Self { path: path.to_owned(), text, ..Self::default() }
    }

    /// Records that the command line sets this field, or part of it.
    pub(super) fn overridden(&mut self, field: Vec<String>) {
        self.overridden.push(field);
    }

    /// Records that the last part of `field` is called `former` in the file.
    pub(super) fn renamed(&mut self, field: Vec<String>, former: &'static str) {
        self.renamed.push((field, former));
    }

    /// An error about the value of `field`, dotted.
    pub(super) fn error(&self, field: &str, message: impl Into<String>) -> Error {
        Error::Config { origin: self.origin(field), field: field.to_owned(), message: message.into() }
    }

    /// `command line`, or `FILE:LINE` of the field. A field that is not in the file has the line of the section around it.
    fn origin(&self, field: &str) -> String {
        let parts: Vec<&str> = field.split('.').collect();
        if self.overridden.iter().any(|set| set.iter().zip(&parts).all(|(a, b)| a == b)) {
            return "command line".to_owned();
        }
        if self.path.as_os_str().is_empty() {
            return "configuration".to_owned();
        }
        for depth in (1..=parts.len()).rev() {
            let field = &parts[..depth];
            let former = self.renamed.iter().find(|(renamed, _)| renamed == field).map(|(_, former)| *former);
            let written = [&field[..depth - 1], &[former.unwrap_or(field[depth - 1])]].concat();
            if let Some(line) = self.line(&written) {
                return format!("{}:{line}", self.path.display());
            }
        }
        self.path.display().to_string()
    }

    fn line(&self, parts: &[&str]) -> Option<usize> {
        let document = serde_yaml::Deserializer::from_str(&self.text);
        let stop = Probe { parts }.deserialize(document).err()?;
        stop.location().map(|at| at.line())
    }

    /// Turns an error of serde into one that names the place, the field, the value and what was expected.
    pub(super) fn explain(&self, error: &serde_path_to_error::Error<serde_yaml::Error>) -> Error {
        let mut parts: Vec<String> = error
            .path()
            .iter()
            .filter_map(|segment| match segment {
                Segment::Seq { index } => Some(index.to_string()),
                Segment::Map { key } => Some(key.clone()),
                Segment::Enum { .. } | Segment::Unknown => None,
            })
            .collect();
        let text = error.inner().to_string();
        let mut quoted = text.split('`').skip(1).step_by(2);
        if text.starts_with("unknown field") {
            let unknown = quoted.next().unwrap_or_default();
            if parts.last().is_none_or(|last| last != unknown) {
                parts.push(unknown.to_owned());
            }
            let known: Vec<&str> = quoted.collect();
            let within = parts[..parts.len() - 1].join(".");
            let place = if within.is_empty() { String::new() } else { format!(" in `{within}`") };
            let hint = peers::answer(unknown)
                .or_else(|| elsewhere(unknown))
                .or_else(|| nearest(unknown, &known).map(|name| format!("did you mean `{name}`?")));
            let message = match hint {
                Some(hint) => format!("unknown key{place}\nhint: {hint}"),
                None => format!("unknown key{place}, expected one of {}", known.join(", ")),
            };
            return self.error(&parts.join("."), message);
        }
        let field = parts.join(".");
        if text.starts_with("unknown variant") {
            let given = quoted.next().unwrap_or_default();
            let known: Vec<&str> = quoted.collect();
            let hint =
                nearest(given, &known).map(|n| format!("\nhint: did you mean `{n}`?")).unwrap_or_default();
            return self.error(&field, format!("`{given}` is none of {}{hint}", known.join(", ")));
        }
        self.error(&field, plain(&text))
    }
}

/// Where a key that stands in the wrong section belongs.
fn elsewhere(name: &str) -> Option<String> {
    let keys = reference::keys();
    let homes: Vec<String> = keys
        .iter()
        .filter(|key| key.rsplit('.').next() == Some(name))
        .map(|key| format!("`{key}`"))
        .collect();
    (!homes.is_empty()).then(|| format!("this key is {}", homes.join(" or ")))
}

/// The message of serde in plain words: `invalid type: string "x", expected usize` names Rust's types.
fn plain(text: &str) -> String {
    let Some((given, expected)) = text.split_once(", expected ") else { return text.to_owned() };
    let given = given.split_once(": ").map_or(given, |(_, value)| value);
    let counted = given.strip_prefix("invalid length ").map(|count| format!("a list of {count}"));
    let given = match given {
        _ if counted.is_some() => counted.as_deref().unwrap_or_default(),
        "unit value" => "null",
        "map" => "a mapping",
        "sequence" => "a list",
        _ => given,
    };
    let expected = match expected {
        "u32" | "u64" | "usize" => "a whole number, 0 or above",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list (lines that start with `- `)",
        "a tuple of size 2" => "two numbers, as [0.9, 0.999]",
        _ if expected.starts_with("struct ") => "`key: value` lines",
        _ if expected.starts_with("path string") => "a path",
        _ => expected,
    };
    let hint = if expected == "a string" { "\nhint: quote it if it is meant as text" } else { "" };
    format!("expected {expected}, found {given}{hint}")
}

/// The known name nearest to `name` by edit distance, if one is near enough.
pub(super) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let bare = |text: &str| text.to_lowercase().replace(['_', '-'], "");
    known
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(&bare(name), &bare(candidate)), *candidate))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 3)
        .map(|(_, candidate)| candidate)
}

/// Walks down a document along `parts` and stops with an error at the key of the field, or at the entry of a list.
struct Probe<'a> {
    parts: &'a [&'a str],
}

const FOUND: &str = "here";

impl<'de> DeserializeSeed<'de> for Probe<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Probe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let Some((first, rest)) = self.parts.split_first() else { return Ok(()) };
        while let Some(hit) = map.next_key_seed(Key { name: first, last: rest.is_empty() })? {
            if hit {
                map.next_value_seed(Probe { parts: rest })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<(), A::Error> {
        let Some((first, rest)) = self.parts.split_first() else { return Ok(()) };
        let wanted = first.parse().unwrap_or(usize::MAX);
        for index in 0.. {
            let more = match index == wanted {
                true if rest.is_empty() => items.next_element_seed(Stop)?.is_some(),
                true => items.next_element_seed(Probe { parts: rest })?.is_some(),
                false => items.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                break;
            }
        }
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> std::result::Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> std::result::Result<(), E> {
        Ok(())
    }
}

/// Reads the key of a mapping and tells whether it is `name`. If it is and the walk ends here, this is an error.
struct Key<'a> {
    name: &'a str,
    last: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> std::result::Result<bool, E> {
        match key == self.name {
            true if self.last => Err(E::custom(FOUND)),
            hit => Ok(hit),
        }
    }
}

/// Stops with an error at any value.
struct Stop;

impl<'de> DeserializeSeed<'de> for Stop {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Stop {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(FOUND)
    }
}
