//! Exports the model of a training run, with prompts, lengths and model card from its configuration.

use std::path::Path;

use serde_json::{Map, Value};

use super::{DatasetInfo, ModelInfo};
use crate::Result;
use crate::config::{self, Config, DataSet, WeightInit};
use crate::model::Model;
use crate::model::peft::LoraConfig;

/// A training run and the metrics of its exported step.
#[derive(Clone, Copy, Debug)]
pub struct TrainedRun<'a> {
    /// Configuration of the run.
    pub config: &'a Config,
    /// The step whose parameters are exported.
    pub step: u64,
    /// Metrics before the first step, by name.
    pub before: &'a Map<String, Value>,
    /// Metrics after `step`, by name.
    pub after: &'a Map<String, Value>,
}

/// Options of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether LoRA adapters are merged into the weights. Otherwise only the adapters are written.
    pub merge: bool,
    /// Whether an existing folder is replaced.
    pub replace: bool,
}

/// Exports the model of a run to the folder `target`: its LoRA adapter if it has one, else the whole model.
///
/// # Errors
/// Those of [`super::write_model`].
pub fn write_run(model: &mut Model, trained: &TrainedRun, options: Options, target: &Path) -> Result<()> {
    let info = info(model, trained);
    let source = model.folder().clone();
    match model.lora() {
        // A random base exists in no folder, so an adapter alone could not be loaded.
        Some(lora) if !options.merge && trained.config.model.init == WeightInit::Pretrained => {
            let (adapters, dense) = (model.adapter_tensors(), model.dense_tensors());
            super::write_adapter(target, options.replace, &source, &info, lora, adapters, dense)
        }
        _ => super::write_model(target, options.replace, &source, &info, model.merged_tensors()?),
    }
}

fn info(model: &Model, trained: &TrainedRun) -> ModelInfo {
    let Config { name, model: section, data, .. } = trained.config;
    let folder = model.folder();
    let longest = model.max_length();
    let length = |own: Option<usize>| own.unwrap_or(longest);
    // A continued adapter keeps its base model.
    let base = folder.adapter.as_ref().and_then(|adapter| adapter.base_model());
    ModelInfo {
        name: name.clone(),
        base: base.unwrap_or(&section.path).to_owned(),
        width: model.embedding_dim(),
        hidden_width: model.hidden_size(),
        pooling: model.pooling(),
        normalize: model.normalize(),
        max_length: length(section.max_query_length).max(length(section.max_document_length)),
        query_prompt: data.common_prompt(|set| &set.query_prompt).unwrap_or(folder.query_prompt()).to_owned(),
        document_prompt: data
            .common_prompt(|set| &set.document_prompt)
            .unwrap_or(folder.document_prompt())
            .to_owned(),
        scores: scores(trained),
        training: training(trained, model.lora()),
        data: data.train.iter().map(dataset_info).collect(),
        loss: trained.config.loss.kind.to_string(),
        config: trained.config.to_yaml().unwrap_or_default(),
    }
}

fn scores(trained: &TrainedRun) -> Vec<(String, Option<f64>, Option<f64>)> {
    let TrainedRun { before, after, .. } = trained;
    let names = before.keys().chain(after.keys().filter(|name| !before.contains_key(*name)));
    let value = |map: &Map<String, Value>, name: &str| map.get(name).and_then(Value::as_f64);
    names.map(|name| (name.clone(), value(before, name), value(after, name))).collect()
}

fn dataset_info(set: &DataSet) -> DatasetInfo {
    let file = || set.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let rows = set.samples.map_or_else(|| "all".to_owned(), |samples| samples.to_string());
    DatasetInfo {
        name: if set.name.is_empty() { file() } else { set.name.clone() },
        rows: if set.weight == 1.0 { rows } else { format!("{rows}, {} times per epoch", set.weight) },
        query_prompt: set.query_prompt.clone(),
        document_prompt: set.document_prompt.clone(),
    }
}

fn training(trained: &TrainedRun, lora: Option<LoraConfig>) -> Vec<(String, String)> {
    let Config { seed, data, loss, training, evaluation, model, .. } = trained.config;
    let mut facts = vec![
        ("steps".to_owned(), format!("{} of {} rows each", trained.step, training.batch_size)),
        ("loss".to_owned(), loss_facts(loss)),
        ("hard negatives".to_owned(), format!("at most {} per row", data.negatives)),
        ("batching".to_owned(), data.batching.to_string()),
        ("learning rate".to_owned(), format!("{:e}, {}", training.learning_rate, training.schedule)),
        ("weight decay".to_owned(), training.weight_decay.to_string()),
        ("maximum gradient norm".to_owned(), training.max_grad_norm.to_string()),
        ("dtype".to_owned(), model.dtype.to_string()),
        ("seed".to_owned(), seed.to_string()),
    ];
    if let Some(patience) = evaluation.patience {
        let metric = &evaluation.metric;
        facts.push((
            "early stopping".to_owned(),
            format!("after {patience} evaluations without improvement of {metric}"),
        ));
    }
    if let Some(lora) = lora {
        let settings = format!("rank {}, alpha {}, dropout {}", lora.rank, lora.alpha, lora.dropout);
        facts.push(("LoRA".to_owned(), settings));
    }
    facts
}

/// The loss with the keys of `loss` that it reads: `triplet (distance euclidean, margin 5.0)`.
fn loss_facts(loss: &config::Loss) -> String {
    let section = serde_json::to_value(loss).unwrap_or_default();
    let value = |key: &&str| match &section[*key] {
        Value::Null => None,
        Value::String(text) => Some(format!("{key} {text}")),
        value => Some(format!("{key} {value}")),
    };
    let values: Vec<String> = loss.kind.traits().keys.iter().filter_map(value).collect();
    if values.is_empty() { loss.kind.to_string() } else { format!("{} ({})", loss.kind, values.join(", ")) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{Data, LossKind};

    #[test]
    fn a_prompt_is_written_only_if_all_data_have_it() {
        let prompt = |prompts: &[&str]| {
            let set = |prompt: &&str| DataSet { query_prompt: (*prompt).into(), ..DataSet::default() };
            let data = Data { train: prompts.iter().map(set).collect(), ..Data::default() };
            data.common_prompt(|set| &set.query_prompt).map(str::to_owned)
        };
        assert_eq!(prompt(&["query: ", "query: "]).as_deref(), Some("query: "));
        assert_eq!(prompt(&["query: ", "query: ", ""]), None);
        assert_eq!(prompt(&[""]), None, "the prompt of the folder stays");
        assert_eq!(prompt(&[]), None);
    }

    #[test]
    fn the_loss_is_described_by_the_keys_that_it_reads() {
        let facts = |kind| loss_facts(&config::Loss { kind, ..config::Loss::default() });
        assert_eq!(facts(LossKind::Triplet), "triplet (distance euclidean, margin 5.0)");
        assert_eq!(facts(LossKind::MarginMse), "margin_mse");
        let info_nce =
            "temperature 0.02, in_batch_negatives true, symmetric false, mask_known_positives true";
        assert_eq!(facts(LossKind::InfoNce), format!("info_nce ({info_nce})"));
    }

    #[test]
    fn scores_have_values_before_and_after() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let (before, after) = (map(json!({"a": 0.5, "b": 0.25})), map(json!({"c": 1.0, "a": 0.75})));
        let trained = TrainedRun { config: &Config::default(), step: 3, before: &before, after: &after };
        let expected = [("a", Some(0.5), Some(0.75)), ("b", Some(0.25), None), ("c", None, Some(1.0))];
        assert_eq!(scores(&trained), expected.map(|(name, before, after)| (name.to_owned(), before, after)));
    }
}
