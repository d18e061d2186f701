//! The command `trainer plan`.

use std::path::PathBuf;

use super::encode::at_least_one;
use super::print;
use crate::config::Config;
use crate::train::plan::{self, CostEstimate, Plan};
use crate::train::scaling::{Rates, ScalingTable, Workload};

/// Check a configuration and its data, and print what the run will do; trains nothing
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer plan configs/quickstart.yaml training.batch_size=128\n  \
    trainer plan configs/minilm.yaml --ranks 4,64,1024 --tokens-per-second 14000 --link-rate 25")]
pub(super) struct Args {
    /// Configuration file (YAML); `trainer config` describes its keys
    config: PathBuf,
    /// Values that override the configuration, such as `training.learning_rate=2e-5`
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Also estimate the time of a step on these numbers of ranks, such as `4,64,1024`
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = at_least_one)]
    ranks: Vec<usize>,
    /// Measured throughput of one rank, `tokens_per_second` in metrics.jsonl (for --ranks)
    #[arg(long, value_name = "X", requires_all = ["ranks", "link_rate"], value_parser = above_zero)]
    tokens_per_second: Option<f64>,
    /// Network bandwidth of one rank in gigabytes per second (for --ranks)
    #[arg(long, value_name = "GB", requires = "tokens_per_second", value_parser = above_zero)]
    link_rate: Option<f64>,
}

pub(super) fn run(args: &Args) -> crate::Result<()> {
    let config = Config::load(&args.config, &args.overrides)?;
    if let Err(missing) = plan::check_inputs(&config) {
        // The user wants to know the cost of a run before fetching its data.
        match CostEstimate::new(&config) {
            Ok(estimate) => {
                print(estimate.to_string().trim_end());
                if !args.ranks.is_empty() {
                    print("ranks      upper bounds, as if every text had the maximum length:");
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
    /// The estimated time of a step for each number of ranks in `--ranks`.
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
