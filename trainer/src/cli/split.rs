//! `trainer split`.

use std::path::PathBuf;

use super::print;
use crate::Result;
use crate::data::split::Split;

/// Divide rows into a part to train on and parts to measure with, none of whose texts is trained on
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer split --input data/qa.csv --output data/qa\n  \
    trainer split --input data/qa.jsonl --output data/qa --fractions 0.9,0.1 --seed 7\n\n\
    Writes train, validation and test (or train and test) in the format of the input, unpacked; of Parquet as .jsonl. Rows \
    that share a text stay together.")]
pub(super) struct Args {
    /// A .jsonl, .csv, .tsv or .parquet file, each also .gz or .zst
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// The folder that is made
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// The shares of train, validation and test, or of train and test
    #[arg(long, value_name = "SHARES", value_delimiter = ',', default_value = "0.8,0.1,0.1")]
    fractions: Vec<f64>,
    /// What the random order follows from
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// The columns whose texts tell which rows belong together. Default: those that training reads
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    columns: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let split = Split { fractions: args.fractions.clone(), seed: args.seed, columns: args.columns.clone() };
    let counts = split.run(&args.input, &args.output)?;
    print(counts.json());
    Ok(())
}
