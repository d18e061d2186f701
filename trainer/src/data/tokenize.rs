//! Texts to token ids, as sentence-transformers 6 does it: the prompt and the text in one string, not stripped, special
//! tokens by the tokenizer's own rule, cut to a length that includes them, never padded.
//!
//! `tokenizer.json` says nearly everything. Three settings that stand elsewhere change the ids: `do_lower_case`, which the
//! model folder tells ([`Tokenizer::open`]), `truncation_side` of `tokenizer_config.json`, and there `add_eos_token` of the
//! classes that honour it up to transformers 4, Llama's and its kin: e5-mistral was trained with the end token, and its
//! `tokenizer.json` does not append it. transformers 5 leaves it out. What is trained here is written with a
//! `tokenizer.json` that appends it ([`appending`]), so that every reader of it does the same.

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

/// What a folder may have of its tokenizer beside tokenizer_config.json.
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

/// Texts that one task tokenises: enough to pay for handing it out.
const TEXTS_PER_TASK: usize = 8;

/// A model folder's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    vocabulary: usize,
    special: BTreeSet<u32>,
    /// Special tokens that a text alone is given.
    added: usize,
    /// Appended to every text, after what `tokenizer.json` puts around it.
    end: Option<u32>,
    cut: TruncationDirection,
}

/// What is put before texts of one kind, and how many tokens of it pooling leaves out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    text: String,
    skip: u32,
}

impl Tokenizer {
    /// Reads the tokenizer of the model folder `folder`; `lower_case` is what the settings beside it say of that.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, or it is not one.
    pub fn open(folder: &Path, lower_case: bool) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(missing(folder));
        }
        let text = std::fs::read(&path).map_err(Error::read("read", &path))?;
        Self::new(path, &text, &settings(&folder.join("tokenizer_config.json"))?, lower_case)
    }

    /// As [`Self::open`]; but where weights are drawn from a seed, a folder needs no tokenizer: a token is a byte then.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for(folder: &Path, lower_case: bool, init: WeightInit) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if init == WeightInit::Random && !path.exists() {
            return Self::new(path, of_bytes().as_bytes(), &Value::Null, lower_case);
        }
        Self::open(folder, lower_case)
    }

    fn new(path: PathBuf, text: &[u8], settings: &Value, lower_case: bool) -> Result<Self> {
        let wrong = |e: tokenizers::Error| Error::file(&path, format!("this is not a tokenizer: {e}"));
        let mut inner = tokenizers::Tokenizer::from_bytes(text).map_err(wrong)?;
        let mut cut = inner.get_truncation().map_or(TruncationDirection::Right, |cut| cut.direction);
        match settings.get("truncation_side").and_then(Value::as_str) {
            Some("left") => cut = TruncationDirection::Left,
            Some("right") => cut = TruncationDirection::Right,
            _ => {}
        }
        inner.with_truncation(None).map_err(wrong)?;
        inner.with_padding(None);
        if lower_case {
            put_lower_case(&mut inner).map_err(wrong)?;
        }
        let vocabulary = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .collect();
        let end = end(&inner, settings).map_err(wrong)?;
        let added =
            inner.get_post_processor().map_or(0, |p| p.added_tokens(false)) + usize::from(end.is_some());
        Ok(Self { inner, path, vocabulary, special, added, end, cut })
    }

    /// Rows that an embedding needs: the highest id and one.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Tokenises `texts`, `prompt` before each, to at most `max_length` tokens with the special ones, in parallel.
    /// Without `include_prompt` pooling leaves the prompt's tokens out ([`Sequence::skip`]).
    ///
    /// # Errors
    /// `max_length` leaves no room for the text; a text has no tokens at all.
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
    /// As [`Self::encode`].
    pub fn prompt(&self, prompt: &str, max_length: usize, include_prompt: bool) -> Result<Prompt> {
        self.room(max_length)?;
        let mut skip = 0;
        if !include_prompt && !prompt.is_empty() {
            let alone = self.ids(prompt, max_length)?;
            // A closing special token stands after the text, not after the prompt.
            let closing = alone.last().is_some_and(|id| self.special.contains(id));
            skip = alone.len() - usize::from(closing);
        }
        Ok(Prompt { text: prompt.to_owned(), skip: skip as u32 })
    }

    /// Tokenises one text.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_one(&self, text: &str, prompt: &Prompt, max_length: usize) -> Result<Sequence> {
        let ids = match prompt.text.as_str() {
            "" => self.ids(text, max_length)?,
            before => self.ids(&[before, text].concat(), max_length)?,
        };
        if ids.is_empty() {
            let shown: String = text.chars().take(40).collect();
            return Err(Error::file(
                &self.path,
                format!("knows no token of the text `{}`", shown.escape_debug()),
            ));
        }
        // Where the prompt alone fills the length, the last token is left to be pooled.
        let skip = prompt.skip.min(ids.len() as u32 - 1);
        Ok(Sequence { ids, skip })
    }

    /// Tokens that a text may have besides the special ones.
    fn room(&self, max_length: usize) -> Result<usize> {
        max_length.checked_sub(self.added).filter(|room| *room > 0).ok_or_else(|| {
            let added = self.added;
            Error::file(
                &self.path,
                format!(
                    "adds {added} special tokens to a text, so a text of at most {max_length} tokens has no room for \
                     its own\nhint: model.max_query_length and model.max_document_length must be {} or more",
                    added + 1
                ),
            )
        })
    }

    fn ids(&self, text: &str, max_length: usize) -> Result<Vec<u32>> {
        let wrong = |e: tokenizers::Error| Error::file(&self.path, format!("cannot tokenise a text: {e}"));
        let room = self.room(max_length)?;
        let mut encoding = self.inner.encode_fast(text, false).map_err(wrong)?;
        encoding.truncate(room, 0, self.cut);
        // What was cut off would be given special tokens too.
        encoding.take_overflowing();
        let encoding = self.inner.post_process(encoding, None, true).map_err(wrong)?;
        Ok(encoding.get_ids().iter().copied().chain(self.end).collect())
    }
}

/// The end token that `tokenizer_config.json` asks for and `tokenizer.json` does not append.
fn end(tokenizer: &tokenizers::Tokenizer, settings: &Value) -> tokenizers::Result<Option<u32>> {
    const CLASSES: [&str; 4] = ["Llama", "CodeLlama", "Gemma", "Cohere"];
    let class = settings["tokenizer_class"].as_str().unwrap_or_default();
    let family = class.strip_suffix("Fast").unwrap_or(class).strip_suffix("Tokenizer").unwrap_or_default();
    if settings["add_eos_token"] != Value::Bool(true) || !CLASSES.contains(&family) {
        return Ok(None);
    }
    // A token is a text, or an object with its text.
    let token = &settings["eos_token"];
    let token = token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default();
    let id = tokenizer.token_to_id(token);
    let last = tokenizer.encode_fast("", true)?.get_ids().last().copied();
    Ok(id.filter(|_| last != id))
}

/// The text of a `tokenizer.json` that makes a token of every byte.
pub fn of_bytes() -> String {
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

/// The text of a folder's `tokenizer.json`, changed so that it appends the end token by itself; none where it need not be.
///
/// # Errors
/// As [`Tokenizer::open`].
pub fn appending(folder: &Path) -> Result<Option<String>> {
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
    let Some(id) = end(&tokenizer, &settings).map_err(wrong)? else { return Ok(None) };
    let token = tokenizer.id_to_token(id).unwrap_or_default();
    let source = std::fs::read_to_string(&path).map_err(Error::read("read", &path))?;
    // All but this field stays as it is, to the byte: a vocabulary's scores must not be rounded.
    let malformed = |e: serde_json::Error| Error::file(&path, format!("this is not JSON: {e}"));
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&source).map_err(malformed)?;
    let own = match fields.get("post_processor") {
        None => Value::Null,
        Some(own) => serde_json::from_str(own.get()).map_err(malformed)?,
    };
    let processors = ending(own, &token, id);
    let raw = RawValue::from_string(processors.to_string()).map_err(malformed)?;
    fields.insert("post_processor".to_owned(), raw);
    serde_json::to_string(&fields).map(Some).map_err(malformed)
}

/// A post-processor that does what `own` does and then appends `token`. A template that is there is extended: a second one would take
/// the special tokens of the first for a text of their own.
fn ending(mut own: Value, token: &str, id: u32) -> Value {
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
                    Some(one) => *one = ending(one.take(), token, id),
                    None => processors.push(ending(Value::Null, token, id)),
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
            ending(template, token, id)
        }
        Some(_) => json!({"type": "Sequence", "processors": [own, ending(Value::Null, token, id)]}),
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

/// A folder's JSON settings; a file that is absent says nothing.
fn settings(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = std::fs::read_to_string(path).map_err(Error::read("read", path))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("this is not JSON: {e}")))
}

/// Lower case before all else, unless the tokenizer's own normalisation has it.
fn put_lower_case(tokenizer: &mut tokenizers::Tokenizer) -> tokenizers::Result<()> {
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
