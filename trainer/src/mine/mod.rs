//! Hard-negative mining: finds documents that are similar to a query and are not its positives.
//!
//! Results are those of `mine_hard_negatives` in sentence-transformers 6: exact search by cosine similarity,
//! the filters of `select`, one row for each pair of a query and a positive, in the order in which the
//! queries first occur. Pairs without any negative are not written. Of documents with equal scores the first
//! is taken.
//!
//! Texts and embeddings are on disk. Memory holds one batch of texts, one block of queries, one batch of
//! documents, and 2k values per query of the block. Ranks embed together and process different blocks.

pub mod nano;
mod stats;
mod search;
mod select;
mod texts;
mod work_dir;

use std::fmt::Write;
use std::iter;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use rayon::prelude::*;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

pub use self::search::{Embeddings, search};
pub use self::select::{Dropped, Filter, Sampling};
pub use self::stats::{MiningStats, ScoreStats};
pub use self::texts::Inputs;
use self::texts::Texts;
use self::work_dir::WorkDir;
use crate::comm::World;
use crate::eval::embed::Role;
use crate::system::npy::Writer;
use crate::system::progress::Progress;
use crate::{Error, Result};

/// Texts that are embedded at once, and rows of one file of embeddings.
const SHARD: usize = 1 << 14;
/// Largest number of queries in a block, which is searched for in one pass over the documents. Few queries
/// are divided into 16 blocks, so that all ranks have work.
const BLOCK: usize = 1 << 13;
/// Largest number of values that a block keeps for its search results.
const BLOCK_VALUES: usize = 1 << 24;

/// Mines hard negatives and writes them as training rows.
#[derive(Clone, Debug)]
pub struct Miner {
    /// Conditions that a negative must meet.
    pub filter: Filter,
    /// Whether rows have a `scores` column: the scores of the positive and the negatives, in this order. The
    /// losses margin_mse and kl train on it.
    pub scores: bool,
    /// The JSONL file to write.
    pub output: PathBuf,
    /// Folder of the embeddings and the finished blocks.
    pub work: PathBuf,
    /// Whether the embeddings stay in `work` at the end.
    pub keep_embeddings: bool,
}

impl Miner {
    /// Mines negatives for `inputs`. Continues an earlier run that had the same inputs and settings.
    ///
    /// `encode` embeds texts: (N, D); all ranks call it with the same texts. `model` identifies the model and
    /// the settings that the embeddings depend on.
    ///
    /// # Errors
    /// The range is too small; an embedding is not finite; the disk is full; what `encode` returns.
    pub fn run(
        &self,
        inputs: &Inputs,
        model: &str,
        world: &World,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<MiningStats> {
        let range_max = self.filter.range_max(inputs.max_positives)?;
        let digests = (xxh3_64(model.as_bytes()), inputs.queries.digest(), inputs.documents.digest());
        let texts = xxh3_64(format!("{digests:x?}").as_bytes());
        let settings = xxh3_64(self.settings(inputs).as_bytes());
        world.assert_same("model, rows or settings", texts ^ settings)?;
        if inputs.blank > 0 {
            tracing::warn!("skipped {} blank texts of the corpus", inputs.blank);
        }
        let work = WorkDir::open(&self.work, texts, settings, world)?;

        let queries = embed(&inputs.queries, "queries", Role::Query, &work, world, &mut encode)?;
        let documents = embed(&inputs.documents, "documents", Role::Document, &work, world, &mut encode)?;

        let count = inputs.queries.len();
        let k = range_max.saturating_add(inputs.max_positives).min(inputs.documents.len());
        let block = count.div_ceil(16).clamp(256, BLOCK).min((BLOCK_VALUES / (2 * k)).max(1));
        let blocks = count.div_ceil(block);
        let range = |number: usize| number * block..count.min((number + 1) * block);
        let present = work.present((0..blocks).map(|number| work.block(number)), world)?;
        let done: usize =
            (0..blocks).filter(|&number| present[number]).map(|number| range(number).len()).sum();
        if done > 0 {
            tracing::info!("resuming: {done} of {count} queries are already mined");
        }
        let mut progress =
            world.is_rank_zero().then(|| Progress::new("mining for queries", count as u64, done as u64));
        for (index, number) in (0..blocks).filter(|&number| !present[number]).enumerate() {
            if index % world.size() == world.rank() {
                let (rows, stats) = self.block(inputs, range(number), &queries, &documents, k, range_max)?;
                work.write_block(number, rows.as_bytes(), &stats)?;
            }
            if index % world.size() == 0
                && let Some(progress) = &mut progress
            {
                // Assumes that the blocks of the other ranks take as long.
                progress.advance((range(number).len() * world.size().min(blocks)) as u64);
            }
        }
        drop(progress);
        world.barrier()?;
        let stats = if world.is_rank_zero() {
            let stats = work.join(blocks, &self.output)?;
            work.remove(self.keep_embeddings)?;
            stats
        } else {
            MiningStats::default()
        };
        world.barrier()?;
        Ok(stats)
    }

    /// The settings that the rows depend on, beside the texts and their embeddings.
    fn settings(&self, inputs: &Inputs) -> String {
        format!("{:?} {} {:x}", self.filter, self.scores, inputs.digest)
    }

    /// Mines one block of queries. Returns its rows as JSONL, and their statistics.
    fn block(
        &self,
        inputs: &Inputs,
        range: Range<usize>,
        queries: &Embeddings,
        documents: &Embeddings,
        k: usize,
        range_max: usize,
    ) -> Result<(String, MiningStats)> {
        let width = queries.width();
        let mut rows = Vec::new();
        queries.read(range.clone(), &mut rows)?;
        let results = search(&rows, documents, k)?;
        let positives: Vec<Vec<f32>> = rows
            .par_chunks(width)
            .zip(&inputs.positives[range.clone()])
            .map(|(query, positives)| documents.scores(query, positives))
            .collect::<Result<_>>()?;
        let (mut text, mut stats) = (String::new(), MiningStats::default());
        for (index, hits) in results.iter().enumerate() {
            let query = range.start + index;
            let (numbers, scores) = (&inputs.positives[query], &positives[index]);
            let lowest = scores.iter().copied().fold(f32::INFINITY, f32::min);
            let negatives =
                self.filter.choose(query as u64, hits, numbers, lowest, range_max, &mut stats.dropped);
            stats.queries += 1;
            stats.candidates += hits.len() as u64;
            scores.iter().for_each(|&score| stats.positive_scores.push(score));
            if negatives.is_empty() {
                stats.pairs_without += numbers.len() as u64;
                continue;
            }
            let query_text = inputs.queries.get(query as u32)?;
            let texts: Vec<String> =
                negatives.iter().map(|hit| inputs.documents.get(hit.document)).collect::<Result<_>>()?;
            for (&number, &score) in numbers.iter().zip(scores) {
                stats.rows += 1;
                stats.rows_with_fewer += u64::from(negatives.len() < self.filter.negatives);
                stats.negatives += negatives.len() as u64;
                for hit in &negatives {
                    stats.negative_scores.push(hit.score);
                    stats.differences.push(score - hit.score);
                }
                let positive = inputs.documents.get(number)?;
                let mut row = json!({"query": query_text, "positive": positive, "negatives": texts});
                if self.scores {
                    row["scores"] = iter::once(score).chain(negatives.iter().map(|hit| hit.score)).collect();
                }
                let _ = writeln!(text, "{row}");
            }
        }
        Ok((text, stats))
    }
}

/// Returns the embeddings of `texts`, scaled to length 1. Embeds only the shards that are not on disk yet.
fn embed(
    texts: &Texts,
    what: &str,
    role: Role,
    work: &WorkDir,
    world: &World,
    encode: &mut dyn FnMut(&[String], Role) -> Result<Tensor>,
) -> Result<Embeddings> {
    let shards = texts.len().div_ceil(SHARD);
    let range = |shard: usize| shard * SHARD..texts.len().min((shard + 1) * SHARD);
    let present = work.present((0..shards).map(|shard| work.shard(what, shard)), world)?;
    let done: usize = (0..shards).filter(|&shard| present[shard]).map(|shard| range(shard).len()).sum();
    if done > 0 {
        tracing::info!("resuming: {done} of {} {what} are already embedded", texts.len());
    }
    let bar = world.is_rank_zero() && shards > 1;
    let mut progress =
        bar.then(|| Progress::new(&format!("embedding {what}"), texts.len() as u64, done as u64));
    for shard in (0..shards).filter(|&shard| !present[shard]) {
        let batch = texts.range(range(shard))?;
        let embeddings = normalize(&encode(&batch, role)?, &batch)?;
        if world.is_rank_zero() {
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

/// Scales the rows of `embeddings` (N, D) to length 1.
///
/// # Errors
/// A row is not finite; the message names its text.
pub(crate) fn normalize(embeddings: &Tensor, texts: &[String]) -> Result<Tensor> {
    let norms = embeddings.sqr()?.sum_keepdim(1)?.sqrt()?;
    if let Some(index) = norms.flatten_all()?.to_vec1::<f32>()?.iter().position(|norm| !norm.is_finite()) {
        let text: String = texts[index].chars().take(80).collect();
        return Err(Error::Failed(format!("the model's embedding of `{text}` is not finite")));
    }
    Ok(embeddings.broadcast_div(&norms.maximum(1e-12)?)?)
}

/// Identifies the contents of a model folder by the names, sizes and modification times of its files, without
/// reading them.
///
/// # Errors
/// The folder cannot be read.
pub fn fingerprint(folder: &Path) -> Result<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::read("read", folder))? {
        let path = entry.map_err(Error::read("read", folder))?.path();
        let metadata = std::fs::metadata(&path).map_err(Error::read("read", &path))?;
        if metadata.is_file() {
            files.push((path, metadata.len(), metadata.modified().ok()));
        }
    }
    files.sort();
    Ok(format!("{files:?}"))
}

#[cfg(test)]
mod tests;
