//! Writes the data of the quickstart: questions and answers in English and German, made from tables of public
//! facts.
//!
//! ```text
//! OUTPUT/train.jsonl       query, positive
//! OUTPUT/test/             a BEIR folder: queries.jsonl, corpus.jsonl, qrels/test.tsv
//! OUTPUT/model/            configuration and tokenizer of a small BERT, no weights
//! ```

/// Tables of facts and their wordings.
mod facts;
/// Writes the model folder.
mod model;
/// Divides the facts into training and test data.
mod split;
/// Builds the vocabulary of the tokenizer.
mod wordpiece;

use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::Parser;
use serde_json::{Value, json};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Write training rows, retrieval test and model folder of the quickstart
#[derive(Parser)]
#[command(
    after_help = "Example:\n  cargo run --release -p trainer --example quickstart -- --output data/quickstart"
)]
struct Arguments {
    /// The folder to write.
    #[arg(long, value_name = "DIR", default_value = "data/quickstart")]
    output: PathBuf,
    /// Seed of the division into training and test, and of the wordings
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

fn main() -> Result {
    let Arguments { output, seed } = Arguments::parse();
    let set = split::split(&facts::all(facts::KINDS)?, seed);
    model::write(&output.join("model"), set.train.iter().flat_map(|(q, p)| [q.as_str(), p.as_str()]))?;
    let test = output.join("test");
    text_file(
        &output.join("train.jsonl"),
        set.train.iter().map(|(q, p)| json!({"query": q, "positive": p})),
    )?;
    text_file(
        &test.join("queries.jsonl"),
        set.queries.iter().map(|(id, text)| json!({"_id": id, "text": text})),
    )?;
    text_file(
        &test.join("corpus.jsonl"),
        set.corpus.iter().map(|(id, text)| json!({"_id": id, "title": "", "text": text})),
    )?;
    let relevant = set.relevant.iter().map(|(query, passage)| format!("{query}\t{passage}\t1"));
    text_file(
        &test.join("qrels/test.tsv"),
        ["query-id\tcorpus-id\tscore".to_owned()].into_iter().chain(relevant),
    )?;
    let line = format!(
        "{}: {} training rows; {} test queries, {} passages\n",
        output.display(),
        set.train.len(),
        set.queries.len(),
        set.corpus.len()
    );
    Ok(io::Write::write_all(&mut io::stderr(), line.as_bytes())?)
}

/// Writes one item per line, and creates folders.
fn text_file<T: ToString>(path: &Path, lines: impl Iterator<Item = T>) -> Result {
    let text: String = lines.map(|line| line.to_string() + "\n").collect();
    write(path, &text)
}

fn json_file(path: &Path, value: &Value) -> Result {
    write(path, &format!("{value:#}\n"))
}

fn write(path: &Path, text: &str) -> Result {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, text))
        .map_err(|e| format!("{}: cannot write: {e}", path.display()).into())
}
