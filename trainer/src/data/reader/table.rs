//! Rows from one file of records: jsonl, csv or tsv.

use std::path::Path;

use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

use super::file::{DataFile, Format};
use super::records::{self, Record, Stop};
use crate::data::row::{Cell, Roles, Row, Schema};
use crate::{Error, Result};

/// An open file whose rows were all checked.
pub(super) struct Table {
    file: DataFile,
    /// Where each row begins.
    offsets: Vec<u64>,
    digest: u64,
    parser: Parser,
}

enum Parser {
    /// Each object has names of its own.
    Jsonl(Schema),
    Csv {
        delimiter: u8,
        names: Vec<String>,
        roles: Roles,
    },
}

impl Table {
    pub(super) fn open(path: &Path, format: Format, schema: Schema) -> Result<Self> {
        let file = DataFile::open(path)?;
        let mut index = Index { offsets: Vec::new(), digest: Xxh3::new() };
        let parser = match format {
            Format::Jsonl => {
                let (mut known, mut negatives) = (None, false);
                records::lines(file.stream(), |record| {
                    parse_json(&schema, record.bytes, &mut known)
                        .map_err(|message| (record.line, message))?;
                    negatives |= known.as_ref().is_some_and(|(_, roles)| roles.has_negatives());
                    index.push(&record);
                    Ok(())
                })
                .map_err(|stop| explain(path, stop))?;
                if !negatives && !index.offsets.is_empty() {
                    schema.without_negatives().map_err(|message| Error::file(path, message))?;
                }
                Parser::Jsonl(schema)
            }
            Format::Csv(delimiter) => {
                let mut header: Option<(Vec<String>, Roles)> = None;
                records::csv(file.stream(), delimiter, |record| {
                    let line = record.line;
                    match &header {
                        None => {
                            header = Some(read_header(&schema, &record, delimiter).map_err(|m| (line, m))?)
                        }
                        Some((names, roles)) => {
                            parse_csv(record.bytes, delimiter, names, roles).map_err(|m| (line, m))?;
                            index.push(&record);
                        }
                    }
                    Ok(())
                })
                .map_err(|stop| explain(path, stop))?;
                let (names, roles) =
                    header.ok_or_else(|| Error::file(path, "is empty, expected a header and rows"))?;
                Parser::Csv { delimiter, names, roles }
            }
        };
        if index.offsets.is_empty() {
            return Err(Error::file(path, "has no rows"));
        }
        index.offsets.shrink_to_fit();
        Ok(Self { file, offsets: index.offsets, digest: index.digest.digest(), parser })
    }

    pub(super) fn len(&self) -> u64 {
        self.offsets.len() as u64
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn row(&self, row: u64) -> Result<Row> {
        let start = self.offsets[row as usize];
        let end = self.offsets.get(row as usize + 1).copied().unwrap_or(self.file.len());
        let bytes = self.file.read(start..end)?;
        // Up to the next row: blank lines are left out, but spaces and tabs belong to a csv row.
        let end = bytes.iter().rposition(|byte| !matches!(byte, b'\n' | b'\r')).map_or(0, |last| last + 1);
        let bytes = &bytes[..end];
        let parsed = match &self.parser {
            Parser::Jsonl(schema) => parse_json(schema, bytes.trim_ascii_end(), &mut None),
            Parser::Csv { delimiter, names, roles } => parse_csv(bytes, *delimiter, names, roles),
        };
        parsed.map_err(|message| self.error(row, format!("{message} (it was right when the run began)")))
    }

    pub(super) fn error(&self, row: u64, message: String) -> Error {
        self.file.row_error(self.offsets[row as usize], message)
    }
}

struct Index {
    offsets: Vec<u64>,
    digest: Xxh3,
}

impl Index {
    fn push(&mut self, record: &Record<'_>) {
        self.offsets.push(record.offset);
        self.digest.update(record.bytes);
        self.digest.update(b"\n");
    }
}

/// A line, and what is wrong with it.
pub(super) type Wrong = (u64, String);

pub(super) fn explain(path: &Path, stop: Stop<Wrong>) -> Error {
    match stop {
        Stop::Io(source) => Error::Io { path: path.to_owned(), action: "read", source },
        Stop::Record(line, message) | Stop::Caller((line, message)) => {
            Error::Row { path: path.to_owned(), line, message }
        }
    }
}

pub(super) fn utf8(bytes: &[u8]) -> std::result::Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| {
        format!(
            "is not UTF-8 at byte {} of the row\nhint: iconv -f LATIN1 -t UTF-8 converts a file",
            e.valid_up_to() + 1
        )
    })
}

/// A JSON object in one line.
pub(super) fn object(bytes: &[u8]) -> std::result::Result<Map<String, Value>, String> {
    match serde_json::from_str(utf8(bytes)?) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(format!("expected a JSON object, found {}", kind(&other))),
        Err(e) => {
            let text = e.to_string();
            Err(format!("this is not JSON: {}", text.replace(" at line 1 column", " at column")))
        }
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("`{value}`"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a text".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// `known`: the names of the row before and their roles, which are nearly always the same.
fn parse_json(
    schema: &Schema,
    bytes: &[u8],
    known: &mut Option<(Vec<String>, Roles)>,
) -> std::result::Result<Row, String> {
    let mut object = object(bytes)?;
    let same = known.as_ref().is_some_and(|(names, _)| names.iter().eq(object.keys()));
    if !same {
        let names: Vec<&str> = object.keys().map(String::as_str).collect();
        let roles = schema.roles(&names)?;
        *known = Some((object.keys().cloned().collect(), roles));
    }
    let Some((names, roles)) = known.as_ref() else { return Err("has no columns".to_owned()) };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    roles.row(&names, |column| {
        let name = names[column];
        let text = |value: Value| match value {
            Value::String(text) => Ok(text),
            other => {
                Err(format!("`{name}` has {} where text was expected\nhint: put it in quotes", kind(&other)))
            }
        };
        match object.get_mut(name).map(Value::take).unwrap_or_default() {
            Value::Null => Ok(Cell::Missing),
            Value::Array(items) => {
                Ok(Cell::List(items.into_iter().map(text).collect::<std::result::Result<_, _>>()?))
            }
            value => text(value).map(Cell::Text),
        }
    })
}

/// The fields of one csv record.
pub(super) fn fields(bytes: &[u8], delimiter: u8) -> std::result::Result<csv::StringRecord, String> {
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

fn read_header(
    schema: &Schema,
    record: &Record<'_>,
    delimiter: u8,
) -> std::result::Result<(Vec<String>, Roles), String> {
    let names: Vec<String> =
        fields(record.bytes, delimiter)?.iter().map(|name| name.trim().to_owned()).collect();
    if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        let first = names.iter().position(|other| other == name).unwrap_or_default();
        return Err(format!("the header names column {} and column {} `{name}`", first + 1, i + 1));
    }
    let roles = schema.header(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok((names, roles))
}

fn parse_csv(
    bytes: &[u8],
    delimiter: u8,
    names: &[String],
    roles: &Roles,
) -> std::result::Result<Row, String> {
    let fields = fields(bytes, delimiter)?;
    if fields.len() != names.len() {
        return Err(format!("has {} fields where the header has {}", fields.len(), names.len()));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    roles.row(&names, |column| {
        let text = &fields[column];
        // A list in one cell is written as JSON; a cell without a negative is empty.
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
