//! Embeds texts: tokenises them, cuts them into chunks and runs the encoder without dropout, on all ranks.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use crate::comm::World;
use crate::data::batch::Sequence;
use crate::data::partition::Partition;
use crate::data::tokenize::Tokenizer;
use crate::model::chunk::{self, Limit};
use crate::model::{Model, Options, locate};
use crate::system::heartbeat;
use crate::system::progress::Progress;
use crate::{Error, Result};

/// What a text is for. It decides which prompt is put before it and where it is truncated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// A text to search with.
    Query,
    /// A text to be found.
    Document,
    /// One of two texts whose similarity is asked for.
    #[value(skip)]
    Text,
}

impl Role {
    /// The plural of what such a text is called, for progress bars.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Query => "queries",
            Self::Document => "documents",
            Self::Text => "texts",
        }
    }
}

/// A model with its weights and its tokenizer, ready for inference.
///
/// ```
/// use trainer::eval::embed::{LoadedModel, Role};
/// use trainer::model::Options;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert");
/// let loaded = LoadedModel::open(folder, &Options::default())?;
/// let embeddings = loaded.embedder().encode(&["iron is a metal", "the river is long"], Role::Document)?;
/// assert_eq!(embeddings.dims(), [2, loaded.model.embedding_dim()]);
/// # Ok::<(), trainer::Error>(())
/// ```
pub struct LoadedModel {
    /// The encoder.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl LoadedModel {
    /// Loads a model folder, or a model by its id on the hub.
    ///
    /// # Errors
    /// As [`locate::model`], [`Model::open`], [`Tokenizer::open`] and [`Model::check_tokenizer`].
    pub fn open(id_or_path: &str, options: &Options) -> Result<Self> {
        let folder = locate::model(id_or_path, options.model.init)?;
        let tokenizer = Tokenizer::open_for(&folder.path, folder.lower_case, options.model.init)?;
        let model = Model::open(folder, options)?;
        model.check_tokenizer(&tokenizer)?;
        Ok(Self { model, tokenizer })
    }

    /// An embedder with the prompts and the maximum length of the model folder, on this rank alone.
    pub fn embedder(&self) -> Embedder<'_> {
        let folder = self.model.folder();
        let longest = self.model.max_length();
        Embedder {
            model: &self.model,
            tokenizer: &self.tokenizer,
            query_prompt: folder.query_prompt(),
            document_prompt: folder.document_prompt(),
            text_prompt: folder.text_prompt(),
            max_query_length: longest,
            max_document_length: longest,
            chunk_tokens: DEFAULT_CHUNK_TOKENS,
            world: World::solo(),
        }
    }
}

/// Default number of tokens in a chunk: enough for full matrix products, few enough to stay in the caches of
/// a CPU.
pub const DEFAULT_CHUNK_TOKENS: usize = 2048;

/// Number of texts from which a progress bar is shown.
const PROGRESS_FROM: usize = 2000;

/// Turns texts into embeddings.
#[derive(Clone)]
pub struct Embedder<'a> {
    /// The encoder.
    pub model: &'a Model,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The prompt before queries.
    pub query_prompt: &'a str,
    /// The prompt before documents.
    pub document_prompt: &'a str,
    /// The prompt before [`Role::Text`].
    pub text_prompt: &'a str,
    /// Maximum length of a query in tokens, with the prompt and the special tokens.
    pub max_query_length: usize,
    /// Maximum length of any other text in tokens, with the prompt and the special tokens.
    pub max_document_length: usize,
    /// Maximum number of tokens in a chunk. A longer text is a chunk alone.
    pub chunk_tokens: usize,
    /// The ranks that share the work. All of them call with the same texts, and all get all embeddings.
    pub world: World,
}

impl Embedder<'_> {
    /// Truncates texts at `length` tokens in place of the model's own maximum; `None` changes nothing.
    ///
    /// # Errors
    /// The model has fewer positions.
    pub fn set_max_length(&mut self, length: Option<usize>) -> Result<()> {
        let Some(length) = length else { return Ok(()) };
        let positions = self.model.max_positions();
        if length > positions {
            return Err(Error::Usage(format!(
                "a maximum length of {length} tokens was given, but the model has {positions} positions"
            )));
        }
        (self.max_query_length, self.max_document_length) = (length, length);
        Ok(())
    }

    /// Embeds texts: (N, D) f32 in the order of the texts, on the CPU. Equal texts are encoded once and get
    /// the same bits.
    ///
    /// # Errors
    /// A text has no tokens, or memory runs out.
    pub fn encode(&self, texts: &[impl AsRef<str>], role: Role) -> Result<Tensor> {
        self.encode_with_progress(texts, role, &mut self.progress(role.plural(), texts.len()))
    }

    /// A progress bar for `count` texts or rows, if they are many; on the first rank alone.
    pub fn progress(&self, what: &'static str, count: usize) -> Option<Progress> {
        (count >= PROGRESS_FROM && self.world.is_rank_zero()).then(|| Progress::new(what, count as u64, 0))
    }

    /// As [`encode`](Self::encode), for a part of the texts that `progress` counts.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_progress(
        &self,
        texts: &[impl AsRef<str>],
        role: Role,
        progress: &mut Option<Progress>,
    ) -> Result<Tensor> {
        let (prompt, max_length) = match role {
            Role::Query => (self.query_prompt, self.max_query_length),
            Role::Document => (self.document_prompt, self.max_document_length),
            Role::Text => (self.text_prompt, self.max_document_length),
        };
        let (unique, indices) = unique_texts(texts);
        let include_prompt = self.model.folder().include_prompt;
        // The ranks balance the tokenising by bytes, then whole chunks by tokens. So a text is in the same
        // chunk, and has the same bits, for any number of ranks.
        let lengths: Vec<usize> = unique.iter().map(|text| text.len()).collect();
        let partition = Partition::balance(&lengths, self.world.size());
        let local: Vec<&str> = partition.of(self.world.rank()).iter().map(|&text| unique[text]).collect();
        let local = self.tokenizer.encode(&local, prompt, max_length, include_prompt)?;
        let mut sequences = self.world.all_gather_sequences(local, &partition)?;

        let all: Vec<usize> = (0..sequences.len()).collect();
        let chunks = chunk::cut(&sequences, &all, Limit::Tokens(self.chunk_tokens));
        let tokens = |chunk: &Vec<usize>| chunk.iter().map(|&index| sequences[index].ids.len()).sum();
        let partition =
            Partition::balance(&chunks.iter().map(tokens).collect::<Vec<usize>>(), self.world.size());
        let done = progress.as_ref().map_or(0, Progress::position);
        let mut local = Vec::new();
        for chunk in partition.of(self.world.rank()).iter().map(|&chunk| &chunks[chunk]) {
            let taken: Vec<_> = chunk.iter().map(|&index| take_sequence(&mut sequences[index])).collect();
            local.extend(self.model.embed(&taken, usize::MAX)?.flatten_all()?.to_vec1::<f32>()?);
            heartbeat::record_work();
            if let Some(progress) = progress {
                // The other ranks have done about as much.
                let chunk = (chunk.len() * self.world.size()) as u64;
                progress.advance(chunk.min((done + unique.len() as u64).saturating_sub(progress.position())));
            }
        }
        if let Some(progress) = progress {
            progress.advance((done + texts.len() as u64).saturating_sub(progress.position()));
        }

        let width = self.model.embedding_dim();
        let mut embeddings = vec![0f32; unique.len() * width];
        for (rows, chunks_of) in self.world.all_gather(&local)?.iter().zip(partition.ranks()) {
            let texts = chunks_of.iter().flat_map(|&chunk| &chunks[chunk]);
            for (row, &index) in rows.chunks_exact(width).zip(texts) {
                embeddings[index * width..][..width].copy_from_slice(row);
            }
        }
        if unique.len() < indices.len() {
            let row = |index: &usize| &embeddings[index * width..][..width];
            embeddings = indices.iter().flat_map(row).copied().collect();
        }
        Ok(Tensor::from_vec(embeddings, (indices.len(), width), &Device::Cpu)?)
    }
}

/// The distinct texts in order of first occurrence, and for each text its index among them.
fn unique_texts<T: AsRef<str>>(texts: &[T]) -> (Vec<&str>, Vec<usize>) {
    let mut known = HashMap::with_capacity(texts.len());
    let mut unique = Vec::new();
    let indices = texts.iter().map(T::as_ref).map(|text| {
        *known.entry(text).or_insert_with(|| {
            unique.push(text);
            unique.len() - 1
        })
    });
    let indices = indices.collect();
    (unique, indices)
}

/// Moves a sequence out of a list and leaves an empty one.
fn take_sequence(sequence: &mut Sequence) -> Sequence {
    Sequence { ids: std::mem::take(&mut sequence.ids), skip: sequence.skip }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one() {
        let (unique, indices) = unique_texts(&["b", "a", "b", "", "a"]);
        assert_eq!(unique, ["b", "a", ""]);
        assert_eq!(indices, [0, 1, 0, 2, 1]);
        assert_eq!(unique_texts::<&str>(&[]), (vec![], vec![]));
    }
}
