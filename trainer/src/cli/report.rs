//! `trainer report`.

use std::path::PathBuf;

use super::print;
use crate::Result;
use crate::train::report;

/// Write an HTML report of one or more runs
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer report runs/quickstart\n  trainer report runs/zeta runs/zeta-r16 --output zeta.html\n\n\
    The report is one file that needs no network. A run in progress is shown up to its last logged step. Several runs are \
    compared, with the keys of the configuration in which they differ."
)]
pub(super) struct Args {
    /// Output folders of runs
    #[arg(value_name = "RUN_DIR", required = true)]
    runs: Vec<PathBuf>,
    /// File to write. Default: RUN_DIR/report.html for one run, report.html in the working directory for several
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    print(report::write(&args.runs, args.output.as_deref())?.display());
    Ok(())
}
