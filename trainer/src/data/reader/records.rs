//! Cuts a text into records, each with its place: the lines of a jsonl file, the records of a csv file.
//!
//! Both are one pass over bytes. A csv record may hold line ends inside quotes; a quote opens only at the beginning of a
//! field, and doubled it stands for itself (RFC 4180).

use std::io::BufRead;

/// One record.
pub(super) struct Record<'a> {
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// The line it begins in, from 1.
    pub(super) line: u64,
    /// Its text, without the line end.
    pub(super) bytes: &'a [u8],
}

/// Why the records end early.
pub(super) enum Stop<E> {
    /// The file cannot be read.
    Io(std::io::Error),
    /// A record is wrong: its line, and why.
    Record(u64, String),
    /// The caller's own.
    Caller(E),
}

/// A text longer than this is not one: something is never closed.
const LONGEST: usize = 1 << 30;

const BOM: &[u8] = b"\xef\xbb\xbf";

/// Calls `each` with every line that is not blank. A byte order mark is left out.
pub(super) fn lines<E>(
    text: impl BufRead,
    each: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    lines_from(0, text, each)
}

/// As [`lines`], for text that begins at an offset of the file. Lines are counted from there.
pub(super) fn lines_from<E>(
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
            return Err(Stop::Record(line, "this line is longer than 1 GiB".to_owned()));
        }
        let skip = if offset == 0 && buffer.starts_with(BOM) { BOM.len() } else { 0 };
        let bytes = buffer[skip..].trim_ascii();
        if !bytes.is_empty() {
            each(Record { offset: offset + skip as u64, line, bytes }).map_err(Stop::Caller)?;
        }
        offset += count as u64;
    }
}

/// As `read_until`, but gives up after [`LONGEST`].
fn read_line(text: &mut impl BufRead, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut limited = std::io::Read::take(text, LONGEST as u64 + 1);
    limited.read_until(b'\n', buffer)
}

/// Calls `each` with every csv record that is not a blank line. A byte order mark is left out.
pub(super) fn csv<E>(
    text: impl BufRead,
    delimiter: u8,
    each: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    csv_from(0, text, delimiter, each)
}

/// As [`csv`], for text that begins at an offset of the file. Lines are counted from there.
pub(super) fn csv_from<E>(
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
                // The byte order mark is no part of the first field.
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
            return Err(Stop::Record(
                start_line,
                "this row is longer than 1 GiB: is a quote never closed?".to_owned(),
            ));
        }
        text.consume(count);
        offset += count as u64;
    }
    if state == Field::Quoted {
        return Err(Stop::Record(start_line, "a quote in this row is never closed".to_owned()));
    }
    emit(&record, start, start_line, &mut each)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    /// Before its first byte.
    Start,
    Plain,
    Quoted,
    /// After a quote inside quotes: the end, or the first half of a doubled one.
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
        let done = match delimiter {
            Some(delimiter) => csv(reader, delimiter, each),
            None => lines(reader, each),
        };
        match done {
            Ok(()) => Ok(seen),
            Err(Stop::Record(line, message)) => Err((line, message)),
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
        assert_eq!(error, (3, "a quote in this row is never closed".to_owned()));
        assert!(all("q\tp\n\"a\t\"b\n", 4, Some(b'\t')).is_ok());
        assert!(all("q,\"\"", 4, Some(b',')).is_ok());
    }
}
