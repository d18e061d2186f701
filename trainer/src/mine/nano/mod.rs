//! A small set that is nearly as hard as the large one it is made of: some queries of a BEIR set, the documents that answer them,
//! and those that are hardest to tell from them.
//!
//! As NanoBEIR: a number of queries drawn by the seed, all their relevant documents, and for each query up to a number of documents
//! that BM25 and a dense model rank highest, one of each in turn. Documents and queries stay as they are in the files, in
//! their order. The corpus stays on disk; in memory are its identifiers' hashes.

mod bm25;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use kernels::topk::TopK;
use serde_json::{Value, json};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

use self::bm25::{Bm25, Builder};
use crate::data::permutation::Permutation;
use crate::data::reader;
use crate::eval::embed::Role;
use crate::eval::open;
use crate::mine::unit;
use crate::system::atomic::Draft;
use crate::system::progress::Progress;
use crate::{Error, Result};

/// Documents that are embedded at once.
const PORTION: usize = 1 << 14;

/// What is made of what.
#[derive(Clone, Debug)]
pub struct Nano {
    /// A BEIR folder.
    pub set: PathBuf,
    /// Which qrels; none: test's, else dev's, else the only ones.
    pub split: Option<String>,
    /// The folder that is made.
    pub output: PathBuf,
    /// Queries that are drawn.
    pub queries: usize,
    /// Documents of each query, beside those that answer it.
    pub negatives: usize,
    /// What is drawn follows from it.
    pub seed: u64,
}

/// What the small set has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Queries.
    pub queries: usize,
    /// Documents of the corpus.
    pub documents: usize,
    /// Those that answer a query.
    pub positives: usize,
    /// Documents that BM25 named, all queries together.
    pub bm25: usize,
    /// Documents that the model named first, all queries together.
    pub dense: usize,
}

impl Counts {
    /// As one object.
    pub fn json(&self) -> Value {
        json!({
            "queries": self.queries,
            "documents": self.documents,
            "positives": self.positives,
            "bm25": self.bm25,
            "dense": self.dense,
        })
    }
}

/// A query that was drawn.
struct Query {
    id: String,
    text: String,
    /// The documents that answer it, with their scores as they stand in the qrels.
    relevant: Vec<(u32, String, String)>,
}

/// The large set, looked through; the small one is begun.
pub struct Sample<'a> {
    nano: &'a Nano,
    draft: Draft,
    corpus: PathBuf,
    queries_file: PathBuf,
    queries: Vec<Query>,
    documents: usize,
    words: Bm25,
}

impl Nano {
    /// Looks through the whole set, draws the queries, and indexes the documents' words.
    ///
    /// # Errors
    /// The output exists; the set is no BEIR folder, has a malformed row, qrels that name what is not there, no answers, or one document.
    pub fn sample(&self) -> Result<Sample<'_>> {
        Draft::free(&self.output)?;
        let qrels = open::qrels(&self.set, self.split.as_deref())?;
        let (queries_file, corpus) =
            (open::find(&self.set, "queries.jsonl")?, open::find(&self.set, "corpus.jsonl")?);
        let mut judged = Vec::new();
        open::judgements(&qrels, |line, query, document, score, written| {
            judged.push((
                line,
                query.to_owned(),
                document.to_owned(),
                (score > 0.0).then(|| written.to_owned()),
            ));
            Ok(())
        })?;
        let queries = identified(&queries_file)?;
        let named: HashSet<&str> = judged.iter().map(|(_, _, document, _)| document.as_str()).collect();

        let draft = Draft::new(&self.output)?;
        let mut words = Builder::new(draft.scratch("words")?)?;
        let (mut numbers, mut seen, mut documents) = (HashMap::new(), HashSet::new(), 0u32);
        each_text(&corpus, true, |line, id, text, _| {
            if !seen.insert(xxh3_128(id.as_bytes())) {
                let message = format!("has the `_id` `{id}` of another document");
                return Err(Error::Row { path: corpus.clone(), line, message });
            }
            if named.contains(id) {
                numbers.insert(id.to_owned(), documents);
            }
            // What is blank answers nothing, and is no answer to mistake for another.
            if !text.trim().is_empty() {
                words.add(documents, text)?;
            }
            documents += 1;
            Ok(())
        })?;
        drop(seen);
        if documents < 2 {
            let message = format!("has {documents} documents, expected some to tell apart");
            return Err(Error::file(corpus, message));
        }
        let mut relevant: HashMap<&str, Vec<(u32, String, String)>> = HashMap::new();
        for (line, query, document, score) in &judged {
            let wrong = |id: &str, file: &str| {
                let message = format!("`{id}` is not in {file}");
                Error::Row { path: qrels.clone(), line: *line, message }
            };
            let number = *numbers.get(document).ok_or_else(|| wrong(document, "corpus.jsonl"))?;
            if !queries.contains_key(query) {
                return Err(wrong(query, "queries.jsonl"));
            }
            if let Some(score) = score {
                let of_query = relevant.entry(query).or_default();
                if !of_query.iter().any(|(other, ..)| *other == number) {
                    of_query.push((number, document.clone(), score.clone()));
                }
            }
        }
        let mut answered: Vec<Query> = Vec::new();
        let mut order: Vec<_> = relevant.into_iter().collect();
        order.sort_by_key(|(id, _)| queries[*id].0);
        for (id, relevant) in order {
            let text = queries[id].1.clone();
            if !text.trim().is_empty() {
                answered.push(Query { id: id.to_owned(), text, relevant });
            }
        }
        if answered.is_empty() {
            return Err(Error::file(qrels, "has no relevant document, expected scores above 0"));
        }
        if answered.len() < self.queries {
            tracing::warn!("{} queries have answers, all of them are taken", answered.len());
        }
        let drawn = Permutation::new(answered.len() as u64, xxh3_64_with_seed(b"nano", self.seed), &[]);
        let drawn: BTreeSet<u64> =
            (0..self.queries.min(answered.len()) as u64).map(|place| drawn.at(place)).collect();
        let mut number = 0;
        answered.retain(|_| {
            number += 1;
            drawn.contains(&(number - 1))
        });
        let words = words.finish()?;
        Ok(Sample {
            nano: self,
            draft,
            corpus,
            queries_file,
            queries: answered,
            documents: documents as usize,
            words,
        })
    }
}

impl Sample<'_> {
    /// Finds what is hard to tell from the answers, and writes the small set. `encode`, where there is a model, embeds
    /// texts: (N, D).
    ///
    /// # Errors
    /// What `encode` returns; the disk is full; the set has changed meanwhile.
    pub fn write(self, encode: Option<&mut Encode<'_>>) -> Result<Counts> {
        let mut counts = Counts { queries: self.queries.len(), ..Counts::default() };
        let dense = match encode {
            Some(encode) => self.dense(encode)?,
            None => vec![Vec::new(); self.queries.len()],
        };
        let most = self.most();
        let (mut taken, mut positives) = (BTreeSet::new(), BTreeSet::new());
        for (query, dense) in self.queries.iter().zip(dense) {
            let own: HashSet<u32> = query.relevant.iter().map(|(number, ..)| *number).collect();
            positives.extend(own.iter().copied());
            let words = self.words.best(&query.text, most + own.len())?;
            let (found, of_words) = in_turn(&words, &dense, &own, most);
            counts.bm25 += of_words;
            counts.dense += found.len() - of_words;
            taken.extend(found);
        }
        counts.positives = positives.len();
        taken.extend(positives);
        counts.documents = taken.len();
        let Self { draft, corpus, queries_file, queries, documents, .. } = self;

        let changed = |path: &Path| Error::file(path, "has changed meanwhile");
        let (mut file, mut number) = (draft.file("corpus.jsonl")?, 0);
        reader::raw(&corpus, |_, bytes, _| {
            number += 1;
            if taken.contains(&(number - 1)) { file.write(bytes) } else { Ok(()) }
        })?;
        if number as usize != documents {
            return Err(changed(&corpus));
        }
        file.finish()?;

        let drawn: HashSet<&str> = queries.iter().map(|query| query.id.as_str()).collect();
        let (mut file, mut written) = (draft.file("queries.jsonl")?, 0);
        each_text(&queries_file, false, |_, id, _, bytes| {
            if !drawn.contains(id) {
                return Ok(());
            }
            written += 1;
            file.write(bytes)
        })?;
        if written != queries.len() {
            return Err(changed(&queries_file));
        }
        file.finish()?;

        let mut file = draft.file("qrels/test.tsv")?;
        file.write(b"query-id\tcorpus-id\tscore")?;
        for query in &queries {
            for (_, document, score) in &query.relevant {
                file.write(format!("{}\t{document}\t{score}", query.id).as_bytes())?;
            }
        }
        file.finish()?;
        draft.finish()?;
        Ok(counts)
    }

    /// Negatives a query at most.
    fn most(&self) -> usize {
        self.nano.negatives.min(self.documents)
    }

    /// For each query the documents that the model finds, best first; its answers may be among them.
    fn dense(&self, encode: &mut Encode<'_>) -> Result<Vec<Vec<u32>>> {
        let texts: Vec<String> = self.queries.iter().map(|query| query.text.clone()).collect();
        let queries = unit(&encode(&texts, Role::Query)?, &texts)?; // (Q, D)
        let width = queries.dim(1)?;
        let queries = queries.flatten_all()?.to_vec1::<f32>()?;
        let answers = self.queries.iter().map(|query| query.relevant.len()).max().unwrap_or(0);
        let mut best = TopK::new(self.queries.len(), self.most() + answers);
        let mut progress = Progress::new("embedding documents", self.documents as u64, 0);
        let (mut portion, mut numbers, mut number) = (Vec::new(), Vec::new(), 0u32);
        let mut embed = |portion: &mut Vec<String>, numbers: &mut Vec<u32>| -> Result<()> {
            if portion.is_empty() {
                return Ok(());
            }
            let documents =
                unit(&encode(portion, Role::Document)?, portion)?.flatten_all()?.to_vec1::<f32>()?;
            // Numbers run on, but for documents that are blank.
            let mut start = 0;
            while start < numbers.len() {
                let run = numbers[start..].windows(2).take_while(|pair| pair[1] == pair[0] + 1).count() + 1;
                best.push(&queries, &documents[start * width..(start + run) * width], width, numbers[start]);
                start += run;
            }
            progress.advance(portion.len() as u64);
            portion.clear();
            numbers.clear();
            Ok(())
        };
        each_text(&self.corpus, true, |_, _, text, _| {
            if !text.trim().is_empty() {
                portion.push(text.to_owned());
                numbers.push(number);
            }
            number += 1;
            if portion.len() == PORTION { embed(&mut portion, &mut numbers) } else { Ok(()) }
        })?;
        embed(&mut portion, &mut numbers)?;
        let found = best.finish().into_iter();
        Ok(found.map(|hits| hits.iter().map(|hit| hit.document).collect()).collect())
    }
}

/// Embeds texts as what they are.
pub type Encode<'a> = dyn FnMut(&[String], Role) -> Result<Tensor> + 'a;

/// One of each list in turn, each document once and none that is an answer, `count` at most; and how many the first list named.
fn in_turn(words: &[u32], dense: &[u32], answers: &HashSet<u32>, count: usize) -> (Vec<u32>, usize) {
    let (mut lists, mut seen) = ([words.iter(), dense.iter()], answers.clone());
    let (mut found, mut of_words) = (Vec::new(), 0);
    while found.len() < count {
        let before = found.len();
        for (turn, list) in lists.iter_mut().enumerate() {
            if found.len() < count
                && let Some(&document) = list.find(|document| seen.insert(**document))
            {
                found.push(document);
                of_words += usize::from(turn == 0);
            }
        }
        if found.len() == before {
            break;
        }
    }
    (found, of_words)
}

/// The identifiers of a file of texts, with their places and texts.
fn identified(path: &Path) -> Result<HashMap<String, (usize, String)>> {
    let mut all = HashMap::new();
    each_text(path, false, |line, id, text, _| {
        let place = all.len();
        match all.insert(id.to_owned(), (place, text.to_owned())) {
            None => Ok(()),
            Some(_) => {
                let message = format!("has the `_id` `{id}` of another row");
                Err(Error::Row { path: path.to_owned(), line, message })
            }
        }
    })?;
    Ok(all)
}

/// Calls `each` with line, identifier, text and bytes of the rows of `queries.jsonl` or `corpus.jsonl`. A title stands before its text.
fn each_text(
    path: &Path,
    titled: bool,
    mut each: impl FnMut(u64, &str, &str, &[u8]) -> Result<()>,
) -> Result<()> {
    reader::raw(path, |line, bytes, row| {
        let Some(row) = row else { return Ok(()) };
        let (id, text) = open::text(&row, titled).map_err(|message| Error::Row {
            path: path.to_owned(),
            line,
            message,
        })?;
        each(line, &id, &text, bytes)
    })
}

#[cfg(test)]
mod tests;
