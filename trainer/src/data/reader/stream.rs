//! Reads a file once from its beginning, where no row has to be found again.

use std::path::Path;

use serde_json::{Map, Value};

use super::file::DataFile;
use super::format::{Format, Layout};
use super::parser::{describe, fields, header, object, utf8};
use super::records::{self, RowError};
use crate::config::RowKind;
use crate::data::row::usual_kind;
use crate::{Error, Result};

/// Calls `f` with each line that is not blank, trimmed, and its number from 1.
pub(crate) fn lines(path: &Path, mut f: impl FnMut(u64, &str) -> Result<()>) -> Result<()> {
    let file = DataFile::open(path)?;
    records::each(Layout::JsonLines, file.stream(), |record| {
        let line = record.line;
        f(line, utf8(record.bytes).map_err(|message| RowError { line, message }.at(path))?)
    })
    .map_err(|stop| stop.at(path))
}

/// Calls `f` with each row of a data file as an object, and the line in which it begins.
pub(crate) fn objects(path: &Path, mut f: impl FnMut(u64, Map<String, Value>) -> Result<()>) -> Result<()> {
    raw(path, |line, _, row| row.map_or(Ok(()), |row| f(line, row)))
}

/// The kind of a file's rows by the columns of its first row, or why these are ambiguous. A file without rows has
/// pairs.
pub(crate) fn kind_of(path: &Path) -> Result<std::result::Result<RowKind, String>> {
    let mut kind = None;
    let read = objects(path, |line, row| {
        kind = Some(usual_kind(&row.keys().map(String::as_str).collect::<Vec<_>>()));
        // An error ends the reading before the end of the file.
        Err(Error::Row { path: path.to_owned(), line, message: String::new() })
    });
    match kind {
        Some(kind) => Ok(kind),
        None => read.map(|()| Ok(RowKind::Pairs)),
    }
}

/// Like [`objects`], with the bytes of each row as they are in the file. The header of a CSV file comes
/// first, without an object.
pub(crate) fn raw(
    path: &Path,
    mut f: impl FnMut(u64, &[u8], Option<Map<String, Value>>) -> Result<()>,
) -> Result<()> {
    let layout = Format::expect(path)?.layout;
    let file = DataFile::open(path)?;
    let mut names: Option<Vec<String>> = None;
    records::each(layout, file.stream(), |record| {
        let line = record.line;
        let wrong = |message| RowError { line, message }.at(path);
        let Layout::Csv(delimiter) = layout else {
            return f(line, record.bytes, Some(object(record.bytes).map_err(wrong)?));
        };
        let Some(names) = &names else {
            names = Some(header(record.bytes, delimiter).map_err(wrong)?);
            return f(line, record.bytes, None);
        };
        let cells = fields(record.bytes, delimiter).map_err(wrong)?;
        if cells.len() != names.len() {
            return Err(wrong(format!("has {} fields where the header has {}", cells.len(), names.len())));
        }
        f(line, record.bytes, Some(names.iter().cloned().zip(cells.iter().map(Value::from)).collect()))
    })
    .map_err(|stop| stop.at(path))
}

/// The column `text` of a row.
///
/// # Errors
/// There is no such column, or it is not a text.
pub(crate) fn text_of(row: &Map<String, Value>) -> std::result::Result<&str, String> {
    match row.get("text") {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`text` is {}, expected a text", describe(other))),
        None => Err("has no `text`".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::Error;

    fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
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
            ("a.doc", "", "expected a data file (.jsonl, .csv, .tsv or .parquet"),
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
