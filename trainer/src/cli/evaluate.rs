//! `trainer evaluate`.

use std::fs;
use std::path::PathBuf;

use clap::ValueEnum;

use super::encode::{at_least_one, options};
use super::print;
use crate::comm::World;
use crate::config::{EvaluationSet, SetKind};
use crate::embed::{CHUNK_TOKENS, Opened};
use crate::eval::{EvalSet, Scores};
use crate::{Error, Result};

/// Measure a model on evaluation sets
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer evaluate --model runs/quickstart/model --set data/quickstart/test.jsonl\n  \
    trainer evaluate --model intfloat/multilingual-e5-base --set scifact nfcorpus --query-prompt 'query: ' \
    --document-prompt 'passage: ' --output results")]
pub(super) struct Args {
    /// A model folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    model: String,
    /// A BEIR folder, or a file of pairs, triplets or scored pairs; several are measured one after another
    #[arg(long = "set", value_name = "DIR", required = true, num_args = 1..)]
    sets: Vec<PathBuf>,
    /// What is measured
    #[arg(long, default_value = "retrieval")]
    kind: KindName,
    /// Where results.json and the CSV files of sentence-transformers go
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Which qrels/SPLIT.tsv is used. Default: test, else dev, else the only one
    #[arg(long)]
    split: Option<String>,
    /// Put before each query. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    query_prompt: Option<String>,
    /// Put before each document. Default: what the model folder says
    #[arg(long, value_name = "TEXT")]
    document_prompt: Option<String>,
    /// Tokens of a text at most, the prompt and special tokens included. Default: what the model folder says
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_length: Option<usize>,
    /// Tokens that are encoded at once
    #[arg(long, value_name = "N", default_value_t = CHUNK_TOKENS, value_parser = at_least_one)]
    chunk_tokens: usize,
    /// Draw the weights from a seed instead of reading them
    #[arg(long)]
    random_weights: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KindName {
    Retrieval,
    Triplet,
    Similarity,
}

pub(super) fn run(args: &Args, world: &World) -> Result<()> {
    let kind = match args.kind {
        KindName::Retrieval => SetKind::Retrieval,
        KindName::Triplet => SetKind::Triplet,
        KindName::Similarity => SetKind::Similarity,
    };
    let sets = args
        .sets
        .iter()
        .map(|path| {
            let split = args.split.clone();
            EvalSet::open(&EvaluationSet { path: path.clone(), kind, split, ..EvaluationSet::default() })
        })
        .collect::<Result<Vec<_>>>()?;
    for (index, set) in sets.iter().enumerate() {
        if sets[..index].iter().any(|other| other.name() == set.name()) {
            let message =
                format!("--set: two sets are called `{}`, and so would be their metrics", set.name());
            return Err(Error::Usage(format!("{message}\nhint: evaluate them one by one")));
        }
    }
    let opened = Opened::open(&args.model, &options(args.random_weights))?;
    let mut embedder = opened.embedder();
    embedder.limit(args.max_length)?;
    embedder.chunk_tokens = args.chunk_tokens;
    embedder.world = world.clone();
    if let Some(prompt) = &args.query_prompt {
        embedder.query_prompt = prompt;
    }
    if let Some(prompt) = &args.document_prompt {
        embedder.document_prompt = prompt;
    }
    let output = args.output.as_ref().filter(|_| world.first());
    if let Some(output) = output {
        fs::create_dir_all(output).map_err(Error::io("create", output))?;
    }

    let mut all = Scores::default();
    for set in &sets {
        let scores = set.evaluate(&embedder)?;
        let primary = set.primary();
        tracing::info!("{primary} {:.4}", scores.get(&primary).unwrap_or(f64::NAN));
        if let Some(output) = output {
            set.append_csv(output, &scores)?;
        }
        all.extend(scores);
    }
    let json = serde_json::to_string_pretty(&all).map_err(|error| Error::Usage(error.to_string()))?;
    if let Some(output) = output {
        let path = output.join("results.json");
        fs::write(&path, format!("{json}\n")).map_err(Error::io("write", path))?;
    }
    if world.first() {
        print(json);
    }
    Ok(())
}
