//! Nano sets: small retrieval sets that are nearly as hard as the BEIR set that they are sampled from, as in
//! NanoBEIR.
//!
//! A Nano set has a number of queries drawn by the seed, all their relevant documents, and for each query the
//! documents that BM25 and a dense model rank highest, taken from both rankings in turn. Rows are copied
//! unchanged, in the order of the files. The corpus stays on disk; memory holds hashes of its identifiers and
//! the BM25 index of the drawn queries.

mod bm25;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use kernels::topk::TopK;
use serde_json::{Value, json};
use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128};

pub use self::bm25::Bm25;
use crate::data::permutation::Permutation;
use crate::data::reader;
use crate::data::reader::beir::{self, BeirFile, Split};
use crate::eval::embed::Role;
use crate::mine::normalize;
use crate::system::atomic::StagedDir;
use crate::system::progress::Progress;
use crate::{Error, Result};

/// Documents that are embedded at once.
const BATCH: usize = 1 << 14;

/// Embeds texts: (N, D).
pub type Encode<'a> = dyn FnMut(&[String], Role) -> Result<Tensor> + 'a;

/// Options of a Nano set: the set that it is sampled from, its size, and where it is written.
#[derive(Clone, Debug)]
pub struct NanoBuilder {
    /// The BEIR folder to sample from.
    pub set: PathBuf,
    /// Name of the qrels file, without `.tsv`. Default: test, else dev, else the only one.
    pub split: Option<String>,
    /// The folder to write. It must not exist, or be empty.
    pub output: PathBuf,
    /// Number of queries to draw.
    pub queries: usize,
    /// Largest number of documents added for each query, beside its relevant ones.
    pub negatives: usize,
    /// Seed of the draw.
    pub seed: u64,
}

/// Numbers of queries and documents of a Nano set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NanoStats {
    /// Number of queries.
    pub queries: usize,
    /// Number of documents in the corpus.
    pub documents: usize,
    /// Number of documents that are relevant to a query.
    pub positives: usize,
    /// Number of documents taken from BM25's rankings, summed over queries.
    pub bm25: usize,
    /// Number of documents taken from the model's rankings, summed over queries.
    pub dense: usize,
}

impl NanoStats {
    /// Returns the numbers as a JSON object.
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

/// The drawn queries of a Nano set, and a BM25 index of the whole corpus for them.
pub struct Sample<'a> {
    options: &'a NanoBuilder,
    draft: StagedDir,
    queries_file: PathBuf,
    corpus_file: PathBuf,
    queries: Vec<Query>,
    corpus: Corpus,
}

/// A query with its relevant documents.
struct Query {
    id: String,
    text: String,
    /// Identifiers of the relevant documents, and their scores as the qrels spell them.
    relevant: Vec<(String, String)>,
}

/// What one pass over the corpus finds.
struct Corpus {
    documents: u32,
    /// Row number of each judged document.
    numbers: HashMap<String, u32>,
    index: Bm25,
}

/// A line of the qrels.
struct Judgement {
    line: u64,
    query: String,
    document: String,
    /// The score as written, if it is above 0.
    relevant: Option<String>,
}

impl NanoBuilder {
    /// Draws the queries and indexes the corpus for them.
    ///
    /// # Errors
    /// The output exists; the set is no BEIR folder, has a malformed row, qrels that name missing queries or
    /// documents, no relevant document, or fewer than two documents.
    pub fn sample(&self) -> Result<Sample<'_>> {
        StagedDir::check_free(&self.output)?;
        let qrels = beir::qrels(&self.set, self.split.as_deref().map_or(Split::Evaluation, Split::Named))?;
        let queries_file = beir::file(&self.set, BeirFile::Queries)?;
        let corpus_file = beir::file(&self.set, BeirFile::Corpus)?;
        let mut judgements = Vec::new();
        beir::judgements(&qrels, |judgement| {
            let beir::Judgement { line, query, document, score, written_score } = judgement;
            let relevant = (score > 0.0).then(|| written_score.to_owned());
            judgements.push(Judgement { line, query: query.into(), document: document.into(), relevant });
            Ok(())
        })?;
        let queries = self.draw(&qrels, &queries_file, &judgements)?;
        let draft = StagedDir::new(&self.output)?;
        let corpus = Corpus::read(&corpus_file, &queries, &judgements)?;
        for Judgement { line, document, .. } in &judgements {
            if !corpus.numbers.contains_key(document) {
                let message = format!("`{document}` is not in corpus.jsonl");
                return Err(Error::Row { path: qrels, line: *line, message });
            }
        }
        Ok(Sample { options: self, draft, queries_file, corpus_file, queries, corpus })
    }

    /// Draws from the queries that have text and a relevant document; returns them in the order of their
    /// file.
    fn draw(&self, qrels: &Path, queries_file: &Path, judgements: &[Judgement]) -> Result<Vec<Query>> {
        let texts = texts_by_id(queries_file)?;
        let mut relevant: HashMap<&str, Vec<(String, String)>> = HashMap::new();
        for Judgement { line, query, document, relevant: score } in judgements {
            if !texts.contains_key(query) {
                let message = format!("`{query}` is not in queries.jsonl");
                return Err(Error::Row { path: qrels.to_owned(), line: *line, message });
            }
            if let Some(score) = score {
                let documents = relevant.entry(query).or_default();
                if !documents.iter().any(|(other, _)| other == document) {
                    documents.push((document.clone(), score.clone()));
                }
            }
        }
        let mut order: Vec<_> = relevant.into_iter().collect();
        order.sort_by_key(|(id, _)| texts[*id].0);
        let mut queries: Vec<Query> = order
            .into_iter()
            .map(|(id, relevant)| Query { id: id.to_owned(), text: texts[id].1.clone(), relevant })
            .filter(|query| !query.text.trim().is_empty())
            .collect();
        if queries.is_empty() {
            return Err(Error::file(qrels, "has no relevant document, expected scores above 0"));
        }
        let (count, wanted) = (queries.len(), self.queries);
        if count < wanted {
            tracing::warn!("only {count} of {wanted} queries have a relevant document: all of them are used");
        }
        let order = Permutation::new(count as u64, xxh3_64_with_seed(b"nano", self.seed), &[]);
        let drawn: HashSet<u64> = (0..wanted.min(count) as u64).map(|place| order.at(place)).collect();
        let mut numbers = 0..;
        queries.retain(|_| numbers.next().is_some_and(|number| drawn.contains(&number)));
        Ok(queries)
    }
}

impl Corpus {
    fn read(path: &Path, queries: &[Query], judgements: &[Judgement]) -> Result<Self> {
        let judged: HashSet<&str> = judgements.iter().map(|judgement| judgement.document.as_str()).collect();
        let mut index = Bm25::new(queries.iter().map(|query| query.text.as_str()));
        let (mut numbers, mut seen, mut documents) = (HashMap::new(), HashSet::new(), 0);
        for_each_text(path, BeirFile::Corpus, |line, id, text, _| {
            if !seen.insert(xxh3_128(id.as_bytes())) {
                let message = format!("has the `_id` `{id}` of another document");
                return Err(Error::Row { path: path.to_owned(), line, message });
            }
            if judged.contains(id) {
                numbers.insert(id.to_owned(), documents);
            }
            // A blank document is never added as a negative.
            if !text.trim().is_empty() {
                index.add(documents, text);
            }
            documents += 1;
            Ok(())
        })?;
        if documents < 2 {
            return Err(Error::file(path, format!("has {documents} documents, expected at least 2")));
        }
        Ok(Self { documents, numbers, index })
    }
}

impl Sample<'_> {
    /// Finds the documents to add and writes the Nano set. `encode` embeds texts for the dense ranking;
    /// without it only BM25 ranks.
    ///
    /// # Errors
    /// What `encode` returns; the disk is full; the set changed since [`NanoBuilder::sample`].
    pub fn write(self, encode: Option<&mut Encode<'_>>) -> Result<NanoStats> {
        let mut stats = NanoStats { queries: self.queries.len(), ..NanoStats::default() };
        let dense = match encode {
            Some(encode) => self.dense_rankings(encode)?,
            None => vec![Vec::new(); self.queries.len()],
        };
        let (mut taken, mut positives) = (BTreeSet::new(), BTreeSet::new());
        for (number, (query, dense)) in self.queries.iter().zip(dense).enumerate() {
            let relevant: HashSet<u32> =
                query.relevant.iter().map(|(document, _)| self.corpus.numbers[document]).collect();
            positives.extend(relevant.iter().copied());
            let bm25 = self.corpus.index.top(number, self.max_negatives() + relevant.len());
            let (negatives, from_bm25) = interleave(&bm25, &dense, &relevant, self.max_negatives());
            stats.bm25 += from_bm25;
            stats.dense += negatives.len() - from_bm25;
            taken.extend(negatives);
        }
        stats.positives = positives.len();
        taken.extend(positives);
        stats.documents = taken.len();
        self.write_files(&taken)?;
        Ok(stats)
    }

    fn write_files(self, documents: &BTreeSet<u32>) -> Result<()> {
        let Self { draft, corpus_file, queries_file, queries, corpus, .. } = self;
        let changed = |path: &Path| Error::file(path, "changed while it was read");
        let (mut file, mut number) = (draft.file("corpus.jsonl")?, 0);
        reader::raw(&corpus_file, |_, bytes, _| {
            number += 1;
            if documents.contains(&(number - 1)) { file.write(bytes) } else { Ok(()) }
        })?;
        if number != corpus.documents {
            return Err(changed(&corpus_file));
        }
        file.finish()?;

        let drawn: HashSet<&str> = queries.iter().map(|query| query.id.as_str()).collect();
        let (mut file, mut written) = (draft.file("queries.jsonl")?, 0);
        for_each_text(&queries_file, BeirFile::Queries, |_, id, _, bytes| {
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
            for (document, score) in &query.relevant {
                file.write(format!("{}\t{document}\t{score}", query.id).as_bytes())?;
            }
        }
        file.finish()?;
        draft.commit()
    }

    fn max_negatives(&self) -> usize {
        self.options.negatives.min(self.corpus.documents as usize)
    }

    /// Ranks the corpus for each query by cosine similarity, best first. Relevant documents may be among the
    /// results.
    fn dense_rankings(&self, encode: &mut Encode<'_>) -> Result<Vec<Vec<u32>>> {
        let texts: Vec<String> = self.queries.iter().map(|query| query.text.clone()).collect();
        let queries = normalize(&encode(&texts, Role::Query)?, &texts)?; // (Q, D)
        let width = queries.dim(1)?;
        let queries = queries.flatten_all()?.to_vec1::<f32>()?;
        let relevant = self.queries.iter().map(|query| query.relevant.len()).max().unwrap_or(0);
        let mut best = TopK::new(self.queries.len(), self.max_negatives() + relevant);
        let mut progress = Progress::new("embedding documents", u64::from(self.corpus.documents), 0);
        let (mut texts, mut numbers, mut number) = (Vec::new(), Vec::new(), 0u32);
        let mut embed = |texts: &mut Vec<String>, numbers: &mut Vec<u32>| -> Result<()> {
            if texts.is_empty() {
                return Ok(());
            }
            let documents = normalize(&encode(texts, Role::Document)?, texts)?;
            let documents = documents.flatten_all()?.to_vec1::<f32>()?;
            // `TopK` takes consecutive numbers; blank documents leave gaps.
            let mut start = 0;
            while start < numbers.len() {
                let run = numbers[start..].windows(2).take_while(|pair| pair[1] == pair[0] + 1).count() + 1;
                best.push(&queries, &documents[start * width..(start + run) * width], width, numbers[start]);
                start += run;
            }
            progress.advance(texts.len() as u64);
            texts.clear();
            numbers.clear();
            Ok(())
        };
        for_each_text(&self.corpus_file, BeirFile::Corpus, |_, _, text, _| {
            if !text.trim().is_empty() {
                texts.push(text.to_owned());
                numbers.push(number);
            }
            number += 1;
            if texts.len() == BATCH { embed(&mut texts, &mut numbers) } else { Ok(()) }
        })?;
        embed(&mut texts, &mut numbers)?;
        let rankings = best.finish().into_iter();
        Ok(rankings.map(|hits| hits.iter().map(|hit| hit.document).collect()).collect())
    }
}

/// Takes the next new document of each ranking in turn, until there are `count`; skips those of `relevant`.
/// Returns them, and how many came from `bm25`.
fn interleave(bm25: &[u32], dense: &[u32], relevant: &HashSet<u32>, count: usize) -> (Vec<u32>, usize) {
    let (mut rankings, mut seen) = ([bm25.iter(), dense.iter()], relevant.clone());
    let (mut taken, mut from_bm25) = (Vec::new(), 0);
    while taken.len() < count {
        let before = taken.len();
        for (index, ranking) in rankings.iter_mut().enumerate() {
            if taken.len() < count
                && let Some(&document) = ranking.find(|document| seen.insert(**document))
            {
                taken.push(document);
                from_bm25 += usize::from(index == 0);
            }
        }
        if taken.len() == before {
            break;
        }
    }
    (taken, from_bm25)
}

/// Reads a file of texts: from each identifier to its row number and text.
fn texts_by_id(path: &Path) -> Result<HashMap<String, (usize, String)>> {
    let mut all = HashMap::new();
    for_each_text(path, BeirFile::Queries, |line, id, text, _| {
        let number = all.len();
        match all.insert(id.to_owned(), (number, text.to_owned())) {
            None => Ok(()),
            Some(_) => {
                let message = format!("has the `_id` `{id}` of another row");
                Err(Error::Row { path: path.to_owned(), line, message })
            }
        }
    })?;
    Ok(all)
}

/// Calls `each` with line number, identifier, text and bytes of each row of `queries.jsonl` or
/// `corpus.jsonl`. The text of a document begins with its title.
fn for_each_text(
    path: &Path,
    file: BeirFile,
    mut each: impl FnMut(u64, &str, &str, &[u8]) -> Result<()>,
) -> Result<()> {
    reader::raw(path, |line, bytes, row| {
        let Some(row) = row else { return Ok(()) };
        let (id, text) =
            beir::text(&row, file).map_err(|message| Error::Row { path: path.to_owned(), line, message })?;
        each(line, &id, &text, bytes)
    })
}

#[cfg(test)]
mod tests;
