//! `trainer plan`.

use std::path::PathBuf;

use super::{Failure, print};
use crate::config::Config;
use crate::plan::Plan;

/// Check everything and say what the run will do: rows, steps, tokens, memory
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: trainer plan configs/quickstart.yaml training.batch_size=128")]
pub(super) struct Args {
    /// The configuration, a YAML file
    config: PathBuf,
    /// Overrides, such as `training.learning_rate=2e-5` or `data.train.0.samples=1000`
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let config = Config::load(&args.config, &args.overrides).map_err(Failure::before)?;
    print(Plan::new(config).map_err(Failure::before)?.to_string().trim_end());
    Ok(())
}
