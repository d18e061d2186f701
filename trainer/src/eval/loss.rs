//! Validation loss: the training loss of a model on rows that it is not trained on, as the `eval_dataset` of
//! sentence-transformers' trainer.
//!
//! The rows may be of any kind that training reads, and have the loss that training would give them:
//! `loss.kind`, for scored pairs CoSENT. They are taken in the order of the file, `training.batch_size` at a
//! time, each with its first positive and its first `data.negatives` hard negatives; the last batch may be
//! shorter. There is no dropout. The metric is the mean over the rows, so that it equals the mean over the
//! batches weighted by their sizes. A loss with in-batch negatives depends on the batch size: only values of
//! the same batch size can be compared.

use std::fmt;
use std::path::Path;

use super::embed::Embedder;
use super::examples::{self, Candidate, Example, shortened};
use super::{EvalOutput, EvalSpec, Examples, ItemScores, Task};
use crate::config::{self, Batching, Config, Data, DataSet, EvaluationKind, EvaluationSet};
use crate::data::batch::{Batch, Cursor};
use crate::data::builder::{BatchOptions, Builder};
use crate::data::mixture::{self, Mixture, SampledRows};
use crate::loss::Losses;
use crate::system::heartbeat;
use crate::{Error, Result};

/// Hard negatives of a row that are shown.
const SHOWN_NEGATIVES: usize = 4;

pub(super) static KIND: EvalSpec = EvalSpec {
    items: "rows",
    primary_metric: "loss",
    metric_names: || vec!["loss".to_owned()],
    csv: None,
    open: |path, set, config| Ok(Box::new(LossRows::open(path, set, config)?)),
};

/// Rows, and the loss that is computed on them.
pub(super) struct LossRows {
    rows: Mixture,
    loss: config::Loss,
    batch_size: u64,
}

impl LossRows {
    /// Opens the rows as a data set of training.
    fn open(path: &Path, set: &EvaluationSet, config: &Config) -> Result<Self> {
        // The reader of training data would take the judgements of a BEIR folder's training split.
        super::expect_file(path, EvaluationKind::Loss)?;
        let rows = DataSet { name: set.name.clone(), path: path.to_owned(), ..DataSet::default() };
        let mut alone = config.clone();
        alone.data = Data {
            train: vec![rows],
            negatives: config.data.negatives,
            batching: Batching::Mixed,
            shuffle: false,
            no_duplicates: false,
        };
        // Rows are taken one by one and put together below, because the last batch may be shorter.
        alone.training.batch_size = 1;
        let rows = Mixture::open(&alone).map_err(|error| match error {
            Error::Config { field, message, .. } => {
                Error::file(path, format!("cannot be a set of kind loss: {field}: {message}"))
            }
            other => other,
        })?;
        Ok(Self { rows, loss: config.loss.clone(), batch_size: config.training.batch_size as u64 })
    }
}

impl Task for LossRows {
    fn evaluate(&self, embedder: &Embedder) -> Result<EvalOutput> {
        let options = BatchOptions {
            max_query_length: embedder.max_query_length,
            max_document_length: embedder.max_document_length,
            include_prompt: embedder.model.folder().include_prompt,
            mask_known_positives: self.loss.mask_known_positives,
        };
        let prompts = [embedder.query_prompt, embedder.document_prompt];
        let builder = Builder::with_prompts(&self.rows, embedder.tokenizer, options, prompts)?;
        let losses = Losses::new(&self.loss, embedder.model.normalize());
        let count = self.rows.rows();
        let mut sampler = self.rows.sampler(&Cursor::default())?;
        let mut row_losses: Vec<f32> = Vec::with_capacity(count as usize);
        let mut shown = Vec::new();
        let mut next_shown = examples::spread(count as usize).peekable();
        let mut progress = embedder.progress("rows", count as usize);
        for first in (0..count).step_by(self.batch_size as usize) {
            let mut batch = SampledRows { examples: Vec::new(), cursor: Cursor::default(), epoch: 0.0 };
            for number in first..count.min(first + self.batch_size) {
                let row = sampler.next_rows()?.examples;
                if next_shown.next_if_eq(&(number as usize)).is_some() {
                    shown.extend(row.first().map(|row| (number as usize, texts(row))));
                }
                batch.examples.extend(row);
            }
            let rows = batch.examples.len();
            let mut partial = builder.partial(batch, embedder.world.shard())?;
            let sequences =
                embedder.world.all_gather_sequences(partial.take_sequences(), partial.partition())?;
            row_losses.extend(batch_losses(embedder, &losses, &partial.finish(sequences))?);
            heartbeat::record_work();
            if let Some(progress) = &mut progress {
                progress.advance(rows as u64);
            }
        }
        let items = ItemScores::means(
            (KIND.metric_names)(),
            row_losses.iter().map(|&loss| f64::from(loss)).collect(),
        );
        let items_shown = shown
            .into_iter()
            .map(|(number, example)| Example { value: f64::from(row_losses[number]), ..example })
            .collect();
        let examples = Examples { measure: "loss".to_owned(), lower_is_better: true, items: items_shown };
        Ok(EvalOutput::new(items, examples))
    }
}

/// The loss of each row of a batch (B), on every rank.
fn batch_losses(embedder: &Embedder, losses: &Losses, batch: &Batch) -> Result<Vec<f32>> {
    let world = &embedder.world;
    let partition = world.partition(&batch.sequences);
    let local: Vec<_> =
        partition.of(world.rank()).iter().map(|&sequence| batch.sequences[sequence].clone()).collect();
    let embeddings = embedder.model.embed(&local, embedder.chunk_tokens)?; // (N of this rank, D)
    let embeddings = world.all_gather_rows(embeddings, &partition)?; // (N, D)
    let (local, _) = losses.evaluate(&embeddings, &batch.tables, world.local_rows(batch.rows.len()))?;
    Ok(world.all_gather_tensor(local)?.to_vec1()?)
}

/// A row as an example that has no value yet.
fn texts(row: &mixture::Example) -> Example {
    let positive = Candidate::new(&row.positives[row.positive], f64::NAN, true);
    let negatives = row.negatives.iter().take(SHOWN_NEGATIVES);
    Example {
        text: shortened(&row.query),
        value: f64::NAN,
        note: match row.scores.as_slice() {
            [score] => format!("score {score}"),
            _ => String::new(),
        },
        candidates: [positive]
            .into_iter()
            .chain(negatives.map(|text| Candidate::new(text, f64::NAN, false)))
            .collect(),
    }
}

impl fmt::Debug for LossRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LossRows").field("rows", &self.rows.rows()).field("loss", &self.loss).finish()
    }
}
