//! Divides facts into training rows and a retrieval test that have no sentence in common.
//!
//! Training and test use different wordings. Some facts are not in the training rows at all: for these the
//! model must combine what it learned about the thing and about the relation. The corpus has a passage for
//! each fact in each language, and both are relevant to its questions, so half of a query's score is
//! cross-lingual.

use std::collections::BTreeMap;

use crate::facts::{Fact, LANGUAGES};

/// Percentage of facts that are not in the training rows.
const HELD_OUT: u64 = 15;
/// Training questions per fact and language.
const QUESTIONS: usize = 3;

/// The data set.
#[derive(Debug, Default)]
pub(crate) struct Set {
    /// Questions with their passages.
    pub(crate) train: Vec<(String, String)>,
    /// Identifier and text.
    pub(crate) queries: Vec<(String, String)>,
    /// Identifier and text.
    pub(crate) corpus: Vec<(String, String)>,
    /// Identifiers of a query and a relevant passage.
    pub(crate) relevant: Vec<(String, String)>,
}

/// The random numbers of SplitMix64 (Steele, Lea, Flood 2014), so that the data set depends only on the seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Divides the facts and chooses wordings.
pub(crate) fn split(facts: &[Fact], seed: u64) -> Set {
    let mut random = Random(seed);
    let mut set = Set::default();
    let asked = asked(facts);
    let unambiguous = |questions: &[String]| -> Vec<String> {
        questions.iter().filter(|q| asked[q.as_str()] == 1).cloned().collect()
    };
    for fact in facts {
        let held_out = random.next() % 100 < HELD_OUT;
        // As many facts from training, so that both halves of the test have the same weight.
        let tested = held_out || random.next() % (100 - HELD_OUT) < HELD_OUT;
        for (l, language) in LANGUAGES.iter().enumerate() {
            let words = &fact.wordings[l];
            let passage = format!("{}-{language}", fact.id);
            set.corpus.push((passage, words.tell_test[random.below(words.tell_test.len())].clone()));
            if !held_out {
                let mut questions = unambiguous(&words.ask);
                random.shuffle(&mut questions);
                for question in questions.into_iter().take(QUESTIONS) {
                    let passages = &fact.wordings[random.below(2)].tell;
                    set.train.push((question, passages[random.below(passages.len())].clone()));
                }
            }
            let questions = unambiguous(&words.ask_test);
            if tested && !questions.is_empty() {
                let id = format!("{}-{}-{language}", if held_out { "new" } else { "known" }, fact.id);
                for other in LANGUAGES {
                    set.relevant.push((id.clone(), format!("{}-{other}", fact.id)));
                }
                set.queries.push((id, questions[random.below(questions.len())].clone()));
            }
        }
    }
    random.shuffle(&mut set.train);
    set
}

/// Counts the facts of each question. A question with several answers is left out, for example about the
/// discoverer of two elements.
fn asked(facts: &[Fact]) -> BTreeMap<&str, usize> {
    let mut asked = BTreeMap::new();
    for words in facts.iter().flat_map(|f| &f.wordings) {
        for question in words.ask.iter().chain(&words.ask_test) {
            *asked.entry(question.as_str()).or_default() += 1;
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::facts::{KINDS, all};

    #[test]
    fn training_holds_no_sentence_of_the_test() {
        let set = split(&all(KINDS).unwrap(), 42);
        let plain = |s: &str| s.to_lowercase().replace(|c: char| !c.is_alphanumeric(), "");
        let train: BTreeSet<_> = set.train.iter().flat_map(|(q, p)| [plain(q), plain(p)]).collect();
        for (id, text) in set.queries.iter().chain(&set.corpus) {
            assert!(!train.contains(&plain(text)), "{id}: {text}");
        }
    }

    #[test]
    fn the_facts_held_out_are_not_told_in_training() {
        let facts = all(KINDS).unwrap();
        let set = split(&facts, 42);
        let train: BTreeSet<_> = set.train.iter().flat_map(|(q, p)| [q, p]).collect();
        let new: BTreeSet<_> = set.queries.iter().filter_map(|(id, _)| id.strip_prefix("new-")).collect();
        assert!(new.len() >= 200, "{}", new.len());
        for fact in facts.iter().filter(|f| new.contains(format!("{}-en", f.id).as_str())) {
            for words in &fact.wordings {
                assert!(words.tell.iter().all(|text| !train.contains(text)), "{}", fact.id);
                assert!(words.ask.iter().all(|text| !train.contains(text)), "{}", fact.id);
            }
        }
    }

    #[test]
    fn every_query_is_asked_once_and_has_its_two_passages() {
        let set = split(&all(KINDS).unwrap(), 42);
        assert!(set.queries.len() >= 500, "{}", set.queries.len());
        assert!(set.train.len() >= 3000, "{}", set.train.len());
        let passages: BTreeSet<_> = set.corpus.iter().map(|(id, _)| id).collect();
        assert_eq!(passages.len(), set.corpus.len());
        let texts: BTreeSet<_> = set.queries.iter().map(|(_, text)| text).collect();
        assert_eq!(texts.len(), set.queries.len());
        let mut relevant: BTreeMap<&str, usize> = BTreeMap::new();
        for (query, passage) in &set.relevant {
            assert!(passages.contains(passage));
            *relevant.entry(query).or_default() += 1;
        }
        assert!(set.queries.iter().all(|(id, _)| relevant[id.as_str()] == 2));
    }

    #[test]
    fn the_same_seed_gives_the_same_set() {
        let facts = all(KINDS).unwrap();
        assert_eq!(split(&facts, 7).train, split(&facts, 7).train);
        assert_ne!(split(&facts, 7).train, split(&facts, 8).train);
    }
}
