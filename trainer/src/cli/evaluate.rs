//! `trainer evaluate`.

use std::fs;
use std::path::PathBuf;

use super::print;
use super::sets::Sets;
use crate::comm::World;
use crate::eval::{Scores, nano};
use crate::system::atomic;
use crate::{Error, Result};

/// Compute the metrics of a model on evaluation sets
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer evaluate --model runs/quickstart/model --set data/quickstart/test\n  \
    trainer evaluate --model intfloat/multilingual-e5-base --set scifact nfcorpus --query-prompt 'query: ' \
    --document-prompt 'passage: ' --output results")]
pub(super) struct Args {
    /// A model folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    model: String,
    #[command(flatten)]
    sets: Sets,
    /// Folder for results.json and the CSV files of sentence-transformers
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(super) fn run(args: &Args, world: &World) -> Result<()> {
    let sets = args.sets.open()?;
    let opened = args.sets.encoding.model(&args.model)?;
    let embedder = args.sets.encoding.embedder(&opened, world)?;
    let output = args.output.as_ref().filter(|_| world.is_rank_zero());
    if let Some(output) = output {
        fs::create_dir_all(output).map_err(Error::write("create", output))?;
    }

    let mut set_scores = Vec::new();
    for set in &sets {
        let scores = set.evaluate(&embedder)?.scores;
        let primary = set.primary_metric();
        tracing::info!("{primary} {:.4}", scores.get(&primary).unwrap_or(f64::NAN));
        if let Some(output) = output {
            set.append_csv(output, &scores)?;
        }
        set_scores.push(scores);
    }
    let means = nano::mean_scores(sets.iter().zip(&set_scores));
    if let Some(output) = output.filter(|_| !means.is_empty()) {
        nano::append_csv(output, &means)?;
    }
    let all: Scores = set_scores.into_iter().chain([means]).flatten().collect();
    let json = serde_json::to_string_pretty(&all)
        .map_err(|error| Error::Bug(format!("scores cannot be written as JSON: {error}")))?;
    if let Some(output) = output {
        atomic::write(&output.join("results.json"), format!("{json}\n"))?;
    }
    if world.is_rank_zero() {
        print(json);
    }
    Ok(())
}
