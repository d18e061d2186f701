//! Builds a WordPiece vocabulary by repeatedly merging the most frequent pair of adjacent pieces.
//!
//! The trainer of `tokenizers` iterates over hash maps, so equally frequent pairs are merged in a random
//! order. Here the first pair in alphabetical order is merged, so the vocabulary is always the same.

use std::collections::BTreeMap;

/// Special tokens of BERT, in its order.
pub(crate) const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// Returns a vocabulary of at most `size` entries: special tokens, characters, merged pieces. `words` are
/// normalised words with their counts.
pub(crate) fn train(words: &BTreeMap<String, usize>, size: usize) -> Vec<String> {
    let mut words: Vec<(Vec<String>, usize)> = words.iter().map(|(word, n)| (characters(word), *n)).collect();
    let mut vocabulary: Vec<String> = SPECIAL.map(String::from).to_vec();
    let mut alphabet: Vec<String> = words.iter().flat_map(|(pieces, _)| pieces.clone()).collect();
    alphabet.sort();
    alphabet.dedup();
    vocabulary.extend(alphabet);

    let mut pairs: BTreeMap<(String, String), usize> = BTreeMap::new();
    for (pieces, n) in &words {
        for pair in neighbours(pieces) {
            *pairs.entry(pair).or_default() += n;
        }
    }
    while vocabulary.len() < size {
        // The first of the most frequent pairs, in alphabetical order.
        let best = pairs.iter().fold(None, |best: Option<(_, usize)>, (pair, n)| match best {
            Some((_, most)) if *n <= most => best,
            _ => Some((pair, *n)),
        });
        let Some((pair, n)) = best.map(|(pair, n)| (pair.clone(), n)) else { break };
        if n < 2 {
            break;
        }
        let merged = format!("{}{}", pair.0, pair.1.trim_start_matches("##"));
        for (pieces, n) in &mut words {
            if !neighbours(pieces).any(|p| p == pair) {
                continue;
            }
            for old in neighbours(pieces) {
                if let Some(count) = pairs.get_mut(&old) {
                    *count -= *n;
                }
            }
            merge(pieces, &pair, &merged);
            for new in neighbours(pieces) {
                *pairs.entry(new).or_default() += *n;
            }
        }
        pairs.retain(|_, n| *n > 0);
        // Two pairs can give the same piece: (un, ##der) and (und, ##er).
        if !vocabulary.contains(&merged) {
            vocabulary.push(merged);
        }
    }
    vocabulary
}

/// Splits a word into characters: `über` into `ü`, `##b`, `##e`, `##r`.
fn characters(word: &str) -> Vec<String> {
    word.chars().enumerate().map(|(i, c)| if i == 0 { c.to_string() } else { format!("##{c}") }).collect()
}

fn neighbours(pieces: &[String]) -> impl Iterator<Item = (String, String)> {
    pieces.windows(2).map(|w| (w[0].clone(), w[1].clone()))
}

fn merge(pieces: &mut Vec<String>, pair: &(String, String), merged: &str) {
    let mut i = 0;
    while i + 1 < pieces.len() {
        if pieces[i] == pair.0 && pieces[i + 1] == pair.1 {
            pieces[i] = merged.to_owned();
            pieces.remove(i + 1);
        }
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[(&str, usize)]) -> BTreeMap<String, usize> {
        list.iter().map(|(w, n)| ((*w).to_owned(), *n)).collect()
    }

    #[test]
    fn the_most_frequent_pair_is_merged_first() {
        let v = train(&words(&[("hug", 10), ("pug", 5), ("hugs", 5)]), 100);
        assert_eq!(v[..5], SPECIAL);
        assert_eq!(v[5..10], ["##g", "##s", "##u", "h", "p"]);
        assert_eq!(v[10..], ["##ug", "hug", "hugs", "pug"]);
    }

    #[test]
    fn ties_go_by_the_alphabet_and_rare_pairs_stay_apart() {
        assert_eq!(train(&words(&[("ba", 2), ("ab", 2), ("xy", 1)]), 100)[11..], ["ab", "ba"]);
    }

    #[test]
    fn a_pair_that_repeats_within_a_word_is_merged_everywhere() {
        let v = train(&words(&[("aaaaa", 3)]), 100);
        assert_eq!(v[5..], ["##a", "a", "##aa", "##aaaa", "aaaaa"]);
    }

    #[test]
    fn the_size_is_kept() {
        assert_eq!(train(&words(&[("hug", 10), ("pug", 5)]), 10).len(), 10);
        assert_eq!(train(&words(&[]), 10).len(), 5);
    }
}
