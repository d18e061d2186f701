//! The model card: `README.md`, as the hub shows it.

use std::fmt::Write;
use std::path::Path;

use super::About;
use crate::model::Pooling;

/// The card's text. `adapter`: the folder holds a LoRA adapter, not the whole model.
pub(super) fn text(about: &About, adapter: bool) -> String {
    let About { name, base, width, max_length, .. } = about;
    // The hub accepts an id here, no path.
    let on_hub = !Path::new(base).exists();
    let mut card =
        String::from("---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n");
    if on_hub {
        let _ = writeln!(card, "base_model: {base}");
    }
    card.push_str(
        "tags:\n- sentence-transformers\n- sentence-similarity\n- feature-extraction\n- lodestone\n",
    );
    if adapter {
        card.push_str("- lora\n");
    }
    let base = if on_hub { format!("[{base}](https://huggingface.co/{base})") } else { format!("`{base}`") };
    let pooling = match about.pooling {
        Pooling::Mean => "the mean of the tokens",
        Pooling::Cls => "the first token",
        Pooling::LastToken => "the last token",
    };
    let normalized = if about.normalize { ", scaled to length one" } else { "" };
    let what = if adapter { "a LoRA adapter of" } else { "trained from" };
    let _ = write!(
        card,
        "---\n\n# {name}\n\nA text-embedding model, {what} {base} with lodestone. It maps texts to {width} dimensions \
         ({pooling}{normalized}) and compares them by cosine similarity. Texts are cut at {max_length} tokens.\n\n\
         ## Usage\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n\
         model = SentenceTransformer(\"path/to/this/folder\")\n\
         queries = model.encode_query([\"What is the melting point of iron?\"])\n\
         documents = model.encode_document([\"Iron melts at 1538 °C.\"])\n\
         print(model.similarity(queries, documents))\n```\n",
    );
    for (role, prompt) in [("Queries", &about.query_prompt), ("Documents", &about.document_prompt)] {
        if !prompt.is_empty() {
            let _ = write!(card, "\n{role} are preceded by the prompt `{}`.\n", prompt.replace('\n', "\\n"));
        }
    }
    if !about.scores.is_empty() {
        card.push_str("\n## Evaluation\n\n| Metric | Before | After |\n|---|---:|---:|\n");
        let shown = |score: Option<f64>| score.map_or_else(|| "–".to_owned(), |score| format!("{score:.4}"));
        for (metric, before, after) in &about.scores {
            let _ = writeln!(card, "| {metric} | {} | {} |", shown(*before), shown(*after));
        }
    }
    if !about.training.is_empty() {
        card.push_str("\n## Training\n\n");
        for (setting, value) in &about.training {
            let _ = writeln!(card, "- {setting}: {value}");
        }
    }
    card
}
