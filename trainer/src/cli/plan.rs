//! `trainer plan`.

use std::path::PathBuf;

use super::encode::at_least_one;
use super::print;
use crate::config::Config;
use crate::train::plan::{self, CostEstimate, Plan};
use crate::train::scaling::{Rates, ScalingTable, Workload};

/// Check everything and say what the run will do: rows, steps, tokens, memory
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer plan configs/quickstart.yaml training.batch_size=128\n  \
    trainer plan configs/minilm.yaml --ranks 4,64,1024 --tokens-per-second 14000 --link-rate 25")]
pub(super) struct Args {
    /// The configuration, a YAML file
    config: PathBuf,
    /// Overrides, such as `training.learning_rate=2e-5` or `data.train.0.samples=1000`
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Show also what a step would take on so many ranks, one or several: `4,64,1024`
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = at_least_one)]
    ranks: Vec<usize>,
    /// What one rank was measured to do (`tokens_per_second` of metrics.jsonl), for `--ranks`
    #[arg(long, value_name = "X", requires_all = ["ranks", "link_rate"], value_parser = above_zero)]
    tokens_per_second: Option<f64>,
    /// Gigabytes per second that a rank can send, for `--ranks`
    #[arg(long, value_name = "GB", requires = "tokens_per_second", value_parser = above_zero)]
    link_rate: Option<f64>,
}

pub(super) fn run(args: &Args) -> crate::Result<()> {
    let config = Config::load(&args.config, &args.overrides)?;
    if let Err(missing) = plan::check_inputs(&config) {
        // What the run costs decides whether the data is fetched at all.
        match CostEstimate::new(&config) {
            Ok(estimate) => {
                print(estimate.to_string().trim_end());
                if !args.ranks.is_empty() {
                    print("ranks      at most, as if every text were as long as it may be:");
                    print(args.table(&estimate.workload));
                }
            }
            Err(error) => tracing::warn!("{error}"),
        }
        return Err(missing);
    }
    let plan = Plan::resolve(config)?;
    print(plan.to_string().trim_end());
    if !args.ranks.is_empty() {
        print(args.table(&plan.workload));
    }
    Ok(())
}

impl Args {
    /// What a step would take on the numbers of ranks that were asked for.
    fn table(&self, workload: &Workload) -> String {
        let rates = self.tokens_per_second.zip(self.link_rate);
        let rates =
            rates.map(|(tokens, link)| Rates { tokens_per_second: tokens, bytes_per_second: link * 1e9 });
        let scaled = self.ranks.iter().map(|&ranks| workload.on_ranks(ranks, rates)).collect();
        ScalingTable(scaled).to_string().trim_end().to_owned()
    }
}

fn above_zero(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|&number: &f64| number > 0.0)
        .ok_or_else(|| "expected a number above 0".to_owned())
}
