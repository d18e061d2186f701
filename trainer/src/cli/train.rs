//! The command `trainer train`.

use std::path::PathBuf;

use super::{logging, print};
use crate::comm::World;
use crate::config::Config;
use crate::train::Run;
use crate::train::plan::Plan;
use crate::{Error, Result};

/// Train a model as a configuration file describes
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer train configs/quickstart.yaml\n  \
    trainer train configs/minilm.yaml training.learning_rate=2e-5 data.train.0.samples=1000\n  \
    trainer train configs/minilm.yaml --resume\n  \
    LODESTONE_NCCL=1 torchrun --no-python --nproc-per-node 4 trainer train configs/zeta.yaml\n\n\
    `trainer train` runs one rank per process under torchrun, srun and mpirun. `launch` sets these variables itself:\n  \
    LODESTONE_NCCL=1           use NCCL between ranks; every rank needs its own GPU\n  \
    LODESTONE_TIMEOUT=SECONDS  end the run if a rank makes no progress for this long (default: 1800)\n  \
    LODESTONE_TOKEN=SECRET     shared secret of the ranks, needed if they run on several hosts (not under mpirun)")]
pub(super) struct Args {
    /// Configuration file (YAML); `trainer config` describes its keys
    config: PathBuf,
    /// Values that override the configuration, such as `training.learning_rate=2e-5`
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Continue from the newest checkpoint; without one, start at the beginning
    #[arg(long)]
    resume: bool,
}

pub(super) fn run(args: &Args, world: &World) -> Result<()> {
    let config = Config::load(&args.config, &args.overrides)?;
    let plan = Plan::resolve(config)?;
    let output = plan.config.output.clone();
    let metric = plan.config.evaluation.metric.clone();
    let text = plan.to_string();
    let run = Run::prepare(plan, args.resume, world.clone())?;
    logging::keep(&output, world.rank())?;
    tracing::info!("{}", text.trim_end());
    let summary = run.train().map_err(Error::during_run)?;
    if !world.is_rank_zero() {
        return Ok(());
    }
    for (name, after) in summary.after.iter().filter(|(name, _)| name.ends_with(&metric)) {
        match (summary.before.get(name).and_then(serde_json::Value::as_f64), after.as_f64()) {
            (Some(before), Some(after)) => {
                print(format_args!("{name}  {before:.4} → {after:.4}  ({:+.4})", after - before))
            }
            (_, after) => print(format_args!("{name}  {:.4}", after.unwrap_or(f64::NAN))),
        }
    }
    tracing::info!("the model after step {} is in {}", summary.selected_step, output.join("model").display());
    Ok(())
}
