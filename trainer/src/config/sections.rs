//! The sections of a configuration, key by key. A field's comment gives its unit and its default.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    Batching, Bytes, ColumnNames, Distance, Dtype, EvaluationKind, Freeze, Interval, LossKind, Pooling,
    RowKind, ScheduleKind, Targets, WeightInit,
};

/// `model`: the encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// A model folder, or an id of the Hugging Face hub. Required.
    pub path: String,
    /// Where the weights come from. Default: pretrained.
    pub init: WeightInit,
    /// How the tokens of a text become one embedding. Default: what the model folder says, else by architecture.
    pub pooling: Option<Pooling>,
    /// Whether embeddings are scaled to length 1. Default: what the model folder says, else true.
    pub normalize: Option<bool>,
    /// What products and activations are computed in; parameters that are trained stay f32. Default: f32.
    pub dtype: Dtype,
    /// Whether a GPU may round the inputs of f32 products to TF32. Default: true.
    pub tf32: bool,
    /// Tokens of a query at most, the prompt and special tokens included. Default: what the model folder says.
    pub max_query_length: Option<usize>,
    /// Tokens of a document at most, the prompt and special tokens included. Default: what the model folder says.
    pub max_document_length: Option<usize>,
    /// The encoder's own dropout, hidden states and attention alike, in [0, 1). Default: what its config.json says.
    pub dropout: Option<f64>,
    /// What is not trained with the rest: `embeddings` (the tables), `norms`. Default: nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<Freeze>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            path: String::new(),
            init: WeightInit::Pretrained,
            pooling: None,
            normalize: None,
            dtype: Dtype::F32,
            tf32: true,
            max_query_length: None,
            max_document_length: None,
            dropout: None,
            freeze: Vec::new(),
        }
    }
}

/// `lora`: low-rank adapters, the only parameters trained where the section is present. An adapter that training goes on with has
/// its own values in place of the defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// An adapter of PEFT to go on with, a folder or an id of the hub; what it says of itself need not be repeated. Default:
    /// null, a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Width between A and B. Default: 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// The adapter's product is scaled by alpha / rank. Default: 8, as in PEFT.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Dropout on the adapter's input, in [0, 1). Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Which linear layers get one: `all-linear`, a list of module names, or a regular expression of whole names. Default:
    /// all-linear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
    /// Whether the scale is alpha / √rank instead. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rslora: Option<bool>,
}

/// `data`: what the model learns from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// The data sets. At least one is required for training.
    pub train: Vec<DataSet>,
    /// Hard negatives taken per row and step; rows with fewer are used as they are. Default: 5.
    pub negatives: usize,
    /// Whether a batch mixes the data sets or is of one. In a mixed batch each row goes to its loss, and its texts are candidates
    /// of rows with the same loss only. Default: mixed.
    pub batching: Batching,
    /// Whether every epoch has an order of its own, from the seed; else the order of the files. Default: true.
    pub shuffle: bool,
    /// Whether no text may stand twice in a batch other than as the same item. A row that would bring one waits for a later batch of
    /// its epoch; what no batch could take goes into the last ones all the same, and so does what comes while 65,536 rows wait.
    /// Default: true.
    pub no_duplicates: bool,
}

impl Data {
    /// The prompt that all data sets have alike, where they have one: it can stand for the run.
    pub fn common_prompt<'a>(&'a self, of: impl Fn(&'a DataSet) -> &'a String) -> Option<&'a str> {
        let first = of(self.train.first()?);
        self.train
            .iter()
            .all(|set| of(set) == first)
            .then_some(first.as_str())
            .filter(|prompt| !prompt.is_empty())
    }
}

impl Default for Data {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            negatives: 5,
            batching: Batching::Mixed,
            shuffle: true,
            no_duplicates: true,
        }
    }
}

/// One of `data.train`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSet {
    /// What it is called in messages. Default: the name of the file, without its endings.
    pub name: String,
    /// A .jsonl, .csv, .tsv or .parquet file, each also .gz or .zst, or a BEIR folder; or a file on the hub,
    /// hf://datasets/ORG/NAME/FILE. Required.
    pub path: PathBuf,
    /// Which column is what. Default: by their names.
    pub columns: Columns,
    /// What a row is: pairs, triplets, labelled (a text and its class: its positive is drawn from the class, its negatives from
    /// others) or similarity (two texts and a score). Default: by the columns.
    pub kind: Option<RowKind>,
    /// Its loss. Default: cosent for similarity rows, else `loss.kind`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<LossKind>,
    /// How many of its rows are used, a random subset that follows from the seed; of labelled rows as many of each class as the
    /// set has in proportion. Default: all.
    pub samples: Option<u64>,
    /// Put before each query. Default: nothing.
    pub query_prompt: String,
    /// Put before each positive and negative. Default: nothing.
    pub document_prompt: String,
    /// How often a row is seen in an epoch: rows an epoch are round(samples · weight). Default: 1.
    pub weight: f64,
}

impl Default for DataSet {
    fn default() -> Self {
        Self {
            name: String::new(),
            path: PathBuf::new(),
            columns: Columns::default(),
            kind: None,
            loss: None,
            samples: None,
            query_prompt: String::new(),
            document_prompt: String::new(),
            weight: 1.0,
        }
    }
}

/// `columns`: the data set's own name for each part of a row. Default of each: the usual names are understood.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Columns {
    /// The question, or what else is searched with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// The text that answers it, or several: `[answer_1, answer_2]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positive: Option<ColumnNames>,
    /// Texts that do not: one column (a text or a list), or several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negatives: Option<ColumnNames>,
    /// The text of a labelled row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Its label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The first text of a similarity row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentence1: Option<String>,
    /// The second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentence2: Option<String>,
    /// How similar they are; or what a teacher says of a row's positive and negatives, in this order, as a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<String>,
}

/// `loss`: how the model learns from a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Loss {
    /// Which loss rows have whose data set names none; those of scored pairs have cosent. Default: info_nce.
    pub kind: LossKind,
    /// What similarities are divided by, above 0 (info_nce, kl). Default: 0.02.
    pub temperature: f64,
    /// Whether the other rows' texts count as negatives. Default: true.
    pub in_batch_negatives: bool,
    /// Whether the positives also look for their queries. Default: false.
    pub symmetric: bool,
    /// Whether a text known to answer a row's query is left out of its negatives. Default: true.
    pub mask_known_positives: bool,
    /// Candidates scoring above the positive by more than this (a cosine) are left out. Default: null, none are.
    pub false_negative_margin: Option<f64>,
    /// How far the negative shall be beyond the positive (triplet), in units of `distance`. Default: 5, as in
    /// sentence-transformers.
    pub margin: f64,
    /// How far two embeddings are apart (triplet). Default: euclidean.
    pub distance: Distance,
    /// What differences of cosines are multiplied by (cosent), above 0. Default: 20.
    pub scale: f64,
    /// What a teacher's scores are divided by (kl), above 0. Default: 1.
    pub teacher_temperature: f64,
    /// Shorter embeddings that are judged too, around any loss. Default: null, only whole ones are.
    pub matryoshka: Option<Matryoshka>,
}

/// `loss.matryoshka`: the first numbers of an embedding shall be one of their own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Matryoshka {
    /// Widths that are judged; the whole one too only if it is among them. Required.
    pub dims: Vec<usize>,
    /// How much each counts. Default: 1 each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Vec<f64>>,
}

impl Matryoshka {
    /// Each width with its weight.
    pub fn pairs(&self) -> Vec<(usize, f64)> {
        let weight = |i: usize| self.weights.as_ref().map_or(1.0, |weights| weights[i]);
        self.dims.iter().enumerate().map(|(i, &dim)| (dim, weight(i))).collect()
    }
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            kind: LossKind::InfoNce,
            temperature: 0.02,
            in_batch_negatives: true,
            symmetric: false,
            mask_known_positives: true,
            false_negative_margin: None,
            margin: 5.0,
            distance: Distance::Euclidean,
            scale: 20.0,
            teacher_temperature: 1.0,
            matryoshka: None,
        }
    }
}

/// `training`: how long and how fast.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Training {
    /// Times that the rows are gone through. Default: 1.
    pub epochs: u64,
    /// Optimizer steps of the run, whatever `epochs` says: where they are more, the rows are gone through again. Default: null, as many
    /// as the epochs have.
    pub max_steps: Option<u64>,
    /// Rows per optimizer step, over all ranks. Default: 64.
    pub batch_size: usize,
    /// Tokens encoded at once at most; a longer text is alone. Default: 1,024 on a CPU, 16,384 on a GPU, fewer where memory is short.
    pub chunk_tokens: Option<usize>,
    /// Sequences encoded at once at most, instead of `chunk_tokens`.
    pub chunk_size: Option<usize>,
    /// Memory for tapes kept from the first pass, in bytes or `2GiB`; 0: everything is computed twice.
    /// Default: null, what is free; on a CPU at most half as much again as parameters, gradients and
    /// moments take, or 512 MiB where that is more.
    pub activation_memory: Option<Bytes>,
    /// The highest rate of the schedule. Default: 5e-5.
    pub learning_rate: f64,
    /// How the rate goes down after the warm-up. Default: linear.
    pub schedule: ScheduleKind,
    /// Share of the steps in which the rate goes up. Default: 0.1, unless `warmup_steps` is given.
    pub warmup_ratio: Option<f64>,
    /// Steps in which the rate goes up, instead of `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// AdamW's, decoupled. Default: 0.01.
    pub weight_decay: f64,
    /// Whether biases and norms decay too. Default: false.
    pub decay_all: bool,
    /// AdamW's. Default: [0.9, 0.999].
    pub betas: (f64, f64),
    /// AdamW's. Default: 1e-8.
    pub epsilon: f64,
    /// Gradients are scaled down to this norm; 0: never. Default: 1.
    pub max_grad_norm: f64,
    /// Steps with a loss or gradient that is not finite, after which the run stops. Default: 1.
    pub max_nonfinite: u64,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            epochs: 1,
            max_steps: None,
            batch_size: 64,
            chunk_tokens: None,
            chunk_size: None,
            activation_memory: None,
            learning_rate: 5e-5,
            schedule: ScheduleKind::Linear,
            warmup_ratio: None,
            warmup_steps: None,
            weight_decay: 0.01,
            decay_all: false,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            max_nonfinite: 1,
        }
    }
}

impl Training {
    /// The share of the steps in which the rate goes up, where no number of steps is given.
    /// Of `warmup_ratio`, where nothing is said of a warm-up.
    pub const WARMUP_RATIO: f64 = 0.1;

    /// Steps in which the rate goes up, in a run of `total`: ceil(total · ratio), as transformers counts them.
    pub fn warmup(&self, total: u64) -> u64 {
        self.warmup_steps
            .unwrap_or_else(|| (total as f64 * self.warmup_ratio.unwrap_or(Self::WARMUP_RATIO)).ceil() as u64)
    }
}

/// `evaluation`: how good the model is, meanwhile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluation {
    /// Steps between evaluations; 0: only before and after the training. Default: 0.
    pub every: u64,
    /// What is evaluated. Default: nothing.
    pub sets: Vec<EvaluationSet>,
    /// The metric whose mean over the sets decides "best" and early stopping. Default: cosine_ndcg@10.
    pub metric: String,
    /// Evaluations without a better metric, after which the training stops. Default: null, it does not.
    pub patience: Option<u64>,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self { every: 0, sets: Vec::new(), metric: "cosine_ndcg@10".to_owned(), patience: None }
    }
}

/// One of `evaluation.sets`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationSet {
    /// The first part of its metrics' names. Default: the name of the folder.
    pub name: String,
    /// A BEIR folder, or a file of pairs, triplets or scored pairs, also hf://datasets/ORG/NAME/FILE. Required.
    pub path: PathBuf,
    /// What is measured: `retrieval` (BEIR's metrics), `triplet` (accuracy), `similarity` (correlation with the scores of pairs) or
    /// `loss` (the training loss on these rows). Default: by the columns; similarity for scored pairs, else retrieval.
    pub kind: Option<EvaluationKind>,
    /// Which `qrels/SPLIT.tsv` is used. Default: test, else dev, else the only one.
    pub split: Option<String>,
    /// Put before each query. Default: what the model folder says for `query`.
    pub query_prompt: Option<String>,
    /// Put before each document. Default: what the model folder says for `document`.
    pub document_prompt: Option<String>,
}

/// `checkpoint`: what is kept of a run that ends early.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between checkpoints, or `epoch`. Default: 500.
    pub every: Interval,
    /// How many are kept, besides the best. Default: 3.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: Interval::Steps(500), keep: 3 }
    }
}

/// `logging`: what is told about the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Logging {
    /// Steps between lines of metrics.jsonl. Default: 1.
    pub every: u64,
    /// Whether event files for TensorBoard are written. Default: true.
    pub tensorboard: bool,
}

impl Default for Logging {
    fn default() -> Self {
        Self { every: 1, tensorboard: true }
    }
}
