//! The flags of `evaluate`, `compare`, `mine` and `nano` that say how texts are embedded.

use super::encode::{at_least_one, options};
use crate::Result;
use crate::comm::World;
use crate::eval::embed::{DEFAULT_CHUNK_TOKENS, Embedder, LoadedModel};
use crate::model::{ModelFolder, locate};

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Encoding {
    /// Text put before each query, and before both texts of a similarity pair. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    query_prompt: Option<String>,
    /// Text put before each document. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    document_prompt: Option<String>,
    /// Truncate texts to this number of tokens, with prompt and special tokens. Default: what the model folder says
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_length: Option<usize>,
    /// Maximum number of tokens encoded at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CHUNK_TOKENS, value_parser = at_least_one)]
    chunk_tokens: usize,
    /// Use random weights, for tests; `compare` does so for the base only
    #[arg(long)]
    pub(super) random_weights: bool,
}

impl Encoding {
    /// Whether any of the flags is given.
    pub(super) fn is_given(&self) -> bool {
        let Self { query_prompt, document_prompt, max_length, chunk_tokens, random_weights } = self;
        query_prompt.is_some()
            || document_prompt.is_some()
            || max_length.is_some()
            || *chunk_tokens != DEFAULT_CHUNK_TOKENS
            || *random_weights
    }

    /// The same flags without `--random-weights`, for a trained model.
    pub(super) fn of_trained(&self) -> Self {
        Self { random_weights: false, ..self.clone() }
    }

    /// Opens the folder of a model, after a download if the model is on the hub only.
    pub(super) fn find(&self, id_or_path: &str) -> Result<ModelFolder> {
        let init = options(self.random_weights, self.max_length).model.init;
        locate::model(id_or_path, init)
    }

    /// A warning if two models truncate texts at different lengths, which gives one of them an advantage.
    pub(super) fn lengths_differ(&self, base: &ModelFolder, tuned: &ModelFolder) -> Option<String> {
        let reads = |folder: &ModelFolder| {
            folder.max_length.map_or("its number of positions".to_owned(), |n| format!("{n} tokens"))
        };
        (self.max_length.is_none() && base.max_length != tuned.max_length).then(|| {
            format!(
                "the base truncates texts at {}, the tuned model at {}: use --max-length N for a fair comparison",
                reads(base),
                reads(tuned)
            )
        })
    }

    /// Opens a model.
    pub(super) fn model(&self, id_or_path: &str) -> Result<LoadedModel> {
        LoadedModel::open(id_or_path, &options(self.random_weights, self.max_length))
    }

    /// An embedder with the model, the flags and the ranks of `world`.
    pub(super) fn embedder<'a>(&'a self, opened: &'a LoadedModel, world: &World) -> Result<Embedder<'a>> {
        let mut embedder = opened.embedder();
        embedder.set_max_length(self.max_length)?;
        embedder.chunk_tokens = self.chunk_tokens;
        embedder.world = world.clone();
        if let Some(prompt) = &self.query_prompt {
            (embedder.query_prompt, embedder.text_prompt) = (prompt, prompt);
        }
        if let Some(prompt) = &self.document_prompt {
            embedder.document_prompt = prompt;
        }
        Ok(embedder)
    }
}
