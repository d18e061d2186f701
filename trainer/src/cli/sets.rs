//! What `evaluate` and `compare` measure, and how.

use std::path::PathBuf;

use clap::ValueEnum;

use super::encode::{at_least_one, options};
use crate::comm::World;
use crate::config::{EvaluationSet, SetKind};
use crate::embed::{CHUNK_TOKENS, Embedder, Opened};
use crate::eval::EvalSet;
use crate::{Error, Result};

#[derive(Debug, clap::Args)]
pub(super) struct Sets {
    /// A BEIR folder, or a file of pairs, triplets or scored pairs; several are measured one after another
    #[arg(long = "set", value_name = "DIR", required = true, num_args = 1..)]
    sets: Vec<PathBuf>,
    /// What is measured
    #[arg(long, default_value = "retrieval")]
    kind: KindName,
    /// Which qrels/SPLIT.tsv is used. Default: test, else dev, else the only one
    #[arg(long)]
    split: Option<String>,
    /// Put before each query. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    query_prompt: Option<String>,
    /// Put before each document. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    document_prompt: Option<String>,
    /// Tokens of a text at most, the prompt and special tokens included. Default: what the model folder says
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_length: Option<usize>,
    /// Tokens that are encoded at once
    #[arg(long, value_name = "N", default_value_t = CHUNK_TOKENS, value_parser = at_least_one)]
    chunk_tokens: usize,
    /// Draw the weights from a seed instead of reading them
    #[arg(long)]
    random_weights: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KindName {
    Retrieval,
    Triplet,
    Similarity,
}

impl Sets {
    /// Reads the sets.
    pub(super) fn open(&self) -> Result<Vec<EvalSet>> {
        let kind = match self.kind {
            KindName::Retrieval => SetKind::Retrieval,
            KindName::Triplet => SetKind::Triplet,
            KindName::Similarity => SetKind::Similarity,
        };
        let open = |path: &PathBuf| {
            let split = self.split.clone();
            EvalSet::open(&EvaluationSet { path: path.clone(), kind, split, ..EvaluationSet::default() })
        };
        let sets = self.sets.iter().map(open).collect::<Result<Vec<_>>>()?;
        for (index, set) in sets.iter().enumerate() {
            if sets[..index].iter().any(|other| other.name() == set.name()) {
                let message =
                    format!("--set: two sets are called `{}`, and so would be their metrics", set.name());
                return Err(Error::Usage(format!("{message}\nhint: take one at a time")));
            }
        }
        Ok(sets)
    }

    /// Opens a model.
    pub(super) fn model(&self, id_or_path: &str) -> Result<Opened> {
        Opened::open(id_or_path, &options(self.random_weights))
    }

    /// What embeds with it as the command line says.
    pub(super) fn embedder<'a>(&'a self, opened: &'a Opened, world: &World) -> Result<Embedder<'a>> {
        let mut embedder = opened.embedder();
        embedder.limit(self.max_length)?;
        embedder.chunk_tokens = self.chunk_tokens;
        embedder.world = world.clone();
        if let Some(prompt) = &self.query_prompt {
            embedder.query_prompt = prompt;
        }
        if let Some(prompt) = &self.document_prompt {
            embedder.document_prompt = prompt;
        }
        Ok(embedder)
    }
}
