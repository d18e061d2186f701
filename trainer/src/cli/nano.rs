//! `trainer nano`.

use std::path::PathBuf;

use super::encode::at_least_one;
use super::encoding::Encoding;
use super::print;
use crate::comm::World;
use crate::mine::nano::NanoBuilder;
use crate::{Error, Result};

/// Make a small evaluation set from a BEIR set (as NanoBEIR)
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer nano --set data/scifact --output data/NanoSciFact\n  \
    trainer nano --set data/scifact --output data/NanoSciFact --queries 100 --model intfloat/multilingual-e5-base\
    \n\nThe set has some of the queries, all their relevant documents, and the documents that BM25 (and --model) rank \
    highest for them, so that it is nearly as hard as the whole set. Writes a BEIR folder (corpus.jsonl, \
    queries.jsonl, qrels/test.tsv) for `trainer evaluate --set`.")]
pub(super) struct Args {
    /// BEIR folder to sample from
    #[arg(long, value_name = "DIR")]
    set: PathBuf,
    /// The folder to write; it must not exist
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Number of queries to draw
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    queries: usize,
    /// Maximum number of documents to add per query: those that BM25 and the model rank highest, alternately
    /// one of each ranking
    #[arg(long, value_name = "N", default_value_t = 200)]
    negatives: usize,
    /// Model folder, or model id on the Hugging Face hub, for the dense ranking. Default: rank with BM25 only
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Name of the qrels file: qrels/SPLIT.tsv. Default: test, else dev, else the only one
    #[arg(long)]
    split: Option<String>,
    #[command(flatten)]
    encoding: Encoding,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.model.is_none() && args.encoding.is_given() {
        let message = "--model is missing: the flags for embedding texts have no effect without it";
        return Err(Error::Usage(message.to_owned()));
    }
    let builder = NanoBuilder {
        set: args.set.clone(),
        split: args.split.clone(),
        output: args.output.clone(),
        queries: args.queries,
        negatives: args.negatives,
        seed: args.seed,
    };
    let sample = builder.sample()?;
    let stats = match &args.model {
        None => sample.write(None)?,
        Some(model) => {
            let opened = args.encoding.model(model)?;
            let embedder = args.encoding.embedder(&opened, &World::solo())?;
            sample.write(Some(&mut |texts, role| embedder.encode(texts, role)))?
        }
    };
    print(stats.json());
    Ok(())
}
