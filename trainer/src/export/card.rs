//! Writes the model card, `README.md`: the same form as that of sentence-transformers, which the hub
//! displays.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::ModelInfo;
use crate::config::Pooling;
use crate::{Error, Result};

/// Endings of the metrics in the table. The front matter has all metrics.
const SHOWN_METRICS: [&str; 8] = [
    "accuracy@1",
    "recall@10",
    "ndcg@10",
    "mrr@10",
    "map@100",
    "_accuracy",
    "pearson_cosine",
    "spearman_cosine",
];

/// Returns the text of the card. `adapter` tells that the folder has a LoRA adapter, not the whole model.
///
/// # Errors
/// The front matter cannot be written as YAML.
pub(super) fn text(info: &ModelInfo, adapter: bool) -> Result<String> {
    let ModelInfo { name, base, width, max_length, .. } = info;
    // The hub accepts only an id here, not a path.
    let on_hub = !Path::new(base).exists();
    let front_matter = serde_yaml::to_string(&front_matter(info, on_hub, adapter))
        .map_err(|error| Error::Bug(format!("the model card of {name}: {error}")))?;
    let base = if on_hub { format!("[{base}](https://huggingface.co/{base})") } else { code(base) };
    let pooling = match info.pooling {
        Pooling::Mean => "the mean of the tokens",
        Pooling::Cls => "the first token",
        Pooling::LastToken => "the last token",
    };
    let normalized = if info.normalize { ", scaled to length 1" } else { "" };
    let what = if adapter { "a LoRA adapter of" } else { "fine-tuned from" };
    let title = line(name);
    let mut card = format!(
        "---\n{front_matter}---\n\n# {title}\n\nA text-embedding model, {what} {base} with lodestone. It maps texts to \
         vectors of {width} dimensions ({pooling}{normalized}), which are compared by cosine similarity. Texts are \
         truncated at {max_length} tokens.\n\n\
         ## Usage\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n\
         model = SentenceTransformer(\"path/to/this/folder\")\n\
         queries = model.encode_query([\"What is the melting point of iron?\"])\n\
         documents = model.encode_document([\"Iron melts at 1538 °C.\"])\n\
         print(model.similarity(queries, documents))\n```\n",
    );
    for (role, prompt) in [("Queries", &info.query_prompt), ("Documents", &info.document_prompt)] {
        if !prompt.is_empty() {
            let _ = write!(card, "\n{role} are prefixed with {}.\n", code(prompt));
        }
    }
    if !info.scores.is_empty() {
        evaluation(&mut card, info);
    }
    if !info.training.is_empty() || !info.data.is_empty() {
        card.push_str("\n## Training\n");
    }
    if !info.data.is_empty() {
        card.push_str("\n| Data set | Rows | Query prompt | Document prompt |\n|---|---:|---|---|\n");
        for set in &info.data {
            let prompt =
                |prompt: &str| if prompt.is_empty() { "–".to_owned() } else { cell(&code(prompt)) };
            let (query, document) = (prompt(&set.query_prompt), prompt(&set.document_prompt));
            let _ = writeln!(card, "| {} | {} | {query} | {document} |", cell(&set.name), set.rows);
        }
    }
    if !info.training.is_empty() {
        card.push('\n');
    }
    for (setting, value) in &info.training {
        let _ = writeln!(card, "- {setting}: {}", line(value));
    }
    if !info.config.is_empty() {
        let fence = "`".repeat(longest_run(&info.config).max(2) + 1);
        let _ = write!(
            card,
            "\n<details><summary>Configuration</summary>\n\n{fence}yaml\n{}\n{fence}\n\n</details>\n",
            info.config.trim_end()
        );
    }
    let _ = write!(card, "\nTrained with lodestone {}.\n", env!("CARGO_PKG_VERSION"));
    Ok(card)
}

/// Returns the front matter, which the hub reads.
fn front_matter(info: &ModelInfo, on_hub: bool, adapter: bool) -> Value {
    let mut tags = vec![
        "sentence-transformers".to_owned(),
        "sentence-similarity".into(),
        "feature-extraction".into(),
        "dense".into(),
        "generated_from_trainer".into(),
        "lodestone".into(),
    ];
    if adapter {
        tags.extend(["peft".into(), "lora".into()]);
    }
    if !info.loss.is_empty() {
        tags.push(format!("loss:{}", info.loss));
    }
    let mut front_matter = Map::new();
    front_matter.insert("library_name".into(), "sentence-transformers".into());
    front_matter.insert("pipeline_tag".into(), "sentence-similarity".into());
    if on_hub {
        front_matter.insert("base_model".into(), info.base.clone().into());
        let relation = if adapter { "adapter" } else { "finetune" };
        front_matter.insert("base_model_relation".into(), relation.into());
    }
    front_matter.insert("tags".into(), tags.into());
    let results = results(info);
    if !results.is_empty() {
        let mut metrics: Vec<&str> = Vec::new();
        for (name, _, after) in &info.scores {
            let metric = split(name).1;
            if after.is_some() && !metrics.contains(&metric) {
                metrics.push(metric);
            }
        }
        front_matter.insert("metrics".into(), metrics.into());
        front_matter.insert("model-index".into(), json!([{ "name": info.name, "results": results }]));
    }
    Value::Object(front_matter)
}

/// Returns the scores after training by evaluation set, in the form of the hub's `model-index`.
fn results(info: &ModelInfo) -> Vec<Value> {
    let mut results: Vec<(&str, &str, Vec<Value>)> = Vec::new();
    for (name, _, after) in &info.scores {
        let Some(value) = after.filter(|value| value.is_finite()) else { continue };
        let (set, metric) = split(name);
        let title = title(metric);
        let metric = json!({ "type": metric, "value": value, "name": title });
        match results.iter_mut().find(|(other, ..)| *other == set) {
            Some((.., metrics)) => metrics.push(metric),
            None => results.push((set, task(name), vec![metric])),
        }
    }
    let result = |(set, task, metrics): (&str, &str, Vec<Value>)| {
        json!({
            "task": { "type": task, "name": title(&task.replace('-', "_")) },
            "dataset": { "name": set, "type": set },
            "metrics": metrics,
        })
    };
    results.into_iter().map(result).collect()
}

/// Splits the name of a score: `scifact_cosine_ndcg@10` into `scifact` and `cosine_ndcg@10`.
fn split(name: &str) -> (&str, &str) {
    const FIRST: [&str; 7] =
        ["_cosine_", "_dot_", "_manhattan_", "_euclidean_", "_max_", "_pearson_", "_spearman_"];
    let place = FIRST.iter().filter_map(|first| name.rfind(first)).max();
    place.map_or(("", name), |place| (&name[..place], &name[place + 1..]))
}

/// Returns the name of the task in the `model-index`, as sentence-transformers has it.
fn task(name: &str) -> &'static str {
    let (set, metric) = split(name);
    match metric {
        _ if set.starts_with("NanoBEIR_mean") => "nano-beir",
        metric if metric.ends_with("_accuracy") => "triplet",
        metric if metric.starts_with("pearson") || metric.starts_with("spearman") => "semantic-similarity",
        _ => "information-retrieval",
    }
}

/// Returns the display name of a metric: `cosine_ndcg@10` becomes `Cosine Ndcg@10`.
fn title(metric: &str) -> String {
    let word = |word: &str| {
        let mut letters = word.chars();
        letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
    };
    metric.split('_').map(word).collect::<Vec<String>>().join(" ")
}

fn evaluation(card: &mut String, info: &ModelInfo) {
    card.push_str("\n## Evaluation\n\n| Metric | Base | Fine-tuned | Δ |\n|---|---:|---:|---:|\n");
    let main = |name: &str| SHOWN_METRICS.iter().any(|metric| name.ends_with(metric));
    let any = info.scores.iter().any(|(name, ..)| main(name));
    let shown = |score: Option<f64>| score.map_or_else(|| "–".to_owned(), |score| format!("{score:.4}"));
    for (metric, before, after) in info.scores.iter().filter(|(name, ..)| !any || main(name)) {
        let delta = before.zip(*after).map(|(before, after)| format!("{:+.4}", after - before));
        let delta = delta.unwrap_or_else(|| "–".to_owned());
        let _ = writeln!(card, "| {} | {} | {} | {delta} |", cell(metric), shown(*before), shown(*after));
    }
}

/// Formats a text as inline code. Line breaks and backticks are escaped.
fn code(text: &str) -> String {
    let text = text.replace('\n', "\\n");
    let ticks = "`".repeat(longest_run(&text) + 1);
    // Markdown removes one space at each end.
    let pad = if text.starts_with(['`', ' ']) || text.ends_with(['`', ' ']) { " " } else { "" };
    format!("{ticks}{pad}{text}{pad}{ticks}")
}

fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// Formats a text for a cell of a table.
fn cell(text: &str) -> String {
    line(text).replace('|', "\\|")
}

fn line(text: &str) -> String {
    text.split(['\n', '\r']).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::DatasetInfo;

    fn info() -> ModelInfo {
        ModelInfo {
            name: "little: \"one\" # | <b>".into(),
            base: "org/name".into(),
            width: 384,
            hidden_width: 384,
            pooling: Pooling::Mean,
            normalize: true,
            max_length: 256,
            query_prompt: "Instruct: `x`\nQuery: ".into(),
            document_prompt: String::new(),
            scores: [
                ("sci_fact_cosine_accuracy@3", Some(0.5), Some(0.625)),
                ("sci_fact_cosine_ndcg@10", Some(0.25), Some(0.5)),
                ("nli_cosine_accuracy", Some(0.75), Some(0.5)),
                ("sts_spearman_cosine", Some(0.5), Some(f64::NAN)),
                ("NanoBEIR_mean_cosine_ndcg@10", None, Some(0.125)),
            ]
            .map(|(name, before, after)| (name.to_owned(), before, after))
            .into(),
            training: vec![("steps".into(), "10 of 64 rows".into())],
            data: vec![DatasetInfo {
                name: "qa|pairs".into(),
                rows: "1000".into(),
                query_prompt: "q|: ".into(),
                document_prompt: String::new(),
            }],
            loss: "info_nce".into(),
            config: "name: little\nprompt: \"```\"\n".into(),
        }
    }

    fn parts(card: &str) -> (Value, &str) {
        let (front_matter, body) = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
        (serde_yaml::from_str(front_matter).unwrap(), body)
    }

    #[test]
    fn the_head_is_what_the_hub_reads() {
        let card = text(&info(), false).unwrap();
        let (front_matter, _) = parts(&card);
        assert_eq!(front_matter["library_name"], "sentence-transformers");
        assert_eq!(
            (&front_matter["base_model"], &front_matter["base_model_relation"]),
            (&json!("org/name"), &json!("finetune"))
        );
        assert!(front_matter["tags"].as_array().unwrap().contains(&"loss:info_nce".into()));
        let index = &front_matter["model-index"][0];
        assert_eq!(index["name"], "little: \"one\" # | <b>");
        let results = index["results"].as_array().unwrap();
        let tasks: Vec<_> = results
            .iter()
            .map(|result| {
                let text = |value: &Value| value.as_str().unwrap().to_owned();
                (
                    text(&result["dataset"]["name"]),
                    text(&result["task"]["type"]),
                    text(&result["task"]["name"]),
                )
            })
            .collect();
        // NaN is not a result.
        assert_eq!(
            tasks,
            [
                ("sci_fact", "information-retrieval", "Information Retrieval"),
                ("nli", "triplet", "Triplet"),
                ("NanoBEIR_mean", "nano-beir", "Nano Beir"),
            ]
            .map(|(set, kind, name)| (set.to_owned(), kind.to_owned(), name.to_owned()))
        );
        let metrics = results[0]["metrics"].as_array().unwrap();
        assert_eq!(metrics[1], json!({"type": "cosine_ndcg@10", "value": 0.5, "name": "Cosine Ndcg@10"}));
        assert_eq!(metrics.len(), 2);

        let adapter = text(&info(), true).unwrap();
        assert_eq!(parts(&adapter).0["base_model_relation"], "adapter");
    }

    #[test]
    fn the_body_shows_scores_data_and_configuration() {
        let card = text(&info(), false).unwrap();
        let (_, body) = parts(&card);
        for expected in [
            "| Metric | Base | Fine-tuned | Δ |",
            "| sci_fact_cosine_ndcg@10 | 0.2500 | 0.5000 | +0.2500 |",
            "| nli_cosine_accuracy | 0.7500 | 0.5000 | -0.2500 |",
            "| NanoBEIR_mean_cosine_ndcg@10 | – | 0.1250 | – |",
            "| qa\\|pairs | 1000 | ` q\\|:  ` | – |",
            "are prefixed with `` Instruct: `x`\\nQuery:  ``.",
            "- steps: 10 of 64 rows",
            "\n````yaml\nname: little\nprompt: \"```\"\n````\n",
        ] {
            assert!(body.contains(expected), "{expected:?} is not in {body}");
        }
        assert!(!body.contains("accuracy@3"), "{body}");
    }

    #[test]
    fn a_model_without_a_run_has_a_card_too() {
        let bare = ModelInfo {
            scores: vec![],
            training: vec![],
            data: vec![],
            config: String::new(),
            loss: String::new(),
            base: ".".into(),
            ..info()
        };
        let card = text(&bare, false).unwrap();
        let (front_matter, body) = parts(&card);
        assert!(front_matter.get("base_model").is_none() && front_matter.get("model-index").is_none());
        assert!(body.contains("fine-tuned from `.` with") && !body.contains("## Training"), "{body}");
    }
}
