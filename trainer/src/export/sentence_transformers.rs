//! Writes the files beside the weights, in the legacy schema of sentence-transformers.
//!
//! All versions of sentence-transformers read it, as do text-embeddings-inference and vLLM. The compact
//! schema of version 5.4 and later is misread or refused by these two.

use std::path::Path;

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use super::{ModelInfo, write_json};
use crate::config::Pooling;
use crate::data::tokenize;
use crate::model::ModelFolder;
use crate::system::atomic::write_flushed;
use crate::system::safetensors;
use crate::{Error, Result};

/// Writes all files but weights, model card and `config.json` into `folder`. `source` is the folder of the
/// base model.
pub(super) fn write(folder: &Path, source: &ModelFolder, info: &ModelInfo) -> Result<()> {
    let mut modules = vec![module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")];
    for dense in &source.dense {
        modules.push(module(modules.len(), &dense.name, "Dense"));
    }
    if info.normalize {
        let place = modules.len();
        modules.push(module(place, &format!("{place}_Normalize"), "Normalize"));
    }
    write_json(&folder.join("modules.json"), &Value::from(modules))?;

    let pooling = folder.join("1_Pooling");
    std::fs::create_dir(&pooling).map_err(Error::write("create", &pooling))?;
    write_json(
        &pooling.join("config.json"),
        &pooling_config(info.pooling, info.hidden_width, source.include_prompt),
    )?;

    let encoder = json!({ "max_seq_length": info.max_length, "do_lower_case": source.lower_case });
    write_json(&folder.join("sentence_bert_config.json"), &encoder)?;

    let mut prompts = source.prompts.clone();
    prompts.insert("query".into(), info.query_prompt.clone());
    prompts.insert("document".into(), info.document_prompt.clone());
    let named = json!({
        "prompts": prompts,
        "default_prompt_name": source.default_prompt,
        "similarity_fn_name": "cosine",
    });
    write_json(&folder.join("config_sentence_transformers.json"), &named)?;

    for name in tokenize::FILES {
        let from = source.path.join(name);
        if from.exists() {
            std::fs::copy(&from, folder.join(name)).map_err(Error::write("copy", from))?;
        }
    }
    if !source.path.join("tokenizer.json").exists() {
        write_flushed(&folder.join("tokenizer.json"), tokenize::byte_level())?;
    }
    if let Some(text) = tokenize::with_end_token(&source.path)? {
        write_flushed(&folder.join("tokenizer.json"), text)?;
    }
    let name = "tokenizer_config.json";
    let from = source.path.join(name);
    if from.exists() {
        let text = std::fs::read(&from).map_err(Error::read("read", &from))?;
        let mut config: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|error| Error::file(&from, format!("malformed: {error}")))?;
        config.insert("model_max_length".into(), info.max_length.into());
        write_json(&folder.join(name), &config.into())?;
    }
    Ok(())
}

/// Writes the dense layers after pooling: the tensors whose names begin with the name of a dense layer's
/// folder. Returns the other tensors, those of the encoder.
pub(super) fn write_dense(
    folder: &Path,
    source: &ModelFolder,
    tensors: Vec<(String, Tensor)>,
) -> Result<Vec<(String, Tensor)>> {
    let mut rest = tensors;
    for dense in &source.dense {
        let place = folder.join(&dense.name);
        std::fs::create_dir(&place).map_err(Error::write("create", &place))?;
        let config = json!({
            "in_features": dense.inputs,
            "out_features": dense.outputs,
            "bias": dense.bias,
            "activation_function": dense.activation.name(),
        });
        write_json(&place.join("config.json"), &config)?;
        let prefix = format!("{}.", dense.name);
        let (own, others): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|(name, _)| name.starts_with(&prefix));
        rest = others;
        let own: Vec<_> =
            own.into_iter().map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor)).collect();
        safetensors::write(&place.join("model.safetensors"), &own)?;
    }
    Ok(rest)
}

fn module(index: usize, path: &str, kind: &str) -> Value {
    let kind = format!("sentence_transformers.models.{kind}");
    json!({ "idx": index, "name": index.to_string(), "path": path, "type": kind })
}

fn pooling_config(pooling: Pooling, width: usize, include_prompt: bool) -> Value {
    json!({
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == Pooling::Cls,
        "pooling_mode_mean_tokens": pooling == Pooling::Mean,
        "pooling_mode_max_tokens": false,
        "pooling_mode_mean_sqrt_len_tokens": false,
        "pooling_mode_weightedmean_tokens": false,
        "pooling_mode_lasttoken": pooling == Pooling::LastToken,
        "include_prompt": include_prompt,
    })
}

/// Writes `config.json` of the encoder. An adapter folder must not have one: transformers would open it as a
/// whole model and not look for the adapter's base.
pub(super) fn write_config(folder: &Path, source: &ModelFolder) -> Result<()> {
    write_json(&folder.join("config.json"), &encoder_config(source.config.clone()))
}

/// Adapts `config.json` to the exported weights: f32, and an encoder without a head.
fn encoder_config(mut config: Value) -> Value {
    for key in ["torch_dtype", "dtype"] {
        if let Some(dtype) = config.get_mut(key) {
            *dtype = "float32".into();
        }
    }
    if let Some(Value::Array(architectures)) = config.get_mut("architectures") {
        for architecture in architectures {
            // BertForMaskedLM → BertModel
            if let Some((family, _)) = architecture.as_str().and_then(|name| name.split_once("For")) {
                *architecture = format!("{family}Model").into();
            }
        }
    }
    config
}
