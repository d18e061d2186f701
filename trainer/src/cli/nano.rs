//! `trainer nano`.

use std::path::PathBuf;

use super::encode::{at_least_one, options};
use super::print;
use crate::Result;
use crate::embed::{CHUNK_TOKENS, Opened};
use crate::nano::Nano;

/// Make a small set that is nearly as hard as a BEIR set: some queries, their answers, and what is hard to tell from them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer nano --set data/scifact --output data/NanoSciFact\n  \
    trainer nano --set data/scifact --output data/NanoSciFact --queries 100 --model intfloat/multilingual-e5-base\n\n\
    Writes a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv. `trainer evaluate --set` opens it.")]
pub(super) struct Args {
    /// A BEIR folder
    #[arg(long, value_name = "DIR")]
    set: PathBuf,
    /// The folder that is made
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Queries that are drawn
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    queries: usize,
    /// Documents of each query beside its answers, at most: those that BM25 and the model rank highest, in turn
    #[arg(long, value_name = "N", default_value_t = 200)]
    negatives: usize,
    /// A model folder, or an id on the Hugging Face hub. Without it, BM25 alone finds the documents
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// What is drawn follows from it
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Which qrels/SPLIT.tsv is used. Default: test, else dev, else the only one
    #[arg(long)]
    split: Option<String>,
    /// Put before each query. Default: what the model folder says
    #[arg(long, value_name = "TEXT", requires = "model")]
    query_prompt: Option<String>,
    /// Put before each document. Default: what the model folder says
    #[arg(long, value_name = "TEXT", requires = "model")]
    document_prompt: Option<String>,
    /// Tokens of a text at most, the prompt and special tokens included. Default: what the model folder says
    #[arg(long, value_name = "N", requires = "model", value_parser = at_least_one)]
    max_length: Option<usize>,
    /// Tokens that are encoded at once
    #[arg(long, value_name = "N", default_value_t = CHUNK_TOKENS, value_parser = at_least_one)]
    chunk_tokens: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let nano = Nano {
        set: args.set.clone(),
        split: args.split.clone(),
        output: args.output.clone(),
        queries: args.queries,
        negatives: args.negatives,
        seed: args.seed,
    };
    let sample = nano.sample()?;
    let counts = match &args.model {
        None => sample.write(None)?,
        Some(model) => {
            let opened = Opened::open(model, &options(false))?;
            let mut embedder = opened.embedder();
            embedder.limit(args.max_length)?;
            embedder.chunk_tokens = args.chunk_tokens;
            if let Some(prompt) = &args.query_prompt {
                embedder.query_prompt = prompt;
            }
            if let Some(prompt) = &args.document_prompt {
                embedder.document_prompt = prompt;
            }
            sample.write(Some(&mut |texts, role| embedder.encode(texts, role)))?
        }
    };
    print(counts.json());
    Ok(())
}
