//! Hard negatives: documents that lie near a query and are not its positives.
//!
//! The results are those of sentence-transformers 6 in its `mine_hard_negatives`: cosine similarity, an exact search, what a negative
//! must be as `select` has it, a row a pair of a query and a positive, the queries in the order in which they first came. Pairs
//! without any negative left are not written. Where scores are equal, the document that came first is taken.
//!
//! Texts and embeddings are on disk; in memory are a portion of texts, a block of queries, a portion of documents, and 2k numbers
//! a query of the block. Ranks embed together and share out the blocks.

pub mod nano;
mod report;
mod search;
mod select;
mod texts;
mod work;

use std::fmt::Write;
use std::iter;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use rayon::prelude::*;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

pub use self::report::{Counts, Scores};
pub use self::search::{Embeddings, search};
pub use self::select::{Dropped, Filter, Sampling};
pub use self::texts::Inputs;
use self::texts::Texts;
use self::work::Work;
use crate::comm::World;
use crate::eval::embed::Role;
use crate::system::npy::Writer;
use crate::system::progress::Progress;
use crate::{Error, Result};

/// Texts that are embedded at once, and rows of a file of embeddings.
const SHARD: usize = 1 << 14;
/// Queries of a block at most: they pass over all documents once. Few queries make 16 blocks, for ranks to share.
const BLOCK: usize = 1 << 13;
/// Numbers that a block keeps of what its queries find.
const KEPT: usize = 1 << 24;

/// Where negatives are mined, and what they must be.
#[derive(Clone, Debug)]
pub struct Mine {
    /// What a negative must be.
    pub filter: Filter,
    /// Whether a row tells the `scores` of its positive and its negatives, in this order: what margin_mse and kl learn from.
    pub scores: bool,
    /// Where the rows go.
    pub output: PathBuf,
    /// Where embeddings and finished rows are kept.
    pub work: PathBuf,
    /// Whether the embeddings stay there when all is done.
    pub keep: bool,
}

impl Mine {
    /// Mines negatives for `inputs`, and goes on where an earlier run with the same settings ended.
    ///
    /// `encode` embeds texts: (N, D); all ranks call it with the same texts. `model` says what the embeddings follow from beside the texts.
    ///
    /// # Errors
    /// A range that is too small; an embedding that is not finite; a disk that is full; what `encode` returns.
    pub fn run(
        &self,
        inputs: &Inputs,
        model: &str,
        world: &World,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<Counts> {
        let range_max = self.filter.range_max(inputs.most)?;
        let digests = (xxh3_64(model.as_bytes()), inputs.queries.digest(), inputs.documents.digest());
        let texts = xxh3_64(format!("{digests:x?}").as_bytes());
        let settings = xxh3_64(self.settings(inputs).as_bytes());
        world.same("model, rows or settings", texts ^ settings)?;
        if inputs.blank > 0 {
            tracing::warn!("{} texts of the corpus are blank and left out", inputs.blank);
        }
        let work = Work::open(&self.work, texts, settings, world)?;

        let queries = embed(&inputs.queries, "queries", Role::Query, &work, world, &mut encode)?;
        let documents = embed(&inputs.documents, "documents", Role::Document, &work, world, &mut encode)?;

        let count = inputs.queries.len();
        let k = range_max.saturating_add(inputs.most).min(inputs.documents.len());
        let block = count.div_ceil(16).clamp(256, BLOCK).min((KEPT / (2 * k)).max(1));
        let blocks = count.div_ceil(block);
        let range = |number: usize| number * block..count.min((number + 1) * block);
        let present = work.present((0..blocks).map(|number| work.block(number)), world)?;
        let done: usize =
            (0..blocks).filter(|&number| present[number]).map(|number| range(number).len()).sum();
        if done > 0 {
            tracing::info!("{done} of {count} queries have their negatives already");
        }
        let mut progress =
            world.first().then(|| Progress::new("mining for queries", count as u64, done as u64));
        for (turn, number) in (0..blocks).filter(|&number| !present[number]).enumerate() {
            if turn % world.size() == world.rank() {
                let (rows, counts) = self.block(inputs, range(number), &queries, &documents, k, range_max)?;
                work.write_block(number, rows.as_bytes(), &counts)?;
            }
            if turn % world.size() == 0
                && let Some(progress) = &mut progress
            {
                // The other ranks' blocks take as long.
                progress.advance((range(number).len() * world.size().min(blocks)) as u64);
            }
        }
        drop(progress);
        world.barrier()?;
        let counts = if world.first() {
            let counts = work.join(blocks, &self.output)?;
            work.remove(self.keep)?;
            counts
        } else {
            Counts::default()
        };
        world.barrier()?;
        Ok(counts)
    }

    /// What the rows follow from beside the texts and their embeddings.
    fn settings(&self, inputs: &Inputs) -> String {
        format!("{:?} {} {:x}", self.filter, self.scores, inputs.digest)
    }

    /// The rows of some queries.
    fn block(
        &self,
        inputs: &Inputs,
        range: Range<usize>,
        queries: &Embeddings,
        documents: &Embeddings,
        k: usize,
        range_max: usize,
    ) -> Result<(String, Counts)> {
        let width = queries.width();
        let mut rows = Vec::new();
        queries.read(range.clone(), &mut rows)?;
        let found = search(&rows, documents, k)?;
        let positives: Vec<Vec<f32>> = rows
            .par_chunks(width)
            .zip(&inputs.positives[range.clone()])
            .map(|(query, positives)| documents.scores(query, positives))
            .collect::<Result<_>>()?;
        let (mut text, mut counts) = (String::new(), Counts::default());
        for (index, hits) in found.iter().enumerate() {
            let query = range.start + index;
            let (numbers, scores) = (&inputs.positives[query], &positives[index]);
            let lowest = scores.iter().copied().fold(f32::INFINITY, f32::min);
            let negatives =
                self.filter.choose(query as u64, hits, numbers, lowest, range_max, &mut counts.dropped);
            counts.queries += 1;
            counts.candidates += hits.len() as u64;
            scores.iter().for_each(|&score| counts.positive_scores.push(score));
            if negatives.is_empty() {
                counts.pairs_without += numbers.len() as u64;
                continue;
            }
            let asked = inputs.queries.get(query as u32)?;
            let texts: Vec<String> =
                negatives.iter().map(|hit| inputs.documents.get(hit.document)).collect::<Result<_>>()?;
            for (&number, &score) in numbers.iter().zip(scores) {
                counts.rows += 1;
                counts.rows_with_fewer += u64::from(negatives.len() < self.filter.negatives);
                counts.negatives += negatives.len() as u64;
                for hit in &negatives {
                    counts.negative_scores.push(hit.score);
                    counts.differences.push(score - hit.score);
                }
                let positive = inputs.documents.get(number)?;
                let mut row = json!({"query": asked, "positive": positive, "negatives": texts});
                if self.scores {
                    row["scores"] = iter::once(score).chain(negatives.iter().map(|hit| hit.score)).collect();
                }
                let _ = writeln!(text, "{row}");
            }
        }
        Ok((text, counts))
    }
}

/// The embeddings of `texts`, of length 1: those that are on disk, and the others after they were made.
fn embed(
    texts: &Texts,
    what: &str,
    role: Role,
    work: &Work,
    world: &World,
    encode: &mut dyn FnMut(&[String], Role) -> Result<Tensor>,
) -> Result<Embeddings> {
    let shards = texts.len().div_ceil(SHARD);
    let range = |shard: usize| shard * SHARD..texts.len().min((shard + 1) * SHARD);
    let present = work.present((0..shards).map(|shard| work.shard(what, shard)), world)?;
    let done: usize = (0..shards).filter(|&shard| present[shard]).map(|shard| range(shard).len()).sum();
    if done > 0 {
        tracing::info!("{done} of {} {what} are embedded already", texts.len());
    }
    let bar = world.first() && shards > 1;
    let mut progress =
        bar.then(|| Progress::new(&format!("embedding {what}"), texts.len() as u64, done as u64));
    for shard in (0..shards).filter(|&shard| !present[shard]) {
        let portion = texts.range(range(shard))?;
        let embeddings = unit(&encode(&portion, role)?, &portion)?;
        if world.first() {
            let (rows, width) = embeddings.dims2()?;
            let mut npy = Writer::create(&work.shard(what, shard), rows, width)?;
            npy.write(&embeddings)?;
            npy.finish()?;
        }
        if let Some(progress) = &mut progress {
            progress.advance(range(shard).len() as u64);
        }
    }
    world.barrier()?;
    Embeddings::open((0..shards).map(|shard| work.shard(what, shard)))
}

/// Rows (N, D) scaled to length 1.
pub(crate) fn unit(embeddings: &Tensor, texts: &[String]) -> Result<Tensor> {
    let norms = embeddings.sqr()?.sum_keepdim(1)?.sqrt()?;
    if let Some(place) = norms.flatten_all()?.to_vec1::<f32>()?.iter().position(|norm| !norm.is_finite()) {
        let text: String = texts[place].chars().take(80).collect();
        return Err(Error::Usage(format!("the model's embedding of `{text}` is not finite")));
    }
    Ok(embeddings.broadcast_div(&norms.maximum(1e-12)?)?)
}

/// What a model folder holds, by its files' names, sizes and times: what embeddings follow from, without reading the weights.
///
/// # Errors
/// The folder cannot be read.
pub fn identity(folder: &Path) -> Result<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let metadata = std::fs::metadata(&path).map_err(Error::io("read", &path))?;
        if metadata.is_file() {
            files.push((path, metadata.len(), metadata.modified().ok()));
        }
    }
    files.sort();
    Ok(format!("{files:?}"))
}

#[cfg(test)]
mod tests;
