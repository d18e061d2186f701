//! Texts to embeddings, with a model as it is: no tape, no dropout.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use crate::comm::World;
use crate::data::batch::Sequence;
use crate::data::share::Share;
use crate::data::tokenize::Tokenizer;
use crate::model::chunk::{self, Limit};
use crate::model::{Folder, Model, Options, hub};
use crate::system::heartbeat;
use crate::system::progress::Progress;
use crate::{Error, Result};

/// What a text is to the model. It decides the prompt and the longest length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Something asked.
    Query,
    /// Something that may answer.
    Document,
    /// Neither: one of two texts that are compared.
    #[value(skip)]
    Text,
}

/// A model that is used as it is, with its tokenizer.
pub struct LoadedModel {
    /// The encoder.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl LoadedModel {
    /// Opens a model folder, or a model by its id on the hub.
    ///
    /// # Errors
    /// What [`hub::resolve`], [`Folder::open`], [`Model::open`] and [`Tokenizer::open`] refuse; a tokenizer that knows more
    /// tokens than the model.
    pub fn open(id_or_path: &str, options: &Options) -> Result<Self> {
        let folder = Folder::open(&hub::resolve_for(id_or_path, options.model.init)?)?;
        let tokenizer = Tokenizer::open_for(&folder.path, folder.lower_case, options.model.init)?;
        let model = Model::open(folder, options)?;
        if tokenizer.vocabulary() > model.vocabulary() {
            let (tokens, rows) = (tokenizer.vocabulary(), model.vocabulary());
            let message =
                format!("the tokenizer knows {tokens} tokens, the model's table has only {rows} rows");
            return Err(Error::file(&model.folder().path, message));
        }
        Ok(Self { model, tokenizer })
    }

    /// With the prompts and the longest length that the model folder names, alone.
    pub fn embedder(&self) -> Embedder<'_> {
        let folder = self.model.folder();
        let longest = folder.max_length.unwrap_or(usize::MAX).min(self.model.positions());
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

/// Tokens of a chunk where nothing else is said: enough for full matrix products, few enough to stay in the caches.
pub const DEFAULT_CHUNK_TOKENS: usize = 2048;

/// Texts to show progress for: fewer are done at once.
const PROGRESS_FROM: usize = 2000;

/// Turns texts into embeddings.
#[derive(Clone)]
pub struct Embedder<'a> {
    /// The encoder.
    pub model: &'a Model,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Put before queries.
    pub query_prompt: &'a str,
    /// Put before documents.
    pub document_prompt: &'a str,
    /// Put before texts that are neither.
    pub text_prompt: &'a str,
    /// Tokens of a query at most, the prompt and special tokens included.
    pub max_query_length: usize,
    /// Tokens of a document, or of any other text, at most.
    pub max_document_length: usize,
    /// Tokens that are encoded at once; a longer text is encoded alone.
    pub chunk_tokens: usize,
    /// Who shares the work. All of them encode the same texts, and all get the embeddings.
    pub world: World,
}

impl Embedder<'_> {
    /// Cuts texts at `length` tokens instead of the model's own limit, where that is given.
    ///
    /// # Errors
    /// The model has fewer positions.
    pub fn set_max_length(&mut self, length: Option<usize>) -> Result<()> {
        let Some(length) = length else { return Ok(()) };
        let positions = self.model.positions();
        if length > positions {
            return Err(Error::Usage(format!(
                "the model has {positions} positions, texts of {length} tokens do not fit"
            )));
        }
        (self.max_query_length, self.max_document_length) = (length, length);
        Ok(())
    }

    /// (N, D) f32, in the order of the texts. Equal texts are encoded once and have the same bits.
    ///
    /// # Errors
    /// The tokenizer knows no token of a text, or memory runs out.
    pub fn encode(&self, texts: &[impl AsRef<str>], role: Role) -> Result<Tensor> {
        self.encode_with_progress(texts, role, &mut self.progress(role, texts.len()))
    }

    /// What shows how far `count` texts have come, where they are many; on the first rank alone.
    pub fn progress(&self, role: Role, count: usize) -> Option<Progress> {
        let what = match role {
            Role::Query => "queries",
            Role::Document => "documents",
            Role::Text => "texts",
        };
        (count >= PROGRESS_FROM && self.world.first()).then(|| Progress::new(what, count as u64, 0))
    }

    /// As [`encode`](Self::encode), the texts being some of those that `progress` counts.
    ///
    /// # Errors
    /// As there.
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
        let (unique, places) = unique_texts(texts);
        let include_prompt = self.model.folder().include_prompt;
        // Ranks share the tokenising by the bytes, then whole chunks by their tokens: a text stands in the same chunk, and has
        // the same bits, however many they are.
        let lengths: Vec<usize> = unique.iter().map(|text| text.len()).collect();
        let share = Share::deal(&lengths, self.world.size());
        let local: Vec<&str> = share.of(self.world.rank()).iter().map(|&text| unique[text]).collect();
        let local = self.tokenizer.encode(&local, prompt, max_length, include_prompt)?;
        let mut sequences = self.world.sequences(local, &share)?;

        let all: Vec<usize> = (0..sequences.len()).collect();
        let chunks = chunk::cut(&sequences, &all, Limit::Tokens(self.chunk_tokens));
        let tokens = |chunk: &Vec<usize>| chunk.iter().map(|&index| sequences[index].ids.len()).sum();
        let share = Share::deal(&chunks.iter().map(tokens).collect::<Vec<usize>>(), self.world.size());
        let done = progress.as_ref().map_or(0, Progress::position);
        let mut local = Vec::new();
        for chunk in share.of(self.world.rank()).iter().map(|&chunk| &chunks[chunk]) {
            let taken: Vec<_> = chunk.iter().map(|&index| take_sequence(&mut sequences[index])).collect();
            local.extend(self.model.embed(&taken, usize::MAX)?.flatten_all()?.to_vec1::<f32>()?);
            heartbeat::beat();
            if let Some(progress) = progress {
                // The other ranks have come about as far.
                let chunk = (chunk.len() * self.world.size()) as u64;
                progress.advance(chunk.min((done + unique.len() as u64).saturating_sub(progress.position())));
            }
        }
        if let Some(progress) = progress {
            progress.advance((done + texts.len() as u64).saturating_sub(progress.position()));
        }

        let width = self.model.width();
        let mut embeddings = vec![0f32; unique.len() * width];
        for (rows, chunks_of) in self.world.all(&local)?.iter().zip(share.ranks()) {
            let texts = chunks_of.iter().flat_map(|&chunk| &chunks[chunk]);
            for (row, &index) in rows.chunks_exact(width).zip(texts) {
                embeddings[index * width..][..width].copy_from_slice(row);
            }
        }
        if unique.len() < places.len() {
            let row = |place: &usize| &embeddings[place * width..][..width];
            embeddings = places.iter().flat_map(row).copied().collect();
        }
        Ok(Tensor::from_vec(embeddings, (places.len(), width), &Device::Cpu)?)
    }
}

/// Each text once, and for each text its place among them.
fn unique_texts<T: AsRef<str>>(texts: &[T]) -> (Vec<&str>, Vec<usize>) {
    let mut known = HashMap::with_capacity(texts.len());
    let mut unique = Vec::new();
    let places = texts.iter().map(T::as_ref).map(|text| {
        *known.entry(text).or_insert_with(|| {
            unique.push(text);
            unique.len() - 1
        })
    });
    let places = places.collect();
    (unique, places)
}

/// The sequence itself; its place stays empty.
fn take_sequence(sequence: &mut Sequence) -> Sequence {
    Sequence { ids: std::mem::take(&mut sequence.ids), skip: sequence.skip }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one() {
        let (unique, places) = unique_texts(&["b", "a", "b", "", "a"]);
        assert_eq!(unique, ["b", "a", ""]);
        assert_eq!(places, [0, 1, 0, 2, 1]);
        assert_eq!(unique_texts::<&str>(&[]), (vec![], vec![]));
    }
}
