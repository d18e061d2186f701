//! Texts to token ids, as in sentence-transformers 6: prompt and text are one string, which is not stripped;
//! the tokenizer's post-processor adds special tokens; sequences are truncated to a length that includes
//! these, and never padded.
//!
//! Three settings outside of `tokenizer.json` change the ids: `do_lower_case` of the model folder, and
//! `truncation_side` and `add_eos_token` of `tokenizer_config.json`. Up to transformers 4 the Llama-like
//! tokenizer classes honour the last one: e5-mistral was trained with the end token, which its
//! `tokenizer.json` does not append; transformers 5 ignores the setting. Exported models have a
//! `tokenizer.json` that appends it ([`with_end_token`]), so that all readers agree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokenizers::normalizers::{Lowercase, NormalizerWrapper, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{PostProcessor, TruncationDirection};

use super::batch::Sequence;
use crate::config::WeightInit;
use crate::{Error, Result};

/// Files of a tokenizer that a model folder may have besides tokenizer_config.json.
pub const FILES: [&str; 9] = [
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
];

/// Texts per task: enough to outweigh the cost of scheduling it.
const TEXTS_PER_TASK: usize = 8;

/// The tokenizer of a model folder.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    vocabulary: usize,
    special: BTreeSet<u32>,
    /// Number of special tokens that are added to a text.
    added: usize,
    /// End token that is appended to every text after the post-processor of `tokenizer.json`.
    end: Option<u32>,
    truncation_side: TruncationDirection,
}

/// A prompt, and the number of its tokens that pooling leaves out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    text: String,
    skip: u32,
}

impl Tokenizer {
    /// Reads the tokenizer of a model folder; `lower_case` is `do_lower_case` of the folder's settings.
    ///
    /// # Errors
    /// `tokenizer.json` is missing or malformed.
    pub fn open(folder: &Path, lower_case: bool) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(missing(folder));
        }
        let text = std::fs::read(&path).map_err(Error::read("read", &path))?;
        Self::new(path, &text, &settings(&folder.join("tokenizer_config.json"))?, lower_case)
    }

    /// Like [`Self::open`], but a folder without a tokenizer gets one with a token per byte if the weights
    /// are random.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_for(folder: &Path, lower_case: bool, init: WeightInit) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if init == WeightInit::Random && !path.exists() {
            return Self::new(path, byte_level().as_bytes(), &Value::Null, lower_case);
        }
        Self::open(folder, lower_case)
    }

    fn new(path: PathBuf, text: &[u8], settings: &Value, lower_case: bool) -> Result<Self> {
        let wrong = |e: tokenizers::Error| Error::file(&path, format!("this is not a tokenizer: {e}"));
        let mut inner = tokenizers::Tokenizer::from_bytes(text).map_err(wrong)?;
        let mut truncation_side =
            inner.get_truncation().map_or(TruncationDirection::Right, |truncation| truncation.direction);
        match settings.get("truncation_side").and_then(Value::as_str) {
            Some("left") => truncation_side = TruncationDirection::Left,
            Some("right") => truncation_side = TruncationDirection::Right,
            _ => {}
        }
        inner.with_truncation(None).map_err(wrong)?;
        inner.with_padding(None);
        if lower_case {
            add_lower_case(&mut inner).map_err(wrong)?;
        }
        let vocabulary = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .collect();
        let end = end_token(&inner, settings).map_err(wrong)?;
        let added =
            inner.get_post_processor().map_or(0, |p| p.added_tokens(false)) + usize::from(end.is_some());
        Ok(Self { inner, path, vocabulary, special, added, end, truncation_side })
    }

    /// Number of rows that the embedding table needs: the highest token id plus one.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Tokenises `texts` in parallel, each after `prompt`, to at most `max_length` tokens, special tokens
    /// included. Without `include_prompt`, pooling leaves out the prompt's tokens ([`Sequence::skip`]).
    ///
    /// # Errors
    /// `max_length` leaves no room for a text; a text has no tokens.
    pub fn encode(
        &self,
        texts: &[impl AsRef<str> + Sync],
        prompt: &str,
        max_length: usize,
        include_prompt: bool,
    ) -> Result<Vec<Sequence>> {
        let prompt = self.prompt(prompt, max_length, include_prompt)?;
        texts
            .par_iter()
            .with_min_len(TEXTS_PER_TASK)
            .map(|text| self.encode_one(text.as_ref(), &prompt, max_length))
            .collect()
    }

    /// Prepares a prompt for [`Self::encode_one`].
    ///
    /// # Errors
    /// Those of [`Self::encode`].
    pub fn prompt(&self, prompt: &str, max_length: usize, include_prompt: bool) -> Result<Prompt> {
        self.room(max_length)?;
        let mut skip = 0;
        if !include_prompt && !prompt.is_empty() {
            let alone = self.ids(prompt, max_length)?;
            // A special token at the end follows the text and not the prompt.
            let closing = alone.last().is_some_and(|id| self.special.contains(id));
            skip = alone.len() - usize::from(closing);
        }
        Ok(Prompt { text: prompt.to_owned(), skip: skip as u32 })
    }

    /// Tokenises one text.
    ///
    /// # Errors
    /// Those of [`Self::encode`].
    pub fn encode_one(&self, text: &str, prompt: &Prompt, max_length: usize) -> Result<Sequence> {
        let ids = match prompt.text.as_str() {
            "" => self.ids(text, max_length)?,
            before => self.ids(&[before, text].concat(), max_length)?,
        };
        if ids.is_empty() {
            let shown: String = text.chars().take(40).collect();
            return Err(Error::file(
                &self.path,
                format!("has no token for the text `{}`", shown.escape_debug()),
            ));
        }
        // If the prompt alone fills the length, the last token remains to be pooled.
        let skip = prompt.skip.min(ids.len() as u32 - 1);
        Ok(Sequence { ids, skip })
    }

    /// Maximum number of tokens of a text without special tokens.
    fn room(&self, max_length: usize) -> Result<usize> {
        max_length.checked_sub(self.added).filter(|room| *room > 0).ok_or_else(|| {
            let added = self.added;
            Error::file(
                &self.path,
                format!(
                    "adds {added} special tokens to a text, so a length of {max_length} tokens leaves no room for the text\n\
                     hint: set model.max_query_length and model.max_document_length to {} or more",
                    added + 1
                ),
            )
        })
    }

    fn ids(&self, text: &str, max_length: usize) -> Result<Vec<u32>> {
        let wrong = |e: tokenizers::Error| Error::file(&self.path, format!("cannot tokenise a text: {e}"));
        let room = self.room(max_length)?;
        let mut encoding = self.inner.encode_fast(text, false).map_err(wrong)?;
        encoding.truncate(room, 0, self.truncation_side);
        // The post-processor would add special tokens to the truncated rest, too.
        encoding.take_overflowing();
        let encoding = self.inner.post_process(encoding, None, true).map_err(wrong)?;
        Ok(encoding.get_ids().iter().copied().chain(self.end).collect())
    }
}

/// The end token, if `tokenizer_config.json` asks for it and `tokenizer.json` does not append it.
fn end_token(tokenizer: &tokenizers::Tokenizer, settings: &Value) -> tokenizers::Result<Option<u32>> {
    const CLASSES: [&str; 4] = ["Llama", "CodeLlama", "Gemma", "Cohere"];
    let class = settings["tokenizer_class"].as_str().unwrap_or_default();
    let family = class.strip_suffix("Fast").unwrap_or(class).strip_suffix("Tokenizer").unwrap_or_default();
    if settings["add_eos_token"] != Value::Bool(true) || !CLASSES.contains(&family) {
        return Ok(None);
    }
    // A token is a string, or an object that contains it.
    let token = &settings["eos_token"];
    let token = token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default();
    let id = tokenizer.token_to_id(token);
    let last = tokenizer.encode_fast("", true)?.get_ids().last().copied();
    Ok(id.filter(|_| last != id))
}

/// A `tokenizer.json` with one token per byte.
pub fn byte_level() -> String {
    let bytes: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
    let vocabulary: Map<String, Value> =
        bytes.iter().enumerate().map(|(id, byte)| (byte.to_string(), id.into())).collect();
    json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    })
    .to_string()
}

/// A folder's `tokenizer.json`, changed so that it appends the end token; none if no change is needed.
///
/// # Errors
/// Those of [`Tokenizer::open`].
pub fn with_end_token(folder: &Path) -> Result<Option<String>> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Ok(None);
    }
    let settings = settings(&folder.join("tokenizer_config.json"))?;
    if settings["add_eos_token"] != Value::Bool(true) {
        return Ok(None);
    }
    let wrong = |e: tokenizers::Error| Error::file(&path, format!("this is not a tokenizer: {e}"));
    let tokenizer = tokenizers::Tokenizer::from_file(&path).map_err(wrong)?;
    let Some(id) = end_token(&tokenizer, &settings).map_err(wrong)? else { return Ok(None) };
    let token = tokenizer.id_to_token(id).unwrap_or_default();
    let source = std::fs::read_to_string(&path).map_err(Error::read("read", &path))?;
    // All other fields keep their bytes, because parsing would round the scores of a vocabulary.
    let malformed = |e: serde_json::Error| Error::file(&path, format!("this is not JSON: {e}"));
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&source).map_err(malformed)?;
    let own = match fields.get("post_processor") {
        None => Value::Null,
        Some(own) => serde_json::from_str(own.get()).map_err(malformed)?,
    };
    let processors = append_token(own, &token, id);
    let raw = RawValue::from_string(processors.to_string()).map_err(malformed)?;
    fields.insert("post_processor".to_owned(), raw);
    serde_json::to_string(&fields).map(Some).map_err(malformed)
}

/// A post-processor that appends `token` after `own`. An existing template is extended, because a second
/// template would treat the special tokens of the first one as text.
fn append_token(mut own: Value, token: &str, id: u32) -> Value {
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let special = |kind: &Value| json!({"SpecialToken": {"id": token, "type_id": kind}});
    match own["type"].as_str() {
        Some("TemplateProcessing") => {
            if let Some(Value::Array(single)) = own.get_mut("single") {
                single.push(special(&json!(0)));
            }
            if let Some(Value::Array(pair)) = own.get_mut("pair") {
                *pair = pair
                    .drain(..)
                    .flat_map(|piece| {
                        let end = piece.get("Sequence").map(|text| special(&text["type_id"]));
                        [Some(piece), end]
                    })
                    .flatten()
                    .collect();
            }
            own["special_tokens"][token] = json!({"id": token, "ids": [id], "tokens": [token]});
            own
        }
        Some("Sequence") => {
            if let Some(Value::Array(processors)) = own.get_mut("processors") {
                let template = |one: &Value| one["type"] == "TemplateProcessing";
                match processors.iter_mut().find(|one| template(one)) {
                    Some(one) => *one = append_token(one.take(), token, id),
                    None => processors.push(append_token(Value::Null, token, id)),
                }
            }
            own
        }
        None => {
            let template = json!({
                "type": "TemplateProcessing",
                "single": [text("A", 0)],
                "pair": [text("A", 0), text("B", 1)],
                "special_tokens": {},
            });
            append_token(template, token, id)
        }
        Some(_) => json!({"type": "Sequence", "processors": [own, append_token(Value::Null, token, id)]}),
    }
}

fn missing(folder: &Path) -> Error {
    let older = [
        "vocab.txt",
        "sentencepiece.bpe.model",
        "spiece.model",
        "tokenizer.model",
        "vocab.json",
        "tekken.json",
    ];
    let found = older.iter().find(|name| folder.join(name).is_file());
    let message = match found {
        Some(name) => format!(
            "has {name} but no tokenizer.json\nhint: write it once: python3 -c \"from transformers import \
             AutoTokenizer; AutoTokenizer.from_pretrained('{0}').save_pretrained('{0}')\"",
            folder.display()
        ),
        None => "has no tokenizer.json: expected a model folder of transformers or sentence-transformers"
            .to_owned(),
    };
    Error::file(folder, message)
}

/// JSON settings of a folder; null if there is no such file.
fn settings(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = std::fs::read_to_string(path).map_err(Error::read("read", path))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("this is not JSON: {e}")))
}

/// Makes lower-casing the first normalisation step, unless the tokenizer has such a step.
fn add_lower_case(tokenizer: &mut tokenizers::Tokenizer) -> tokenizers::Result<()> {
    let mut steps = vec![NormalizerWrapper::from(Lowercase)];
    match tokenizer.get_normalizer() {
        Some(NormalizerWrapper::Lowercase(_)) => return Ok(()),
        Some(NormalizerWrapper::Sequence(own)) => {
            let own: &[NormalizerWrapper] = own.as_ref();
            if own.iter().any(|step| matches!(step, NormalizerWrapper::Lowercase(_))) {
                return Ok(());
            }
            steps.extend(own.iter().cloned());
        }
        Some(own) => steps.push(own.clone()),
        None => {}
    }
    tokenizer.with_normalizer(Some(Normalizers::new(steps)))?;
    Ok(())
}

#[cfg(test)]
mod tests;
