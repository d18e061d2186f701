//! BM25 over the words of documents, by `tantivy`: k1 = 1.2, b = 0.75, words in lower case, no stemming, in any language that puts
//! spaces between words.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};

use tantivy::collector::TopDocs;
use tantivy::query::{BooleanQuery, Occur, Query, TermQuery};
use tantivy::schema::{FAST, Field, IndexRecordOption, Schema, TextFieldIndexing, TextOptions};
use tantivy::{
    DocId, Index, IndexWriter, Score, Searcher, SegmentReader, TantivyDocument, TantivyError, Term,
};

use crate::{Error, Result};

/// Bytes of postings before they go to disk.
const MEMORY: usize = 128 << 20;

/// An index that is being written.
pub(super) struct Builder {
    folder: PathBuf,
    index: Index,
    writer: IndexWriter,
    text: Field,
    number: Field,
}

/// A finished index.
pub(super) struct Bm25 {
    folder: PathBuf,
    index: Index,
    searcher: Searcher,
    text: Field,
}

impl Builder {
    /// In an empty folder.
    pub(super) fn new(folder: PathBuf) -> Result<Self> {
        let mut schema = Schema::builder();
        let words = TextFieldIndexing::default().set_index_option(IndexRecordOption::WithFreqs);
        let text = schema.add_text_field("text", TextOptions::default().set_indexing_options(words));
        let number = schema.add_u64_field("number", FAST);
        let index = Index::create_in_dir(&folder, schema.build()).map_err(wrong(&folder))?;
        // One thread: the documents' order is that of their numbers.
        let writer = index.writer_with_num_threads(1, MEMORY).map_err(wrong(&folder))?;
        Ok(Self { folder, index, writer, text, number })
    }

    pub(super) fn add(&mut self, number: u32, text: &str) -> Result<()> {
        let mut document = TantivyDocument::default();
        document.add_text(self.text, text);
        document.add_u64(self.number, u64::from(number));
        self.writer.add_document(document).map(drop).map_err(wrong(&self.folder))
    }

    pub(super) fn finish(mut self) -> Result<Bm25> {
        let Self { folder, index, text, .. } = self;
        self.writer.commit().map_err(wrong(&folder))?;
        self.writer.wait_merging_threads().map_err(wrong(&folder))?;
        let searcher = index.reader().map_err(wrong(&folder))?.searcher();
        Ok(Bm25 { folder, index, searcher, text })
    }
}

impl Bm25 {
    /// The numbers of the `count` best documents for a query, best first; of equal ones the first. Fewer, where fewer have one of its
    /// words.
    pub(super) fn best(&self, query: &str, count: usize) -> Result<Vec<u32>> {
        let mut words: Vec<(Occur, Box<dyn Query>)> = Vec::new();
        let mut tokenizer = self.index.tokenizer_for_field(self.text).map_err(wrong(&self.folder))?;
        tokenizer.token_stream(query).process(&mut |token| {
            let term = Term::from_field_text(self.text, &token.text);
            words.push((Occur::Should, Box::new(TermQuery::new(term, IndexRecordOption::WithFreqs))));
        });
        if count == 0 || words.is_empty() {
            return Ok(Vec::new());
        }
        let order = TopDocs::with_limit(count).tweak_score(|segment: &SegmentReader| {
            let numbers = segment.fast_fields().u64("number").map(|column| column.first_or_default_col(0));
            move |document: DocId, score: Score| {
                let number = numbers.as_ref().map_or(0, |numbers| numbers.get_val(document));
                (score, Reverse(number))
            }
        });
        let found = self.searcher.search(&BooleanQuery::new(words), &order).map_err(wrong(&self.folder))?;
        Ok(found.into_iter().map(|((_, Reverse(number)), _)| number as u32).collect())
    }
}

fn wrong(folder: &Path) -> impl Fn(TantivyError) -> Error + '_ {
    move |error| Error::Io {
        path: folder.to_owned(),
        action: "index words in",
        source: std::io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula, over words in lower case.
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
        let folder = tempfile::tempdir().unwrap();
        let mut index = Builder::new(folder.path().to_owned()).unwrap();
        for (number, text) in (0..).zip(documents) {
            index.add(number, text).unwrap();
        }
        let index = index.finish().unwrap();
        for query in [
            "metal",
            "is mars a planet?",
            "IRON",
            "river river long",
            "über",
            "nothing here",
            "",
            "+(\" AND metal",
        ] {
            let expected = reference(&documents, query);
            assert_eq!(index.best(query, 20).unwrap(), expected, "{query}");
            assert_eq!(index.best(query, 2).unwrap(), expected[..expected.len().min(2)], "{query}");
        }
        assert!(index.best("metal", 0).unwrap().is_empty());
    }
}
