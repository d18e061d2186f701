//! Exports models in the formats of sentence-transformers and PEFT, which text-embeddings-inference and vLLM
//! open too.
//!
//! A folder is written under a temporary name and then renamed, so that it is never incomplete.

mod card;
mod peft;
mod run;
mod sentence_transformers;
mod weights;

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

pub use self::run::{Options, TrainedRun, write_run};
use crate::config::Pooling;
use crate::model::ModelFolder;
use crate::model::peft::LoraConfig;
use crate::system::atomic::{self, write_flushed};
use crate::{Error, Result};

/// What an exported folder says about its model, beside weights and tokenizer.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Name of the model.
    pub name: String,
    /// The base model: an id of the hub, or a folder.
    pub base: String,
    /// Width D of an embedding.
    pub width: usize,
    /// Width of a hidden state.
    pub hidden_width: usize,
    /// How hidden states become one embedding.
    pub pooling: Pooling,
    /// Whether embeddings are scaled to length 1.
    pub normalize: bool,
    /// Number of tokens at which texts are truncated.
    pub max_length: usize,
    /// Prompt before queries.
    pub query_prompt: String,
    /// Prompt before documents.
    pub document_prompt: String,
    /// Metrics: name, value before training, value after.
    pub scores: Vec<(String, Option<f64>, Option<f64>)>,
    /// Training settings: name, value.
    pub training: Vec<(String, String)>,
    /// Training data sets.
    pub data: Vec<DatasetInfo>,
    /// Name of the loss.
    pub loss: String,
    /// The whole configuration of the run, as YAML.
    pub config: String,
}

/// A training data set, as the model card shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetInfo {
    /// Name of the data set.
    pub name: String,
    /// Number of rows used, as text.
    pub rows: String,
    /// Prompt before queries.
    pub query_prompt: String,
    /// Prompt before documents.
    pub document_prompt: String,
}

/// Writes a whole model to the folder `target`: `tensors` with their names in a checkpoint. `source` is the
/// folder of the base model.
///
/// # Errors
/// `target` exists, is not empty, and `replace` is false; the disk is full or read-only.
pub fn write_model(
    target: &Path,
    replace: bool,
    source: &ModelFolder,
    info: &ModelInfo,
    tensors: Vec<(String, Tensor)>,
) -> Result<()> {
    publish(target, replace, |draft| {
        sentence_transformers::write(draft, source, info)?;
        sentence_transformers::write_config(draft, source)?;
        write_flushed(&draft.join("README.md"), card::text(info, false)?)?;
        let tensors = sentence_transformers::write_dense(draft, source, tensors)?;
        weights::write(draft, &tensors, weights::MAX_SHARD_BYTES)
    })
}

/// Writes a LoRA adapter to the folder `target`: `adapters` with the names of their modules, and `dense`, the
/// tensors of the dense layers after pooling, which PEFT does not store. The rest is as in [`write_model`].
///
/// # Errors
/// Those of [`write_model`].
pub fn write_adapter(
    target: &Path,
    replace: bool,
    source: &ModelFolder,
    info: &ModelInfo,
    lora: LoraConfig,
    adapters: Vec<(String, Tensor)>,
    dense: Vec<(String, Tensor)>,
) -> Result<()> {
    // An absolute path, so that the adapter finds its base from any working directory.
    let base = match Path::new(&info.base).canonicalize() {
        Ok(path) => path.display().to_string(),
        Err(_) => info.base.clone(),
    };
    publish(target, replace, |draft| {
        sentence_transformers::write(draft, source, info)?;
        write_flushed(&draft.join("README.md"), card::text(info, true)?)?;
        sentence_transformers::write_dense(draft, source, dense)?;
        peft::write(draft, &base, lora, adapters)
    })
}

/// Calls `write` with a temporary folder, then renames it to `target`.
fn publish(target: &Path, replace: bool, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if target.exists() && !replace && !atomic::is_empty(target) {
        let message = "already exists\nhint: give another folder or delete it";
        return Err(Error::file(target, message));
    }
    atomic::write_dir(target, write)
}

/// Writes JSON with an indent of two, as transformers does.
fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_flushed(path, format!("{value:#}\n"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use candle_core::Device;
    use serde_json::json;

    use super::*;

    fn source() -> (tempfile::TempDir, ModelFolder) {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        put(
            "config.json",
            r#"{"architectures": ["BertForMaskedLM"], "torch_dtype": "float16", "hidden_size": 2}"#,
        );
        put("tokenizer.json", r#"{"truncation": {"max_length": 128},   "x": 0.1}"#);
        put("tokenizer_config.json", r#"{"model_max_length": 512, "z": 1, "a": 2}"#);
        put("vocab.txt", "[PAD]");
        put("sentence_bert_config.json", r#"{"max_seq_length": 64, "do_lower_case": true}"#);
        put("config_sentence_transformers.json", r#"{"prompts": {"query": "old", "sts": "s: "}}"#);
        put("pytorch_model.bin", "");
        let found = ModelFolder::open(folder.path()).unwrap();
        (folder, found)
    }

    fn info() -> ModelInfo {
        ModelInfo {
            name: "little".into(),
            base: "org/name".into(),
            width: 2,
            hidden_width: 2,
            pooling: Pooling::LastToken,
            normalize: true,
            max_length: 192,
            query_prompt: "query: ".into(),
            document_prompt: String::new(),
            scores: vec![
                ("set_cosine_ndcg@10".into(), Some(0.25), Some(0.5)),
                ("late".into(), None, Some(1.0)),
            ],
            training: vec![("steps".into(), "10".into())],
            data: vec![],
            loss: String::new(),
            config: String::new(),
        }
    }

    fn names(folder: &Path) -> BTreeSet<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn read(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_model_folder_opens_with_the_settings_it_was_written_with() {
        let (_keep, source) = source();
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("new/model");
        let tensors = [("embeddings.weight".to_owned(), Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap())];
        write_model(&target, false, &source, &info(), tensors.into()).unwrap();
        let expected = [
            "1_Pooling",
            "README.md",
            "config.json",
            "config_sentence_transformers.json",
            "model.safetensors",
            "modules.json",
            "sentence_bert_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ];
        assert_eq!(names(&target), expected.map(String::from).into());
        assert_eq!(names(target.parent().unwrap()), ["model".to_owned()].into());

        let back = ModelFolder::open(&target).unwrap();
        assert_eq!((back.pooling, back.normalize), (Some(Pooling::LastToken), Some(true)));
        assert_eq!((back.max_length, back.lower_case, back.include_prompt), (Some(192), true, true));
        assert_eq!(
            (back.query_prompt(), back.document_prompt(), back.prompts["sts"].as_str()),
            ("query: ", "", "s: ")
        );
        assert_eq!(
            back.config,
            json!({"architectures": ["BertModel"], "torch_dtype": "float32", "hidden_size": 2})
        );
        assert_eq!(read(&target.join("1_Pooling/config.json"))["pooling_mode_lasttoken"], true);
        assert_eq!(read(&target.join("tokenizer_config.json"))["model_max_length"], 192);
        // Byte for byte: rounding the scores of a vocabulary would change the tokens.
        assert_eq!(
            fs::read(target.join("tokenizer.json")).unwrap(),
            fs::read(source.path.join("tokenizer.json")).unwrap()
        );
        let card = fs::read_to_string(target.join("README.md")).unwrap();
        assert!(card.contains("base_model: org/name\n"), "{card}");
        assert!(card.contains("| set_cosine_ndcg@10 | 0.2500 | 0.5000 | +0.2500 |"), "{card}");
    }

    #[test]
    fn an_adapter_folder_has_no_weights_of_the_base() {
        let (_keep, source) = source();
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("adapter");
        let zeros = Tensor::zeros((1, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let base = source.path.canonicalize().unwrap().display().to_string();
        let info = ModelInfo { normalize: false, base: base.clone(), ..info() };
        write_adapter(
            &target,
            false,
            &source,
            &info,
            LoraConfig::default(),
            vec![("q.lora_A.weight".into(), zeros)],
            vec![],
        )
        .unwrap();
        let found = names(&target);
        assert!(
            found.contains("adapter_config.json") && found.contains("adapter_model.safetensors"),
            "{found:?}"
        );
        assert!(!found.contains("model.safetensors") && !found.contains("config.json"), "{found:?}");
        let back = ModelFolder::open(&target).unwrap();
        assert_eq!((back.normalize, &back.config), (Some(false), &source.config));
        assert_eq!(back.adapter.unwrap().base_model(), Some(base.as_str()));
    }

    #[test]
    fn nothing_is_overwritten_and_no_incomplete_folder_stays() {
        let (_keep, source) = source();
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("model");
        write_flushed(&target, "a file").unwrap();
        let error = write_model(&target, false, &source, &info(), vec![]).unwrap_err().to_string();
        assert!(error.contains("already exists"), "{error}");
        fs::remove_file(&target).unwrap();
        let failed = publish(&target, false, |draft| {
            write_flushed(&draft.join("a"), "b")?;
            Err(Error::file(draft, "no space left"))
        });
        assert!(failed.is_err());
        assert_eq!(names(place.path()), BTreeSet::new());
        // Files that a killed process left do not get into the next folder.
        fs::create_dir(place.path().join(".model.tmp")).unwrap();
        fs::write(place.path().join(".model.tmp/old"), "").unwrap();
        publish(&target, false, |_| Ok(())).unwrap();
        assert_eq!(names(&target), BTreeSet::new());
        publish(&target, true, |draft| write_flushed(&draft.join("new"), "")).unwrap();
        assert_eq!(names(&target), ["new".to_owned()].into());
        assert_eq!(names(place.path()), ["model".to_owned()].into());
    }
}
