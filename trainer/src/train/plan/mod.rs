//! The plan of a run: a configuration resolved against model, data and memory, and checked before anything is written.

mod cost;
mod display;
mod estimate;

use std::fs;
use std::sync::Arc;

use serde_json::{Map, Value};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::RankEnv;
use crate::config::{self, Config};
use crate::data::batch::Cursor;
use crate::data::builder::{self, Builder};
use crate::data::loader::Loader;
use crate::data::mixture::Mixture;
use crate::data::partition::Shard;
use crate::data::tokenize::Tokenizer;
use crate::eval::{EvalSet, nano};
use crate::model::{Model, ModelFolder, Options, locate};
use crate::system::device;
use crate::train::checkpoint::{Identity, State};
use crate::train::gradcache::Budget;
use crate::train::memory;
use crate::train::scaling::Workload;
use crate::train::selection;
use crate::train::setup::StepSettings;
use crate::{Error, Result};
pub use cost::Cost;
pub use estimate::{CostEstimate, check_inputs};

/// The plan of a run: everything that follows from its configuration.
pub struct Plan {
    /// The configuration as the user wrote it.
    pub config: Config,
    /// The files of the model folder, except its weights.
    pub folder: ModelFolder,
    /// The tokenizer of the model.
    pub tokenizer: Arc<Tokenizer>,
    /// The training rows.
    pub mixture: Arc<Mixture>,
    /// The evaluation sets with their prompts.
    pub sets: Vec<(EvalSet, Prompts)>,
    /// Maximum lengths of texts.
    pub lengths: Lengths,
    /// Optimizer steps of the run.
    pub steps: u64,
    /// Size of the chunks, and memory for saved activations.
    pub budget: Budget,
    /// Tokens of a chunk in evaluation.
    pub embed_tokens: usize,
    /// Memory and computation of the run.
    pub cost: Cost,
    /// The part of the cost that is divided among ranks.
    pub workload: Workload,
}

/// Prompts of an evaluation set: what is put before each text, by the role of the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompts {
    /// Prompt of queries.
    pub query: String,
    /// Prompt of documents.
    pub document: String,
    /// Prompt of both texts of a scored pair.
    pub text: String,
}

/// Maximum lengths of texts in tokens, prompts and special tokens included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Maximum length of queries.
    pub query: usize,
    /// Maximum length of documents.
    pub document: usize,
}

impl Plan {
    /// Resolves and checks a configuration: opens the device, downloads what is missing of model and data, reads the model's
    /// configuration (not its weights), indexes the training rows, and estimates the cost from a sample of them.
    ///
    /// # Errors
    /// The GPU, the model or the data is missing; a value of the configuration does not fit model or data.
    pub fn resolve(config: Config) -> Result<Self> {
        device::current()?;
        check_inputs(&config)?;
        let folder = locate::model(&config.model.path, config.model.init)?;
        let tokenizer = Tokenizer::open_for(&folder.path, folder.lower_case, config.model.init)?;
        let model = Model::open(folder.clone(), &Options { shapes_only: true, ..options(&config) })?;
        model.check_tokenizer(&tokenizer)?;
        check_dimensions(&config, &model)?;
        let lengths = lengths(&config, &model)?;

        let mixture = Mixture::open(&config)?;
        let steps = config.training.max_steps.unwrap_or(mixture.batches() * config.training.epochs);
        let sets = evaluation_sets(&config, &folder)?;
        check_metric(&config, &sets)?;

        let (tokens, first) = sample(&mixture, &tokenizer, batch_options(&config, &folder, lengths))?;
        let workload = Workload { lengths: first, width: model.embedding_dim(), trained: model.flat().len() };
        let (ranks, local_ranks) = RankEnv::from_env()?.map_or((1, 1), |env| (env.size, env.local_size));
        let available = memory::available(local_ranks);
        let (budget, cost) =
            cost::divide_memory(&config.training, &model, tokens, &workload.lengths, ranks, available);
        let embed_tokens = memory::default_chunk_tokens().max(lengths.query).max(lengths.document);
        let (tokenizer, mixture) = (Arc::new(tokenizer), Arc::new(mixture));
        Ok(Self {
            config,
            folder,
            tokenizer,
            mixture,
            sets,
            lengths,
            steps,
            budget,
            embed_tokens,
            cost,
            workload,
        })
    }

    /// Opens the model with its weights.
    ///
    /// # Errors
    /// A file cannot be read or does not fit the model's configuration.
    pub fn model(&self) -> Result<Model> {
        Model::open(self.folder.clone(), &options(&self.config))
    }

    /// What an optimizer step computes.
    pub fn step_settings(&self) -> StepSettings<'_> {
        StepSettings {
            training: &self.config.training,
            loss: &self.config.loss,
            seed: self.config.seed,
            steps: self.steps,
            budget: self.budget,
        }
    }

    /// What must not change when the run is resumed.
    pub fn identity(&self, model: &Model) -> Identity {
        Identity {
            seed: self.config.seed,
            batch_size: self.config.training.batch_size,
            steps: self.steps,
            data: format!("{:016x}", self.mixture.digest()),
            parameters: model.flat().len(),
        }
    }

    /// The configuration, in which omitted values that follow from others or from the data are filled in.
    pub fn resolved(&self) -> Config {
        let mut config = self.config.clone();
        let training = &mut config.training;
        if training.warmup_steps.is_none() {
            training.warmup_ratio.get_or_insert(config::Training::WARMUP_RATIO);
        }
        for (set, opened) in config.data.train.iter_mut().zip(self.mixture.sets()) {
            set.name.clone_from(&opened.name);
        }
        for (set, (opened, _)) in config.evaluation.sets.iter_mut().zip(&self.sets) {
            opened.name().clone_into(&mut set.name);
            set.kind = Some(opened.kind());
        }
        config
    }

    /// What must be the same on all ranks: the configuration without paths, which may differ between hosts, and the digest of
    /// the tokenizer.
    ///
    /// # Errors
    /// The tokenizer's file cannot be read.
    pub fn rank_invariant(&self) -> Result<(Config, u64)> {
        let mut config = self.config.clone();
        config.output.clear();
        config.model.path.clear();
        config.data.train.iter_mut().for_each(|set| set.path.clear());
        config.evaluation.sets.iter_mut().for_each(|set| set.path.clear());
        if let Some(lora) = &mut config.lora {
            lora.path = None;
        }
        let path = self.folder.path.join("tokenizer.json");
        // A model without a tokenizer reads bytes.
        let tokenizer =
            if path.exists() { fs::read(&path).map_err(Error::read("read", path))? } else { Vec::new() };
        Ok((config, xxh3_64(&tokenizer)))
    }

    /// The batches from `state` to the end of the run, of which this rank tokenises its `shard`.
    ///
    /// # Errors
    /// `state` does not fit the data; a thread cannot be started.
    pub fn batches(&self, state: &State, shard: Shard) -> Result<Loader> {
        Loader::start(
            Arc::clone(&self.mixture),
            Arc::clone(&self.tokenizer),
            batch_options(&self.config, &self.folder, self.lengths),
            state.cursor.clone(),
            self.steps.saturating_sub(state.step),
            shard,
        )
    }

    /// The value of `evaluation.metric` in `scores`, by which evaluations are compared; none without evaluation sets.
    pub fn selection_metric(&self, scores: &Map<String, Value>) -> Option<f64> {
        selection::selection_metric(scores, &self.config.evaluation.metric)
    }
}

fn options(config: &Config) -> Options<'_> {
    Options {
        model: config.model.clone(),
        lora: config.lora.as_ref(),
        trained: true,
        seed: config.seed,
        shapes_only: false,
    }
}

/// Checks that the model's embeddings have the dimensions of `loss.matryoshka`.
fn check_dimensions(config: &Config, model: &Model) -> Result<()> {
    for (i, &dim) in config.loss.matryoshka.iter().flat_map(|matryoshka| &matryoshka.dims).enumerate() {
        if dim > model.embedding_dim() {
            let message =
                format!("{dim}, but the model's embeddings have {} dimensions", model.embedding_dim());
            return Err(config.error(&format!("loss.matryoshka.dims.{i}"), message));
        }
    }
    Ok(())
}

fn lengths(config: &Config, model: &Model) -> Result<Lengths> {
    let default = model.max_length();
    let check = |field: &str, length: Option<usize>| match length {
        Some(length) if length > model.max_positions() => Err(config
            .error(field, format!("{length} tokens, but the model has {} positions", model.max_positions()))),
        length => Ok(length.unwrap_or(default)),
    };
    Ok(Lengths {
        query: check("model.max_query_length", config.model.max_query_length)?,
        document: check("model.max_document_length", config.model.max_document_length)?,
    })
}

/// Opens the evaluation sets. A set without its own prompts gets those that the trained model's folder
/// will have.
fn evaluation_sets(config: &Config, folder: &ModelFolder) -> Result<Vec<(EvalSet, Prompts)>> {
    let mut sets: Vec<(EvalSet, Prompts)> = Vec::new();
    for (i, set) in config.evaluation.sets.iter().enumerate() {
        let data = &config.data;
        let queries = data.common_prompt(|set| &set.query_prompt).unwrap_or(folder.query_prompt());
        let documents = data.common_prompt(|set| &set.document_prompt).unwrap_or(folder.document_prompt());
        let own = |given: &Option<String>, default: &str| given.as_deref().unwrap_or(default).to_owned();
        let prompts = Prompts {
            query: own(&set.query_prompt, queries),
            document: own(&set.document_prompt, documents),
            text: own(&set.query_prompt, folder.text_prompt()),
        };
        let opened = EvalSet::open(set, config)?;
        if sets.iter().any(|(other, _)| other.name() == opened.name()) {
            let message = format!(
                "two sets are named `{}`, so their metrics would have the same names\nhint: give each a `name`",
                opened.name()
            );
            return Err(config.error(&format!("evaluation.sets.{i}"), message));
        }
        sets.push((opened, prompts));
    }
    Ok(sets)
}

/// Checks that a set has `evaluation.metric`.
fn check_metric(config: &Config, sets: &[(EvalSet, Prompts)]) -> Result<()> {
    let own = sets.iter().flat_map(|(set, _)| set.metric_names());
    let known: Vec<String> = own.chain(nano::mean_metric_names(sets.iter().map(|(set, _)| set))).collect();
    let metric = &config.evaluation.metric;
    if known.is_empty() || selection::has_metric(known.iter().map(String::as_str), metric) {
        return Ok(());
    }
    Err(config.error("evaluation.metric", format!("no set has `{metric}`; there are {}", known.join(", "))))
}

fn batch_options(config: &Config, folder: &ModelFolder, lengths: Lengths) -> builder::BatchOptions {
    builder::BatchOptions {
        max_query_length: lengths.query,
        max_document_length: lengths.document,
        include_prompt: folder.include_prompt,
        mask_known_positives: config.loss.mask_known_positives,
    }
}

/// Builds the first batches: the mean number of tokens of a batch, and the tokens of each sequence of the first one.
fn sample(
    mixture: &Mixture,
    tokenizer: &Tokenizer,
    options: builder::BatchOptions,
) -> Result<(f64, Vec<usize>)> {
    const BATCHES: u64 = 4;
    let builder = Builder::new(mixture, tokenizer, options)?;
    let mut sampler = mixture.sampler(&Cursor::default())?;
    let batches = BATCHES.min(mixture.batches()).max(1);
    let (mut tokens, mut first) = (0, None);
    for _ in 0..batches {
        let batch = builder.build(sampler.next_rows()?)?;
        tokens += batch.tokens();
        first.get_or_insert_with(|| batch.sequences.iter().map(|sequence| sequence.ids.len()).collect());
    }
    Ok((tokens as f64 / batches as f64, first.unwrap_or_default()))
}
