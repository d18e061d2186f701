//! Splits a file of rows into training, validation and test parts that have no text in common.
//!
//! Rows that share a text form a group (union-find over hashes of the texts), and a group goes to one part.
//! Groups are assigned in a random order, the larger ones first, each to the part that lacks the largest
//! fraction of its rows. So every part has groups of all sizes, and its number of rows is within one of the
//! requested number unless groups are too large. The parts keep the bytes of the rows and their order.
//! Memory: a hash per text and a number per row.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

use crate::data::reader::{self, Format};
use crate::data::row::text_columns;
use crate::system::atomic::{LineWriter, StagedDir};
use crate::{Error, Result};

/// Settings of a split.
#[derive(Clone, Debug)]
pub struct Split {
    /// Fraction of the rows of each part: two or three numbers above 0 whose sum is 1.
    pub fractions: Vec<f64>,
    /// Seed of the random order.
    pub seed: u64,
    /// Columns whose texts must not be in two parts. Empty: the columns that training reads.
    pub columns: Vec<String>,
}

/// Numbers of rows after a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitCounts {
    /// Number of rows of the file.
    pub rows: u64,
    /// Number of groups of rows that share texts.
    pub groups: u64,
    /// Number of rows of the largest group.
    pub largest_group: u64,
    /// Name and number of rows of each part.
    pub parts: Vec<(&'static str, u64)>,
}

impl SplitCounts {
    /// The numbers as a JSON object.
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
    /// Splits `input` into files of the new folder `output`: train, validation and test, or train and test,
    /// in the format of the input without compression.
    ///
    /// # Errors
    /// The fractions are wrong; the folder exists; the input cannot be read, has no column of texts, or has
    /// so few groups that a part would be empty.
    pub fn run(&self, input: &Path, output: &Path) -> Result<SplitCounts> {
        let names = self.names()?;
        StagedDir::check_free(output)?;
        let ending = Format::expect(input)?.written_ending();
        let groups = Groups::read(input, &self.columns)?;
        let parts = groups.parts_of_rows(&self.fractions, self.seed);
        let rows_of = |part: usize| parts.iter().filter(|&&other| other == part).count() as u64;
        let counts = SplitCounts {
            rows: parts.len() as u64,
            groups: groups.sizes.len() as u64,
            largest_group: groups.largest() as u64,
            parts: names.iter().enumerate().map(|(part, &name)| (name, rows_of(part))).collect(),
        };
        self.check(input, &counts)?;

        let draft = StagedDir::new(output)?;
        let files = names.iter().map(|name| draft.file(&format!("{name}.{ending}")));
        let mut files = files.collect::<Result<Vec<_>>>()?;
        let changed = || Error::file(input, "has changed while it was being split");
        let mut row = 0;
        reader::raw(input, |_, bytes, object| {
            if object.is_none() {
                return files.iter_mut().try_for_each(|file| file.write(bytes));
            }
            let part = *parts.get(row).ok_or_else(changed)?;
            row += 1;
            files[part].write(bytes)
        })?;
        if row != parts.len() {
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
            return Err(wrong("has a fraction that is not between 0 and 1"));
        }
        if (self.fractions.iter().sum::<f64>() - 1.0).abs() > 1e-6 {
            return Err(wrong("do not add up to 1"));
        }
        match self.fractions.len() {
            2 => Ok(&["train", "test"]),
            3 => Ok(&["train", "validation", "test"]),
            _ => Err(wrong("has neither two fractions (train, test) nor three (train, validation, test)")),
        }
    }

    /// Refuses an empty part, and warns of parts whose number of rows is more than 1 % off.
    fn check(&self, input: &Path, counts: &SplitCounts) -> Result<()> {
        let SplitCounts { rows, groups, largest_group, parts } = counts;
        let together = format!(
            "the {rows} rows form {groups} groups that share texts, the largest with {largest_group} rows"
        );
        if let Some((name, _)) = parts.iter().find(|(_, rows)| *rows == 0) {
            let hint = "negatives shared by many rows join these into one group: split before mining, or choose the columns \
                        that matter with --columns";
            return Err(Error::file(input, format!("{together}, so {name} would be empty\nhint: {hint}")));
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

/// Groups of rows that share texts.
pub(crate) struct Groups {
    of_row: Vec<u32>,
    sizes: Vec<usize>,
}

impl Groups {
    fn read(input: &Path, columns: &[String]) -> Result<Self> {
        let (mut grouping, mut text_columns) = (Grouping::default(), TextColumns::default());
        reader::raw(input, |line, _, object| {
            let Some(object) = object else { return Ok(()) };
            let row = grouping.add_row();
            let joined = text_columns.texts(&object, columns, |text| grouping.join(row, text));
            joined.map_err(|message| Error::Row { path: input.to_owned(), line, message })
        })?;
        if grouping.parents.is_empty() {
            return Err(Error::file(input, "has no rows"));
        }
        Ok(grouping.finish())
    }

    /// Number of rows of the largest group.
    pub(crate) fn largest(&self) -> usize {
        self.sizes.iter().copied().max().unwrap_or(0)
    }

    /// The part of each row, if parts are to have these fractions of the rows.
    pub(crate) fn parts_of_rows(&self, fractions: &[f64], seed: u64) -> Vec<usize> {
        let parts = assign(&self.sizes, fractions, self.of_row.len(), seed);
        self.of_row.iter().map(|&group| parts[group as usize]).collect()
    }
}

/// Finds groups while rows are read.
#[derive(Default)]
pub(crate) struct Grouping {
    parents: Vec<u32>,
    /// A row that has the text with this hash.
    rows_of: HashMap<u128, u32>,
}

impl Grouping {
    /// Adds a row and returns its number.
    pub(crate) fn add_row(&mut self) -> u32 {
        let row = self.parents.len() as u32;
        self.parents.push(row);
        row
    }

    /// Joins the group of `row` with that of all rows that have this text.
    pub(crate) fn join(&mut self, row: u32, text: &str) {
        let text = text.trim();
        if text.is_empty() {
            return; // for example the empty cell of a row without a negative
        }
        let other = *self.rows_of.entry(xxh3_128(text.as_bytes())).or_insert(row);
        let (one, other) = (root(&mut self.parents, row), root(&mut self.parents, other));
        // The first row of a group is its root.
        self.parents[one.max(other) as usize] = one.min(other);
    }

    /// The groups of all rows.
    pub(crate) fn finish(self) -> Groups {
        let Self { mut parents, .. } = self;
        let (mut numbers, mut sizes) = (HashMap::new(), Vec::new());
        let of_row = (0..parents.len() as u32).map(|row| {
            let number = *numbers.entry(root(&mut parents, row)).or_insert(sizes.len() as u32);
            if number as usize == sizes.len() {
                sizes.push(0);
            }
            sizes[number as usize] += 1;
            number
        });
        Groups { of_row: of_row.collect(), sizes }
    }
}

/// The root of a row's group, with path halving.
fn root(parents: &mut [u32], mut row: u32) -> u32 {
    while parents[row as usize] != row {
        let grandparent = parents[parents[row as usize] as usize];
        parents[row as usize] = grandparent;
        row = grandparent;
    }
    row
}

/// The column names of the previous row and which of them hold texts; consecutive rows nearly always have the
/// same.
#[derive(Default)]
struct TextColumns {
    names: Vec<String>,
    texts: Vec<usize>,
}

impl TextColumns {
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
                    format!("{message}\nhint: name the columns of texts with --columns NAME,NAME")
                })?
            } else {
                let found = columns.iter().filter_map(|column| names.iter().position(|name| name == column));
                found.collect()
            };
            if self.texts.is_empty() {
                let (wanted, found) = (columns.join("`, `"), names.join(", "));
                return Err(format!("has no column `{wanted}` as named by --columns; found {found}"));
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

/// The texts of a CSV cell that is a JSON list.
fn list(text: &str) -> Option<Vec<String>> {
    let text = text.trim();
    if text.starts_with('[') { serde_json::from_str(text).ok() } else { None }
}

/// Assigns each group to a part; returns the parts' numbers.
fn assign(sizes: &[usize], fractions: &[f64], rows: usize, seed: u64) -> Vec<usize> {
    // Rounding the cumulative fractions makes the parts add up to all rows.
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
        let need = |part: usize| {
            let fits = size <= lacking[part];
            (fits, if fits { lacking[part] / wanted[part] } else { lacking[part] })
        };
        let best = (1..wanted.len()).fold(0, |best, part| if need(part) > need(best) { part } else { best });
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
        // Passages with 1 to 9 questions, some questions about two passages, negatives that are passages of
        // others.
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
                "the 9 rows form 1 groups that share texts, the largest with 9 rows, so validation would be empty",
            ),
            ("x.jsonl", good, &[0.5, 0.6], "--fractions: 0.5,0.6 do not add up to 1"),
            ("x.jsonl", good, &[1.0], "--fractions: 1 has a fraction that is not between"),
            ("x.jsonl", good, &[0.25; 4], "has neither two fractions"),
            ("x.jsonl", "", &[0.5, 0.5], "x.jsonl: has no rows"),
            ("x.jsonl", "{\"a\": \"b\"}\n", &[0.5, 0.5], "x.jsonl:1: has no column for the query"),
            ("x.jsonl", "{\"query\": \"b\", \"positive\": 1\n", &[0.5, 0.5], "x.jsonl:1: this is not JSON"),
            ("x.csv", "query,positive\na\n", &[0.5, 0.5], "x.csv:2: has 1 fields"),
            ("x.txt", "a\n", &[0.5, 0.5], "expected a data file (.jsonl, .csv, .tsv or .parquet"),
            ("x", "a\n", &[0.5, 0.5], "expected a data file (.jsonl, .csv, .tsv or .parquet"),
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
            error.contains("x.jsonl:1: has no column `Antwort` as named by --columns; found Frage"),
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
