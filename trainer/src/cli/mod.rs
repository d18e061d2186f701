//! The commands of `trainer`: what the user typed, to what is done, to an exit status.
//!
//! Results go to standard output, everything else to standard error.

mod compare;
mod encode;
mod encoding;
mod evaluate;
mod export;
mod logging;
mod mine;
mod nano;
mod plan;
mod report;
mod sets;
mod split;
mod train;

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::comm::{RankEnv, World};
use crate::system::heartbeat;
use crate::system::progress;
use crate::train::memory;
use crate::{Error, Result};

/// Trains text-embedding models, and uses them.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, propagate_version = true)]
#[command(after_help = "Example: trainer train configs/quickstart.yaml training.learning_rate=2e-4\n\n\
    Exit status: 0 done; 1 the run failed; 2 the command line, the configuration or an input is wrong and nothing was \
    started; 128+S a checkpoint was written because signal S asked for a stop.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Show results and errors only
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model
    Train(train::Args),
    /// Check everything and say what a run will do; trains nothing
    Plan(plan::Args),
    /// Turn texts into embeddings
    Encode(encode::Args),
    /// Measure a model on evaluation sets
    Evaluate(evaluate::Args),
    /// Measure two models on the same sets
    Compare(compare::Args),
    /// Divide rows into a part to train on and parts to measure with, none of whose texts is trained on
    Split(split::Args),
    /// Find hard negatives: documents near a query that do not answer it
    Mine(mine::Args),
    /// Make a small set that is nearly as hard as a BEIR set
    Nano(nano::Args),
    /// Write the model of a run as a folder for other programs
    Export(export::Args),
    /// Write a page to look at runs
    Report(report::Args),
}

/// Runs the command in `args`, the program's name first, and returns its exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    memory::keep_pages();
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // --help and --version are results, on standard output, and no failure.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let env = RankEnv::from_env().ok().flatten();
    let rank = env.as_ref().map_or(0, |env| env.rank);
    // One voice is enough: the others say what went wrong, and keep the rest in their logs.
    logging::start(cli.quiet, rank);
    if cli.quiet || rank > 0 {
        progress::quiet();
    }
    let (done, world) = match start(&cli.command) {
        // On a thread of the pool: an op called from outside of it would put this thread to sleep and wake it up again.
        Ok(world) => (rayon::scope(|_| run(cli.command, &world)), world),
        Err(error) => (Err(error), World::solo()),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    let status = error.exit_status();
    match error {
        // Under MPI the first that notices ends all, before others may say it.
        Error::Rank { rank: other, .. }
            if rank > 0 && rank != other && env.is_some_and(|env| env.master.is_some()) =>
        {
            tracing::warn!("{error}");
        }
        // Somebody asked for it.
        Error::Stopped { .. } => tracing::warn!("{error}"),
        _ => tracing::error!("{error}"),
    }
    if !matches!(error, Error::Stopped { .. }) {
        // After the last word: with MPI nothing comes after this.
        world.abort(&error, status);
    }
    ExitCode::from(status)
}

/// Joins the other ranks, where the command shares its work with them.
fn start(command: &Command) -> Result<World> {
    let env = RankEnv::from_env()?;
    if let Ok(Some((path, slot))) = env::var(heartbeat::VARIABLE).map(|variable| {
        variable.rsplit_once(':').and_then(|(path, slot)| Some((path.to_owned(), slot.parse().ok()?)))
    }) {
        heartbeat::publish(Path::new(&path), slot)
            .map_err(Error::system("write heartbeats for the launcher"))?;
    }
    let Some(env) = env else { return Ok(World::solo()) };
    use Command::{Compare, Encode, Evaluate, Mine, Train};
    if !matches!(command, Train(_) | Encode(_) | Evaluate(_) | Compare(_) | Mine(_)) {
        let message = format!("this command does not share its work, and {} ranks were started", env.size);
        return Err(Error::Usage(format!("{message}\nhint: start it alone")));
    }
    if let Some(threads) = env.threads.filter(|_| env::var_os("RAYON_NUM_THREADS").is_none()) {
        // It fails where threads run already, and then they stay as many as they are.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    World::connect()
}

fn run(command: Command, world: &World) -> Result<()> {
    match command {
        Command::Train(args) => train::run(&args, world),
        Command::Plan(args) => plan::run(&args),
        Command::Encode(args) => encode::run(&args, world),
        Command::Evaluate(args) => evaluate::run(&args, world),
        Command::Compare(args) => compare::run(&args, world),
        Command::Split(args) => split::run(&args),
        Command::Mine(args) => mine::run(&args, world),
        Command::Nano(args) => nano::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Report(args) => report::run(&args),
    }
}

/// Prints a result. A reader that has gone away (`| head`) is no failure.
pub(crate) fn print(result: impl std::fmt::Display) {
    progress::suspend(|| {
        let _ = writeln!(std::io::stdout(), "{result}");
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_has_an_example() {
        let cli = Cli::command();
        cli.clone().debug_assert();
        for command in cli.get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("trainer {}", command.get_name())), "{}", command.get_name());
        }
    }
}
