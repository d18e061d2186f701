//! The model of a run: what its configuration says becomes the folder's prompts, lengths and card.

use std::path::Path;

use serde_json::{Map, Value};

use super::{About, DataFacts};
use crate::Result;
use crate::config::{Config, DataSet, WeightInit};
use crate::model::Model;
use crate::model::adapter::Settings;

/// What a run has come to.
#[derive(Clone, Copy, Debug)]
pub struct Trained<'a> {
    /// How it was trained.
    pub config: &'a Config,
    /// The step whose parameters the model has.
    pub step: u64,
    /// Metrics before the first step.
    pub before: &'a Map<String, Value>,
    /// Metrics after `step`.
    pub after: &'a Map<String, Value>,
}

/// How a folder is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether adapters are merged into the weights they belong to; else only they are written.
    pub merge: bool,
    /// Whether a folder at the same place is replaced.
    pub replace: bool,
}

/// Writes the model of a run at `target`: whole, or its adapters if it has any.
///
/// # Errors
/// A folder at `target` that is not to be replaced; a full or read-only disk.
pub fn write(model: &mut Model, trained: &Trained, options: Options, target: &Path) -> Result<()> {
    let about = about(model, trained);
    let source = model.folder().clone();
    match model.lora() {
        // Weights from a seed lie in no folder, so the adapters alone would belong to nothing.
        Some(lora) if !options.merge && trained.config.model.init == WeightInit::Pretrained => {
            let (adapters, dense) = (model.adapters(), model.dense());
            super::adapter(target, options.replace, &source, &about, lora, adapters, dense)
        }
        _ => super::model(target, options.replace, &source, &about, model.tensors()?),
    }
}

fn about(model: &Model, trained: &Trained) -> About {
    let Config { name, model: section, data, .. } = trained.config;
    let folder = model.folder();
    let longest = folder.max_length.unwrap_or(usize::MAX).min(model.positions());
    let length = |own: Option<usize>| own.unwrap_or(longest);
    // An adapter that was trained further belongs to the same model as before.
    let base = folder.adapter.as_ref().and_then(|adapter| adapter["base_model_name_or_path"].as_str());
    About {
        name: name.clone(),
        base: base.unwrap_or(&section.path).to_owned(),
        width: model.width(),
        hidden_width: model.hidden_width(),
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
        data: data.train.iter().map(facts).collect(),
        loss: trained.config.loss.kind.to_string(),
        config: trained.config.to_yaml().unwrap_or_default(),
    }
}

fn scores(trained: &Trained) -> Vec<(String, Option<f64>, Option<f64>)> {
    let Trained { before, after, .. } = trained;
    let names = before.keys().chain(after.keys().filter(|name| !before.contains_key(*name)));
    let value = |map: &Map<String, Value>, name: &str| map.get(name).and_then(Value::as_f64);
    names.map(|name| (name.clone(), value(before, name), value(after, name))).collect()
}

fn facts(set: &DataSet) -> DataFacts {
    let file = || set.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let rows = set.samples.map_or_else(|| "all".to_owned(), |samples| samples.to_string());
    DataFacts {
        name: if set.name.is_empty() { file() } else { set.name.clone() },
        rows: if set.weight == 1.0 { rows } else { format!("{rows}, {} times an epoch", set.weight) },
        query_prompt: set.query_prompt.clone(),
        document_prompt: set.document_prompt.clone(),
    }
}

fn training(trained: &Trained, lora: Option<Settings>) -> Vec<(String, String)> {
    let Config { seed, data, loss, training, evaluation, model, .. } = trained.config;
    let mut of_loss = format!("{}, temperature {}", loss.kind, loss.temperature);
    for (told, what) in [
        (!loss.in_batch_negatives, "without in-batch negatives"),
        (loss.symmetric, "symmetric"),
        (!loss.mask_known_positives, "known positives not masked"),
    ] {
        if told {
            of_loss = format!("{of_loss}, {what}");
        }
    }
    let mut facts = vec![
        ("steps".to_owned(), format!("{} of {} rows", trained.step, training.batch_size)),
        ("loss".to_owned(), of_loss),
        ("hard negatives".to_owned(), format!("{} a row at most", data.negatives)),
        ("batches".to_owned(), data.batching.to_string()),
        ("learning rate".to_owned(), format!("{:e}, {}", training.learning_rate, training.schedule)),
        ("weight decay".to_owned(), training.weight_decay.to_string()),
        ("largest gradient norm".to_owned(), training.max_grad_norm.to_string()),
        ("computed in".to_owned(), model.dtype.to_string()),
        ("seed".to_owned(), seed.to_string()),
    ];
    if let Some(patience) = evaluation.patience {
        let metric = &evaluation.metric;
        facts.push((
            "early stopping".to_owned(),
            format!("after {patience} evaluations without a better {metric}"),
        ));
    }
    if let Some(lora) = lora {
        let facts_of_lora = format!("rank {}, alpha {}, dropout {}", lora.rank, lora.alpha, lora.dropout);
        facts.push(("LoRA".to_owned(), facts_of_lora));
    }
    facts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Data;

    #[test]
    fn a_prompt_is_written_only_if_all_data_have_it() {
        let prompt = |prompts: &[&str]| {
            let set = |prompt: &&str| DataSet { query_prompt: (*prompt).into(), ..DataSet::default() };
            let data = Data { train: prompts.iter().map(set).collect(), ..Data::default() };
            data.common_prompt(|set| &set.query_prompt).map(str::to_owned)
        };
        assert_eq!(prompt(&["query: ", "query: "]).as_deref(), Some("query: "));
        assert_eq!(prompt(&["query: ", "query: ", ""]), None);
        assert_eq!(prompt(&[""]), None, "the folder's stays");
        assert_eq!(prompt(&[]), None);
    }

    #[test]
    fn scores_stand_before_and_after() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let (before, after) = (map(json!({"a": 0.5, "b": 0.25})), map(json!({"c": 1.0, "a": 0.75})));
        let trained = Trained { config: &Config::default(), step: 3, before: &before, after: &after };
        let expected = [("a", Some(0.5), Some(0.75)), ("b", Some(0.25), None), ("c", None, Some(1.0))];
        assert_eq!(scores(&trained), expected.map(|(name, before, after)| (name.to_owned(), before, after)));
    }
}
