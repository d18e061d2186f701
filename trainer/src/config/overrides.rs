//! Overrides on the command line, `KEY=VALUE`: the key is dotted, an entry of a list has its number from 0, the value is YAML.

use serde_yaml::{Mapping, Value};

use super::renamed;
use crate::{Error, Result};

/// Sets one value in the tree and returns its field.
///
/// # Errors
/// The argument is not `KEY=VALUE`, the value is not YAML, or the key goes through a single value or past the end of a list.
pub(super) fn apply(tree: &mut Value, argument: &str) -> Result<Vec<String>> {
    let wrong = |message: String| Error::Config {
        origin: "command line".to_owned(),
        field: argument.split('=').next().unwrap_or_default().to_owned(),
        message,
    };
    let (key, text) = argument
        .split_once('=')
        .filter(|(key, _)| !key.split('.').any(str::is_empty))
        .ok_or_else(|| wrong("expected KEY=VALUE, such as training.learning_rate=2e-5".to_owned()))?;
    let value = value(text).map_err(|e| wrong(format!("`{text}` is not YAML: {e}")))?;
    let mut parts: Vec<String> = key.split('.').map(str::to_owned).collect();
    renamed::rename_key(&mut parts);
    let mut at = tree;
    for (depth, part) in parts.iter().enumerate() {
        if at.is_null() {
            *at = if part == "0" { Value::Sequence(Vec::new()) } else { Value::Mapping(Mapping::new()) };
        }
        at = match at {
            Value::Mapping(map) => map.entry(Value::String(part.clone())).or_insert(Value::Null),
            Value::Sequence(items) => {
                let count = items.len();
                let index = part.parse::<usize>().ok().filter(|index| *index <= count).ok_or_else(|| {
                    let list = parts[..depth].join(".");
                    wrong(format!(
                        "`{list}` is a list of {count}: expected a number from 0 to {count}, found `{part}`"
                    ))
                })?;
                if index == count {
                    items.push(Value::Null);
                }
                &mut items[index]
            }
            _ => {
                return Err(wrong(format!(
                    "`{}` is a single value and has no keys",
                    parts[..depth].join(".")
                )));
            }
        };
    }
    *at = value;
    Ok(parts)
}

/// Parses a value as YAML. A block mapping makes no sense in an argument, so `query: ` is text. What is not YAML is text as well,
/// unless it begins with a quote or a bracket.
fn value(text: &str) -> std::result::Result<Value, serde_yaml::Error> {
    let plain = !text.trim_start().starts_with(['{', '[', '"', '\'']);
    match serde_yaml::from_str(text) {
        Ok(Value::Mapping(_)) | Err(_) if plain => Ok(Value::String(text.to_owned())),
        value => value,
    }
}
