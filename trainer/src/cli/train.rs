//! The command `trainer train`.

use std::path::{Path, PathBuf};

use super::{logging, print};
use crate::comm::World;
use crate::config::Config;
use crate::eval::is_better;
use crate::train::plan::Plan;
use crate::train::selection::selection_metric;
use crate::train::{Run, Summary};
use crate::{Error, Result};

/// Train a model as a configuration file describes
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer train configs/quickstart.yaml\n  \
    trainer train configs/minilm.yaml training.learning_rate=2e-5 data.train.0.samples=1000\n  \
    trainer train configs/minilm.yaml --resume\n  \
    LODESTONE_NCCL=1 torchrun --no-python --nproc-per-node 4 trainer train configs/zeta.yaml\n\n\
    Under torchrun, srun and mpirun each process of `trainer train` is one rank. Set these variables there; \
    `launch` sets them itself:\n  \
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
    let config = plan.config.clone();
    let text = plan.to_string();
    let run = Run::prepare(plan, args.resume, world.clone())?;
    logging::keep(&config.output, world.rank())?;
    tracing::info!("{}", text.trim_end());
    let summary = run.train().map_err(Error::during_run)?;
    if world.is_rank_zero() {
        show(&summary, &config);
    }
    Ok(())
}

/// Prints the scores, and says what the run has written and how it went.
fn show(summary: &Summary, config: &Config) {
    let metric = &config.evaluation.metric;
    for (name, after) in summary.after.iter().filter(|(name, _)| name.ends_with(metric)) {
        match (summary.before.get(name).and_then(serde_json::Value::as_f64), after.as_f64()) {
            (Some(before), Some(after)) => {
                print(format_args!("{name}  {before:.4} → {after:.4}  ({:+.4})", after - before))
            }
            (_, after) => print(format_args!("{name}  {:.4}", after.unwrap_or(f64::NAN))),
        }
    }
    if let (Some(before), Some(after)) =
        (selection_metric(&summary.before, metric), selection_metric(&summary.after, metric))
        && is_better(metric, before, after)
    {
        tracing::warn!(
            "the model is worse than its base: {metric} {before:.4} → {after:.4}\n\
             hint: try a smaller `training.learning_rate`, fewer steps, LoRA, or `evaluation.load_best: true`"
        );
    }
    for line in last_lines(summary, &config.output, metric) {
        tracing::info!("{line}");
    }
}

/// The last lines of a run: its loss, the best step, the step in OUTPUT/model, the report, the time taken.
fn last_lines(summary: &Summary, output: &Path, metric: &str) -> Vec<String> {
    let Summary { steps, selected_step, best, loss, report, duration, .. } = summary;
    let output = output.display();
    let mut lines = Vec::new();
    if let Some(loss) = loss {
        lines.push(format!("loss {loss:.4}, the mean over the rows of the last steps"));
    }
    if let Some(best) = best {
        lines.push(format!("best step {}: {metric} {:.4}", best.step, best.value));
    }
    let which = match best {
        Some(best) if best.step == *selected_step => ", the best one".to_owned(),
        Some(_) => {
            format!(", the last one; the best: trainer export --run {output} --checkpoint best --output DIR")
        }
        None => String::new(),
    };
    lines.push(format!("{output}/model is the model after step {selected_step}{which}"));
    if let Some(report) = report {
        lines.push(format!("report: {}", report.display()));
    }
    let seconds = duration.as_secs();
    let time = match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, _) => format!("{:.1} s", duration.as_secs_f64()),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    };
    lines.push(format!("finished after step {steps}, in {time}"));
    lines
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::train::selection::Best;

    #[test]
    fn the_last_lines_name_the_best_step_and_the_one_in_the_model_folder() {
        let lines = |summary: &Summary| last_lines(summary, Path::new("runs/x"), "cosine_ndcg@10");
        let mut summary = Summary {
            steps: 38,
            selected_step: 38,
            best: Some(Best { step: 25, value: 0.16084 }),
            loss: Some(0.5),
            report: Some("runs/x/report.html".into()),
            duration: Duration::from_millis(200_900),
            ..Summary::default()
        };
        let expected = [
            "loss 0.5000, the mean over the rows of the last steps",
            "best step 25: cosine_ndcg@10 0.1608",
            "runs/x/model is the model after step 38, the last one; \
             the best: trainer export --run runs/x --checkpoint best --output DIR",
            "report: runs/x/report.html",
            "finished after step 38, in 3 min 20 s",
        ];
        assert_eq!(lines(&summary), expected);
        summary.selected_step = 25;
        assert_eq!(lines(&summary)[2], "runs/x/model is the model after step 25, the best one");
        summary = Summary { best: None, loss: None, report: None, ..summary };
        assert_eq!(lines(&summary)[0], "runs/x/model is the model after step 25");
    }
}
