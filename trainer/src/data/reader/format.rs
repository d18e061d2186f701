//! Data formats and compressions: the only table of file-name endings, and how each format is read.
//!
//! To add a format, add a row to `FORMATS`. A format that is neither JSON lines nor CSV also needs a
//! `convert` function in its own file, as `parquet`.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::parquet;
use crate::system::progress::ProgressReader;
use crate::{Error, Result};

/// One data format.
#[derive(Debug)]
pub(crate) struct Format {
    /// Endings of file names, in lower case, without the dot.
    endings: &'static [&'static str],
    /// How the text is cut into rows.
    pub(super) layout: Layout,
    /// Converts a file to text in `layout`, where the format itself has no rows that can be read at any
    /// position.
    pub(super) convert: Option<fn(&Path, File) -> Result<File>>,
}

/// How the text of a file is cut into rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// One JSON object per line.
    JsonLines,
    /// A header, then records with this delimiter (RFC 4180).
    Csv(u8),
}

static FORMATS: [Format; 4] = [
    Format { endings: &["jsonl", "ndjson"], layout: Layout::JsonLines, convert: None },
    Format { endings: &["csv"], layout: Layout::Csv(b','), convert: None },
    Format { endings: &["tsv"], layout: Layout::Csv(b'\t'), convert: None },
    Format { endings: &["parquet"], layout: Layout::JsonLines, convert: Some(parquet::to_json_lines) },
];

/// One compression of whole files.
struct Compression {
    /// The ending that is added to a file's name, without the dot.
    ending: &'static str,
    reader: fn(ProgressReader<File>) -> io::Result<Box<dyn Read>>,
}

static COMPRESSIONS: [Compression; 2] = [
    Compression {
        ending: "gz",
        reader: |file| Ok(Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file)))),
    },
    Compression { ending: "zst", reader: |file| Ok(Box::new(zstd::Decoder::new(file)?)) },
];

/// What a data file is, for help texts and error messages.
pub(crate) const DATA_FILE: &str = "data file (.jsonl, .csv, .tsv or .parquet, each also .gz or .zst)";

impl Format {
    /// The format that a file's name tells; none where the ending is unknown.
    pub(crate) fn of(path: &Path) -> Option<&'static Self> {
        split_name(path.file_name()?.to_str()?).format
    }

    /// Like [`Self::of`], where only a data file will do.
    ///
    /// # Errors
    /// The ending is unknown.
    pub(crate) fn expect(path: &Path) -> Result<&'static Self> {
        Self::of(path).ok_or_else(|| Error::file(path, format!("expected a {DATA_FILE}")))
    }

    /// The ending under which rows of this format are written: a converted format is written as what it was
    /// converted to.
    pub(crate) fn written_ending(&self) -> &'static str {
        let plain = FORMATS.iter().find(|format| format.convert.is_none() && format.layout == self.layout);
        plain.unwrap_or(self).endings[0]
    }
}

/// A file's name without the endings of its format and compression: `pairs.en` of `data/pairs.en.jsonl.gz`.
pub(crate) fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    split_name(&name).stem.to_owned()
}

/// `folder/name`, plain or compressed; none where neither exists.
pub(crate) fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let compressed = COMPRESSIONS.iter().map(|compression| format!("{name}.{}", compression.ending));
    std::iter::once(name.to_owned())
        .chain(compressed)
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
}

/// The decompressed bytes of a file; none if its name has no ending of a compression.
pub(super) fn decompress(path: &Path, file: &File) -> Result<Option<Box<dyn Read>>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some(compression) = split_name(&name).compression else { return Ok(None) };
    let bytes = file.metadata().map_err(Error::read("read", path))?.len();
    let file = file.try_clone().map_err(Error::read("read", path))?;
    let watched = ProgressReader::new(file, "unpacking", path, bytes);
    (compression.reader)(watched).map(Some).map_err(Error::read("unpack", path))
}

/// A file's name, taken apart.
struct Name<'a> {
    stem: &'a str,
    format: Option<&'static Format>,
    compression: Option<&'static Compression>,
}

fn split_name(name: &str) -> Name<'_> {
    let ends = |name: &str, ending: &str| {
        let at = name.len().checked_sub(ending.len() + 1)?;
        let (stem, rest) = (name.get(..at)?, name.get(at..)?);
        (rest.starts_with('.') && rest[1..].eq_ignore_ascii_case(ending))
            .then_some(at)
            .filter(|_| !stem.is_empty())
    };
    let (mut stem, mut compression, mut format) = (name, None, None);
    for candidate in &COMPRESSIONS {
        if let Some(at) = ends(stem, candidate.ending) {
            (stem, compression) = (&stem[..at], Some(candidate));
            break;
        }
    }
    for candidate in &FORMATS {
        if let Some(at) = candidate.endings.iter().find_map(|ending| ends(stem, ending)) {
            (stem, format) = (&stem[..at], Some(candidate));
            break;
        }
    }
    Name { stem, format, compression }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_format_and_compression() {
        let layout = |name: &str| Format::of(Path::new(name)).map(|format| format.layout);
        for (name, expected, bare) in [
            ("a/pairs.en.jsonl.gz", Some(Layout::JsonLines), "pairs.en"),
            ("a/X.CSV", Some(Layout::Csv(b',')), "X"),
            ("x.tsv.ZST", Some(Layout::Csv(b'\t')), "x"),
            ("x.parquet", Some(Layout::JsonLines), "x"),
            ("x.txt.gz", None, "x.txt"),
            ("jsonl", None, "jsonl"),
            (".csv", None, ".csv"),
            ("é.csv", Some(Layout::Csv(b',')), "é"),
        ] {
            assert_eq!((layout(name), stem(Path::new(name)).as_str()), (expected, bare), "{name}");
        }
        let written = |name: &str| Format::of(Path::new(name)).unwrap().written_ending();
        assert_eq!(["x.ndjson", "x.tsv", "x.parquet"].map(written), ["jsonl", "tsv", "jsonl"]);
    }

    #[test]
    fn messages_name_every_format() {
        for format in &FORMATS {
            assert!(DATA_FILE.contains(&format!(".{}", format.endings[0])), "{format:?}");
        }
        for compression in &COMPRESSIONS {
            assert!(DATA_FILE.contains(&format!(".{}", compression.ending)), "{}", compression.ending);
        }
    }
}
