//! `trainer export`.

use std::path::{Path, PathBuf};

use serde_json::Map;

use crate::config::{self, Config};
use crate::export::{self, TrainedRun};
use crate::model::{Model, Options, locate};
use crate::train::checkpoint::Checkpoints;
use crate::train::metrics::History;
use crate::{Error, Result};

/// Export the model of a run in the format of sentence-transformers
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer export --run runs/zeta --output zeta-adapter\n  \
    trainer export --run runs/zeta --output zeta --merge --checkpoint best\n\n\
    sentence-transformers, PEFT, text-embeddings-inference and vLLM open the folder.")]
pub(super) struct Args {
    /// Output folder of the run
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// The folder to write; it must not exist
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Merge LoRA adapters into the weights and write the whole model. Default: write only the adapter
    #[arg(long)]
    merge: bool,
    /// Checkpoint to export: `best`, `last` or `step-N`. Default: `best` if the run stopped early or has
    /// `evaluation.load_best`, else `last`
    #[arg(long, value_name = "WHICH")]
    checkpoint: Option<String>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.output.exists() {
        let message = "already exists\nhint: give another --output or delete it";
        return Err(Error::file(&args.output, message));
    }
    let config = args.run.join("config.yaml");
    if !config.is_file() {
        return Err(Error::file(&args.run, "is not the output folder of a run: it has no config.yaml"));
    }
    let config = Config::load(&config, &[])?;
    // A run without evaluation has no metrics.
    let history = History::read(&args.run.join("metrics.jsonl"))?.unwrap_or_default();
    let checkpoints = Checkpoints::new(&args.run, config.checkpoint.keep);
    let checkpoint = match &args.checkpoint {
        Some(which) => checkpoints.find(which)?,
        None => {
            // The run itself selects the same for OUTPUT/model.
            let best = history.selection(&config.evaluation.metric).selects_best(&config.evaluation);
            checkpoints.find(if best { "best" } else { "last" })?
        }
    };
    let folder = locate::model(&config.model.path, config.model.init)?;
    let options = Options {
        // Exported weights are f32 for any `model.dtype`, so that frozen weights are not rounded.
        model: config::Model { dtype: config::Dtype::F32, ..config.model.clone() },
        lora: config.lora.as_ref(),
        trained: true,
        seed: config.seed,
        ..Options::default()
    };
    let mut model = Model::open(folder, &options)?;
    model.load_parameters(&checkpoint.join("parameters.safetensors"))?;

    let step = step(&checkpoint)?;
    let none = Map::new();
    let trained = TrainedRun {
        config: &config,
        step,
        before: history.scores_at(0).unwrap_or(&none),
        after: history.scores_at(step).filter(|_| step > 0).unwrap_or(&none),
    };
    export::write_run(
        &mut model,
        &trained,
        export::Options { merge: args.merge, replace: false },
        &args.output,
    )?;
    tracing::info!("exported {} to {}", checkpoint.display(), args.output.display());
    Ok(())
}

/// Parses the step from the name of a checkpoint.
fn step(checkpoint: &Path) -> Result<u64> {
    checkpoint
        .file_name()
        .and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok())
        .ok_or_else(|| Error::file(checkpoint, "is not a checkpoint, expected a name like step-000100"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_is_parsed_from_the_name() {
        assert_eq!(step(Path::new("runs/x/checkpoints/step-000120")).unwrap(), 120);
        assert!(step(Path::new("runs/x/checkpoints/best")).is_err());
    }
}
