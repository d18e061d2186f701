//! One file of rows into a part to train on and parts to measure with.
//!
//! Rows that share a text stay together (union-find over the texts' hashes), so that no text of one part is in another. The
//! groups are dealt out in a random order, the larger first, each to the part that lacks the greatest share of its rows: parts
//! have groups of all sizes, and their rows within one of what was asked for, unless the groups are too large for that. Parts keep
//! the rows as they stand in the file, byte for byte and in its order. In memory are a hash a text and a number a row.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

use crate::data::reader;
use crate::data::row::text_columns;
use crate::system::atomic::{LineWriter, StagedDir};
use crate::{Error, Result};

/// How a file is divided.
#[derive(Clone, Debug)]
pub struct Split {
    /// The share of each part, two or three numbers above 0 with the sum 1.
    pub fractions: Vec<f64>,
    /// What the random order follows from.
    pub seed: u64,
    /// Columns whose texts tell which rows belong together; none: those that training would read.
    pub columns: Vec<String>,
}

/// What became of the rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Rows of the file.
    pub rows: u64,
    /// Groups of rows that share texts.
    pub groups: u64,
    /// Rows of the largest group.
    pub largest_group: u64,
    /// The parts' names and rows.
    pub parts: Vec<(&'static str, u64)>,
}

impl Counts {
    /// As one object.
    pub fn json(&self) -> Value {
        let mut object = json!({
            "rows": self.rows,
            "groups": self.groups,
            "largest_group": self.largest_group,
        });
        for (name, rows) in &self.parts {
            object[*name] = json!(rows);
        }
        object
    }
}

impl Split {
    /// Divides `input` into files of the folder `output`, which must not be there: train, validation and test, or train and
    /// test, in the input's format, unpacked.
    ///
    /// # Errors
    /// The fractions are no shares of a whole; the folder exists; the input cannot be read, has no column of texts, or so few groups
    /// that a part would be empty.
    pub fn run(&self, input: &Path, output: &Path) -> Result<Counts> {
        let names = self.names()?;
        StagedDir::check_free(output)?;
        let ending = ending(input)?;
        let groups = Groups::read(input, &self.columns)?;
        let parts = deal(&groups.sizes, &self.fractions, groups.of_row.len(), self.seed);
        let mut rows = vec![0u64; names.len()];
        for (&size, &part) in groups.sizes.iter().zip(&parts) {
            rows[part] += size as u64;
        }
        let counts = Counts {
            rows: groups.of_row.len() as u64,
            groups: groups.sizes.len() as u64,
            largest_group: groups.sizes.iter().copied().max().unwrap_or(0) as u64,
            parts: names.iter().copied().zip(rows).collect(),
        };
        self.check(input, &counts)?;

        let draft = StagedDir::new(output)?;
        let files = names.iter().map(|name| draft.file(&format!("{name}.{ending}")));
        let mut files = files.collect::<Result<Vec<_>>>()?;
        let changed = || Error::file(input, "has changed meanwhile");
        let mut row = 0;
        reader::raw(input, |_, bytes, object| {
            if object.is_none() {
                return files.iter_mut().try_for_each(|file| file.write(bytes));
            }
            let group = *groups.of_row.get(row).ok_or_else(changed)?;
            row += 1;
            files[parts[group as usize]].write(bytes)
        })?;
        if row != groups.of_row.len() {
            return Err(changed());
        }
        files.into_iter().try_for_each(LineWriter::finish)?;
        draft.commit()?;
        Ok(counts)
    }

    fn names(&self) -> Result<&'static [&'static str]> {
        let wrong = |message: &str| {
            let given: Vec<String> = self.fractions.iter().map(f64::to_string).collect();
            Error::Usage(format!("--fractions: {} {message}", given.join(",")))
        };
        if self.fractions.iter().any(|&fraction| !(fraction > 0.0 && fraction < 1.0)) {
            return Err(wrong("has a share that is not between 0 and 1"));
        }
        if (self.fractions.iter().sum::<f64>() - 1.0).abs() > 1e-6 {
            return Err(wrong("do not add up to 1"));
        }
        match self.fractions.len() {
            2 => Ok(&["train", "test"]),
            3 => Ok(&["train", "validation", "test"]),
            _ => Err(wrong("are no two or three shares: train and test, or train, validation and test")),
        }
    }

    /// Whether every part has rows, and about as many as it should.
    fn check(&self, input: &Path, counts: &Counts) -> Result<()> {
        let Counts { rows, groups, largest_group, parts } = counts;
        let together =
            format!("{rows} rows are {groups} groups that share texts, the largest of {largest_group} rows");
        if let Some((name, _)) = parts.iter().find(|(_, rows)| *rows == 0) {
            let hint = "negatives that many rows have tie them together: split before mining, or name the columns that count \
                        with --columns";
            return Err(Error::file(input, format!("{together}: no row is left for {name}\nhint: {hint}")));
        }
        for ((name, found), fraction) in parts.iter().zip(&self.fractions) {
            let wanted = fraction * *rows as f64;
            if (*found as f64 - wanted).abs() > (0.01 * *rows as f64).max(1.0) {
                tracing::warn!("{name} has {found} rows instead of {wanted:.0}: {together}");
            }
        }
        Ok(())
    }
}

/// `jsonl` of `data/x.jsonl.gz`, and of Parquet, whose rows are read as lines of JSON.
fn ending(input: &Path) -> Result<String> {
    let name = input.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let lower = name.to_ascii_lowercase();
    let bare = [".gz", ".zst"].iter().find_map(|packed| lower.strip_suffix(packed)).unwrap_or(&lower);
    match Path::new(bare).extension().and_then(|ending| ending.to_str()) {
        Some("parquet") => Ok("jsonl".to_owned()),
        Some(ending) => Ok(ending.to_owned()),
        None => {
            Err(Error::file(input, "expected a .jsonl, .csv, .tsv or .parquet file, each also .gz or .zst"))
        }
    }
}

/// Which rows share texts.
struct Groups {
    of_row: Vec<u32>,
    sizes: Vec<usize>,
}

impl Groups {
    fn read(input: &Path, columns: &[String]) -> Result<Self> {
        let mut parents: Vec<u32> = Vec::new();
        let mut rows_of: HashMap<u128, u32> = HashMap::new();
        let mut known = Known::default();
        reader::raw(input, |line, _, object| {
            let Some(object) = object else { return Ok(()) };
            let wrong = |message| Error::Row { path: input.to_owned(), line, message };
            let row = parents.len() as u32;
            parents.push(row);
            known
                .texts(&object, columns, |text| {
                    let text = text.trim();
                    if text.is_empty() {
                        return; // an empty cell, as of a row without a negative, ties nothing
                    }
                    let other = *rows_of.entry(xxh3_128(text.as_bytes())).or_insert(row);
                    let (one, other) = (root(&mut parents, row), root(&mut parents, other));
                    // The first row of a group stands for it.
                    parents[one.max(other) as usize] = one.min(other);
                })
                .map_err(wrong)
        })?;
        if parents.is_empty() {
            return Err(Error::file(input, "has no rows"));
        }
        let (mut numbers, mut sizes) = (HashMap::new(), Vec::new());
        let of_row = (0..parents.len() as u32).map(|row| {
            let number = *numbers.entry(root(&mut parents, row)).or_insert(sizes.len() as u32);
            if number as usize == sizes.len() {
                sizes.push(0);
            }
            sizes[number as usize] += 1;
            number
        });
        Ok(Self { of_row: of_row.collect(), sizes })
    }
}

/// Who stands for the group of `row`; ways to it are halved.
fn root(parents: &mut [u32], mut row: u32) -> u32 {
    while parents[row as usize] != row {
        let grandparent = parents[parents[row as usize] as usize];
        parents[row as usize] = grandparent;
        row = grandparent;
    }
    row
}

/// The names of the row before, and which of them hold texts: nearly always the same.
#[derive(Default)]
struct Known {
    names: Vec<String>,
    texts: Vec<usize>,
}

impl Known {
    fn texts(
        &mut self,
        row: &Map<String, Value>,
        columns: &[String],
        mut each: impl FnMut(&str),
    ) -> std::result::Result<(), String> {
        if !self.names.iter().eq(row.keys()) || self.texts.is_empty() {
            let names: Vec<&str> = row.keys().map(String::as_str).collect();
            self.texts = if columns.is_empty() {
                text_columns(&names).map_err(|message| {
                    let message = message.split("\nhint").next().unwrap_or_default();
                    format!("{message}\nhint: --columns NAME,NAME says which columns hold the texts")
                })?
            } else {
                let found = columns.iter().filter_map(|column| names.iter().position(|name| name == column));
                found.collect()
            };
            if self.texts.is_empty() {
                let (wanted, found) = (columns.join("`, `"), names.join(", "));
                return Err(format!("has no column `{wanted}`, which --columns names; found {found}"));
            }
            self.names = row.keys().cloned().collect();
        }
        for (_, value) in self.texts.iter().filter_map(|&column| row.iter().nth(column)) {
            match value {
                Value::String(text) => match list(text) {
                    Some(texts) => texts.iter().for_each(|text| each(text)),
                    None => each(text),
                },
                Value::Array(texts) => texts.iter().filter_map(Value::as_str).for_each(&mut each),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A list in a cell of a table is written as JSON.
fn list(text: &str) -> Option<Vec<String>> {
    let text = text.trim();
    if text.starts_with('[') { serde_json::from_str(text).ok() } else { None }
}

/// Which part each group goes to.
fn deal(sizes: &[usize], fractions: &[f64], rows: usize, seed: u64) -> Vec<usize> {
    // Whole rows: the parts' ends are rounded, so that they add up.
    let mut before = (0.0, 0.0);
    let wanted: Vec<f64> = fractions
        .iter()
        .map(|fraction| {
            let end = before.0 + fraction;
            let (first, last) = (before.1, (end * rows as f64).round());
            before = (end, last);
            last - first
        })
        .collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_cached_key(|&group| {
        (Reverse(sizes[group]), xxh3_64_with_seed(&(group as u64).to_le_bytes(), seed), group)
    });
    let (mut lacking, mut parts) = (wanted.clone(), vec![0; sizes.len()]);
    for group in order {
        let size = sizes[group] as f64;
        let share = |part: usize| {
            let fits = size <= lacking[part];
            (fits, if fits { lacking[part] / wanted[part] } else { lacking[part] })
        };
        let best =
            (1..wanted.len()).fold(0, |best, part| if share(part) > share(best) { part } else { best });
        lacking[best] -= size;
        parts[group] = best;
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    fn split(fractions: &[f64], seed: u64) -> Split {
        Split { fractions: fractions.to_vec(), seed, columns: Vec::new() }
    }

    const FRACTIONS: [f64; 3] = [0.8, 0.1, 0.1];

    fn at(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn lines(path: PathBuf) -> Vec<String> {
        fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn rows_of_different_texts_are_divided_exactly() {
        let folder = tempfile::tempdir().unwrap();
        for (rows, expected) in [(1000, [800, 100, 100]), (104, [83, 11, 10]), (10, [8, 1, 1])] {
            let text: Vec<String> =
                (0..rows).map(|i| format!("{{\"query\": \"q{i}\", \"positive\": \"p{i}\"}}\n")).collect();
            let input = at(folder.path(), "rows.jsonl", &text.concat());
            let output = folder.path().join(format!("out-{rows}"));
            let counts = split(&FRACTIONS, 42).run(&input, &output).unwrap();
            assert_eq!(counts.parts.iter().map(|part| part.1).collect::<Vec<_>>(), expected);
            let parts =
                ["train", "validation", "test"].map(|name| lines(output.join(format!("{name}.jsonl"))));
            let mut place = 0;
            for part in &parts {
                assert!(
                    part.iter().is_sorted_by_key(|line| text.iter().position(|row| row.trim_end() == line))
                );
                place += part.len();
            }
            assert_eq!(place, rows);
            assert_eq!(parts.iter().flatten().collect::<HashSet<_>>().len(), rows);
        }
    }

    #[test]
    fn no_text_is_in_two_parts_and_parts_have_groups_of_all_sizes() {
        // Passages with 1 to 9 questions, some questions about two passages, negatives that are passages of others.
        let folder = tempfile::tempdir().unwrap();
        let mut text = String::new();
        for passage in 0..400 {
            for question in 0..passage % 9 + 1 {
                let other = if passage % 50 == 0 { passage + 1 } else { passage };
                text.push_str(&format!(
                    "{{\"positive\": [\"p{passage}\", \"p{other} \"], \"query\": \"q{passage}.{question}\", \"id\": 1}}\n"
                ));
            }
        }
        let input = at(folder.path(), "rows.jsonl", &text);
        let output = folder.path().join("out");
        let counts = split(&FRACTIONS, 1).run(&input, &output).unwrap();
        assert_eq!((counts.rows, counts.groups), (text.lines().count() as u64, 392));
        let mut seen: Vec<HashSet<String>> = Vec::new();
        for (name, rows) in &counts.parts {
            let part = lines(output.join(format!("{name}.jsonl")));
            let wanted = FRACTIONS[seen.len()] * counts.rows as f64;
            assert!((*rows as f64 - wanted).abs() <= 1.0, "{counts:?}");
            let mut texts = HashSet::new();
            let mut questions = HashMap::new();
            for row in &part {
                let row: Value = serde_json::from_str(row).unwrap();
                *questions.entry(row["positive"][0].to_string()).or_insert(0) += 1;
                texts.insert(row["query"].as_str().unwrap().to_owned());
                texts.extend(
                    row["positive"].as_array().unwrap().iter().map(|p| p.as_str().unwrap().trim().to_owned()),
                );
            }
            assert!((1..=9).all(|size| questions.values().any(|&count| count == size)), "{name}");
            seen.push(texts);
        }
        for (i, one) in seen.iter().enumerate() {
            assert!(seen[..i].iter().all(|other| one.is_disjoint(other)));
        }
    }

    #[test]
    fn the_seed_decides_and_the_same_seed_decides_alike() {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..200).map(|i| format!("q{i}\tp{i}\n")).collect();
        let input = at(folder.path(), "rows.tsv", &format!("query\tpositive\n{text}"));
        let test = |seed, name: &str| {
            split(&[0.7, 0.3], seed).run(&input, &folder.path().join(name)).unwrap();
            lines(folder.path().join(name).join("test.tsv"))
        };
        let (one, same, other) = (test(1, "a"), test(1, "b"), test(2, "c"));
        assert_eq!(one.len(), 61, "a header and rows");
        assert_eq!(one, same);
        assert!(one != other && one[0] == other[0]);
    }

    #[test]
    fn rows_stay_as_they_are_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let rows = ["a,\"b, \"\"c\"\"\nd\",1", "e,\"f\",2", "\"g\",h,", "i,j,4"];
        let input = at(
            folder.path(),
            "rows.csv",
            &format!("\u{feff}Question,Answer,note\r\n{}\r\n", rows.join("\r\n")),
        );
        split(&[0.5, 0.5], 3).run(&input, &folder.path().join("out")).unwrap();
        let parts = ["train", "test"]
            .map(|name| fs::read_to_string(folder.path().join("out").join(format!("{name}.csv"))).unwrap());
        for part in &parts {
            assert!(part.starts_with("Question,Answer,note\n"), "{part}");
            assert_eq!(rows.iter().filter(|row| part.contains(*row)).count(), 2);
        }
        let bytes: usize = parts.iter().map(String::len).sum();
        assert_eq!(bytes, 2 * 21 + rows.iter().map(|row| row.len() + 1).sum::<usize>());
    }

    #[test]
    fn empty_cells_tie_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let rows: Vec<String> = (0..10).map(|n| format!("q{n},a{n},")).collect();
        let input = at(folder.path(), "rows.csv", &format!("query,positive,negative\n{}\n", rows.join("\n")));
        let output = folder.path().join("out");
        split(&[0.8, 0.2], 1).run(&input, &output).unwrap();
        let test = fs::read_to_string(output.join("test.csv")).unwrap();
        assert_eq!(test.lines().count(), 1 + 2);
    }

    #[test]
    fn what_cannot_be_divided_is_said_and_nothing_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let same = "{\"query\": \"a\", \"positive\": \"p\"}\n".repeat(9);
        let good = "{\"query\": \"a\", \"positive\": \"p\"}\n{\"query\": \"b\", \"positive\": \"r\"}\n";
        let output = folder.path().join("out");
        for (name, text, fractions, expected) in [
            (
                "x.jsonl",
                same.as_str(),
                &FRACTIONS[..],
                "9 rows are 1 groups that share texts, the largest of 9 rows: no row is left for validation",
            ),
            ("x.jsonl", good, &[0.5, 0.6], "--fractions: 0.5,0.6 do not add up to 1"),
            ("x.jsonl", good, &[1.0], "--fractions: 1 has a share that is not between"),
            ("x.jsonl", good, &[0.25; 4], "are no two or three shares"),
            ("x.jsonl", "", &[0.5, 0.5], "x.jsonl: has no rows"),
            ("x.jsonl", "{\"a\": \"b\"}\n", &[0.5, 0.5], "x.jsonl:1: has no column for the query"),
            ("x.jsonl", "{\"query\": \"b\", \"positive\": 1\n", &[0.5, 0.5], "x.jsonl:1: this is not JSON"),
            ("x.csv", "query,positive\na\n", &[0.5, 0.5], "x.csv:2: has 1 fields"),
            ("x.txt", "a\n", &[0.5, 0.5], "expected a .jsonl, .csv, .tsv or .parquet file"),
            ("x", "a\n", &[0.5, 0.5], "expected a .jsonl, .csv, .tsv or .parquet file"),
        ] {
            let input = at(folder.path(), name, text);
            let error = split(fractions, 42).run(&input, &output).unwrap_err().to_string();
            assert!(error.contains(expected), "expected {expected:?} in {error:?}");
            assert!(!output.exists());
        }
        let input =
            at(folder.path(), "x.jsonl", "{\"Frage\": \"a\"}\n{\"Frage\": \"b\"}\n{\"Frage\": \"a\"}\n");
        let mut named = split(&[0.6, 0.4], 42);
        named.columns = vec!["Antwort".into()];
        let error = named.run(&input, &output).unwrap_err().to_string();
        assert!(
            error.contains("x.jsonl:1: has no column `Antwort`, which --columns names; found Frage"),
            "{error}"
        );
        named.columns = vec!["Frage".into()];
        assert_eq!(named.run(&input, &output).unwrap().groups, 2);
        let error = named.run(&input, &output).unwrap_err().to_string();
        assert!(error.contains("out: already exists"), "{error}");
        assert!(
            fs::read_dir(folder.path())
                .unwrap()
                .all(|entry| { !entry.unwrap().file_name().to_string_lossy().starts_with(".staged") })
        );
    }
}
