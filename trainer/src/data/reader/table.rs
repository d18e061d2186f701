//! Rows from one file of records: jsonl, csv or tsv.

use std::path::Path;

use serde_json::{Map, Value};

use super::check::Check;
use super::file::{DataFile, Format};
use super::index::Index;
use super::records::{self, Record, Stop};
use crate::config::RowKind;
use crate::data::labels::Labels;
use crate::data::row::{Cell, Roles, Row, Schema};
use crate::{Error, Result};

/// An open file whose rows were all checked.
pub(super) struct Table {
    file: DataFile,
    index: Index,
    digest: u64,
    parser: Parser,
    kind: RowKind,
    negatives: bool,
    dropped: Dropped,
    labels: Option<Labels>,
}

/// Negatives that are left out, because they are also positives of their rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// How many.
    pub negatives: usize,
    /// The first row that has one.
    pub first: u64,
}

/// How records become rows.
pub(super) enum Parser {
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
        let mut check = Check::default();
        let parser = match format {
            Format::Jsonl => {
                let mut parser: Option<Parser> = None;
                records::lines(file.stream(), |record| {
                    let parser = match &mut parser {
                        Some(parser) => parser,
                        // What the first row is, all are.
                        none => {
                            let mut known = None;
                            parse_json(&schema, record.bytes, &mut known).map_err(|m| (record.line, m))?;
                            let kind = known.map_or(RowKind::Pairs, |(_, roles)| roles.kind());
                            none.insert(Parser::Jsonl(schema.clone().of_kind(kind)))
                        }
                    };
                    check.add(&record, parser)
                })
                .map_err(|stop| explain(path, stop))?;
                parser.unwrap_or(Parser::Jsonl(schema.clone()))
            }
            Format::Csv(delimiter) => {
                let mut parser: Option<Parser> = None;
                records::csv(file.stream(), delimiter, |record| match &parser {
                    Some(parser) => check.add(&record, parser),
                    None => {
                        let (names, roles) =
                            read_header(&schema, &record, delimiter).map_err(|m| (record.line, m))?;
                        parser = Some(Parser::Csv { delimiter, names, roles });
                        Ok(())
                    }
                })
                .map_err(|stop| explain(path, stop))?;
                parser.ok_or_else(|| Error::file(path, "is empty, expected a header and rows"))?
            }
        };
        check.rest(&parser).map_err(|wrong| explain(path, Stop::Caller(wrong)))?;
        let Check { mut index, digest, found, .. } = check;
        if index.rows() == 0 {
            return Err(Error::file(path, "has no rows"));
        }
        index.finish(file.len());
        if matches!(parser, Parser::Jsonl(_)) && !found.negatives {
            schema.without_negatives().map_err(|message| Error::file(path, message))?;
        }
        let labels = (found.kind == Some(RowKind::Labelled))
            .then(|| Labels::new(found.labels, found.classes))
            .transpose()
            .map_err(|message| Error::file(path, message))?;
        Ok(Self {
            file,
            index,
            digest: digest.digest(),
            parser,
            kind: found.kind.unwrap_or(RowKind::Pairs),
            negatives: found.negatives,
            dropped: found.dropped,
            labels,
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.index.rows()
    }

    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    pub(super) fn kind(&self) -> RowKind {
        self.kind
    }

    pub(super) fn negatives(&self) -> bool {
        self.negatives
    }

    pub(super) fn labels(&self) -> Option<&Labels> {
        self.labels.as_ref()
    }

    pub(super) fn dropped(&self) -> Dropped {
        self.dropped
    }

    pub(super) fn row(&self, row: u64) -> Result<Row> {
        let changed =
            |message: String| self.error(row, format!("{message} (it was right when the run began)"));
        let (_, bytes) = self.record(row)?.ok_or_else(|| changed("the row is gone".to_owned()))?;
        self.parser.parse(&bytes, &mut None).map(|(row, _)| row).map_err(changed)
    }

    pub(super) fn error(&self, row: u64, message: String) -> Error {
        match self.record(row) {
            Ok(Some((offset, _))) => self.file.row_error(offset, message),
            // The file has changed since: near the place where the row was.
            Ok(None) => self.file.row_error(self.index.find(row).0.start, message),
            Err(error) => error,
        }
    }

    /// The text of a row and where it begins; none if the file no longer has it.
    fn record(&self, row: u64) -> Result<Option<(u64, Vec<u8>)>> {
        let (part, mut before) = self.index.find(row);
        let start = part.start;
        let bytes = self.file.read(part)?;
        let take = |record: Record<'_>| {
            if before == 0 {
                return Err((record.offset, record.bytes.to_vec()));
            }
            before -= 1;
            Ok(())
        };
        let stopped = match &self.parser {
            Parser::Jsonl(_) => records::lines_from(start, bytes.as_slice(), take),
            Parser::Csv { delimiter, .. } => records::csv_from(start, bytes.as_slice(), *delimiter, take),
        };
        Ok(match stopped {
            Err(Stop::Caller(record)) => Some(record),
            _ => None,
        })
    }
}

/// The names of the row before and their roles, which are nearly always the same.
pub(super) type Known = Option<(Vec<String>, Roles)>;

impl Parser {
    /// A row, and whether it has columns of negatives.
    pub(super) fn parse(&self, bytes: &[u8], known: &mut Known) -> std::result::Result<(Row, bool), String> {
        match self {
            Self::Jsonl(schema) => {
                let row = parse_json(schema, bytes, known)?;
                Ok((row, known.as_ref().is_some_and(|(_, roles)| roles.has_negatives())))
            }
            Self::Csv { delimiter, names, roles } => {
                Ok((parse_csv(bytes, *delimiter, names, roles)?, roles.has_negatives()))
            }
        }
    }

    pub(super) fn kind(&self) -> Option<RowKind> {
        match self {
            Self::Jsonl(schema) => schema.kind(),
            Self::Csv { roles, .. } => Some(roles.kind()),
        }
    }
}

/// A line, and what is wrong with it.
pub(super) type Wrong = (u64, String);

pub(super) fn explain(path: &Path, stop: Stop<Wrong>) -> Error {
    match stop {
        Stop::Io(source) => Error::Read { path: path.to_owned(), action: "read", source },
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
            let text = e.to_string().replace(" at line 1 column", " at column");
            let nan = ["NaN", "Infinity"].iter().find(|word| {
                bytes
                    .get(e.column().saturating_sub(1)..)
                    .is_some_and(|rest| rest.starts_with(word.as_bytes()))
            });
            let hint = nan.map_or_else(String::new, |word| format!("\nhint: {word} is no number in JSON"));
            Err(format!("this is not JSON: {text}{hint}"))
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

fn parse_json(schema: &Schema, bytes: &[u8], known: &mut Known) -> std::result::Result<Row, String> {
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
            Value::Number(number) if roles.value(column) => Ok(number.to_string()),
            Value::Bool(value) if roles.value(column) => Ok(value.to_string()),
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
