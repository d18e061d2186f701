//! Writes a model folder without weights: the configuration of a small BERT, and a tokenizer built from
//! training texts.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, Tokenizer,
};

use crate::wordpiece::{SPECIAL, train};
use crate::{Result, json_file};

/// Maximum size of the vocabulary.
const VOCABULARY: usize = 4096;
/// Hidden size.
const WIDTH: usize = 128;
/// Number of layers.
const LAYERS: usize = 3;
/// Number of attention heads.
const HEADS: usize = 4;
/// Intermediate size.
const FEED_FORWARD: usize = 512;
/// Number of positions, the maximum number of tokens of a text.
const POSITIONS: usize = 64;

/// Writes `config.json`, the tokenizer and the modules of a sentence-transformers folder.
pub(crate) fn write<'a>(folder: &Path, texts: impl Iterator<Item = &'a str>) -> Result {
    let vocabulary = train(&words(texts)?, VOCABULARY);
    json_file(&folder.join("config.json"), &config(vocabulary.len()))?;
    tokenizer(&vocabulary)?.save(folder.join("tokenizer.json"), true)?;
    json_file(
        &folder.join("tokenizer_config.json"),
        &json!({"tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": POSITIONS,
                "pad_token": SPECIAL[0], "unk_token": SPECIAL[1],
                "cls_token": SPECIAL[2], "sep_token": SPECIAL[3],
                "mask_token": SPECIAL[4]}),
    )?;
    json_file(
        &folder.join("modules.json"),
        &json!([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]),
    )?;
    json_file(
        &folder.join("1_Pooling/config.json"),
        &json!({
            "word_embedding_dimension": WIDTH, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true,
        }),
    )?;
    json_file(
        &folder.join("sentence_bert_config.json"),
        &json!({"max_seq_length": POSITIONS, "do_lower_case": false}),
    )
}

fn config(vocabulary: usize) -> Value {
    json!({
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    })
}

/// Lower-cases text and removes accents, so that `São` and `sao` are equal.
fn normalizer() -> BertNormalizer {
    BertNormalizer::new(true, true, Some(true), true)
}

/// Counts the words of texts, split as the tokenizer splits them.
fn words<'a>(texts: impl Iterator<Item = &'a str>) -> Result<BTreeMap<String, usize>> {
    let mut words = BTreeMap::new();
    for text in texts {
        let mut normalized = NormalizedString::from(text);
        normalizer().normalize(&mut normalized)?;
        let mut split = PreTokenizedString::from(normalized);
        BertPreTokenizer.pre_tokenize(&mut split)?;
        for (word, ..) in split.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            *words.entry(word.to_owned()).or_default() += 1;
        }
    }
    Ok(words)
}

fn tokenizer(vocabulary: &[String]) -> Result<Tokenizer> {
    let id = |token: &str| vocabulary.iter().position(|v| v == token).unwrap_or_default() as u32;
    let (cls, sep) = ((SPECIAL[2].to_owned(), id(SPECIAL[2])), (SPECIAL[3].to_owned(), id(SPECIAL[3])));
    // Through JSON, because the builder takes a hash map of another crate.
    let entries: Map<String, Value> =
        vocabulary.iter().zip(0..).map(|(v, id)| (v.clone(), json!(id))).collect();
    let model: WordPiece = serde_json::from_str(
        &json!({
            "type": "WordPiece",
            "unk_token": SPECIAL[1],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": entries,
        })
        .to_string(),
    )?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(normalizer()))?
        .with_pre_tokenizer(Some(BertPreTokenizer))
        .with_post_processor(Some(BertProcessing::new(sep, cls)));
    tokenizer.add_special_tokens(SPECIAL.map(|s| AddedToken::from(s, true)))?;
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_split_as_bert_splits() {
        let texts = ["Straße nach Köln", "Straße", "nach", "nach Köln"];
        let vocabulary = train(&words(texts.into_iter()).unwrap(), 100);
        let encoding = tokenizer(&vocabulary).unwrap().encode("Nach koln, strasse", true).unwrap();
        assert_eq!(encoding.get_tokens()[..3], ["[CLS]", "nach", "koln"]);
        assert_eq!(encoding.get_tokens().last().unwrap(), "[SEP]");
        assert_eq!(encoding.get_ids()[0], 2);
    }
}
