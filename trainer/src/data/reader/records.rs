//! Cuts text into records with their offsets: the lines of JSON lines, the records of CSV.
//!
//! Both take one pass over the bytes. A CSV record may contain line ends inside quotes; a quote opens only at
//! the beginning of a field, and a doubled quote stands for one (RFC 4180).

use std::io::BufRead;
use std::path::Path;

use super::format::Layout;
use crate::Error;

/// One record of a text.
pub(super) struct Record<'a> {
    /// Byte offset in the file.
    pub(super) offset: u64,
    /// The line in which it begins, from 1.
    pub(super) line: u64,
    /// The text without its line end.
    pub(super) bytes: &'a [u8],
}

/// Why reading stopped before the end of the text.
pub(super) enum Stop<E> {
    /// The file cannot be read.
    Io(std::io::Error),
    /// The text cannot be cut into records.
    Record(RowError),
    /// The error of the function that receives the records.
    Caller(E),
}

/// What is wrong with the record that begins in a line (from 1).
pub(super) struct RowError {
    pub(super) line: u64,
    pub(super) message: String,
}

impl RowError {
    /// The error, with its file.
    pub(super) fn at(self, path: &Path) -> Error {
        Error::Row { path: path.to_owned(), line: self.line, message: self.message }
    }
}

impl Stop<RowError> {
    /// The error, with its file.
    pub(super) fn at(self, path: &Path) -> Error {
        match self {
            Self::Io(source) => Error::read("read", path)(source),
            Self::Record(error) | Self::Caller(error) => error.at(path),
        }
    }
}

impl Stop<Error> {
    /// The error; one of the text gets its file.
    pub(super) fn at(self, path: &Path) -> Error {
        match self {
            Self::Io(source) => Error::read("read", path)(source),
            Self::Record(error) => error.at(path),
            Self::Caller(error) => error,
        }
    }
}

/// Longest record in bytes: a longer one means that a quote or a line is never closed.
const LONGEST: usize = 1 << 30;

const BOM: &[u8] = b"\xef\xbb\xbf";

/// Calls `f` with every record; blank lines and a byte order mark are left out.
pub(super) fn each<E>(
    layout: Layout,
    text: impl BufRead,
    f: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    each_from(0, layout, text, f)
}

/// Like [`each`], for text that begins at `offset` of the file. Lines are counted from there.
pub(super) fn each_from<E>(
    offset: u64,
    layout: Layout,
    text: impl BufRead,
    f: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    match layout {
        Layout::JsonLines => lines(offset, text, f),
        Layout::Csv(delimiter) => csv(offset, text, delimiter, f),
    }
}

fn lines<E>(
    mut offset: u64,
    mut text: impl BufRead,
    mut each: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    let (mut line, mut buffer) = (0, Vec::new());
    loop {
        buffer.clear();
        let count = read_line(&mut text, &mut buffer).map_err(Stop::Io)?;
        if count == 0 {
            return Ok(());
        }
        line += 1;
        if count > LONGEST {
            let message = "this line is longer than 1 GiB".to_owned();
            return Err(Stop::Record(RowError { line, message }));
        }
        let skip = if offset == 0 && buffer.starts_with(BOM) { BOM.len() } else { 0 };
        let bytes = buffer[skip..].trim_ascii();
        if !bytes.is_empty() {
            each(Record { offset: offset + skip as u64, line, bytes }).map_err(Stop::Caller)?;
        }
        offset += count as u64;
    }
}

/// Like `read_until`, but stops after [`LONGEST`] bytes.
fn read_line(text: &mut impl BufRead, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut limited = std::io::Read::take(text, LONGEST as u64 + 1);
    limited.read_until(b'\n', buffer)
}

fn csv<E>(
    mut offset: u64,
    mut text: impl BufRead,
    delimiter: u8,
    mut each: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    let mut state = Field::Start;
    let mut record: Vec<u8> = Vec::new();
    let (mut start, mut line, mut start_line) = (offset, 1_u64, 1_u64);
    loop {
        let chunk = text.fill_buf().map_err(Stop::Io)?;
        if chunk.is_empty() {
            break;
        }
        let count = chunk.len();
        let mut copied = 0;
        for (i, byte) in chunk.iter().enumerate() {
            if *byte == b'\n' {
                line += 1;
                if state != Field::Quoted {
                    record.extend_from_slice(&chunk[copied..i]);
                    emit(&record, start, start_line, &mut each)?;
                    record.clear();
                    copied = i + 1;
                    (start, start_line, state) = (offset + i as u64 + 1, line, Field::Start);
                    continue;
                }
            }
            state = match (state, *byte) {
                // The byte order mark is not part of the first field.
                (Field::Start, _) if start == 0 && BOM.get((offset + i as u64) as usize) == Some(byte) => {
                    Field::Start
                }
                (Field::Start, b'"') => Field::Quoted,
                (Field::Quoted, b'"') => Field::Quote,
                (Field::Quoted, _) => Field::Quoted,
                (Field::Quote, b'"') => Field::Quoted,
                (_, byte) if byte == delimiter => Field::Start,
                _ => Field::Plain,
            };
        }
        record.extend_from_slice(&chunk[copied..]);
        if record.len() > LONGEST {
            let message = "this row is longer than 1 GiB: is a closing quote missing?".to_owned();
            return Err(Stop::Record(RowError { line: start_line, message }));
        }
        text.consume(count);
        offset += count as u64;
    }
    if state == Field::Quoted {
        let message = "a quote that opens in this row is never closed".to_owned();
        return Err(Stop::Record(RowError { line: start_line, message }));
    }
    emit(&record, start, start_line, &mut each)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    /// Before the first byte of a field.
    Start,
    Plain,
    Quoted,
    /// After a quote inside quotes: the end of the field, or the first half of a doubled quote.
    Quote,
}

fn emit<E>(
    bytes: &[u8],
    offset: u64,
    line: u64,
    each: &mut impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    let skip = if offset == 0 && bytes.starts_with(BOM) { BOM.len() } else { 0 };
    let bytes = bytes[skip..].strip_suffix(b"\r").unwrap_or(&bytes[skip..]);
    if bytes.is_empty() {
        return Ok(());
    }
    each(Record { offset: offset + skip as u64, line, bytes }).map_err(Stop::Caller)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::{BufReader, Cursor};

    use super::*;

    type Seen = Vec<(u64, u64, String)>;

    fn all(text: &str, buffer: usize, delimiter: Option<u8>) -> Result<Seen, (u64, String)> {
        let mut seen = Vec::new();
        let reader = BufReader::with_capacity(buffer, Cursor::new(text.as_bytes()));
        let each = |r: Record<'_>| {
            seen.push((r.offset, r.line, String::from_utf8(r.bytes.to_vec()).unwrap()));
            Ok::<(), Infallible>(())
        };
        let layout = delimiter.map_or(Layout::JsonLines, Layout::Csv);
        match super::each(layout, reader, each) {
            Ok(()) => Ok(seen),
            Err(Stop::Record(RowError { line, message })) => Err((line, message)),
            Err(_) => unreachable!(),
        }
    }

    #[test]
    fn lines_keep_their_place_over_blanks_marks_and_line_ends() {
        for buffer in [1, 3, 64] {
            let text = "\u{feff}{a}\r\n\r\n  \n{b}\n{c}";
            let expected =
                vec![(3, 1, "{a}".to_owned()), (13, 4, "{b}".to_owned()), (17, 5, "{c}".to_owned())];
            assert_eq!(all(text, buffer, None), Ok(expected));
        }
        assert_eq!(all("", 8, None), Ok(vec![]));
    }

    #[test]
    fn csv_records_end_outside_quotes_only() {
        for buffer in [1, 2, 5, 64] {
            let text = "\u{feff}\"q\",p\r\n\"a\nb\",\"say \"\"no\n\"\"\"\r\n\r\nx \"y\" z,w\"\n1,2";
            let seen = all(text, buffer, Some(b',')).unwrap();
            let texts: Vec<&str> = seen.iter().map(|r| r.2.as_str()).collect();
            assert_eq!(texts, ["\"q\",p", "\"a\nb\",\"say \"\"no\n\"\"\"", "x \"y\" z,w\"", "1,2"]);
            assert_eq!(seen.iter().map(|r| r.1).collect::<Vec<_>>(), [1, 2, 6, 7]);
            for (offset, _, text_of) in &seen {
                assert!(text[*offset as usize..].starts_with(text_of.as_str()));
            }
        }
    }

    #[test]
    fn a_quote_that_is_never_closed_names_its_row() {
        let error = all("q,p\na,b\nc,\"d\ne,f\n", 4, Some(b',')).unwrap_err();
        assert_eq!(error, (3, "a quote that opens in this row is never closed".to_owned()));
        assert!(all("q\tp\n\"a\t\"b\n", 4, Some(b'\t')).is_ok());
        assert!(all("q,\"\"", 4, Some(b',')).is_ok());
    }
}
