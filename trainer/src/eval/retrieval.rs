//! Retrieval: whether queries find the documents that answer them.
//!
//! As sentence-transformers 6 in its `InformationRetrievalEvaluator`: cosine similarity; hits ordered by score, then by
//! document id as a string; a document with the query's own id counts like any other. With rel the query's relevant
//! documents and hits the k best,
//!
//! ```text
//! accuracy@k   1 if any hit is relevant                 precision@k  |hits ∩ rel| / k
//! mrr@k        1 / rank of the first relevant hit       recall@k     |hits ∩ rel| / |rel|
//! ndcg@k       Σ 1/log2(rank + 1) over the relevant hits, divided by the same over min(|rel|, k) first ranks
//! map@k        Σ precision@rank over the relevant hits, divided by min(|rel|, k)
//! ```
//!
//! each as the mean over the queries. Neither the matrix of all scores (Q, C) nor, of a large corpus, all embeddings exist at
//! once: documents are embedded portion by portion, scored block by block, and each query keeps its 100 best.

use std::cmp::Ordering;

use candle_core::Tensor;
use rayon::prelude::*;

use super::rankings::{self, Hit as Shown, Ranking};
use super::{Found, Items};
use crate::Result;
use crate::embed::Role;

const ACCURACY_AT: [usize; 4] = [1, 3, 5, 10];
const PRECISION_RECALL_AT: [usize; 4] = [1, 3, 5, 10];
const NDCG_AT: usize = 10;
const MRR_AT: usize = 10;
const MAP_AT: usize = 100;

/// Documents that are embedded at once, and the bytes of their embeddings: what is sorted by length, and what is in memory.
const PORTION: usize = 50_000;
const PORTION_BYTES: usize = 256 << 20;
/// Scores that exist at once.
const BLOCK: usize = 1 << 22;

/// Queries, documents, and which answers which.
#[derive(Debug)]
pub(super) struct Retrieval {
    queries: Vec<String>,
    documents: Vec<String>,
    ranks: Vec<u32>,
    relevant: Vec<Vec<u32>>,
}

/// A document in a query's list of hits.
#[derive(Clone, Copy, Debug)]
struct Hit {
    score: f32,
    /// The place of the document's id among all ids: what decides between equal scores.
    rank: u32,
    document: u32,
}

impl Hit {
    fn order(&self, other: &Self) -> Ordering {
        other.score.partial_cmp(&self.score).unwrap_or(Ordering::Equal).then(self.rank.cmp(&other.rank))
    }
}

impl Retrieval {
    /// `ids` are the documents'. `relevant` holds, for each query, the indices of its documents; queries without any are
    /// left out.
    pub(super) fn new(
        queries: Vec<String>,
        documents: Vec<String>,
        ids: &[String],
        relevant: Vec<Vec<u32>>,
    ) -> Self {
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_by_key(|&document| &ids[document as usize]);
        let mut ranks = vec![0; ids.len()];
        for (rank, document) in order.into_iter().enumerate() {
            ranks[document as usize] = rank as u32;
        }
        let (queries, relevant) = queries
            .into_iter()
            .zip(relevant)
            .filter(|(_, relevant)| !relevant.is_empty())
            .map(|(query, mut relevant)| {
                relevant.sort_unstable();
                relevant.dedup();
                (query, relevant)
            })
            .unzip();
        Self { queries, documents, ranks, relevant }
    }

    /// Queries that have an answer.
    pub(super) fn queries(&self) -> usize {
        self.queries.len()
    }

    /// Documents that are looked through.
    pub(super) fn documents(&self) -> usize {
        self.documents.len()
    }

    /// What each query finds. `encode` embeds texts: (N, D).
    pub(super) fn evaluate(
        &self,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<Found> {
        let queries = unit(&encode(&self.queries, Role::Query)?)?; // (Q, D)
        let mut lists = vec![Vec::with_capacity(MAP_AT + 1); self.queries.len()];
        let block = (BLOCK / self.queries.len().max(1)).max(256);
        let portion = (PORTION_BYTES / size_of::<f32>() / queries.dim(1)?.max(1)).clamp(1, PORTION);
        for (number, texts) in self.documents.chunks(portion).enumerate() {
            let documents = encode(texts, Role::Document)?; // (C, D)
            for start in (0..texts.len()).step_by(block) {
                let count = block.min(texts.len() - start);
                let of_block = unit(&documents.narrow(0, start, count)?)?;
                let scores = queries.matmul(&of_block.t()?)?.to_vec2::<f32>()?; // (Q, count)
                let first = number * portion + start;
                lists
                    .par_iter_mut()
                    .zip(scores)
                    .for_each(|(list, scores)| self.keep_best(list, &scores, first));
            }
        }
        let values =
            lists.iter().zip(&self.relevant).flat_map(|(list, all)| metrics(&ranks(list, all), all.len()));
        let items = Items::means(names(), values.collect());
        Ok(Found { items, rankings: self.rankings(&lists) })
    }

    /// Puts the documents `first..` with these scores into a query's list of hits, best first.
    fn keep_best(&self, list: &mut Vec<Hit>, scores: &[f32], first: usize) {
        for (offset, &score) in scores.iter().enumerate() {
            // A score that is no number ranks behind all others.
            let score = if score.is_nan() { f32::NEG_INFINITY } else { score };
            let full = list.len() == MAP_AT;
            if full && list.last().is_some_and(|last| score < last.score) {
                continue;
            }
            let document = first + offset;
            let hit = Hit { score, rank: self.ranks[document], document: document as u32 };
            let place = list.partition_point(|other| other.order(&hit).is_lt());
            if place < MAP_AT {
                list.truncate(MAP_AT - 1);
                list.insert(place, hit);
            }
        }
    }

    /// What a few queries find, spread evenly over all.
    fn rankings(&self, lists: &[Vec<Hit>]) -> Vec<Ranking> {
        let of = |query: usize| {
            let (list, all) = (&lists[query], &self.relevant[query]);
            let ranks = ranks(list, all);
            let hits = list.iter().take(rankings::HITS).map(|hit| Shown {
                text: rankings::short(&self.documents[hit.document as usize]),
                score: hit.score,
                relevant: all.binary_search(&hit.document).is_ok(),
            });
            Ranking {
                query: rankings::short(&self.queries[query]),
                relevant: all.len(),
                first: ranks.first().copied(),
                ndcg: ndcg(&ranks, all.len()),
                hits: hits.collect(),
            }
        };
        let (many, shown) = (self.queries.len(), rankings::QUERIES.min(self.queries.len()));
        (0..shown).map(|n| of(n * many / shown)).collect()
    }
}

/// The ranks, from 1, of a query's relevant hits.
fn ranks(list: &[Hit], relevant: &[u32]) -> Vec<usize> {
    let hits = list.iter().enumerate().filter(|(_, hit)| relevant.binary_search(&hit.document).is_ok());
    hits.map(|(place, _)| place + 1).collect()
}

/// A query's metrics, in the order of their names: the ranks of its relevant hits, and how many documents are relevant.
fn metrics(ranks: &[usize], relevant: usize) -> Vec<f64> {
    let hits = |k: usize| ranks.iter().filter(|&&rank| rank <= k).count() as f64;
    let precisions = ranks.iter().enumerate().map(|(place, &rank)| (place + 1) as f64 / rank as f64);
    let mut metrics = Vec::new();
    metrics.extend(ACCURACY_AT.map(|k| hits(k).min(1.0)));
    metrics.extend(PRECISION_RECALL_AT.map(|k| hits(k) / k as f64));
    metrics.extend(PRECISION_RECALL_AT.map(|k| hits(k) / relevant as f64));
    metrics.push(ndcg(ranks, relevant));
    metrics.push(ranks.first().filter(|&&rank| rank <= MRR_AT).map_or(0.0, |&rank| 1.0 / rank as f64));
    // The sum of nothing is −0.
    metrics.push((precisions.sum::<f64>() + 0.0) / relevant.min(MAP_AT) as f64);
    metrics
}

fn ndcg(ranks: &[usize], relevant: usize) -> f64 {
    let gain = |rank: usize| 1.0 / ((rank + 1) as f64).log2();
    let found: f64 = ranks.iter().filter(|&&rank| rank <= NDCG_AT).map(|&rank| gain(rank)).sum();
    (found + 0.0) / (1..=NDCG_AT.min(relevant)).map(gain).sum::<f64>()
}

/// What the metrics are called, in the order in which sentence-transformers returns them.
pub(super) fn names() -> Vec<String> {
    let at = |name: &'static str, ks: &'static [usize]| ks.iter().map(move |k| format!("cosine_{name}@{k}"));
    let mut names: Vec<_> = at("accuracy", &ACCURACY_AT).collect();
    names.extend(at("precision", &PRECISION_RECALL_AT).chain(at("recall", &PRECISION_RECALL_AT)));
    names.extend(at("ndcg", &[NDCG_AT]).chain(at("mrr", &[MRR_AT])).chain(at("map", &[MAP_AT])));
    names
}

/// The columns of sentence-transformers' CSV: a heading, and the metric that stands below it.
pub(super) fn columns() -> Vec<(String, String)> {
    let column =
        |title: &str, name: &str, k: usize| (format!("cosine-{title}@{k}"), format!("cosine_{name}@{k}"));
    let mut columns: Vec<_> = ACCURACY_AT.iter().map(|&k| column("Accuracy", "accuracy", k)).collect();
    for k in PRECISION_RECALL_AT {
        columns.extend([column("Precision", "precision", k), column("Recall", "recall", k)]);
    }
    columns.extend([
        column("MRR", "mrr", MRR_AT),
        column("NDCG", "ndcg", NDCG_AT),
        column("MAP", "map", MAP_AT),
    ]);
    columns
}

/// Rows scaled to length one: x / max(‖x‖, 1e-12).
fn unit(x: &Tensor) -> Result<Tensor> {
    let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
    Ok(x.broadcast_div(&norm)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::golden;

    /// A text is the number of a row of `rows`.
    fn encode(rows: &[Vec<f32>], texts: &[String]) -> Result<Tensor> {
        let rows: Vec<_> = texts.iter().map(|text| rows[text.parse::<usize>().unwrap()].clone()).collect();
        let width = rows.first().map_or(2, Vec::len);
        Ok(Tensor::from_vec(rows.concat(), (rows.len(), width), &candle_core::Device::Cpu)?)
    }

    fn numbers(count: usize) -> Vec<String> {
        (0..count).map(|i| i.to_string()).collect()
    }

    #[test]
    fn metrics_are_those_of_sentence_transformers_ties_included() {
        for golden in golden::read()["retrieval"].as_array().unwrap() {
            let (set, queries, documents) = golden::retrieval(golden);
            let scores = set
                .evaluate(|texts, role| {
                    encode(if role == Role::Query { &queries } else { &documents }, texts)
                })
                .unwrap();
            golden::assert_scores(&scores.items.scores(), golden);
            let headings: Vec<_> = columns().into_iter().map(|(heading, _)| heading).collect();
            assert_eq!(format!("epoch,steps,{}", headings.join(",")), golden["csv_header"]);
        }
    }

    #[test]
    fn blocks_and_portions_do_not_change_the_hits() {
        // Many equal scores, and more documents than a block holds.
        let queries: Vec<_> = (0..5).map(|i| vec![1.0, i as f32]).collect();
        let documents: Vec<_> = (0..1201).map(|i| vec![1.0, (i % 7) as f32]).collect();
        let ids = numbers(documents.len());
        let set = Retrieval::new(numbers(5), numbers(documents.len()), &ids, vec![vec![3]; 5]);
        let mut lists = [Vec::new(), Vec::new()];
        for (list, block) in lists.iter_mut().zip([1, 500]) {
            let query = unit(&encode(&queries, &["2".into()]).unwrap()).unwrap();
            let all = unit(&encode(&documents, &ids).unwrap()).unwrap();
            let scores = query.matmul(&all.t().unwrap()).unwrap().to_vec2::<f32>().unwrap().remove(0);
            for (index, scores) in scores.chunks(block).enumerate() {
                set.keep_best(list, scores, index * block);
            }
        }
        let documents = |list: &[Hit]| list.iter().map(|hit| hit.document).collect::<Vec<_>>();
        assert_eq!(lists[0].len(), MAP_AT);
        assert_eq!(documents(&lists[0]), documents(&lists[1]));
        // All of them are documents that lie in the query's direction, in the order of their ids as strings.
        assert_eq!(documents(&lists[0])[..4], [100, 1003, 1010, 1017]);
    }

    #[test]
    fn scores_that_are_no_number_rank_last() {
        let documents = vec![vec![f32::NAN, 0.0], vec![0.0, 1.0], vec![1.0, 0.0]];
        let set = Retrieval::new(numbers(1), numbers(3), &numbers(3), vec![vec![0]]);
        let scores = set
            .evaluate(|texts, role| {
                encode(if role == Role::Query { &documents[2..] } else { &documents }, texts)
            })
            .unwrap();
        let scores = scores.items.scores();
        assert_eq!(scores.iter().find(|(name, _)| name == "cosine_mrr@10").unwrap().1, 1.0 / 3.0);
        assert!(scores.iter().all(|(_, score)| score.is_sign_positive()), "{scores:?}");
    }

    #[test]
    fn rankings_are_shown_of_queries_spread_over_all() {
        let rows: Vec<_> = (0..30).map(|i| vec![(i as f32 * 0.1).cos(), (i as f32 * 0.1).sin()]).collect();
        // Query i is document i; what answers it is its neighbour.
        let relevant = (0..30).map(|i| vec![(i + 1) % 30, (i + 2) % 30]).collect();
        let set = Retrieval::new(numbers(30), numbers(30), &numbers(30), relevant);
        let found = set.evaluate(|texts, _| encode(&rows, texts)).unwrap().rankings;
        let queries: Vec<_> = found.iter().map(|ranking| ranking.query.as_str()).collect();
        assert_eq!(queries.len(), rankings::QUERIES);
        assert_eq!(queries[..4], ["0", "2", "5", "7"]);
        let first = &found[1];
        let hits: Vec<_> = first.hits.iter().map(|hit| (hit.text.as_str(), hit.relevant)).collect();
        assert_eq!(hits[0], ("2", false));
        assert_eq!((hits.len(), hits.iter().filter(|hit| hit.1).count()), (rankings::HITS, 2));
        assert_eq!((first.relevant, first.first), (2, Some(hits.iter().position(|hit| hit.1).unwrap() + 1)));
        assert!(first.ndcg > 0.0 && first.ndcg < 1.0);
        assert!(first.hits.is_sorted_by(|a, b| a.score >= b.score));
    }
}
