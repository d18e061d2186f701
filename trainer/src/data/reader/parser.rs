//! Text of one record to a row: a JSON object, or the fields of a CSV record.

use serde_json::{Map, Value};

use super::format::Layout;
use crate::config::RowKind;
use crate::data::row::{Cell, Roles, Row, Schema};

/// Turns the records of one file into rows.
pub(super) enum Parser {
    /// Each object has its own column names.
    JsonLines(Schema),
    /// All records have the header's columns.
    Csv { delimiter: u8, names: Vec<String>, roles: Roles },
}

/// The column names of the previous object and their roles; consecutive objects nearly always have the same.
pub(super) type ColumnCache = Option<(Vec<String>, Roles)>;

impl Parser {
    /// Decides from a file's first record what its rows are: the header of a CSV file, the first row of JSON
    /// lines.
    ///
    /// # Errors
    /// The record is malformed, or its columns are not those of a row.
    pub(super) fn new(layout: Layout, schema: &Schema, first: &[u8]) -> Result<Self, String> {
        match layout {
            Layout::JsonLines => {
                let mut cache = None;
                parse_json(schema, first, &mut cache)?;
                let kind = cache.map_or(RowKind::Pairs, |(_, roles)| roles.kind());
                Ok(Self::JsonLines(schema.clone().of_kind(kind)))
            }
            Layout::Csv(delimiter) => {
                let names = header(first, delimiter)?;
                let roles = schema.header(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
                Ok(Self::Csv { delimiter, names, roles })
            }
        }
    }

    /// Parses a row; also returns whether it has columns for negatives.
    pub(super) fn parse(&self, bytes: &[u8], cache: &mut ColumnCache) -> Result<(Row, bool), String> {
        match self {
            Self::JsonLines(schema) => {
                let row = parse_json(schema, bytes, cache)?;
                Ok((row, cache.as_ref().is_some_and(|(_, roles)| roles.has_negatives())))
            }
            Self::Csv { delimiter, names, roles } => {
                Ok((parse_csv(bytes, *delimiter, names, roles)?, roles.has_negatives()))
            }
        }
    }

    /// The kind of all rows.
    pub(super) fn kind(&self) -> RowKind {
        match self {
            Self::JsonLines(schema) => schema.kind().unwrap_or(RowKind::Pairs),
            Self::Csv { roles, .. } => roles.kind(),
        }
    }

    /// How the file is cut into records.
    pub(super) fn layout(&self) -> Layout {
        match self {
            Self::JsonLines(_) => Layout::JsonLines,
            Self::Csv { delimiter, .. } => Layout::Csv(*delimiter),
        }
    }

    /// Whether the first record is a header and no row.
    pub(super) fn has_header(&self) -> bool {
        matches!(self, Self::Csv { .. })
    }
}

/// A record as text.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| {
        format!(
            "is not UTF-8 at byte {} of the row\nhint: iconv -f LATIN1 -t UTF-8 converts a file",
            e.valid_up_to() + 1
        )
    })
}

/// Parses a JSON object.
pub(super) fn object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(utf8(bytes)?) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(format!("expected a JSON object, found {}", describe(&other))),
        Err(e) => {
            let text = e.to_string().replace(" at line 1 column", " at column");
            let nan = ["NaN", "Infinity"].iter().find(|word| {
                bytes
                    .get(e.column().saturating_sub(1)..)
                    .is_some_and(|rest| rest.starts_with(word.as_bytes()))
            });
            let hint = nan.map_or_else(String::new, |word| format!("\nhint: {word} is not a number in JSON"));
            Err(format!("this is not JSON: {text}{hint}"))
        }
    }
}

/// A JSON value in words, for messages.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("`{value}`"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a text".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

fn parse_json(schema: &Schema, bytes: &[u8], cache: &mut ColumnCache) -> Result<Row, String> {
    let mut object = object(bytes)?;
    let same = cache.as_ref().is_some_and(|(names, _)| names.iter().eq(object.keys()));
    if !same {
        let names: Vec<&str> = object.keys().map(String::as_str).collect();
        let roles = schema.roles(&names)?;
        *cache = Some((object.keys().cloned().collect(), roles));
    }
    let Some((names, roles)) = cache.as_ref() else { return Err("has no columns".to_owned()) };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    roles.row(&names, |column| {
        let name = names[column];
        let text = |value: Value| match value {
            Value::String(text) => Ok(text),
            Value::Number(number) if roles.value(column) => Ok(number.to_string()),
            Value::Bool(value) if roles.value(column) => Ok(value.to_string()),
            other => Err(format!(
                "`{name}` has {} where text was expected\nhint: put it in quotes",
                describe(&other)
            )),
        };
        match object.get_mut(name).map(Value::take).unwrap_or_default() {
            Value::Null => Ok(Cell::Missing),
            Value::Array(items) => Ok(Cell::List(items.into_iter().map(text).collect::<Result<_, _>>()?)),
            value => text(value).map(Cell::Text),
        }
    })
}

/// The fields of one CSV record.
pub(super) fn fields(bytes: &[u8], delimiter: u8) -> Result<csv::StringRecord, String> {
    let text = utf8(bytes)?;
    let mut record = csv::StringRecord::new();
    csv::ReaderBuilder::new()
        .has_headers(false)
        .delimiter(delimiter)
        .terminator(csv::Terminator::Any(b'\n'))
        .buffer_capacity(text.len().max(16))
        .from_reader(text.as_bytes())
        .read_record(&mut record)
        .map_err(|e| format!("this is not CSV: {e}"))?;
    Ok(record)
}

/// The column names in the header of a CSV file.
pub(super) fn header(bytes: &[u8], delimiter: u8) -> Result<Vec<String>, String> {
    let names: Vec<String> = fields(bytes, delimiter)?.iter().map(|name| name.trim().to_owned()).collect();
    if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        let first = names.iter().position(|other| other == name).unwrap_or_default();
        return Err(format!("the header names column {} and column {} `{name}`", first + 1, i + 1));
    }
    Ok(names)
}

fn parse_csv(bytes: &[u8], delimiter: u8, names: &[String], roles: &Roles) -> Result<Row, String> {
    let fields = fields(bytes, delimiter)?;
    if fields.len() != names.len() {
        return Err(format!("has {} fields where the header has {}", fields.len(), names.len()));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    roles.row(&names, |column| {
        let text = &fields[column];
        // Several negatives in one cell are a JSON list; an empty cell is a row without negatives.
        let listed = roles.negatives(column).then(|| text.trim());
        Ok(match listed {
            Some("") => Cell::Missing,
            Some(list) if list.starts_with('[') => {
                serde_json::from_str(list).map_or_else(|_| Cell::Text(text.to_owned()), Cell::List)
            }
            _ => Cell::Text(text.to_owned()),
        })
    })
}
