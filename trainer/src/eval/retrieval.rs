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
//! each as the mean over the queries. The matrix of all scores (Q, C) never exists: documents are embedded portion by
//! portion, scored block by block, and each query keeps its 100 best.

use std::cmp::Ordering;

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::embed::Role;

const ACCURACY_AT: [usize; 4] = [1, 3, 5, 10];
const PRECISION_RECALL_AT: [usize; 4] = [1, 3, 5, 10];
const NDCG_AT: usize = 10;
const MRR_AT: usize = 10;
const MAP_AT: usize = 100;

/// Documents that are embedded at once: what is sorted by length, and what is in memory.
const PORTION: usize = 50_000;
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

    /// The metrics by name, without the set's. `encode` embeds texts: (N, D).
    pub(super) fn evaluate(
        &self,
        mut encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<Vec<(String, f64)>> {
        let queries = unit(&encode(&self.queries, Role::Query)?)?; // (Q, D)
        let mut lists = vec![Vec::with_capacity(MAP_AT + 1); self.queries.len()];
        let block = (BLOCK / self.queries.len().max(1)).max(256);
        for (portion, texts) in self.documents.chunks(PORTION).enumerate() {
            let documents = unit(&encode(texts, Role::Document)?)?; // (C, D)
            for start in (0..texts.len()).step_by(block) {
                let count = block.min(texts.len() - start);
                let scores = queries.matmul(&documents.narrow(0, start, count)?.t()?)?.to_vec2::<f32>()?; // (Q, count)
                let first = portion * PORTION + start;
                lists
                    .par_iter_mut()
                    .zip(scores)
                    .for_each(|(list, scores)| self.keep_best(list, &scores, first));
            }
        }
        Ok(self.metrics(&lists))
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

    fn metrics(&self, lists: &[Vec<Hit>]) -> Vec<(String, f64)> {
        // For each query the ranks, from 1, of its relevant hits.
        let found: Vec<Vec<usize>> = lists
            .iter()
            .zip(&self.relevant)
            .map(|(list, relevant)| {
                let hits =
                    list.iter().enumerate().filter(|(_, hit)| relevant.binary_search(&hit.document).is_ok());
                hits.map(|(place, _)| place + 1).collect()
            })
            .collect();
        let mean = |of: &dyn Fn(&[usize], f64) -> f64| {
            let sum: f64 =
                found.iter().zip(&self.relevant).map(|(ranks, all)| of(ranks, all.len() as f64)).sum();
            // The sum of nothing is −0.
            (sum + 0.0) / found.len() as f64
        };
        let hits = |ranks: &[usize], k: usize| ranks.iter().filter(|&&rank| rank <= k).count() as f64;
        let gain = |rank: usize| 1.0 / ((rank + 1) as f64).log2();

        let mut scores = Vec::new();
        for k in ACCURACY_AT {
            scores.push((format!("cosine_accuracy@{k}"), mean(&|ranks, _| hits(ranks, k).min(1.0))));
        }
        for k in PRECISION_RECALL_AT {
            scores.push((format!("cosine_precision@{k}"), mean(&|ranks, _| hits(ranks, k) / k as f64)));
        }
        for k in PRECISION_RECALL_AT {
            scores.push((format!("cosine_recall@{k}"), mean(&|ranks, all| hits(ranks, k) / all)));
        }
        let ndcg = mean(&|ranks, all| {
            let found: f64 = ranks.iter().filter(|&&rank| rank <= NDCG_AT).map(|&rank| gain(rank)).sum();
            found / (1..=NDCG_AT.min(all as usize)).map(gain).sum::<f64>()
        });
        scores.push((format!("cosine_ndcg@{NDCG_AT}"), ndcg));
        let mrr = mean(&|ranks, _| {
            ranks.first().filter(|&&rank| rank <= MRR_AT).map_or(0.0, |&rank| 1.0 / rank as f64)
        });
        scores.push((format!("cosine_mrr@{MRR_AT}"), mrr));
        let map = mean(&|ranks, all| {
            let precisions = ranks.iter().enumerate().map(|(place, &rank)| (place + 1) as f64 / rank as f64);
            precisions.sum::<f64>() / all.min(MAP_AT as f64)
        });
        scores.push((format!("cosine_map@{MAP_AT}"), map));
        scores
    }
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
            let (queries, documents) =
                (golden::matrix(&golden["queries"]), golden::matrix(&golden["documents"]));
            let ids: Vec<String> = serde_json::from_value(golden["ids"].clone()).unwrap();
            let relevant = (0..queries.len())
                .map(|query| {
                    let of_query: Vec<String> =
                        serde_json::from_value(golden["relevant"][format!("q{query}")].clone()).unwrap();
                    let index = |id: &String| ids.iter().position(|other| other == id).unwrap() as u32;
                    of_query.iter().map(index).collect()
                })
                .collect();
            let set = Retrieval::new(numbers(queries.len()), numbers(documents.len()), &ids, relevant);
            let scores = set
                .evaluate(|texts, role| {
                    encode(if role == Role::Query { &queries } else { &documents }, texts)
                })
                .unwrap();
            golden::assert_scores(&scores, golden);
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
        assert_eq!(scores.iter().find(|(name, _)| name == "cosine_mrr@10").unwrap().1, 1.0 / 3.0);
        assert!(scores.iter().all(|(_, score)| score.is_sign_positive()), "{scores:?}");
    }
}
