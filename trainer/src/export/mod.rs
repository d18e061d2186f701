//! Model folders that other programs open: sentence-transformers, PEFT, text-embeddings-inference, vLLM.
//!
//! A folder is written under a temporary name beside its place and renamed when it is whole.

mod card;
mod peft;
mod run;
mod sentence_transformers;
mod weights;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

pub use self::run::{Options, Trained, write as run};
use crate::config::Pooling;
use crate::model::Folder;
use crate::model::adapter::Settings;
use crate::{Error, Result};

/// What is written about a model besides its weights.
#[derive(Clone, Debug)]
pub struct About {
    /// What it is called.
    pub name: String,
    /// The model that it was trained from: an id of the hub, or a folder.
    pub base: String,
    /// D of an embedding.
    pub width: usize,
    /// D of a hidden state.
    pub hidden_width: usize,
    /// How its hidden states become one embedding.
    pub pooling: Pooling,
    /// Whether embeddings have the length one.
    pub normalize: bool,
    /// The longest text in tokens.
    pub max_length: usize,
    /// What queries were trained with.
    pub query_prompt: String,
    /// What documents were trained with.
    pub document_prompt: String,
    /// Metrics: name, before the training, after it.
    pub scores: Vec<(String, Option<f64>, Option<f64>)>,
    /// How it was trained: setting, value.
    pub training: Vec<(String, String)>,
    /// What it was trained on.
    pub data: Vec<DataFacts>,
    /// The loss that was minimised.
    pub loss: String,
    /// The run's whole configuration, YAML.
    pub config: String,
}

/// A data set in the card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFacts {
    /// What it is called.
    pub name: String,
    /// How many of its rows were used.
    pub rows: String,
    /// Put before queries.
    pub query_prompt: String,
    /// Put before documents.
    pub document_prompt: String,
}

/// Writes a whole model at `target`: `tensors` by their names in a checkpoint. `source` is the folder that it was trained
/// from.
///
/// # Errors
/// Something is at `target` already, unless it is to be replaced; the disk is full or read-only.
pub fn model(
    target: &Path,
    replace: bool,
    source: &Folder,
    about: &About,
    tensors: Vec<(String, Tensor)>,
) -> Result<()> {
    publish(target, replace, |draft| {
        sentence_transformers::write(draft, source, about)?;
        sentence_transformers::write_config(draft, source)?;
        put_text(&draft.join("README.md"), &card::text(about, false)?)?;
        let tensors = sentence_transformers::write_dense(draft, source, tensors)?;
        weights::write(draft, &tensors, weights::SHARD)
    })
}

/// Writes a LoRA adapter at `target`: `adapters` by their modules' names, and `dense`, the tensors of the layers after
/// pooling, which PEFT does not know; as [`model`] else.
///
/// # Errors
/// As [`model`].
pub fn adapter(
    target: &Path,
    replace: bool,
    source: &Folder,
    about: &About,
    lora: Settings,
    adapters: Vec<(String, Tensor)>,
    dense: Vec<(String, Tensor)>,
) -> Result<()> {
    // A path is of use only from where it was written, unless it is whole.
    let base = match Path::new(&about.base).canonicalize() {
        Ok(path) => path.display().to_string(),
        Err(_) => about.base.clone(),
    };
    publish(target, replace, |draft| {
        sentence_transformers::write(draft, source, about)?;
        put_text(&draft.join("README.md"), &card::text(about, true)?)?;
        sentence_transformers::write_dense(draft, source, dense)?;
        peft::write(draft, &base, lora, adapters)
    })
}

/// Lets `write` fill a folder under a temporary name, then renames it to `target`.
fn publish(target: &Path, replace: bool, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if target.exists() && !replace && !crate::system::atomic::is_empty(target) {
        let message =
            "is there already, and nothing is overwritten\nhint: give another folder, or remove this one";
        return Err(Error::file(target, message));
    }
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Error::file(target, "is no name for a folder"));
    };
    let parent = if parent == Path::new("") { Path::new(".") } else { parent };
    let beside = |ending: &str| parent.join(format!(".{}.{ending}", name.display()));
    let (draft, old) = (beside("tmp"), beside("old"));
    // A process that was killed has left them.
    remove(&draft)?;
    remove(&old)?;
    fs::create_dir_all(&draft).map_err(Error::io("create", &draft))?;
    let written = write(&draft).and_then(|()| {
        if target.exists() {
            fs::rename(target, &old).map_err(Error::io("rename", target))?;
        }
        fs::rename(&draft, target).map_err(Error::io("rename", &draft))
    });
    if written.is_err() {
        // A full disk must not stay full of what it could not hold.
        let _ = fs::remove_dir_all(&draft);
    }
    written?;
    remove(&old)?;
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(Error::io("sync", parent))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// Writes JSON, indented by two as transformers does.
fn put(path: &Path, value: &Value) -> Result<()> {
    put_text(path, &format!("{value:#}\n"))
}

fn put_text(path: &Path, text: &str) -> Result<()> {
    File::create(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use candle_core::Device;
    use serde_json::json;

    use super::*;

    fn source() -> (tempfile::TempDir, Folder) {
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
        let found = Folder::open(folder.path()).unwrap();
        (folder, found)
    }

    fn about() -> About {
        About {
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
    fn a_model_folder_says_again_what_it_was_written_with() {
        let (_keep, source) = source();
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("new/model");
        let tensors = [("embeddings.weight".to_owned(), Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap())];
        model(&target, false, &source, &about(), tensors.into()).unwrap();
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

        let back = Folder::open(&target).unwrap();
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
        // Byte for byte: rounding a vocabulary's scores would change how texts are cut.
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
        let about = About { normalize: false, base: base.clone(), ..about() };
        adapter(
            &target,
            false,
            &source,
            &about,
            Settings::default(),
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
        let back = Folder::open(&target).unwrap();
        assert_eq!((back.normalize, &back.config), (Some(false), &source.config));
        assert_eq!(back.adapter.unwrap()["base_model_name_or_path"], base);
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_half_written_stays() {
        let (_keep, source) = source();
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("model");
        put_text(&target, "a file").unwrap();
        let error = model(&target, false, &source, &about(), vec![]).unwrap_err().to_string();
        assert!(error.contains("is there already"), "{error}");
        fs::remove_file(&target).unwrap();
        let failed = publish(&target, false, |draft| {
            put_text(&draft.join("a"), "b")?;
            Err(Error::file(draft, "no space left"))
        });
        assert!(failed.is_err());
        assert_eq!(names(place.path()), BTreeSet::new());
        // What a killed process left behind does not get into the next folder.
        fs::create_dir(place.path().join(".model.tmp")).unwrap();
        fs::write(place.path().join(".model.tmp/old"), "").unwrap();
        publish(&target, false, |_| Ok(())).unwrap();
        assert_eq!(names(&target), BTreeSet::new());
        publish(&target, true, |draft| put_text(&draft.join("new"), "")).unwrap();
        assert_eq!(names(&target), ["new".to_owned()].into());
        assert_eq!(names(place.path()), ["model".to_owned()].into());
    }
}
