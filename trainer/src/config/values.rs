//! Types of values other than text, numbers and booleans: choices by name, and values that can be written in several forms.

use std::borrow::Cow;
use std::fmt;

use clap::ValueEnum;
use kernels::precision::Precision;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// An enum whose variants are chosen by name, with the same spelling in a configuration and on the command line.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
        pub enum $name {
            $($(#[$doc])* #[serde(rename = $text)] #[value(name = $text)] $variant),+
        }

        impl $name {
            /// The spelling in a configuration.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text),+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

choice! {
    /// `model.init`: the initial weights.
    WeightInit {
        /// The weights of the model folder.
        Pretrained = "pretrained",
        /// Random weights, drawn from `seed`. The model folder then needs only `config.json`.
        Random = "random",
    }
}

choice! {
    /// `model.pooling`: how the token vectors of a text become one vector.
    Pooling {
        /// The mean of all token vectors.
        Mean = "mean",
        /// The vector of the first token.
        Cls = "cls",
        /// The vector of the last token.
        LastToken = "last_token",
    }
}

choice! {
    /// `model.dtype`: the data type of matrix products and activations.
    Dtype {
        /// 32-bit floating point.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// 16-bit floating point (IEEE half); in training the gradient is scaled.
        F16 = "f16",
    }
}

impl Dtype {
    /// The kernels' precision for this data type.
    pub fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
            Self::F16 => Precision::F16,
        }
    }
}

choice! {
    /// `data.train.N.kind`: what a row of training data holds.
    RowKind {
        /// A query and its positives; negatives if the rows have some.
        Pairs = "pairs",
        /// A query, its positives and its negatives.
        Triplets = "triplets",
        /// A text and its class. The positive is drawn from the same class, the negatives from other classes.
        Labelled = "labelled",
        /// Two texts and the score of their similarity.
        Similarity = "similarity",
    }
}

choice! {
    /// `data.batching`: whether a batch has rows of several data sets.
    Batching {
        /// The rows of all data sets are shuffled together, and batches are taken from them.
        Mixed = "mixed",
        /// A batch has rows of one data set; the data sets alternate in proportion to their rows.
        PerDataset = "per_dataset",
    }
}

choice! {
    /// `loss.kind` and `data.train.N.loss`: the loss function.
    #[derive(Default)]
    LossKind {
        /// InfoNCE: cross-entropy of the positive among all candidates (MultipleNegativesRankingLoss).
        #[default]
        InfoNce = "info_nce",
        /// Triplet loss: the positive is closer than each negative by a margin (TripletLoss).
        Triplet = "triplet",
        /// CoSENT: a pair with a higher score gets a higher cosine (CoSENTLoss). For similarity rows only.
        CoSent = "cosent",
        /// Mean squared error of score(positive) − score(negative) against the teacher's (MarginMSELoss).
        MarginMse = "margin_mse",
        /// KL divergence from a teacher's distribution over the candidates (DistillKLDivLoss).
        Kl = "kl",
    }
}

/// The scores that a loss reads beside the texts of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowScores {
    /// None.
    None,
    /// The similarity of a pair: rows of kind `similarity`, and only those.
    Pair,
    /// The scores of a teacher for the positive and each negative.
    Teacher,
}

/// What a loss needs of its rows, and which keys of `loss` it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LossTraits {
    /// The scores it reads.
    pub scores: RowScores,
    /// Whether the loss of a row without negatives is 0 or undefined.
    pub needs_negatives: bool,
    /// Whether texts of other rows are negatives, unless `loss.in_batch_negatives` is false.
    pub in_batch_negatives: bool,
    /// The keys of `loss` that it reads.
    pub keys: &'static [&'static str],
}

impl LossKind {
    /// What the loss needs and reads. This is the only place that tells the losses apart, except `loss/`, which computes them.
    pub fn traits(self) -> LossTraits {
        let none = LossTraits {
            scores: RowScores::None,
            needs_negatives: false,
            in_batch_negatives: false,
            keys: &[],
        };
        match self {
            Self::InfoNce => LossTraits {
                in_batch_negatives: true,
                keys: &[
                    "temperature",
                    "in_batch_negatives",
                    "symmetric",
                    "mask_known_positives",
                    "false_negative_margin",
                ],
                ..none
            },
            Self::Triplet => LossTraits { needs_negatives: true, keys: &["distance", "margin"], ..none },
            Self::CoSent => LossTraits { scores: RowScores::Pair, keys: &["scale"], ..none },
            Self::MarginMse => LossTraits { scores: RowScores::Teacher, needs_negatives: true, ..none },
            Self::Kl => LossTraits {
                scores: RowScores::Teacher,
                needs_negatives: true,
                keys: &["temperature", "teacher_temperature"],
                ..none
            },
        }
    }

    /// The loss of rows of this kind for which the configuration names none: `default`, but CoSENT for scored pairs.
    pub fn for_rows(kind: RowKind, default: Self) -> Self {
        if kind == RowKind::Similarity { Self::CoSent } else { default }
    }

    /// Why rows of this kind cannot have the loss; none if they can.
    pub fn misfit(self, kind: RowKind) -> Option<String> {
        match (kind, self.traits().scores) {
            (RowKind::Similarity, RowScores::Pair) => None,
            (RowKind::Similarity, _) => Some(format!(
                "`{self}` is not defined for similarity rows (two texts and a score), expected `{}`",
                Self::CoSent
            )),
            (_, RowScores::Pair) => {
                Some(format!("`{self}` needs similarity rows (two texts and a score), these rows are {kind}"))
            }
            (RowKind::Labelled, RowScores::Teacher) => {
                Some(format!("`{self}` needs a teacher's scores, which labelled rows do not have"))
            }
            _ => None,
        }
    }
}

choice! {
    /// `loss.distance`: the distance between two embeddings.
    Distance {
        /// 1 − cosine.
        Cosine = "cosine",
        /// Euclidean distance.
        Euclidean = "euclidean",
        /// Manhattan distance: the sum of absolute differences.
        Manhattan = "manhattan",
    }
}

choice! {
    /// `model.freeze`: a group of parameters.
    Freeze {
        /// Word, position and token-type embeddings.
        Embeddings = "embeddings",
        /// Weights and biases of all norms.
        Norms = "norms",
    }
}

choice! {
    /// `training.schedule`: the learning rate after the warm-up.
    ScheduleKind {
        /// Linear decay to 0.
        Linear = "linear",
        /// Decay to 0 along half a cosine.
        Cosine = "cosine",
        /// No decay (`constant_with_warmup` of transformers).
        Constant = "constant",
    }
}

choice! {
    /// `evaluation.sets.N.kind`: what an evaluation set measures.
    EvaluationKind {
        /// How high relevant documents rank for each query: accuracy, precision, recall, nDCG, MRR and MAP.
        Retrieval = "retrieval",
        /// How often the positive is closer to the query than the negative: accuracy.
        Triplet = "triplet",
        /// How well similarities follow given scores: Pearson and Spearman correlation.
        Similarity = "similarity",
        /// The training loss of these rows (validation loss).
        Loss = "loss",
    }
}

/// `lora.targets`: the linear layers that get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every linear layer of the encoder.
    AllLinear,
    /// Layers with one of these names, or whose name ends with a dot and one of them: `q_proj`, `attention.output.dense`.
    Names(Vec<String>),
    /// Layers whose whole name matches this regular expression: `.*\.(q|v)_proj`.
    Pattern(String),
}

/// The name of a column, or a list of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnNames(pub Vec<String>);

/// An interval of a run: a number of steps, or `epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    /// Until the end of each epoch.
    Epoch,
    /// This number of steps.
    Steps(u64),
}

/// A size in bytes. It is read from a number, or from a text like `1.5GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl Bytes {
    const UNITS: [(&str, u64); 7] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
    ];

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (number, unit) =
            text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
        let number: f64 = number.trim().parse().ok()?;
        let unit = match unit {
            "" | "B" => 1,
            _ => Self::UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1,
        };
        let bytes = number * unit as f64;
        (bytes >= 0.0 && bytes < u64::MAX as f64).then_some(Self(bytes as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::UNITS[..4].iter().rev().find(|(_, unit)| self.0 >= *unit) {
            Some((name, unit)) => write!(f, "{:.1} {name}", self.0 as f64 / *unit as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str("all-linear"),
            Self::Pattern(pattern) => serializer.serialize_str(pattern),
            Self::Names(names) => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Targets;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`all-linear`, a list of module names or a regular expression")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Targets, E> {
                match text {
                    "all-linear" => Ok(Targets::AllLinear),
                    _ => Ok(Targets::Pattern(text.to_owned())),
                }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Targets, A::Error> {
                strings(items).map(Targets::Names)
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl Serialize for ColumnNames {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [name] => serializer.serialize_str(name),
            names => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ColumnNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = ColumnNames;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a column, or a list of names")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ColumnNames, E> {
                Ok(ColumnNames(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<ColumnNames, A::Error> {
                strings(items).map(ColumnNames)
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl Serialize for Interval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Epoch => serializer.serialize_str("epoch"),
            Self::Steps(steps) => serializer.serialize_u64(*steps),
        }
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl Visitor<'_> for Form {
            type Value = Interval;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of steps or `epoch`")
            }
            fn visit_u64<E: de::Error>(self, steps: u64) -> Result<Interval, E> {
                Ok(Interval::Steps(steps))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Interval, E> {
                match text {
                    "epoch" => Ok(Interval::Epoch),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl Visitor<'_> for Form {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or an amount like 2GiB")
            }
            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                Bytes::parse(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// The JSON Schema of a type that reads several forms. It has no name, so that it stands where it is used.
macro_rules! inline_schema {
    ($name:ty, $schema:tt) => {
        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

inline_schema!(Targets, {"anyOf": [
    {"const": "all-linear"},
    {"type": "array", "items": {"type": "string"}, "minItems": 1},
    {"type": "string", "format": "regex"},
]});
inline_schema!(ColumnNames, {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]});
inline_schema!(Interval, {"anyOf": [{"type": "integer", "minimum": 0}, {"const": "epoch"}]});
inline_schema!(Bytes, {"anyOf": [
    {"type": "integer", "minimum": 0},
    {"type": "string", "pattern": r"^ *[0-9]+(\.[0-9]+)? *([kKMGT]i?)?B? *$"},
]});

fn strings<'de, A: SeqAccess<'de>>(mut items: A) -> Result<Vec<String>, A::Error> {
    let mut all = Vec::new();
    while let Some(item) = items.next_element()? {
        all.push(item);
    }
    Ok(all)
}
