//! `trainer compare`.

use std::path::PathBuf;

use super::print;
use super::sets::Sets;
use crate::Result;
use crate::comm::World;
use crate::compare::Comparison;
use crate::eval::{Bootstrap, EvalSet, Measured};

/// Measure two models on the same sets, and say how sure their difference is
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer compare --base sentence-transformers/all-MiniLM-L6-v2 --tuned runs/minilm/model --set data/scifact\n  \
    trainer compare --base intfloat/multilingual-e5-base --tuned runs/e5-base/model --set data/qa/test.csv \
    --query-prompt 'query: ' --document-prompt 'passage: ' --output results\n\n\
    A difference comes with the interval in which 95 of 100 draws lie: queries, triplets or pairs are drawn with\n\
    replacement, and both models are measured on the same draw.")]
pub(super) struct Args {
    /// The model before: a folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    base: String,
    /// The model after
    #[arg(long, value_name = "DIR")]
    tuned: String,
    #[command(flatten)]
    sets: Sets,
    /// Where compare.json goes
    #[arg(long, value_name = "DIR", default_value = ".")]
    output: PathBuf,
    /// Draws for the intervals
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = super::encode::at_least_one)]
    resamples: usize,
    /// What the draws follow from
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
}

pub(super) fn run(args: &Args, world: &World) -> Result<()> {
    let sets = args.sets.open()?;
    let base = measure(args, &args.base, "base", &sets, world)?;
    let tuned = measure(args, &args.tuned, "tuned", &sets, world)?;
    if !world.first() {
        return Ok(());
    }
    let bootstrap = Bootstrap { resamples: args.resamples, seed: args.seed };
    let comparison = Comparison::new(&sets, &base, &tuned, bootstrap);
    comparison.write(&args.output, &args.base, &args.tuned, bootstrap)?;
    print(comparison.to_string().trim_end());
    Ok(())
}

/// One model at a time: two may not fit.
fn measure(args: &Args, model: &str, what: &str, sets: &[EvalSet], world: &World) -> Result<Vec<Measured>> {
    let opened = args.sets.encoding.model(model)?;
    let embedder = args.sets.encoding.embedder(&opened, world)?;
    sets.iter()
        .map(|set| {
            let measured = set.evaluate(&embedder)?;
            let primary = set.primary();
            tracing::info!("{what}: {primary} {:.4}", measured.scores.get(&primary).unwrap_or(f64::NAN));
            Ok(measured)
        })
        .collect()
}
