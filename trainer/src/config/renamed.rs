//! Keys that had another name in an earlier version. The former name is still read; the resolved configuration has the
//! current one.

use serde_yaml::{Mapping, Value};

use super::Origins;
use crate::Result;

/// A key and its former name.
struct Renamed {
    /// The dotted section of the key; `*` stands for every entry of a list.
    section: &'static str,
    former: &'static str,
    name: &'static str,
}

const RENAMED: &[Renamed] =
    &[Renamed { section: "training", former: "tape_memory", name: "activation_memory" }];

/// Gives every key of the tree its current name, and tells `origins` under which name it was written.
///
/// # Errors
/// A key is given under both of its names.
pub(super) fn rename(tree: &mut Value, origins: &mut Origins) -> Result<()> {
    walk(tree, &mut Vec::new(), origins)
}

/// The same for the key of a `KEY=VALUE`.
pub(super) fn rename_key(parts: &mut [String]) {
    for depth in 0..parts.len() {
        let (section, rest) = parts.split_at_mut(depth);
        if let Some(renamed) = RENAMED.iter().find(|r| r.is_in(section) && r.former == rest[0]) {
            rest[0] = renamed.name.to_owned();
        }
    }
}

/// The keys of a section (`data.train.N`) that had another name: former and current names.
pub(super) fn in_section(section: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let section: Vec<String> = section.split('.').map(str::to_owned).collect();
    RENAMED
        .iter()
        .filter(move |renamed| renamed.is_in(&section))
        .map(|renamed| (renamed.former, renamed.name))
}

impl Renamed {
    fn is_in(&self, section: &[String]) -> bool {
        let mut parts = self.section.split('.');
        section.iter().all(|part| parts.next().is_some_and(|pattern| pattern == "*" || pattern == part))
            && parts.next().is_none()
    }
}

fn walk(value: &mut Value, section: &mut Vec<String>, origins: &mut Origins) -> Result<()> {
    match value {
        Value::Mapping(map) => {
            for renamed in RENAMED.iter().filter(|renamed| renamed.is_in(section)) {
                apply(renamed, map, section, origins)?;
            }
            for (key, value) in map {
                if let Some(key) = key.as_str() {
                    section.push(key.to_owned());
                    walk(value, section, origins)?;
                    section.pop();
                }
            }
        }
        Value::Sequence(items) => {
            for (index, value) in items.iter_mut().enumerate() {
                section.push(index.to_string());
                walk(value, section, origins)?;
                section.pop();
            }
        }
        _ => {}
    }
    Ok(())
}

fn apply(renamed: &Renamed, map: &mut Mapping, section: &[String], origins: &mut Origins) -> Result<()> {
    let &Renamed { former, name, .. } = renamed;
    let Some(value) = map.remove(former) else { return Ok(()) };
    let field = |key: &str| [section, &[key.to_owned()]].concat();
    if map.contains_key(name) {
        let message = format!("`{name}` is the current name of this key, and the configuration has both");
        let hint = format!("{message}\nhint: keep `{name}` and delete `{former}`");
        return Err(origins.error(&field(former).join("."), hint));
    }
    map.insert(Value::String(name.to_owned()), value);
    origins.renamed(field(name), former);
    Ok(())
}
