//! Recognises what the rows of a data file are, by well-known column names, else by other names and by
//! content.
//!
//! Training itself understands few names, so that it never guesses. Here a guess is allowed, because it is
//! written into a configuration for a person to read.

use std::collections::HashSet;
use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value};
use xxhash_rust::xxh3::xxh3_64;

use super::reader;
use super::row::{
    FIRST, LABEL, NEGATIVE, POSITIVE, QUERY, SCORE, SECOND, Schema, TEXT, is_alias, negative_columns,
};
use crate::config::{ColumnNames, Columns, DataSet, RowKind};
use crate::{Error, Result};

/// More names of each part, in several languages; umlauts and accents are compared without their marks.
const MORE_QUERY: [&str; 20] = [
    "frage",
    "anfrage",
    "suchanfrage",
    "suche",
    "prompt",
    "instruction",
    "input",
    "user",
    "title",
    "titel",
    "headline",
    "ueberschrift",
    "subject",
    "betreff",
    "search",
    "pregunta",
    "consulta",
    "domanda",
    "vraag",
    "pytanie",
];
const MORE_POSITIVE: [&str; 24] = [
    "antwort",
    "dokument",
    "absatz",
    "text",
    "inhalt",
    "content",
    "body",
    "context",
    "kontext",
    "response",
    "output",
    "completion",
    "paragraph",
    "abstract",
    "description",
    "beschreibung",
    "loesung",
    "solution",
    "target",
    "respuesta",
    "reponse",
    "risposta",
    "antwoord",
    "odpowiedz",
];
const MORE_NEGATIVE: [&str; 5] = ["hardnegative", "hardnegatives", "negativ", "falscheantwort", "distractor"];
const MORE_TEXT: [&str; 9] =
    ["satz", "utterance", "nachricht", "message", "review", "tweet", "content", "comment", "kommentar"];
const MORE_LABEL: [&str; 9] =
    ["klasse", "class", "category", "kategorie", "intent", "topic", "thema", "sentiment", "target"];
const MORE_SCORE: [&str; 7] =
    ["similar", "aehnlichkeit", "bewertung", "rating", "relatedness", "gold", "goldscore"];

/// Fields shown of the first row are cut to this number of characters.
const SHOWN: usize = 60;

/// Values of one column.
struct Column {
    name: String,
    /// Rows in which it is not empty.
    values: u64,
    /// Those that are numbers, or texts that can be parsed as numbers.
    numbers: u64,
    /// Those that are numbers with a fraction.
    fractions: u64,
    /// Those that are texts with a space, or lists.
    prose: u64,
    characters: u64,
    /// Hashes of distinct values, at most [`DISTINCT`].
    distinct: HashSet<u64>,
}

/// Distinct values that are counted.
const DISTINCT: usize = 10_000;

/// The columns of a file and their values.
pub(crate) struct Profile {
    rows: u64,
    columns: Vec<Column>,
    first: Map<String, Value>,
}

/// What the rows of a file are.
#[derive(Debug, PartialEq)]
pub(crate) struct Recognised {
    /// RowKind of the rows; pairs with negatives are [`RowKind::Pairs`], too.
    pub(crate) kind: RowKind,
    /// The columns of the parts; empty if training understands their names.
    pub(crate) columns: Columns,
    /// Why these columns were chosen, for the person who reads the result.
    pub(crate) reason: String,
}

impl Profile {
    /// Reads all rows of a file.
    ///
    /// # Errors
    /// The file cannot be read, has no rows, or a row is malformed.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut profile = Self { rows: 0, columns: Vec::new(), first: Map::new() };
        reader::objects(path, |_, row| {
            profile.rows += 1;
            for (name, value) in &row {
                let place = profile.columns.iter().position(|column| column.name == *name);
                let place = place.unwrap_or_else(|| {
                    profile.columns.push(Column::new(name));
                    profile.columns.len() - 1
                });
                profile.columns[place].add(value);
            }
            if profile.rows == 1 {
                profile.first = row;
            }
            Ok(())
        })?;
        if profile.rows == 0 {
            return Err(Error::file(path, "has no rows"));
        }
        Ok(profile)
    }

    /// Recognises the kind and the columns of the rows; `given` are columns that are known.
    ///
    /// # Errors
    /// The rows are not understood: what they look like and what is needed.
    pub(crate) fn recognise(&self, given: &Columns) -> std::result::Result<Recognised, String> {
        let names: Vec<&str> = self.columns.iter().map(|column| column.name.as_str()).collect();
        let schema = Schema::new(&DataSet { columns: given.clone(), ..DataSet::default() });
        let unknown = match schema.header(&names) {
            Ok(roles) => {
                let reason = "by the column names".to_owned();
                return Ok(Recognised { kind: roles.kind(), columns: given.clone(), reason });
            }
            Err(message) => message,
        };
        if *given != Columns::default() {
            return Err(format!("{}\n{self}", unknown.split("\nhint").next().unwrap_or_default()));
        }
        let by_name = self.by_name(&names)?;
        by_name.or_else(|| self.by_content()).ok_or_else(|| {
            format!(
                "cannot tell what the rows are\n{self}\n\
                 needed: a query and a text that answers it (and texts that do not); or a text and a label; or two texts and \
                 a score\nhint: name the columns with --columns query=NAME,positive=NAME (negatives=NAME), or \
                 text=NAME,label=NAME, or sentence1=NAME,sentence2=NAME,score=NAME"
            )
        })
    }

    /// Recognises names that training does not understand, or not without a `kind`.
    fn by_name(&self, names: &[&str]) -> std::result::Result<Option<Recognised>, String> {
        let find = |known: &[&str], more: &[&str]| {
            let place = |alias: &str| names.iter().position(|name| is_alias(&plain_letters(name), alias));
            known.iter().chain(more).find_map(|alias| place(alias))
        };
        let name = |place: usize| Some(names[place].to_owned());
        let score = find(&SCORE, &MORE_SCORE);
        let twins = twins(names).or_else(|| Some((find(&FIRST, &[])?, find(&SECOND, &[])?)));
        let pair = find(&QUERY, &MORE_QUERY).zip(find(&POSITIVE, &MORE_POSITIVE)).filter(|(a, b)| a != b);
        let negatives = negative_columns(names).unwrap_or_default();
        let negatives = if negatives.is_empty() {
            find(&NEGATIVE, &MORE_NEGATIVE).into_iter().collect()
        } else {
            negatives
        };
        if let (Some((first, second)), Some(score), true) = (twins.or(pair), score, negatives.is_empty()) {
            self.check_score(score)?;
            let columns = Columns {
                sentence1: name(first),
                sentence2: name(second),
                score: name(score),
                ..Columns::default()
            };
            let reason = format!("`{}` is the similarity of the texts", names[score]);
            return Ok(Some(Recognised { kind: RowKind::Similarity, columns, reason }));
        }
        if let Some((query, positive)) = pair.or(twins) {
            let negatives: Vec<String> = negatives.iter().map(|&place| names[place].to_owned()).collect();
            let columns = Columns {
                query: name(query),
                positive: name(positive).map(|name| ColumnNames(vec![name])),
                negatives: (!negatives.is_empty()).then_some(ColumnNames(negatives)),
                ..Columns::default()
            };
            return Ok(Some(Recognised {
                kind: RowKind::Pairs,
                columns,
                reason: "by the column names".to_owned(),
            }));
        }
        Ok(find(&TEXT, &MORE_TEXT).zip(find(&LABEL, &MORE_LABEL)).map(|(text, label)| {
            let columns = Columns { text: name(text), label: name(label), ..Columns::default() };
            Recognised { kind: RowKind::Labelled, columns, reason: "by the column names".to_owned() }
        }))
    }

    /// Whether a column beside two texts can be their similarity.
    fn check_score(&self, place: usize) -> std::result::Result<(), String> {
        let column = &self.columns[place];
        let classes = column.fractions == 0 && column.distinct.len() == 3 || column.numbers < column.values;
        if classes {
            return Err(format!(
                "has two texts and the classes of `{}`, as in natural language inference, which no loss can use\n{self}\n\
                 needed: triplets of a premise (query), an entailed text (positive) and a contradicting text (negative); or a \
                 score instead of classes",
                column.name
            ));
        }
        Ok(())
    }

    /// Recognises rows by what their columns contain.
    fn by_content(&self) -> Option<Recognised> {
        let prose: Vec<&Column> = self.columns.iter().filter(|column| column.is_prose()).collect();
        let name = |column: &Column| Some(column.name.clone());
        match prose[..] {
            [first, second] => {
                // Questions and titles are shorter than what answers them, wherever their column stands.
                let swapped = first.mean_length() > 2.0 * second.mean_length();
                let (query, positive) = if swapped { (second, first) } else { (first, second) };
                let why = if swapped { "the shorter texts" } else { "the first column of texts" };
                let columns = Columns {
                    query: name(query),
                    positive: name(positive).map(|name| ColumnNames(vec![name])),
                    ..Columns::default()
                };
                let reason = format!("assumed that `{}`, {why}, is the query", query.name);
                Some(Recognised { kind: RowKind::Pairs, columns, reason })
            }
            [text] => {
                let mut classes = self.columns.iter().filter(|column| column.is_category(self.rows));
                let (label, None) = (classes.next()?, classes.next()) else { return None };
                let columns = Columns { text: name(text), label: name(label), ..Columns::default() };
                let reason = format!(
                    "assumed that `{}`, with {} values, is the label",
                    label.name,
                    label.distinct.len()
                );
                Some(Recognised { kind: RowKind::Labelled, columns, reason })
            }
            _ => None,
        }
    }
}

/// The columns and the first row, for messages.
impl std::fmt::Display for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut columns = String::new();
        for column in &self.columns {
            let content = if column.numbers == column.values { "numbers" } else { "text" };
            let length = column.mean_length();
            write!(columns, "\n  {}  ({content}, {length:.0} characters on average)", column.name)?;
        }
        write!(f, "found {} rows with the columns{columns}\nfirst row:", self.rows)?;
        for (name, value) in &self.first {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let shown: String = text.chars().take(SHOWN).collect();
            let more = if shown.len() < text.len() { " …" } else { "" };
            write!(f, "\n  {name}: {}{more}", shown.escape_debug())?;
        }
        if let [only] = self.columns.as_slice()
            && [';', '\t', '|'].iter().any(|delimiter| only.name.contains(*delimiter))
        {
            write!(
                f,
                "\nthe fields look separated by another character than a comma: save the file with commas, or tabs as .tsv"
            )?;
        }
        Ok(())
    }
}

impl Column {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            values: 0,
            numbers: 0,
            fractions: 0,
            prose: 0,
            characters: 0,
            distinct: HashSet::new(),
        }
    }

    fn add(&mut self, value: &Value) {
        let text = match value {
            Value::Null => return,
            Value::String(text) if text.trim().is_empty() => return,
            Value::String(text) => text.clone(),
            Value::Array(texts) => {
                texts.iter().map(|text| text.as_str().unwrap_or_default()).collect::<Vec<_>>().join(" ")
            }
            other => other.to_string(),
        };
        self.values += 1;
        self.characters += text.chars().count() as u64;
        match text.trim().parse::<f64>() {
            Ok(number) => {
                self.numbers += 1;
                self.fractions += u64::from(number.fract() != 0.0);
            }
            Err(_) => self.prose += u64::from(text.trim().contains(' ')),
        }
        if self.distinct.len() < DISTINCT {
            self.distinct.insert(xxh3_64(text.as_bytes()));
        }
    }

    /// Mean number of characters of a value.
    fn mean_length(&self) -> f64 {
        self.characters as f64 / self.values.max(1) as f64
    }

    /// Whether most values are texts of several words, and few are repeated often.
    fn is_prose(&self) -> bool {
        let distinct = self.distinct.len() as u64;
        2 * self.prose > self.values && (distinct >= DISTINCT as u64 || 10 * distinct > self.values)
    }

    /// Whether the values are few and repeated, as classes are.
    fn is_category(&self, rows: u64) -> bool {
        let distinct = self.distinct.len() as u64;
        self.values == rows && distinct > 1 && 4 * distinct <= rows && self.fractions == 0 && !self.is_prose()
    }
}

/// Two columns whose names differ only in the last character: `text1` and `text2`, `satz_a` and `satz_b`.
fn twins(names: &[&str]) -> Option<(usize, usize)> {
    let bare = |name: &str| name.trim().to_lowercase();
    let second = |ending: char| match ending {
        '1' => Some('2'),
        'a' => Some('b'),
        _ => None,
    };
    names.iter().enumerate().find_map(|(place, name)| {
        let mut other = bare(name);
        let ending = second(other.pop()?)?;
        other.push(ending);
        let twin = names.iter().position(|name| bare(name) == other)?;
        (other.len() > 1 && !other.starts_with("neg")).then_some((place, twin))
    })
}

/// Lower case without umlauts and accents.
fn plain_letters(name: &str) -> String {
    let mut plain = String::with_capacity(name.len());
    for letter in name.to_lowercase().chars() {
        match letter {
            'ä' => plain.push_str("ae"),
            'ö' => plain.push_str("oe"),
            'ü' => plain.push_str("ue"),
            'ß' => plain.push_str("ss"),
            'é' | 'è' | 'ê' => plain.push('e'),
            'ź' | 'ż' => plain.push('z'),
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recognise(name: &str, text: &str) -> std::result::Result<Recognised, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        Profile::read(&path).unwrap().recognise(&Columns::default())
    }

    fn csv(header: &str, row: impl Fn(usize) -> String) -> String {
        (0..40).fold(format!("{header}\n"), |text, i| text + &row(i) + "\n")
    }

    fn pair(query: &str, positive: &str) -> Columns {
        Columns {
            query: Some(query.to_owned()),
            positive: Some(ColumnNames(vec![positive.to_owned()])),
            ..Columns::default()
        }
    }

    #[test]
    fn names_that_training_understands_need_no_columns() {
        let found =
            recognise("a.csv", &csv("question,answer", |i| format!("what is {i},it is {i}"))).unwrap();
        assert_eq!((found.kind, found.columns), (RowKind::Pairs, Columns::default()));
        let found = recognise("a.jsonl", "{\"text\": \"a b\", \"label\": 1}\n").unwrap();
        assert_eq!((found.kind, found.columns), (RowKind::Labelled, Columns::default()));
    }

    #[test]
    fn names_of_other_languages_are_understood() {
        let text = csv("id,Frage,Antwort", |i| format!("{i},Was ist {i}?,Das ist {i}."));
        let found = recognise("a.csv", &text).unwrap();
        assert_eq!((found.kind, found.columns), (RowKind::Pairs, pair("Frage", "Antwort")));
        let text = csv("Satz 1,Satz 2,Ähnlichkeit", |i| format!("ein {i},zwei {i},{}", i as f64 / 10.0));
        let found = recognise("a.csv", &text).unwrap();
        let columns = Columns {
            sentence1: Some("Satz 1".to_owned()),
            sentence2: Some("Satz 2".to_owned()),
            score: Some("Ähnlichkeit".to_owned()),
            ..Columns::default()
        };
        assert_eq!((found.kind, found.columns), (RowKind::Similarity, columns));
        let found =
            recognise("a.csv", &csv("question_1,question_2,similar", |i| format!("a {i},b {i},{}", i % 2)));
        assert_eq!(found.unwrap().kind, RowKind::Similarity);
    }

    #[test]
    fn unknown_names_are_understood_by_their_content() {
        let text =
            csv("nr,x,y", |i| format!("{i},a long text that says what the answer to number {i} is,why {i}?"));
        let found = recognise("a.csv", &text).unwrap();
        assert_eq!((found.kind, found.columns), (RowKind::Pairs, pair("y", "x")));
        assert!(found.reason.contains("`y`, the shorter texts"), "{}", found.reason);
        let found = recognise("a.csv", &csv("x,y", |i| format!("some words {i},c{}", i % 3))).unwrap();
        assert_eq!(found.kind, RowKind::Labelled);
        assert_eq!((found.columns.text.as_deref(), found.columns.label.as_deref()), (Some("x"), Some("y")));
    }

    #[test]
    fn rows_that_are_not_understood_are_shown() {
        let error = recognise("a.csv", &csv("u,v,w", |i| format!("a {i},b {i},c {i}"))).unwrap_err();
        for words in [
            "found 40 rows",
            "\n  u  (text, 4 characters",
            "first row:\n  u: a 0\n",
            "needed: ",
            "--columns query=",
        ] {
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
        let error = recognise("a.csv", &csv("Frage;Antwort", |i| format!("a {i};b {i}"))).unwrap_err();
        assert!(error.contains("another character than a comma"), "{error}");
        let nli = csv("premise,hypothesis,label", |i| format!("a {i},b {i},{}", i % 3));
        let error = recognise("a.csv", &nli).unwrap_err();
        assert!(error.contains("classes of `label`"), "{error}");
    }
}
