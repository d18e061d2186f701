//! Reads facts and the sentences that ask for them and state them.
//!
//! Each kind of thing (countries, rivers, books …) has two files. `facts/KIND.tsv` is a table with a row for
//! each thing and a column for each property, or `NAME.en` and `NAME.de` if the languages differ (an empty
//! German cell means the same as in English). `wording/KIND.txt` has a section for each relation, with lines
//! of the form
//!
//! ```text
//! ask|tell en|de [test]: SENTENCE with {column}, or {first|second} for the first property that the thing has
//! ```
//!
//! `ask` is a question, `tell` a passage that answers it; a wording with `test` is not used in training. A
//! thing has a relation if all its wordings can be filled in.

use std::collections::BTreeMap;

/// Languages of the data set.
pub(crate) const LANGUAGES: [&str; 2] = ["en", "de"];

/// Name of a kind, its table and its wordings.
pub(crate) type Source = (&'static str, &'static str, &'static str);

macro_rules! kinds {
    ($($name:literal)*) => {
        /// All kinds of things.
        pub(crate) const KINDS: &[Source] = &[$(
            (
                $name,
                include_str!(concat!("facts/", $name, ".tsv")),
                include_str!(concat!("wording/", $name, ".txt")),
            ),
        )*];
    };
}
kinds! {
    "animal" "book" "compound" "country" "discovery" "element" "invention" "landmark" "language" "letter"
    "moon" "mountain" "music" "painting" "planet" "river" "state" "unit"
}

/// All wordings of a fact in one language.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wordings {
    /// Questions for training.
    pub(crate) ask: Vec<String>,
    /// Questions for the test.
    pub(crate) ask_test: Vec<String>,
    /// Passages for training.
    pub(crate) tell: Vec<String>,
    /// Passages for the test.
    pub(crate) tell_test: Vec<String>,
}

impl Wordings {
    fn part(&mut self, role: &str, test: bool) -> Option<&mut Vec<String>> {
        match (role, test) {
            ("ask", false) => Some(&mut self.ask),
            ("ask", true) => Some(&mut self.ask_test),
            ("tell", false) => Some(&mut self.tell),
            ("tell", true) => Some(&mut self.tell_test),
            _ => None,
        }
    }
}

/// A fact: a relation of a thing, in all wordings.
#[derive(Clone, Debug)]
pub(crate) struct Fact {
    /// `KIND-LINE-RELATION`, unique.
    pub(crate) id: String,
    /// Wordings by language, in the order of [`LANGUAGES`].
    pub(crate) wordings: [Wordings; 2],
}

/// Returns all facts of all kinds, in the order of the files. Errors name the file.
pub(crate) fn all(kinds: &[Source]) -> Result<Vec<Fact>, String> {
    let mut facts = Vec::new();
    for (kind, table, wording) in kinds {
        let relations = relations(wording).map_err(|e| format!("wording/{kind}.txt: {e}"))?;
        let things = things(table).map_err(|e| format!("facts/{kind}.tsv: {e}"))?;
        for (line, thing) in things.iter().enumerate() {
            for (relation, templates) in &relations {
                if let Some(wordings) = fill(templates, thing) {
                    facts.push(Fact { id: format!("{kind}-{}-{relation}", line + 1), wordings });
                }
            }
        }
    }
    Ok(facts)
}

type Thing<'a> = BTreeMap<&'a str, &'a str>;

fn things(table: &str) -> Result<Vec<Thing<'_>>, String> {
    let mut lines = table.lines();
    let columns: Vec<&str> = lines.next().unwrap_or_default().split('\t').collect();
    lines
        .enumerate()
        .map(|(n, line)| {
            let cells: Vec<&str> = line.split('\t').collect();
            if cells.len() != columns.len() {
                return Err(format!("line {}: {} cells, expected {}", n + 2, cells.len(), columns.len()));
            }
            Ok(columns.iter().copied().zip(cells).filter(|(_, cell)| !cell.is_empty()).collect())
        })
        .collect()
}

fn relations(wording: &str) -> Result<Vec<(&str, [Wordings; 2])>, String> {
    let mut relations: Vec<(&str, [Wordings; 2])> = Vec::new();
    for (n, line) in wording.lines().enumerate() {
        let error = || format!("line {}: expected `[relation]` or `ask|tell en|de [test]: sentence`", n + 1);
        if line.is_empty() {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            relations.push((name, Default::default()));
            continue;
        }
        let (head, sentence) = line.split_once(": ").ok_or_else(error)?;
        let mut head = head.split(' ');
        let (role, language, test) = (head.next(), head.next(), head.next());
        let language = LANGUAGES.iter().position(|l| Some(*l) == language).ok_or_else(error)?;
        let (_, templates) = relations.last_mut().ok_or_else(error)?;
        let part = templates[language].part(role.unwrap_or_default(), test == Some("test"));
        part.ok_or_else(error)?.push(sentence.to_owned());
    }
    Ok(relations)
}

/// Fills templates with the properties of a thing; `None` if it lacks one.
fn fill(templates: &[Wordings; 2], thing: &Thing) -> Option<[Wordings; 2]> {
    let mut filled = templates.clone();
    for (wordings, language) in filled.iter_mut().zip(LANGUAGES) {
        for part in [&mut wordings.ask, &mut wordings.ask_test, &mut wordings.tell, &mut wordings.tell_test] {
            for sentence in part {
                *sentence = sentence_of(sentence, thing, language)?;
            }
        }
    }
    Some(filled)
}

fn sentence_of(template: &str, thing: &Thing, language: &str) -> Option<String> {
    let mut sentence = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (columns, after) = after.split_once('}')?;
        sentence += before;
        sentence += columns.split('|').find_map(|column| property(thing, column, language))?;
        rest = after;
    }
    sentence += rest;
    let mut characters = sentence.chars();
    let first = characters.next()?;
    Some(first.to_uppercase().chain(characters).collect())
}

fn property<'a>(thing: &Thing<'a>, column: &str, language: &str) -> Option<&'a str> {
    let localised = |language: &str| thing.get(format!("{column}.{language}").as_str()).copied();
    localised(language).or_else(|| localised("en")).or_else(|| thing.get(column).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_relation_has_things_and_every_wording_of_both_languages() {
        for source in KINDS {
            let facts = all(&[*source]).unwrap();
            for (relation, templates) in relations(source.2).unwrap() {
                let suffix = format!("-{relation}");
                let count = facts.iter().filter(|f| f.id.ends_with(&suffix)).count();
                assert!(count >= 8, "{} {relation}: only {count} things", source.0);
                for w in templates {
                    assert!(w.ask.len() >= 3 && !w.ask_test.is_empty(), "{} {relation}", source.0);
                    assert!(w.tell.len() >= 2 && !w.tell_test.is_empty(), "{} {relation}", source.0);
                }
            }
        }
    }

    #[test]
    fn columns_that_no_wording_reads_do_not_exist() {
        for (kind, table, wording) in KINDS {
            for column in table.lines().next().unwrap().split('\t') {
                let column = column.split('.').next().unwrap();
                let read = [format!("{{{column}}}"), format!("{{{column}|"), format!("|{column}}}")];
                assert!(read.iter().any(|r| wording.contains(r)), "{kind}: {column}");
            }
        }
    }

    #[test]
    fn a_thing_without_the_property_has_no_such_fact() {
        let table = "name.en\tname.de\tsize\nRome\tRom\t7\nParis\t\t\n";
        let wording =
            "[size]\nask en: How big is {name}?\nask de: Wie groß ist {name}?\ntell de: {short|size}.";
        let facts = all(&[("city", table, wording)]).unwrap();
        assert_eq!(facts.len(), 1);
        assert_eq!(facts[0].id, "city-1-size");
        assert_eq!(facts[0].wordings[1].ask, ["Wie groß ist Rom?"]);
        assert_eq!(facts[0].wordings[1].tell, ["7."]);
    }

    #[test]
    fn a_wrong_line_is_named() {
        let error = all(&[("city", "name\n", "[size]\nasks en: What?")]).unwrap_err();
        assert!(error.starts_with("wording/city.txt: line 2"), "{error}");
        let error = all(&[("city", "name\tsize\nRome\n", "")]).unwrap_err();
        assert_eq!(error, "facts/city.tsv: line 2: 1 cells, expected 2");
    }
}
