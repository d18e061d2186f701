//! A file gone through once, row by row, where nothing has to be found again.

use std::path::Path;

use serde_json::{Map, Value};

use super::file::{DataFile, Format};
use super::records::{self, Record, Stop};
use super::table::{fields, object, utf8};
use crate::config::RowKind;
use crate::data::row::usual_kind;
use crate::{Error, Result};

/// Calls `each` with the lines that are not blank, without white space at their ends, and their numbers from 1.
pub(crate) fn lines(path: &Path, mut each: impl FnMut(u64, &str) -> Result<()>) -> Result<()> {
    let file = DataFile::open(path)?;
    let done = records::lines(file.stream(), |record| {
        let text = utf8(record.bytes).map_err(|message| wrong(path, &record, message))?;
        each(record.line, text)
    });
    explain(path, done)
}

/// Calls `each` with the rows of a .jsonl, .csv, .tsv or .parquet file, each also .gz or .zst, and the lines they begin in.
pub(crate) fn objects(
    path: &Path,
    mut each: impl FnMut(u64, Map<String, Value>) -> Result<()>,
) -> Result<()> {
    raw(path, |line, _, row| row.map_or(Ok(()), |row| each(line, row)))
}

/// The kind of a file's rows by the columns of its first row, or what is ambiguous about these. A file without rows has pairs.
pub(crate) fn kind_of(path: &Path) -> Result<std::result::Result<RowKind, String>> {
    let mut kind = None;
    let read = objects(path, |line, row| {
        kind = Some(usual_kind(&row.keys().map(String::as_str).collect::<Vec<_>>()));
        // An error is how reading ends before the file does.
        Err(Error::Row { path: path.to_owned(), line, message: String::new() })
    });
    match kind {
        Some(kind) => Ok(kind),
        None => read.map(|()| Ok(RowKind::Pairs)),
    }
}

/// As [`objects`], with the bytes of each row as they stand in the file. The header of a table comes first, as no row.
pub(crate) fn raw(
    path: &Path,
    mut each: impl FnMut(u64, &[u8], Option<Map<String, Value>>) -> Result<()>,
) -> Result<()> {
    let format = Format::of(path).ok_or_else(|| {
        Error::file(path, format!("expected a {} file, each also .gz or .zst", Format::NAMES))
    })?;
    let file = DataFile::open(path)?;
    let done = match format {
        Format::Jsonl => records::lines(file.stream(), |record| {
            let row = object(record.bytes).map_err(|message| wrong(path, &record, message))?;
            each(record.line, record.bytes, Some(row))
        }),
        Format::Csv(delimiter) => {
            let mut names: Option<Vec<String>> = None;
            records::csv(file.stream(), delimiter, |record| {
                let cells =
                    fields(record.bytes, delimiter).map_err(|message| wrong(path, &record, message))?;
                let Some(names) = &names else {
                    names = Some(cells.iter().map(|name| name.trim().to_owned()).collect());
                    return each(record.line, record.bytes, None);
                };
                if cells.len() != names.len() {
                    let message = format!("has {} fields where the header has {}", cells.len(), names.len());
                    return Err(wrong(path, &record, message));
                }
                let row = names.iter().cloned().zip(cells.iter().map(Value::from)).collect();
                each(record.line, record.bytes, Some(row))
            })
        }
    };
    explain(path, done)
}

fn wrong(path: &Path, record: &Record<'_>, message: String) -> Error {
    Error::Row { path: path.to_owned(), line: record.line, message }
}

fn explain(path: &Path, done: std::result::Result<(), Stop<Error>>) -> Result<()> {
    done.map_err(|stop| match stop {
        Stop::Io(source) => Error::Read { path: path.to_owned(), action: "read", source },
        Stop::Record(line, message) => Error::Row { path: path.to_owned(), line, message },
        Stop::Caller(error) => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn rows_are_objects_whatever_the_format() {
        for (name, text) in [
            ("a.jsonl", "{\"x\": \"1\", \"y\": \"a b\"}\n\n{\"x\": \"2\", \"y\": \"c\"}\n"),
            ("a.csv", "x,y\n1,\"a b\"\n2,c\n"),
            ("a.tsv", "x\ty\n1\ta b\n2\tc"),
        ] {
            let (_folder, path) = file(name, text);
            let mut seen = Vec::new();
            objects(&path, |line, row| {
                seen.push((line, row["x"].clone(), row["y"].clone()));
                Ok(())
            })
            .unwrap();
            let first = if name == "a.jsonl" { 1 } else { 2 };
            let expected = [(first, "1".into(), "a b".into()), (3, "2".into(), "c".into())];
            assert_eq!(seen, expected, "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (name, text, expected) in [
            ("a.jsonl", "{}\n[1]\n", "a.jsonl:2: expected a JSON object"),
            ("a.csv", "x,y\n1\n", "a.csv:2: has 1 fields where the header has 2"),
            ("a.doc", "", "expected a .jsonl, .csv, .tsv or .parquet file"),
        ] {
            let (_folder, path) = file(name, text);
            let error = objects(&path, |_, _| Ok(())).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let (_folder, path) = file("a.txt", "a\nb\n");
        let error = lines(&path, |line, text| Err(Error::Usage(format!("{line} {text}")))).unwrap_err();
        assert_eq!(error.to_string(), "1 a");
        assert!(lines(Path::new("/no/such"), |_, _| Ok(())).unwrap_err().to_string().contains("cannot open"));
    }
}
