//! How a command embeds texts: the flags that `evaluate`, `compare`, `mine` and `nano` share.

use super::encode::{at_least_one, options};
use crate::Result;
use crate::comm::World;
use crate::eval::embed::{DEFAULT_CHUNK_TOKENS, Embedder, LoadedModel};
use crate::model::{ModelFolder, locate};

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Encoding {
    /// Put before each query, and before both texts of a scored pair. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    query_prompt: Option<String>,
    /// Put before each document. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    document_prompt: Option<String>,
    /// Tokens of a text at most, the prompt and special tokens included. Default: what the model folder says
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_length: Option<usize>,
    /// Tokens that are encoded at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CHUNK_TOKENS, value_parser = at_least_one)]
    chunk_tokens: usize,
    /// Draw the weights from a seed instead of reading them; in a comparison those of the base
    #[arg(long)]
    pub(super) random_weights: bool,
}

impl Encoding {
    /// Whether the command line says anything about it.
    pub(super) fn is_given(&self) -> bool {
        let Self { query_prompt, document_prompt, max_length, chunk_tokens, random_weights } = self;
        query_prompt.is_some()
            || document_prompt.is_some()
            || max_length.is_some()
            || *chunk_tokens != DEFAULT_CHUNK_TOKENS
            || *random_weights
    }

    /// The same of a model that was trained: its weights are read.
    pub(super) fn of_trained(&self) -> Self {
        Self { random_weights: false, ..self.clone() }
    }

    /// Fetches a model that is not here, and looks at its folder.
    pub(super) fn find(&self, id_or_path: &str) -> Result<ModelFolder> {
        let init = options(self.random_weights, self.max_length).model.init;
        locate::model(id_or_path, init)
    }

    /// What to know of two models that would read unlike parts of a text: the one that reads more has an advantage of its own.
    pub(super) fn lengths_differ(&self, base: &ModelFolder, tuned: &ModelFolder) -> Option<String> {
        let reads = |folder: &ModelFolder| {
            folder.max_length.map_or("all that it has positions for".to_owned(), |n| format!("{n} tokens"))
        };
        (self.max_length.is_none() && base.max_length != tuned.max_length).then(|| {
            format!(
                "of a text the base reads {}, the tuned model {}: --max-length N compares them on the same part",
                reads(base),
                reads(tuned)
            )
        })
    }

    /// Opens a model.
    pub(super) fn model(&self, id_or_path: &str) -> Result<LoadedModel> {
        LoadedModel::open(id_or_path, &options(self.random_weights, self.max_length))
    }

    /// What embeds with it as the command line says.
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
