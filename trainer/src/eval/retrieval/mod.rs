//! Retrieval: whether queries find the documents that answer them.
//!
//! As `InformationRetrievalEvaluator` in sentence-transformers 6: cosine similarity; hits are ordered by
//! score, then by document id as a string; a document with the query's own id counts like any other. With rel
//! for the query's relevant documents and hits for the k best,
//!
//! ```text
//! accuracy@k   1 if any hit is relevant                 precision@k  |hits ∩ rel| / k
//! mrr@k        1 / rank of the first relevant hit       recall@k     |hits ∩ rel| / |rel|
//! ndcg@k       Σ 1/log2(rank + 1) over the relevant hits, divided by the same over min(|rel|, k) first ranks
//! map@k        Σ precision@rank over the relevant hits, divided by min(|rel|, k)
//! ```
//!
//! each as the mean over the queries. Neither the matrix of all scores (Q, C) nor all embeddings of a large
//! corpus are in memory at once: documents are embedded in portions, and [`TopK`] keeps the 100 best of each
//! query.

mod open;

use std::mem;

use candle_core::Tensor;
use kernels::topk::{Hit, TopK};

use super::embed::{Embedder, Role};
use super::examples::{Candidate, Example, shortened};
use super::{CsvFile, EvalOutput, EvalSpec, Examples, ItemScores, Task};
use crate::Result;

const ACCURACY_AT: [usize; 4] = [1, 3, 5, 10];
const PRECISION_RECALL_AT: [usize; 4] = [1, 3, 5, 10];
const NDCG_AT: usize = 10;
const MRR_AT: usize = 10;
const MAP_AT: usize = 100;

/// Maximum number of documents in a portion, and maximum bytes of their embeddings.
const PORTION: usize = 50_000;
const PORTION_BYTES: usize = 256 << 20;

/// Hits of a query that an example shows.
const SHOWN_HITS: usize = 5;

pub(super) static KIND: EvalSpec = EvalSpec {
    items: "queries",
    primary_metric: "cosine_ndcg@10",
    metric_names,
    csv: Some(CsvFile { prefix: "Information-Retrieval_evaluation", columns: csv_columns }),
    open: |path, set, _| {
        Ok(Box::new(match path.is_dir() {
            true => open::beir(path, set.split.as_deref())?,
            false => open::pairs(path)?,
        }))
    },
};

/// Queries, documents, and which documents are relevant to which query.
#[derive(Debug)]
pub(super) struct Retrieval {
    queries: Vec<String>,
    /// In the order of their ids: among equal scores the lower number comes first, and so the lower id.
    documents: Vec<String>,
    relevant: Vec<Vec<u32>>,
}

impl Retrieval {
    /// A set of queries, and documents with their ids. `relevant` has for each query the indices of its
    /// relevant documents; queries without any are dropped.
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

    /// The number of queries that have a relevant document.
    fn queries(&self) -> usize {
        self.queries.len()
    }

    /// The metrics. `encode` embeds texts: (N, D).
    pub(super) fn evaluate_with(
        &self,
        encode: impl FnMut(&[String], Role) -> Result<Tensor>,
    ) -> Result<EvalOutput> {
        let lists = self.search(encode, PORTION)?;
        let values =
            lists.iter().zip(&self.relevant).flat_map(|(list, all)| metrics(&ranks(list, all), all.len()));
        let items = ItemScores::means(metric_names(), values.collect());
        let example = |query: usize| self.example(query, &lists[query]);
        Ok(EvalOutput::new(items, Examples::new("nDCG@10", false, lists.len(), example)))
    }

    /// The hits of each query, best first. At most `portion` documents are embedded at once.
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

    /// A query with its best hits.
    fn example(&self, query: usize, list: &[Hit]) -> Example {
        let relevant = &self.relevant[query];
        let ranks = ranks(list, relevant);
        let documents = if relevant.len() == 1 { "document" } else { "documents" };
        let first = match ranks.first() {
            Some(rank) => format!("first at rank {rank}"),
            None => format!("none among the first {MAP_AT}"),
        };
        let hits = list.iter().take(SHOWN_HITS).map(|hit| {
            let text = &self.documents[hit.document as usize];
            Candidate::new(text, f64::from(hit.score), relevant.binary_search(&hit.document).is_ok())
        });
        Example {
            text: shortened(&self.queries[query]),
            value: ndcg(&ranks, relevant.len()),
            note: format!("{} relevant {documents}, {first}", relevant.len()),
            candidates: hits.collect(),
        }
    }
}

impl Task for Retrieval {
    fn evaluate(&self, embedder: &Embedder) -> Result<EvalOutput> {
        let mut documents = embedder.progress(Role::Document.plural(), self.documents.len());
        self.evaluate_with(|texts, role| match role {
            Role::Document => embedder.encode_with_progress(texts, role, &mut documents),
            _ => embedder.encode(texts, role),
        })
    }
}

/// The ranks from 1 of the relevant documents among a query's hits.
fn ranks(list: &[Hit], relevant: &[u32]) -> Vec<usize> {
    let hits = list.iter().enumerate().filter(|(_, hit)| relevant.binary_search(&hit.document).is_ok());
    hits.map(|(index, _)| index + 1).collect()
}

/// A query's metrics in the order of their names, from the ranks of its relevant hits and its number of
/// relevant documents.
fn metrics(ranks: &[usize], relevant: usize) -> Vec<f64> {
    let hits = |k: usize| ranks.iter().filter(|&&rank| rank <= k).count() as f64;
    let precisions = ranks.iter().enumerate().map(|(index, &rank)| (index + 1) as f64 / rank as f64);
    let mut metrics = Vec::new();
    metrics.extend(ACCURACY_AT.map(|k| hits(k).min(1.0)));
    metrics.extend(PRECISION_RECALL_AT.map(|k| hits(k) / k as f64));
    metrics.extend(PRECISION_RECALL_AT.map(|k| hits(k) / relevant as f64));
    metrics.push(ndcg(ranks, relevant));
    metrics.push(ranks.first().filter(|&&rank| rank <= MRR_AT).map_or(0.0, |&rank| 1.0 / rank as f64));
    // An empty sum is −0.
    metrics.push((precisions.sum::<f64>() + 0.0) / relevant.min(MAP_AT) as f64);
    metrics
}

fn ndcg(ranks: &[usize], relevant: usize) -> f64 {
    let gain = |rank: usize| 1.0 / ((rank + 1) as f64).log2();
    let dcg: f64 = ranks.iter().filter(|&&rank| rank <= NDCG_AT).map(|&rank| gain(rank)).sum();
    (dcg + 0.0) / (1..=NDCG_AT.min(relevant)).map(gain).sum::<f64>()
}

/// The names of the metrics, in the order in which sentence-transformers returns them.
pub(super) fn metric_names() -> Vec<String> {
    let at = |name: &'static str, ks: &'static [usize]| ks.iter().map(move |k| format!("cosine_{name}@{k}"));
    let mut names: Vec<_> = at("accuracy", &ACCURACY_AT).collect();
    names.extend(at("precision", &PRECISION_RECALL_AT).chain(at("recall", &PRECISION_RECALL_AT)));
    names.extend(at("ndcg", &[NDCG_AT]).chain(at("mrr", &[MRR_AT])).chain(at("map", &[MAP_AT])));
    names
}

/// The columns of sentence-transformers' CSV: a heading, and the metric below it.
pub(super) fn csv_columns() -> Vec<(String, String)> {
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

/// The rows of x (N, D) scaled to length one, x / max(‖x‖, 1e-12), end to end, and D.
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
                .evaluate_with(|texts, role| {
                    encode(if role == Role::Query { &queries } else { &documents }, texts)
                })
                .unwrap();
            golden::assert_scores(&scores.scores, golden);
            assert_eq!(golden::csv_header(csv_columns()), golden["csv_header"]);
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
            .evaluate_with(|texts, role| {
                encode(if role == Role::Query { &documents[2..] } else { &documents }, texts)
            })
            .unwrap();
        let scores = scores.scores;
        assert_eq!(scores.iter().find(|(name, _)| *name == "cosine_mrr@10").unwrap().1, 1.0 / 3.0);
        assert!(scores.iter().all(|(_, score)| score.is_sign_positive()), "{scores:?}");
    }

    #[test]
    fn examples_are_queries_with_their_best_hits() {
        let rows: Vec<_> = (0..30).map(|i| vec![(i as f32 * 0.1).cos(), (i as f32 * 0.1).sin()]).collect();
        // Query i is document i; what answers it is its neighbour.
        let relevant = (0..30).map(|i| vec![(i + 1) % 30, (i + 2) % 30]).collect();
        let set = Retrieval::new(numbers(30), numbers(30), &numbers(30), relevant);
        let examples = set.evaluate_with(|texts, _| encode(&rows, texts)).unwrap().examples;
        assert_eq!((examples.measure.as_str(), examples.items.len()), ("nDCG@10", 30));
        let example = &examples.items[2];
        let hits: Vec<_> = example.candidates.iter().map(|hit| (hit.text.as_str(), hit.relevant)).collect();
        assert_eq!((example.text.as_str(), hits[0]), ("2", ("2", false)));
        assert_eq!((hits.len(), hits.iter().filter(|hit| hit.1).count()), (SHOWN_HITS, 2));
        let first = hits.iter().position(|hit| hit.1).unwrap() + 1;
        assert_eq!(example.note, format!("2 relevant documents, first at rank {first}"));
        assert!(example.value > 0.0 && example.value < 1.0);
        assert!(example.candidates.is_sorted_by(|a, b| a.cosine >= b.cosine));
        let missed = set.example(0, &[]);
        assert_eq!(
            (missed.value, missed.note.as_str()),
            (0.0, "2 relevant documents, none among the first 100")
        );
    }
}
