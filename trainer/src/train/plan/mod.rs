//! What a run will do: the configuration resolved against model, data and memory, checked once, before anything is started.

mod estimate;

use std::fmt;
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
use crate::model::chunk::Limit;
use crate::model::pass::Saved;
use crate::model::{Model, ModelFolder, Options, locate};
use crate::system::device;
use crate::train::checkpoint::{Identity, State};
use crate::train::gradcache::Budget;
use crate::train::memory::{self, format_bytes};
use crate::train::metrics;
use crate::train::scaling::Workload;
use crate::train::schedule::LrSchedule;
use crate::{Error, Result};
pub use estimate::{CostEstimate, check_inputs};

/// A run, ready to be started or only to be looked at.
pub struct Plan {
    /// As the user wrote it.
    pub config: Config,
    /// What the model folder says besides its weights.
    pub folder: ModelFolder,
    /// The model's.
    pub tokenizer: Arc<Tokenizer>,
    /// The training rows.
    pub mixture: Arc<Mixture>,
    /// What is evaluated, with its prompts.
    pub sets: Vec<(EvalSet, Prompts)>,
    /// The longest texts, in tokens.
    pub lengths: Lengths,
    /// Optimizer steps of the run.
    pub steps: u64,
    /// The learning rate.
    pub schedule: LrSchedule,
    /// How batches are cut.
    pub budget: Budget,
    /// Tokens of a chunk in evaluation.
    pub embed_tokens: usize,
    /// What a batch and the model take.
    pub cost: Cost,
    /// What ranks share of them.
    pub workload: Workload,
}

/// Put before texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompts {
    /// Before queries.
    pub query: String,
    /// Before documents.
    pub document: String,
    /// Before both texts of a scored pair.
    pub text: String,
}

/// The longest texts in tokens, prompts and special tokens included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Of queries.
    pub query: usize,
    /// Of documents.
    pub document: usize,
}

/// What the run takes, estimated from a sample of its rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// All parameters.
    pub elements: usize,
    /// Trained ones.
    pub trained: usize,
    /// The rank of the adapters that are.
    pub lora: Option<usize>,
    /// Of a batch.
    pub tokens: f64,
    /// Bytes: parameters, gradients, moments.
    pub state: u64,
    /// Bytes: activations of a step at most, of which tapes are kept as the budget says.
    pub activations: u64,
    /// Bytes that this process may use.
    pub available: u64,
}

impl Cost {
    /// Bytes that a step takes at most, or the weights when they are read: f32 until they are rounded.
    pub fn peak(&self) -> u64 {
        (self.state + self.activations).max((size_of::<f32>() * self.elements) as u64)
    }
}

impl Plan {
    /// Resolves and checks a configuration.
    pub fn resolve(config: Config) -> Result<Self> {
        // A GPU that was asked for and is not there is said first.
        device::current()?;
        check_inputs(&config)?;
        let folder = locate::model(&config.model.path, config.model.init)?;
        let tokenizer = Tokenizer::open_for(&folder.path, folder.lower_case, config.model.init)?;
        // Only shapes are looked at here: the weights are read once, when the run starts.
        let model = Model::open(folder.clone(), &Options { shapes_only: true, ..options(&config) })?;
        model.check_tokenizer(&tokenizer)?;
        let lengths = lengths(&config, &model)?;
        for (i, &dim) in config.loss.matryoshka.iter().flat_map(|matryoshka| &matryoshka.dims).enumerate() {
            if dim > model.embedding_dim() {
                let message =
                    format!("{dim}, but the model's embeddings have {} numbers", model.embedding_dim());
                return Err(config.error(&format!("loss.matryoshka.dims.{i}"), message));
            }
        }
        let mixture = Mixture::open(&config)?;
        let all = mixture.batches() * config.training.epochs;
        let steps = config.training.max_steps.unwrap_or(all);
        let schedule = LrSchedule {
            shape: config.training.schedule,
            peak: config.training.learning_rate,
            warmup: config.training.warmup(steps),
            total: steps,
        };
        let sets = config
            .evaluation
            .sets
            .iter()
            .map(|set| {
                // As the model that the run writes will have them.
                let data = &config.data;
                let queries = data.common_prompt(|set| &set.query_prompt).unwrap_or(folder.query_prompt());
                let documents =
                    data.common_prompt(|set| &set.document_prompt).unwrap_or(folder.document_prompt());
                let own = |given: &Option<String>, else_: &str| given.as_deref().unwrap_or(else_).to_owned();
                let prompts = Prompts {
                    query: own(&set.query_prompt, queries),
                    document: own(&set.document_prompt, documents),
                    text: own(&set.query_prompt, folder.text_prompt()),
                };
                Ok((EvalSet::open(set, &config)?, prompts))
            })
            .collect::<Result<Vec<_>>>()?;
        for (i, (set, _)) in sets.iter().enumerate() {
            if sets[..i].iter().any(|(other, _)| other.name() == set.name()) {
                let message = format!(
                    "two sets are called `{}`, and so would be their metrics\nhint: give each a `name`",
                    set.name()
                );
                return Err(config.error(&format!("evaluation.sets.{i}"), message));
            }
        }
        let known = metric_names(&sets);
        if !known.is_empty()
            && !metrics::has_metric(known.iter().map(String::as_str), &config.evaluation.metric)
        {
            let message =
                format!("no set has `{}`; there are {}", config.evaluation.metric, known.join(", "));
            return Err(config.error("evaluation.metric", message));
        }
        let (tokens, of_batch) = sample(&mixture, &tokenizer, batch_options(&config, &folder, lengths))?;
        let workload =
            Workload { lengths: of_batch, width: model.embedding_dim(), trained: model.flat().len() };
        let ranks = RankEnv::from_env()?.map_or((1, 1), |env| (env.size, env.local_size));
        let (budget, cost) = share_memory(&config.training, &model, tokens, &workload.lengths, ranks);
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
            schedule,
            budget,
            embed_tokens,
            cost,
            workload,
        })
    }

    /// Reads the weights.
    pub fn model(&self) -> Result<Model> {
        Model::open(self.folder.clone(), &options(&self.config))
    }

    /// What makes this run itself.
    pub fn identity(&self, model: &Model) -> Identity {
        Identity {
            seed: self.config.seed,
            batch_size: self.config.training.batch_size,
            steps: self.steps,
            data: format!("{:016x}", self.mixture.digest()),
            parameters: model.flat().len(),
        }
    }

    /// The configuration with what it leaves to a default that follows from other values.
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

    /// What all ranks must have alike, wherever each of them has its files: the configuration without places, and the tokenizer.
    ///
    /// # Errors
    /// The tokenizer's file is gone.
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
        // Without one a token is a byte.
        let tokenizer =
            if path.exists() { fs::read(&path).map_err(Error::read("read", path))? } else { Vec::new() };
        Ok((config, xxh3_64(&tokenizer)))
    }

    /// The batches from where `state` stands to the end of the run, tokenised in part.
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

    /// The value that decides "best": the mean of the deciding metric over the sets; none without sets.
    pub fn selection_metric(&self, scores: &Map<String, Value>) -> Option<f64> {
        metrics::selection_metric(scores, &self.config.evaluation.metric)
    }
}

/// The metrics that an evaluation of all sets will have.
fn metric_names(sets: &[(EvalSet, Prompts)]) -> Vec<String> {
    let own = sets.iter().flat_map(|(set, _)| set.metric_names());
    own.chain(nano::mean_metric_names(sets.iter().map(|(set, _)| set))).collect()
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

fn batch_options(config: &Config, folder: &ModelFolder, lengths: Lengths) -> builder::BatchOptions {
    builder::BatchOptions {
        max_query_length: lengths.query,
        max_document_length: lengths.document,
        include_prompt: folder.include_prompt,
        mask_known_positives: config.loss.mask_known_positives,
    }
}

/// Tokens of a batch, from the first few, and those of each sequence of the first.
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

/// Bytes of parameters, gradients and moments: what is trained is f32, as are its gradients and two moments.
fn state_bytes(model: &Model) -> u64 {
    let trained = model.flat().len();
    (model.element_bytes() * (model.parameter_count() - trained) + 16 * trained) as u64
}

/// Parameters and moments first, then a chunk, then as many tapes as fit. `ranks` are all, and those on this host.
fn share_memory(
    training: &config::Training,
    model: &Model,
    tokens: f64,
    lengths: &[usize],
    ranks: (usize, usize),
) -> (Budget, Cost) {
    let available = memory::available(ranks.1);
    let (elements, trained) = (model.parameter_count(), model.flat().len());
    let lora = model.lora().map(|lora| lora.rank);
    let state_bytes = state_bytes(model);
    // A checkpoint's snapshot of what is trained and of the moments, which is never on a GPU.
    let state = state_bytes + if memory::on_gpu() { 0 } else { 12 * trained as u64 };
    let tape = model.tape_bytes_per_token(Saved::All) as u64;
    let free = (available / 10 * 8).saturating_sub(state);
    let chunk = match (training.chunk_tokens, training.chunk_size) {
        (Some(tokens), _) => Limit::Tokens(tokens),
        (None, Some(sequences)) => Limit::Sequences(sequences),
        // A chunk that runs backward needs its tape and, for a while, a layer's gradients.
        (None, None) => {
            Limit::Tokens(memory::default_chunk_tokens().min((free / (2 * tape).max(1)) as usize).max(64))
        }
    };
    let local_tokens = (tokens / ranks.0 as f64).ceil() as usize;
    let chunk_tokens = match chunk {
        Limit::Tokens(limit) => limit.min(local_tokens),
        // The longest ones may come together.
        Limit::Sequences(limit) => (limit * lengths.iter().max().copied().unwrap_or(0)).min(local_tokens),
    };
    let most = memory::default_activation_memory(state_bytes);
    let beside = 2 * memory::chunk_bytes(model, chunk_tokens);
    let kept = training.activation_memory.map_or(free.saturating_sub(beside).min(most), |bytes| bytes.0);
    let activations = memory::step_bytes(model, local_tokens, lengths.len(), chunk_tokens, kept);
    (
        Budget { chunk, activation_memory: kept },
        Cost { elements, trained, lora, tokens, state, activations, available },
    )
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cost { elements, trained, lora, tokens, state, activations, available } = self.cost;
        let config = &self.config;
        writeln!(f, "run        {} → {}", config.name, config.output.display())?;
        writeln!(
            f,
            "model      {}: {:.1} M parameters, {:.2} M trained{}",
            config.model.path,
            elements as f64 / 1e6,
            trained as f64 / 1e6,
            lora.map_or_else(String::new, |rank| format!(" (LoRA, rank {rank})"))
        )?;
        for set in self.mixture.sets() {
            writeln!(
                f,
                "data       {}: {} rows an epoch ({}, {}), of {}",
                set.name,
                set.rows,
                set.kind,
                set.loss,
                set.path.display()
            )?;
        }
        writeln!(
            f,
            "steps      {} of {} rows, warm-up {}, {} to {:e}",
            self.steps,
            config.training.batch_size,
            self.schedule.warmup,
            self.schedule.shape,
            self.schedule.peak
        )?;
        writeln!(
            f,
            "tokens     about {tokens:.0} a step, {:.2} M in all; texts are cut at {} and {}",
            tokens * self.steps as f64 / 1e6,
            self.lengths.query,
            self.lengths.document
        )?;
        let chunk = match self.budget.chunk {
            Limit::Tokens(tokens) => format!("{tokens} tokens"),
            Limit::Sequences(sequences) => format!("{sequences} sequences"),
        };
        writeln!(
            f,
            "memory     {} at most: {} for parameters and moments, {} for activations in chunks of {chunk}; {} are free",
            format_bytes(self.cost.peak()),
            format_bytes(state),
            format_bytes(activations),
            format_bytes(available)
        )?;
        for (set, _) in &self.sets {
            writeln!(f, "evaluation {}", set.name())?;
        }
        Ok(())
    }
}
