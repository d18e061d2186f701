//! The reference of the configuration: every key with its type, default and meaning, as Markdown and as a JSON Schema.
//!
//! Everything is generated from the sections: their doc comments, types and `Default`s. `docs/configuration.md` and
//! `docs/configuration.schema.json` are what `trainer config` and `trainer config --schema` print; a test compares them.

use std::fmt::{self, Write};

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::{Config, origin, peers, renamed};
use crate::{Error, Result};

/// The JSON Schema of a configuration file: draft 7, which editors of YAML read.
pub fn schema() -> Value {
    let mut schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<Config>().to_value();
    schema["title"] = json!("lodestone configuration");
    tidy(&mut schema);
    let sections: Vec<(String, String)> = sections(&schema)
        .into_iter()
        .filter_map(|section| Some((section.field, section.definition?)))
        .collect();
    for (field, definition) in sections {
        for (former, name) in renamed::in_section(&field) {
            let properties = &mut schema["definitions"][&definition]["properties"];
            let mut property = properties[name].clone();
            property["description"] = json!(format!("Former name of `{name}`."));
            property["deprecated"] = json!(true);
            properties[former] = property;
        }
    }
    schema
}

/// Removes defaults that say nothing to a reader: those of whole sections, and null.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if map.get("default").is_some_and(|default| default.is_object() || default.is_null()) {
                map.remove("default");
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

/// The whole reference in Markdown.
pub fn page() -> String {
    let schema = raw();
    let mut page = format!("# Configuration\n\n{}\n", text(&schema));
    let _ = write!(
        page,
        "\nThis page is printed by `trainer config`; `trainer config KEY` prints a section or a key. Keys are written with dots, as in \
         `KEY=VALUE` on the command line: `training.epochs=3`. `N` stands for the number of an entry in a list, from 0. \
         [configuration.schema.json](configuration.schema.json) is the same for editors.\n"
    );
    for section in sections(&schema) {
        let _ = write!(page, "\n{section}");
    }
    page.trim_end().to_owned()
}

/// The part of the reference about a key or a section: `training`, `training.epochs`, `data.train.0.path`, or the last part of a
/// key, `epochs`.
///
/// # Errors
/// There is no such key.
pub fn find(key: &str) -> Result<String> {
    let wanted = plain(key);
    let schema = raw();
    let sections = sections(&schema);
    let keys = || sections.iter().flat_map(|section| &section.keys);
    // A key that is a section is shown as the section.
    let is_section = |key: &Key| sections.iter().any(|section| section.field == key.field);
    let mut parts: Vec<String> = keys()
        .filter(|key| plain(&key.field) == wanted && !is_section(key))
        .map(ToString::to_string)
        .collect();
    let inside = |field: &str| field == wanted || field.starts_with(&format!("{wanted}."));
    parts.extend(sections.iter().filter(|section| inside(&plain(&section.field))).map(ToString::to_string));
    if parts.is_empty() {
        parts = keys().filter(|key| key.name() == wanted).map(ToString::to_string).collect();
    }
    if !parts.is_empty() {
        return Ok(parts.join("\n").trim_end().to_owned());
    }
    let last = wanted.rsplit('.').next().unwrap_or_default();
    let known: Vec<&str> =
        keys().map(Key::name).chain(sections.iter().map(|section| &*section.field)).collect();
    let hint = peers::answer(last)
        .or_else(|| origin::nearest(last, &known).map(|name| format!("did you mean `{name}`?")))
        .unwrap_or_else(|| "`trainer config` prints all keys".to_owned());
    Err(Error::Usage(format!("`{key}` is not a key of the configuration\nhint: {hint}")))
}

/// All keys and sections, dotted: `training.epochs`, `data.train.N.path`.
pub(super) fn keys() -> Vec<String> {
    let schema = raw();
    sections(&schema)
        .into_iter()
        .flat_map(|section| section.keys.into_iter().map(|key| key.field).chain([section.field]))
        .filter(|field| !field.is_empty())
        .collect()
}

/// A key without the numbers of entries in lists.
fn plain(field: &str) -> String {
    let number = |part: &&str| *part != "N" && part.parse::<usize>().is_err();
    field.split('.').filter(number).collect::<Vec<_>>().join(".")
}

fn raw() -> Value {
    SchemaSettings::draft07().into_generator().into_root_schema_for::<Config>().to_value()
}

/// A mapping of the configuration.
struct Section {
    /// Dotted; empty for the top level.
    field: String,
    /// Its name among the definitions of the schema; none for the top level.
    definition: Option<String>,
    text: String,
    keys: Vec<Key>,
}

/// A key of a section.
struct Key {
    field: String,
    /// In words.
    kind: String,
    choices: Vec<(String, String)>,
    default: Option<String>,
    former: Option<&'static str>,
    text: String,
    /// The field of the section that the key holds, or that each entry of its list is.
    section: Option<String>,
}

impl Key {
    /// The last part of the field.
    fn name(&self) -> &str {
        self.field.rsplit('.').next().unwrap_or_default()
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field.as_str() {
            "" => {
                writeln!(f, "## Top level\n")?;
                for key in self.keys.iter().filter(|key| key.section.is_some()) {
                    writeln!(f, "- [`{0}`](#{0}): {1}", key.field, key.text.replace('\n', " "))?;
                }
            }
            field => writeln!(f, "## {field}\n\n{}", self.text)?,
        }
        for key in self.keys.iter().filter(|key| !self.field.is_empty() || key.section.is_none()) {
            write!(f, "\n{key}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "### {}\n\nType: {}", self.field, self.kind)?;
        if let Some(section) = &self.section {
            write!(f, ", see [{section}](#{})", section.replace('.', "").to_lowercase())?;
        }
        write!(f, ".")?;
        if let Some(default) = &self.default {
            write!(f, " Default: `{default}`.")?;
        }
        if let Some(former) = self.former {
            write!(f, " Former name: `{former}`.")?;
        }
        writeln!(f, "\n\n{}", self.text)?;
        if self.choices.iter().any(|(_, text)| !text.is_empty()) {
            writeln!(f)?;
        }
        for (name, text) in self.choices.iter().filter(|(_, text)| !text.is_empty()) {
            writeln!(f, "- `{name}`: {text}")?;
        }
        Ok(())
    }
}

/// The sections of the schema, each followed by those inside it.
fn sections(schema: &Value) -> Vec<Section> {
    let mut all = Vec::new();
    walk(schema, schema, String::new(), None, &mut all);
    all
}

fn walk(root: &Value, section: &Value, field: String, definition: Option<String>, all: &mut Vec<Section>) {
    let within = if field.is_empty() { String::new() } else { format!("{field}.") };
    let at = all.len();
    all.push(Section { field: field.clone(), definition, text: text(section), keys: Vec::new() });
    let mut keys = Vec::new();
    for (name, property) in section["properties"].as_object().into_iter().flatten() {
        let kind = Kind::of(root, property);
        let key = format!("{within}{name}");
        let inner = kind
            .section
            .map(|(definition, entry)| (definition, if entry { format!("{key}.N") } else { key.clone() }));
        if let Some((definition, field)) = &inner {
            let schema = &root["definitions"][definition];
            walk(root, schema, field.clone(), Some(definition.clone()), all);
        }
        let text = text(property);
        keys.push(Key {
            kind: kind.words,
            choices: kind.choices,
            default: default(property, &text),
            former: renamed::in_section(&field)
                .find(|(_, current)| current == name)
                .map(|(former, _)| former),
            text,
            section: inner.map(|(_, field)| field),
            field: key,
        });
    }
    all[at].keys = keys;
}

fn text(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().to_owned()
}

/// The default, unless the text gives one or the key is required.
fn default(property: &Value, text: &str) -> Option<String> {
    if text.contains("Default: ") || text.contains("Required") {
        return None;
    }
    match property.get("default")? {
        Value::Object(_) | Value::Null => None,
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Array(items) => {
            Some(format!("[{}]", items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")))
        }
        value => Some(value.to_string()),
    }
}

/// The type of a value.
#[derive(Default)]
struct Kind {
    words: String,
    /// Of an enum: names and meanings.
    choices: Vec<(String, String)>,
    /// Of a mapping, or of a list of them (true): the definition.
    section: Option<(String, bool)>,
}

impl Kind {
    fn of(root: &Value, schema: &Value) -> Self {
        let words = |words: &str| Self { words: words.to_owned(), ..Self::default() };
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.rsplit('/').next().unwrap_or_default();
            let definition = &root["definitions"][name];
            if definition["properties"].is_object() {
                return Self { section: Some((name.to_owned(), false)), ..words("mapping") };
            }
            return Self::of(root, definition);
        }
        for several in ["allOf", "anyOf"] {
            if let Some(of) = schema[several].as_array() {
                return Self::any(of.iter().map(|schema| Self::of(root, schema)));
            }
        }
        if let Some(choices) = choices(schema) {
            let names: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
            return Self { words: join(&names), choices, section: None };
        }
        if let Some(name) = schema["const"].as_str() {
            return words(&format!("`{name}`"));
        }
        let types = match &schema["type"] {
            Value::Array(types) => types.iter().filter_map(Value::as_str).find(|name| *name != "null"),
            name => name.as_str(),
        };
        match types {
            Some("boolean") => words("true or false"),
            Some("integer") => words("whole number"),
            Some("number") => words("number"),
            Some("string") if schema["format"] == "regex" => words("regular expression"),
            Some("string") => words("text"),
            Some("array") => match schema["items"].as_array() {
                Some(items) => words(&format!("list of {} numbers", items.len())),
                None => {
                    let item = Self::of(root, &schema["items"]);
                    let plural =
                        if item.choices.is_empty() { format!("{}s", item.words) } else { item.words };
                    let section = item.section.map(|(definition, _)| (definition, true));
                    Self { words: format!("list of {plural}"), choices: item.choices, section }
                }
            },
            _ => words(""),
        }
    }

    fn any(kinds: impl Iterator<Item = Self>) -> Self {
        let mut kinds = kinds.filter(|kind| !kind.words.is_empty());
        let mut any = kinds.next().unwrap_or_default();
        let mut words = vec![std::mem::take(&mut any.words)];
        words.extend(kinds.map(|kind| kind.words));
        Self { words: join(&words), ..any }
    }
}

/// Names and meanings of an enum's variants.
fn choices(schema: &Value) -> Option<Vec<(String, String)>> {
    let named = |variant: &Map<String, Value>| {
        let text = variant.get("description").and_then(Value::as_str).unwrap_or_default();
        Some((variant.get("const")?.as_str()?.to_owned(), text.replace('\n', " ")))
    };
    schema["oneOf"].as_array()?.iter().map(|variant| named(variant.as_object()?)).collect()
}

/// `a, b or c`.
fn join(words: &[String]) -> String {
    match words {
        [] => String::new(),
        [word] => word.clone(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn committed(name: &str) -> String {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name))
            .unwrap_or_default()
    }

    #[test]
    fn the_committed_pages_are_those_of_this_build() {
        assert!(
            committed("configuration.md").trim_end() == page(),
            "docs/configuration.md is stale: cargo run --bin trainer -- config > docs/configuration.md"
        );
        assert!(
            committed("configuration.schema.json").trim_end()
                == serde_json::to_string_pretty(&schema()).unwrap(),
            "the schema is stale: cargo run --bin trainer -- config --schema > docs/configuration.schema.json"
        );
    }

    #[test]
    fn every_key_has_a_type_a_meaning_and_a_default() {
        let schema = raw();
        for key in sections(&schema).into_iter().flat_map(|section| section.keys) {
            assert!(!key.kind.is_empty() && !key.kind.contains("``"), "{}: {}", key.field, key.kind);
            assert!(key.text.ends_with('.') || key.text.ends_with("```"), "{}: {}", key.field, key.text);
            let told = ["Default: ", "Required"].iter().any(|word| key.text.contains(word));
            let optional = key.section.is_some() || key.field.contains(".columns.");
            assert!(key.default.is_some() || told || optional, "{}: no default", key.field);
        }
    }

    #[test]
    fn every_example_in_the_reference_is_understood() {
        let page = page();
        let examples: Vec<&str> =
            page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert!(examples.len() >= 5);
        for example in examples {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("example.yaml");
            fs::write(&path, example).unwrap();
            let rest: &[&str] = match (example.contains("model:"), example.contains("data:")) {
                (true, true) => &[],
                (true, false) => &["data.train.0.path=a.jsonl"],
                (false, true) => &["model.path=m"],
                (false, false) => &["model.path=m", "data.train.0.path=a.jsonl"],
            };
            let overrides: Vec<String> = rest.iter().map(ToString::to_string).collect();
            if let Err(error) = Config::load(&path, &overrides) {
                panic!("{example}\n{error}");
            }
        }
    }

    #[test]
    fn a_key_is_found_by_its_place_or_its_name() {
        let batch = find("training.batch_size").unwrap();
        assert!(
            batch.starts_with("### training.batch_size\n\nType: whole number. Default: `64`.\n\n"),
            "{batch}"
        );
        assert_eq!(find("batch_size").unwrap(), batch);
        assert_eq!(find("data.train.3.path").unwrap(), find("data.train.N.path").unwrap());
        assert!(find("loss.kind").unwrap().contains("Type: `info_nce`, `triplet`"));
        assert!(find("training.activation_memory").unwrap().contains("Former name: `tape_memory`."));
        let data = find("data").unwrap();
        assert!(data.starts_with("## data\n") && data.contains("### data.train.N.columns.query"), "{data}");
        let error = |key: &str| find(key).unwrap_err().to_string();
        assert_eq!(
            error("training.epoch"),
            "`training.epoch` is not a key of the configuration\nhint: did you mean `epochs`?"
        );
        assert!(error("lora_r").contains("use `lora.rank`"));
        assert!(error("zzzzzz").contains("`trainer config` prints all keys"));
    }
}
