//! `trainer split`.

use std::path::PathBuf;

use super::print;
use crate::Result;
use crate::data::reader::DATA_FILE;
use crate::data::split::Split;

/// Split rows into train/validation/test so that no text is in two parts
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer split --input data/qa.csv --output data/qa\n  \
    trainer split --input data/qa.jsonl --output data/qa --fractions 0.9,0.1 --seed 7\n\n\
    Writes the parts in the format of the input, without compression (Parquet becomes .jsonl). Rows that share a text go to \
    the same part.")]
pub(super) struct Args {
    #[arg(long, value_name = "FILE", help = format!("A {DATA_FILE}"))]
    input: PathBuf,
    /// New folder for the parts
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Fractions of train, validation and test, or of train and test
    #[arg(long, value_name = "FRACTIONS", value_delimiter = ',', default_value = "0.8,0.1,0.1")]
    fractions: Vec<f64>,
    /// Seed of the random assignment
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Columns whose texts must not be in two parts. Default: the columns that training reads
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    columns: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let split = Split { fractions: args.fractions.clone(), seed: args.seed, columns: args.columns.clone() };
    let counts = split.run(&args.input, &args.output)?;
    print(counts.json());
    Ok(())
}
