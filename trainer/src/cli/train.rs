//! `trainer train`.

use std::path::PathBuf;

use super::{logging, print};
use crate::comm::World;
use crate::config::Config;
use crate::train::Run;
use crate::train::plan::Plan;
use crate::{Error, Result};

/// Train a model
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer train configs/quickstart.yaml\n  \
    trainer train configs/minilm.yaml training.learning_rate=2e-5 data.train.0.samples=1000\n  \
    trainer train configs/minilm.yaml --resume\n  \
    LODESTONE_NCCL=1 torchrun --no-python --nproc-per-node 4 trainer train configs/zeta.yaml\n\n\
    Ranks that torchrun, srun or mpirun has started look at these variables, which `launch` sets for its own:\n  \
    LODESTONE_NCCL=1           each rank has a GPU of its own: they talk over NCCL, not through the processor's memory\n  \
    LODESTONE_TIMEOUT=SECONDS  how long a rank may show no sign of work before the others end the run; default 1800\n  \
    LODESTONE_TOKEN=SECRET     the same on all hosts, for ranks on several (not under mpirun)")]
pub(super) struct Args {
    /// The configuration, a YAML file
    config: PathBuf,
    /// Overrides, such as `training.learning_rate=2e-5` or `data.train.0.samples=1000`
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Continue from the newest whole checkpoint, or start anew where there is none
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
