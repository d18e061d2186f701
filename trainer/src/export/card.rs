//! The model card: `README.md`, as the hub shows it and sentence-transformers writes it.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::About;
use crate::config::Pooling;
use crate::{Error, Result};

/// The metrics that stand in the table; all are in the head.
const MAIN: [&str; 8] = [
    "accuracy@1",
    "recall@10",
    "ndcg@10",
    "mrr@10",
    "map@100",
    "_accuracy",
    "pearson_cosine",
    "spearman_cosine",
];

/// The card's text. `adapter`: the folder holds a LoRA adapter, not the whole model.
///
/// # Errors
/// The head is no YAML.
pub(super) fn text(about: &About, adapter: bool) -> Result<String> {
    let About { name, base, width, max_length, .. } = about;
    // The hub accepts an id here, no path.
    let on_hub = !Path::new(base).exists();
    let head = serde_yaml::to_string(&head(about, on_hub, adapter))
        .map_err(|error| Error::Usage(format!("the model card of {name}: {error}")))?;
    let base = if on_hub { format!("[{base}](https://huggingface.co/{base})") } else { code(base) };
    let pooling = match about.pooling {
        Pooling::Mean => "the mean of the tokens",
        Pooling::Cls => "the first token",
        Pooling::LastToken => "the last token",
    };
    let normalized = if about.normalize { ", scaled to length one" } else { "" };
    let what = if adapter { "a LoRA adapter of" } else { "trained from" };
    let title = line(name);
    let mut card = format!(
        "---\n{head}---\n\n# {title}\n\nA text-embedding model, {what} {base} with lodestone. It maps texts to {width} dimensions \
         ({pooling}{normalized}) and compares them by cosine similarity. Texts are cut at {max_length} tokens.\n\n\
         ## Usage\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n\
         model = SentenceTransformer(\"path/to/this/folder\")\n\
         queries = model.encode_query([\"What is the melting point of iron?\"])\n\
         documents = model.encode_document([\"Iron melts at 1538 °C.\"])\n\
         print(model.similarity(queries, documents))\n```\n",
    );
    for (role, prompt) in [("Queries", &about.query_prompt), ("Documents", &about.document_prompt)] {
        if !prompt.is_empty() {
            let _ = write!(card, "\n{role} are preceded by the prompt {}.\n", code(prompt));
        }
    }
    if !about.scores.is_empty() {
        evaluation(&mut card, about);
    }
    if !about.training.is_empty() || !about.data.is_empty() {
        card.push_str("\n## Training\n");
    }
    if !about.data.is_empty() {
        card.push_str(
            "\n| Data set | Rows | Prompt of queries | Prompt of documents |\n|---|---:|---|---|\n",
        );
        for set in &about.data {
            let prompt =
                |prompt: &str| if prompt.is_empty() { "–".to_owned() } else { cell(&code(prompt)) };
            let (query, document) = (prompt(&set.query_prompt), prompt(&set.document_prompt));
            let _ = writeln!(card, "| {} | {} | {query} | {document} |", cell(&set.name), set.rows);
        }
    }
    if !about.training.is_empty() {
        card.push('\n');
    }
    for (setting, value) in &about.training {
        let _ = writeln!(card, "- {setting}: {}", line(value));
    }
    if !about.config.is_empty() {
        let fence = "`".repeat(longest_run(&about.config).max(2) + 1);
        let _ = write!(
            card,
            "\n<details><summary>The whole configuration</summary>\n\n{fence}yaml\n{}\n{fence}\n\n</details>\n",
            about.config.trim_end()
        );
    }
    let _ = write!(card, "\nlodestone {}\n", env!("CARGO_PKG_VERSION"));
    Ok(card)
}

/// What the hub reads.
fn head(about: &About, on_hub: bool, adapter: bool) -> Value {
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
    if !about.loss.is_empty() {
        tags.push(format!("loss:{}", about.loss));
    }
    let mut head = Map::new();
    head.insert("library_name".into(), "sentence-transformers".into());
    head.insert("pipeline_tag".into(), "sentence-similarity".into());
    if on_hub {
        head.insert("base_model".into(), about.base.clone().into());
        let relation = if adapter { "adapter" } else { "finetune" };
        head.insert("base_model_relation".into(), relation.into());
    }
    head.insert("tags".into(), tags.into());
    let results = results(about);
    if !results.is_empty() {
        let mut metrics: Vec<&str> = Vec::new();
        for (name, _, after) in &about.scores {
            let metric = split(name).1;
            if after.is_some() && !metrics.contains(&metric) {
                metrics.push(metric);
            }
        }
        head.insert("metrics".into(), metrics.into());
        head.insert("model-index".into(), json!([{ "name": about.name, "results": results }]));
    }
    Value::Object(head)
}

/// The scores after the training, set by set, as the hub's index of models has them.
fn results(about: &About) -> Vec<Value> {
    let mut results: Vec<(&str, &str, Vec<Value>)> = Vec::new();
    for (name, _, after) in &about.scores {
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

/// `scifact_cosine_ndcg@10` → its set and its metric.
fn split(name: &str) -> (&str, &str) {
    const FIRST: [&str; 7] =
        ["_cosine_", "_dot_", "_manhattan_", "_euclidean_", "_max_", "_pearson_", "_spearman_"];
    let place = FIRST.iter().filter_map(|first| name.rfind(first)).max();
    place.map_or(("", name), |place| (&name[..place], &name[place + 1..]))
}

/// The task's name in the hub's index, as sentence-transformers gives it.
fn task(name: &str) -> &'static str {
    let (set, metric) = split(name);
    match metric {
        _ if set.starts_with("NanoBEIR_mean") => "nano-beir",
        metric if metric.ends_with("_accuracy") => "triplet",
        metric if metric.starts_with("pearson") || metric.starts_with("spearman") => "semantic-similarity",
        _ => "information-retrieval",
    }
}

/// `cosine_ndcg@10` → `Cosine Ndcg@10`.
fn title(metric: &str) -> String {
    let word = |word: &str| {
        let mut letters = word.chars();
        letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
    };
    metric.split('_').map(word).collect::<Vec<String>>().join(" ")
}

fn evaluation(card: &mut String, about: &About) {
    card.push_str("\n## Evaluation\n\n| Metric | Base | Tuned | Δ |\n|---|---:|---:|---:|\n");
    let main = |name: &str| MAIN.iter().any(|metric| name.ends_with(metric));
    let any = about.scores.iter().any(|(name, ..)| main(name));
    let shown = |score: Option<f64>| score.map_or_else(|| "–".to_owned(), |score| format!("{score:.4}"));
    for (metric, before, after) in about.scores.iter().filter(|(name, ..)| !any || main(name)) {
        let delta = before.zip(*after).map(|(before, after)| format!("{:+.4}", after - before));
        let delta = delta.unwrap_or_else(|| "–".to_owned());
        let _ = writeln!(card, "| {} | {} | {} | {delta} |", cell(metric), shown(*before), shown(*after));
    }
}

/// A text as code in a line, whatever is in it.
fn code(text: &str) -> String {
    let text = text.replace('\n', "\\n");
    let ticks = "`".repeat(longest_run(&text) + 1);
    // Spaces at both ends are taken away by Markdown, one each.
    let pad = if text.starts_with(['`', ' ']) || text.ends_with(['`', ' ']) { " " } else { "" };
    format!("{ticks}{pad}{text}{pad}{ticks}")
}

fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// A text in a cell of a table.
fn cell(text: &str) -> String {
    line(text).replace('|', "\\|")
}

fn line(text: &str) -> String {
    text.split(['\n', '\r']).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::DataFacts;

    fn about() -> About {
        About {
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
            data: vec![DataFacts {
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
        let (head, body) = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
        (serde_yaml::from_str(head).unwrap(), body)
    }

    #[test]
    fn the_head_is_what_the_hub_reads() {
        let card = text(&about(), false).unwrap();
        let (head, _) = parts(&card);
        assert_eq!(head["library_name"], "sentence-transformers");
        assert_eq!(
            (&head["base_model"], &head["base_model_relation"]),
            (&json!("org/name"), &json!("finetune"))
        );
        assert!(head["tags"].as_array().unwrap().contains(&"loss:info_nce".into()));
        let index = &head["model-index"][0];
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
        // What is no number is no result.
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

        let adapter = text(&about(), true).unwrap();
        assert_eq!(parts(&adapter).0["base_model_relation"], "adapter");
    }

    #[test]
    fn the_body_shows_base_tuned_and_what_it_was_trained_on() {
        let card = text(&about(), false).unwrap();
        let (_, body) = parts(&card);
        for expected in [
            "| Metric | Base | Tuned | Δ |",
            "| sci_fact_cosine_ndcg@10 | 0.2500 | 0.5000 | +0.2500 |",
            "| nli_cosine_accuracy | 0.7500 | 0.5000 | -0.2500 |",
            "| NanoBEIR_mean_cosine_ndcg@10 | – | 0.1250 | – |",
            "| qa\\|pairs | 1000 | ` q\\|:  ` | – |",
            "preceded by the prompt `` Instruct: `x`\\nQuery:  ``.",
            "- steps: 10 of 64 rows",
            "\n````yaml\nname: little\nprompt: \"```\"\n````\n",
        ] {
            assert!(body.contains(expected), "{expected:?} is not in {body}");
        }
        assert!(!body.contains("accuracy@3"), "{body}");
    }

    #[test]
    fn a_model_without_a_run_has_a_card_too() {
        let bare = About {
            scores: vec![],
            training: vec![],
            data: vec![],
            config: String::new(),
            loss: String::new(),
            base: ".".into(),
            ..about()
        };
        let card = text(&bare, false).unwrap();
        let (head, body) = parts(&card);
        assert!(head.get("base_model").is_none() && head.get("model-index").is_none());
        assert!(body.contains("trained from `.` with") && !body.contains("## Training"), "{body}");
    }
}
