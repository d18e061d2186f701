//! The values that are neither text, number nor truth: choices by name, and the few keys that take two forms.

use std::fmt;

use clap::ValueEnum;
use kernels::precision::Precision;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// An enum whose variants are chosen by name, with the same spelling in a configuration and on the command line.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
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
    /// `model.init`: where the weights come from.
    WeightInit {
        /// From the model folder.
        Pretrained = "pretrained",
        /// Drawn from the seed.
        Random = "random",
    }
}

choice! {
    /// `model.pooling`: how the vectors of a text's tokens become one.
    Pooling {
        /// The mean over the tokens.
        Mean = "mean",
        /// The first token.
        Cls = "cls",
        /// The last token.
        LastToken = "last_token",
    }
}

choice! {
    /// `model.dtype`: what products and activations are computed in.
    Dtype {
        /// 32-bit floating point.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// 16-bit floating point, with loss scaling.
        F16 = "f16",
    }
}

impl Dtype {
    /// What a model rounds to.
    pub fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
            Self::F16 => Precision::F16,
        }
    }
}

choice! {
    /// `data.train.N.kind`: what a row is.
    RowKind {
        /// A query and its positives.
        Pairs = "pairs",
        /// A query, its positives and its negatives.
        Triplets = "triplets",
        /// A text and its class.
        Labelled = "labelled",
        /// Two texts and how similar they are.
        Similarity = "similarity",
    }
}

choice! {
    /// `data.batching`: whether a batch mixes the data sets.
    Batching {
        /// Rows of all data sets in one batch, as the shuffled order has them.
        Mixed = "mixed",
        /// Every batch is of one data set; the batches take turns in proportion.
        PerDataset = "per_dataset",
    }
}

choice! {
    /// `loss.kind` and `data.train.N.loss`.
    #[derive(Default)]
    LossKind {
        /// Cross-entropy of the positive among the candidates.
        #[default]
        InfoNce = "info_nce",
        /// The positive closer than the negative by a margin.
        Triplet = "triplet",
        /// Scored pairs in the order of their scores.
        CoSent = "cosent",
        /// Differences of scores as a teacher has them.
        MarginMse = "margin_mse",
        /// A distribution over the candidates as a teacher has it.
        Kl = "kl",
    }
}

impl LossKind {
    /// Whether a teacher's scores are needed, of each row's positive and negatives.
    pub fn distils(self) -> bool {
        matches!(self, Self::MarginMse | Self::Kl)
    }

    /// Why rows of this kind cannot have it.
    pub fn misfit(self, kind: RowKind) -> Option<String> {
        match kind {
            RowKind::Similarity if self != Self::CoSent => {
                Some(format!("`{self}` cannot judge similarity rows, two texts and a score: expected cosent"))
            }
            RowKind::Similarity => None,
            _ if self == Self::CoSent => {
                Some(format!("`cosent` judges similarity rows, two texts and a score; these rows are {kind}"))
            }
            RowKind::Labelled if self.distils() => {
                Some(format!("`{self}` follows a teacher's scores, which labelled rows do not have"))
            }
            _ => None,
        }
    }

    /// Whether a row without negatives tells it nothing.
    pub fn needs_negatives(self) -> bool {
        self == Self::Triplet || self.distils()
    }
}

choice! {
    /// `loss.distance`: how far two embeddings are apart.
    Distance {
        /// 1 − their cosine.
        Cosine = "cosine",
        /// The length of their difference.
        Euclidean = "euclidean",
        /// The sum of their differences.
        Manhattan = "manhattan",
    }
}

choice! {
    /// `model.freeze`: a kind of parameters.
    Freeze {
        /// The tables of words, positions and types.
        Embeddings = "embeddings",
        /// Gains and biases of all norms.
        Norms = "norms",
    }
}

choice! {
    /// `training.schedule`: how the rate goes down after the warm-up.
    ScheduleKind {
        /// Straight to 0.
        Linear = "linear",
        /// Along half a cosine to 0.
        Cosine = "cosine",
        /// Not at all.
        Constant = "constant",
    }
}

choice! {
    /// `evaluation.sets.N.kind`: what is measured.
    EvaluationKind {
        /// Whether queries find their documents.
        Retrieval = "retrieval",
        /// Whether positives are closer than negatives.
        Triplet = "triplet",
        /// Whether similarities follow given scores.
        Similarity = "similarity",
        /// The training loss, without training.
        Loss = "loss",
    }
}

/// `lora.targets`: `all-linear`, a list of module names, or a regular expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every linear layer of the encoder.
    AllLinear,
    /// Those whose name ends so: `query`, `q_proj`, `attention.output.dense`.
    Names(Vec<String>),
    /// Those whose whole name matches: `.*\.(q|v)_proj`.
    Pattern(String),
}

/// One column's name, or several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnNames(pub Vec<String>);

/// `checkpoint.every`: a number of steps, or `epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    /// At the end of each epoch.
    Epoch,
    /// After so many steps.
    Steps(u64),
}

/// An amount of memory.
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
                f.write_str("a column's name or a list of them")
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
                f.write_str("bytes, or an amount like 2GiB")
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

fn strings<'de, A: SeqAccess<'de>>(mut items: A) -> Result<Vec<String>, A::Error> {
    let mut all = Vec::new();
    while let Some(item) = items.next_element()? {
        all.push(item);
    }
    Ok(all)
}
