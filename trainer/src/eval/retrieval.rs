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
//! once: documents are embedded portion by portion, and [`TopK`] keeps the 100 best of each query.

use std::mem;

use candle_core::Tensor;
use kernels::topk::{Hit, TopK};

use super::rankings::{self, Hit as Shown, Ranking};
use super::{EvalOutput, ItemScores};
use crate::Result;
use crate::eval::embed::Role;

const ACCURACY_AT: [usize; 4] = [1, 3, 5, 10];
const PRECISION_RECALL_AT: [usize; 4] = [1, 3, 5, 10];
const NDCG_AT: usize = 10;
const MRR_AT: usize = 10;
const MAP_AT: usize = 100;

/// Documents that are embedded at once, and the bytes of their embeddings: what is sorted by length, and what is in memory.
const PORTION: usize = 50_000;
const PORTION_BYTES: usize = 256 << 20;

/// Queries, documents, and which answers which.
#[derive(Debug)]
pub(super) struct Retrieval {
    queries: Vec<String>,
    /// In the order of their ids: of equal scores the lower number comes first, and so the lower id.
    documents: Vec<String>,
    relevant: Vec<Vec<u32>>,
}

impl Retrieval {
    /// `ids` are the documents'. `relevant` holds, for each query, the indices of its documents; queries without any are
    /// left out.
    pub(super) fn new(
        queries: Vec<String>,
        mut documents: Vec<String>,
        ids: &[String],
        relevant: Vec<Vec<u32>>,
    ) -> Self {
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_by_key(|&document| &ids[document as usize]);
        let mut numbers = vec![0; ids.len()];
        for (number, &document) in (0..).zip(&order) {
            numbers[document as usize] = number;
        }
        documents = order.iter().map(|&document| mem::take(&mut documents[document as usize])).collect();
        let (queries, relevant) = queries
            .into_iter()
            .zip(relevant)
            .filter(|(_, relevant)| !relevant.is_empty())
            .map(|(query, relevant)| {
                let mut relevant: Vec<u32> =
                    relevant.iter().map(|&document| numbers[document as usize]).collect();
                relevant.sort_unstable();
                relevant.dedup();
                (query, relevant)
            })
            .unzip();
        Self { queries, documents, relevant }
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
        encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<EvalOutput> {
        let lists = self.search(encode, PORTION)?;
        let values =
            lists.iter().zip(&self.relevant).flat_map(|(list, all)| metrics(&ranks(list, all), all.len()));
        let items = ItemScores::means(names(), values.collect());
        Ok(EvalOutput::new(items, self.rankings(&lists)))
    }

    /// The hits of each query, best first; documents are embedded `portion` at once, or fewer.
    fn search(
        &self,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
        portion: usize,
    ) -> Result<Vec<Vec<Hit>>> {
        let (queries, width) = unit(&encode(&self.queries, Role::Query)?)?; // (Q, D)
        let mut best = TopK::new(self.queries.len(), MAP_AT);
        let portion = (PORTION_BYTES / size_of::<f32>() / width).clamp(1, portion);
        for (number, texts) in self.documents.chunks(portion).enumerate() {
            let (documents, _) = unit(&encode(texts, Role::Document)?)?; // (C, D)
            best.push(&queries, &documents, width, (number * portion) as u32);
        }
        Ok(best.finish())
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

/// Rows scaled to length one, x / max(‖x‖, 1e-12), end to end; and their width.
fn unit(x: &Tensor) -> Result<(Vec<f32>, usize)> {
    let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
    Ok((x.broadcast_div(&norm)?.flatten_all()?.to_vec1()?, x.dim(1)?.max(1)))
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
            golden::assert_scores(&scores.scores, golden);
            let headings: Vec<_> = columns().into_iter().map(|(heading, _)| heading).collect();
            assert_eq!(format!("epoch,steps,{}", headings.join(",")), golden["csv_header"]);
        }
    }

    #[test]
    fn portions_do_not_change_the_hits() {
        // Many equal scores.
        let queries: Vec<_> = (0..5).map(|i| vec![1.0, i as f32]).collect();
        let documents: Vec<_> = (0..1201).map(|i| vec![1.0, (i % 7) as f32]).collect();
        let ids = numbers(documents.len());
        let set = Retrieval::new(numbers(5), numbers(documents.len()), &ids, vec![vec![3]; 5]);
        let hits = |portion| {
            let rows = |texts: &[String], role| {
                encode(if role == Role::Query { &queries } else { &documents }, texts)
            };
            set.search(rows, portion).unwrap().remove(2)
        };
        let all = hits(5000);
        assert_eq!(all.len(), MAP_AT);
        for portion in [1, 500] {
            assert_eq!(hits(portion), all);
        }
        // All of them lie in the query's direction, in the order of their ids as strings.
        let found: Vec<_> = all.iter().map(|hit| set.documents[hit.document as usize].as_str()).collect();
        assert_eq!(found[..4], ["100", "1003", "1010", "1017"]);
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
        let scores = scores.scores;
        assert_eq!(scores.iter().find(|(name, _)| *name == "cosine_mrr@10").unwrap().1, 1.0 / 3.0);
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
