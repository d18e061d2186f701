//! `trainer nano`.

use std::path::PathBuf;

use super::encode::at_least_one;
use super::encoding::Encoding;
use super::print;
use crate::comm::World;
use crate::mine::nano::Nano;
use crate::{Error, Result};

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
    #[command(flatten)]
    encoding: Encoding,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.model.is_none() && args.encoding.is_given() {
        let message =
            "--model is missing: without it nothing is embedded, and the flags of how texts are say nothing";
        return Err(Error::Usage(message.to_owned()));
    }
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
            let opened = args.encoding.model(model)?;
            let embedder = args.encoding.embedder(&opened, &World::solo())?;
            sample.write(Some(&mut |texts, role| embedder.encode(texts, role)))?
        }
    };
    print(counts.json());
    Ok(())
}
