//! `trainer report`.

use std::path::PathBuf;

use super::print;
use crate::Result;
use crate::train::report;

/// Write a page to look at a run, or at several beside each other
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer report runs/quickstart\n  trainer report runs/zeta runs/zeta-r16\n\n\
    The page needs nothing else: no network, no other file. A run that goes on is shown as far as it has come."
)]
pub(super) struct Args {
    /// Output folders of runs; report.html is written into the first
    #[arg(value_name = "RUN_DIR", required = true)]
    runs: Vec<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    print(report::write(&args.runs)?.display());
    Ok(())
}
