//! BM25 ranking of documents, with an inverted index of the words that occur in the queries.
//!
//! ```text
//! score(q, d) = Σ idf(w) · (k1 + 1) · f / (f + k1 · (1 − b + b · |d| / mean))      over the words w of q
//! idf(w)      = ln(1 + (N − n + 0.5) / (n + 0.5))                                  k1 = 1.2, b = 0.75
//! ```
//!
//! `f` is the number of times that `w` occurs in `d`, `n` the number of documents that contain `w`, `N` the
//! number of documents, `|d|` the number of words of `d` and `mean` its average. A word that a query repeats
//! is counted again. The formula is that of Robertson and Zaragoza (The Probabilistic Relevance Framework:
//! BM25 and Beyond, 2009) with the idf of Lucene. Words, rounding of lengths and order of sums are those of
//! tantivy 0.27 with its default tokenizer, so scores are equal to the last bit.

use std::collections::HashMap;

const K1: f32 = 1.2;
const B: f32 = 0.75;
/// Longer words are not indexed, in bytes of UTF-8.
const MAX_WORD_BYTES: usize = 39;

/// An index of documents for queries that are known beforehand.
///
/// Memory is 4 bytes per document and 8 bytes per document and distinct word of the queries that it contains.
/// The texts are not kept.
///
/// ```
/// use trainer::mine::nano::Bm25;
///
/// let mut index = Bm25::new(["red planet", "metal"]);
/// for (number, text) in (0..).zip(["Iron is a metal.", "Mars is a planet.", "Mars, the red planet"]) {
///     index.add(number, text);
/// }
/// assert_eq!(index.top(0, 10), [2, 1]);
/// assert_eq!(index.top(1, 10), [0]);
/// ```
#[derive(Debug, Default)]
pub struct Bm25 {
    /// Index into `postings` of each word.
    words: HashMap<String, usize>,
    /// The words of each query, in their order and with repetitions.
    queries: Vec<Vec<usize>>,
    postings: Vec<Vec<Posting>>,
    /// Stored length of each document, 0 for numbers that were not added.
    lengths: Vec<u32>,
    documents: u64,
    total_length: u64,
}

#[derive(Debug)]
struct Posting {
    document: u32,
    frequency: u32,
}

impl Bm25 {
    /// Creates an empty index for `queries`, which [`Self::top`] names by their position.
    pub fn new<'a>(queries: impl IntoIterator<Item = &'a str>) -> Self {
        let mut index = Self::default();
        for text in queries {
            let mut query = Vec::new();
            for_each_word(text, |word| {
                let next = index.words.len();
                query.push(*index.words.entry(word.to_owned()).or_insert(next));
            });
            index.queries.push(query);
        }
        index.postings.resize_with(index.words.len(), Vec::new);
        index
    }

    /// Indexes document number `document`. Numbers must be increasing; they may have gaps.
    pub fn add(&mut self, document: u32, text: &str) {
        let mut length = 0;
        for_each_word(text, |word| {
            length += 1;
            let Some(&word) = self.words.get(word) else { return };
            match self.postings[word].last_mut() {
                Some(last) if last.document == document => last.frequency += 1,
                _ => self.postings[word].push(Posting { document, frequency: 1 }),
            }
        });
        self.lengths.resize(document as usize, 0);
        self.lengths.push(stored_length(length));
        self.documents += 1;
        self.total_length += u64::from(length);
    }

    /// Numbers of the `k` documents with the highest scores for query number `query`, best first; of equal
    /// ones the lowest number first. Documents without any word of the query are not ranked, so there may be
    /// fewer.
    pub fn top(&self, query: usize, k: usize) -> Vec<u32> {
        let mean = self.total_length as f32 / self.documents as f32;
        let mut scores: Vec<Option<f32>> = vec![None; self.lengths.len()];
        for &word in &self.queries[query] {
            let weight = self.idf(self.postings[word].len()) * (1.0 + K1);
            for posting in &self.postings[word] {
                let document = posting.document as usize;
                let frequency = posting.frequency as f32;
                let norm = K1 * (1.0 - B + B * self.lengths[document] as f32 / mean);
                *scores[document].get_or_insert(0.0) += weight * (frequency / (frequency + norm));
            }
        }
        let mut ranked: Vec<(f32, u32)> =
            (0..).zip(scores).filter_map(|(document, score)| Some((score?, document))).collect();
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if k < ranked.len() {
            ranked.select_nth_unstable_by(k, order);
            ranked.truncate(k);
        }
        ranked.sort_unstable_by(order);
        ranked.into_iter().map(|(_, document)| document).collect()
    }

    /// Inverse document frequency of a word that `holders` documents contain.
    fn idf(&self, holders: usize) -> f32 {
        let ratio = ((self.documents - holders as u64) as f32 + 0.5) / (holders as f32 + 0.5);
        (1.0 + ratio).ln()
    }
}

/// Calls `each` with the words of a text: its runs of letters and digits, in lower case.
fn for_each_word(text: &str, mut each: impl FnMut(&str)) {
    let mut lower = String::new();
    for word in text.split(|c: char| !c.is_alphanumeric()) {
        if !word.is_empty() && word.len() <= MAX_WORD_BYTES {
            lower.clear();
            if word.is_ascii() {
                lower.push_str(word);
                lower.make_ascii_lowercase();
            } else {
                // Character by character: `str::to_lowercase` treats a final Σ differently.
                lower.extend(word.chars().flat_map(char::to_lowercase));
            }
            each(&lower);
        }
    }
}

/// A document's length as Lucene stores it in one byte: exact up to 40, rounded down to 4 significant bits
/// above 24.
fn stored_length(length: u32) -> u32 {
    let Some(above) = length.checked_sub(24) else { return length };
    let shift = (u32::BITS - above.leading_zeros()).saturating_sub(4);
    24 + (above >> shift << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula in f64, over words in lower case.
    fn reference(documents: &[&str], query: &str) -> Vec<u32> {
        let words = |text: &str| -> Vec<String> {
            text.split(|c: char| !c.is_alphanumeric())
                .filter(|w| !w.is_empty())
                .map(str::to_lowercase)
                .collect()
        };
        let documents: Vec<_> = documents.iter().map(|text| words(text)).collect();
        let count = documents.len() as f64;
        let mean = documents.iter().map(Vec::len).sum::<usize>() as f64 / count;
        let score = |document: &Vec<String>| -> f64 {
            let of_word = |word: &String| {
                let holders = documents.iter().filter(|d| d.contains(word)).count() as f64;
                let frequency = document.iter().filter(|other| *other == word).count() as f64;
                let length = 1.2 * (1.0 - 0.75 + 0.75 * document.len() as f64 / mean);
                (1.0 + (count - holders + 0.5) / (holders + 0.5)).ln() * frequency * 2.2
                    / (frequency + length)
            };
            words(query).iter().map(of_word).sum()
        };
        let scores: Vec<f64> = documents.iter().map(score).collect();
        let mut order: Vec<u32> =
            (0..).zip(&scores).filter(|(_, score)| **score > 0.0).map(|(i, _)| i).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        order
    }

    #[test]
    fn documents_are_in_the_order_of_the_formula() {
        let documents = [
            "Iron is a metal.",
            "Tin is a metal; tin, iron and zinc are.",
            "Mars is a planet",
            "metal",
            "",
            "Planets: Mars, Venus, iron-red MARS",
            "the river is long and the river is wide",
            "Über Eisen",
            "Iron is a metal.",
        ];
        let queries = [
            "metal",
            "is mars a planet?",
            "IRON",
            "river river long",
            "über",
            "nothing here",
            "",
            "+(\" AND metal",
        ];
        let mut index = Bm25::new(queries);
        for (number, text) in (0..).zip(documents) {
            index.add(number, text);
        }
        for (number, query) in queries.iter().enumerate() {
            let expected = reference(&documents, query);
            assert_eq!(index.top(number, 20), expected, "{query}");
            assert_eq!(index.top(number, 2), expected[..expected.len().min(2)], "{query}");
        }
        assert!(index.top(0, 0).is_empty());
    }

    #[test]
    fn document_numbers_may_have_gaps_which_do_not_count() {
        let (mut dense, mut gaps) = (Bm25::new(["b c"]), Bm25::new(["b c"]));
        for (number, text) in (0..).zip(["a b", "b c d e f", "c c", "b"]) {
            dense.add(number, text);
            gaps.add(3 * number + 2, text);
        }
        let expected: Vec<u32> = dense.top(0, 9).iter().map(|number| 3 * number + 2).collect();
        assert_eq!(gaps.top(0, 9), expected);
    }

    #[test]
    fn words_are_runs_of_letters_and_digits_in_lower_case() {
        let words = |text: &str| {
            let mut words = Vec::new();
            for_each_word(text, |word| words.push(word.to_owned()));
            words
        };
        assert_eq!(words("Don't, E5-base ΟΔΟΣ\tİ"), ["don", "t", "e5", "base", "οδοσ", "i\u{307}"]);
        let long = "a".repeat(39);
        assert_eq!(words(&format!("{long} {long}b x")), [long.as_str(), "x"]);
    }

    #[test]
    fn lengths_are_rounded_as_lucene_stores_them() {
        let exact: Vec<u32> = (0..=40).collect();
        assert_eq!(exact.iter().map(|&length| stored_length(length)).collect::<Vec<_>>(), exact);
        let pairs =
            [(41, 40), (42, 42), (55, 54), (56, 56), (59, 56), (127, 120), (1000, 984), (100_000, 98_328)];
        for (length, stored) in pairs {
            assert_eq!(stored_length(length), stored, "{length}");
        }
    }
}
