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

use crate::Error;
use crate::comm::{self, World};
use crate::system::heartbeat;
use crate::system::progress;
use crate::train::memory;

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

/// Why a command ended early, and what it returns to the shell.
pub(crate) struct Failure {
    error: Error,
    status: u8,
}

impl Failure {
    /// Nothing was started: whatever it is, the user can mend it and lose nothing.
    pub(crate) fn before(error: Error) -> Self {
        match error {
            Error::Rank { .. } => Self::during(error),
            _ => Self { error, status: 2 },
        }
    }

    /// Work had begun.
    pub(crate) fn during(error: Error) -> Self {
        let status = match error {
            Error::Stopped { signal, .. } => 128 + u8::try_from(signal).unwrap_or(0),
            Error::Rank { status, .. } => status,
            _ => 1,
        };
        Self { error, status }
    }
}

/// What is wrong with an input is the user's to mend; what goes wrong with an output is the run's failure.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Usage(_) | Error::Config { .. } | Error::Row { .. } | Error::File { .. } => {
                Self::before(error)
            }
            Error::Io { action: "open" | "read" | "unpack", .. } => Self::before(error),
            _ => Self::during(error),
        }
    }
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
    let place = comm::place().ok().flatten();
    let rank = place.as_ref().map_or(0, |place| place.rank);
    // One voice is enough: the others say what went wrong, and keep the rest in their logs.
    logging::start(cli.quiet, rank);
    if cli.quiet || rank > 0 {
        progress::quiet();
    }
    let (done, world) = match start(&cli.command) {
        // On a thread of the pool: an op called from outside of it would put this thread to sleep and wake it up again.
        Ok(world) => (rayon::scope(|_| run(cli.command, &world)), world),
        Err(failure) => (Err(failure), World::solo()),
    };
    let Err(Failure { error, status }) = done else { return ExitCode::SUCCESS };
    match error {
        // Under MPI the first that notices ends all, before others may say it.
        Error::Rank { rank: other, .. }
            if rank > 0 && rank != other && place.is_some_and(|place| place.master.is_some()) =>
        {
            tracing::warn!("{error}");
        }
        // Somebody asked for it.
        Error::Stopped { .. } => tracing::warn!("{error}"),
        _ => tracing::error!("{error}"),
    }
    if !matches!(error, Error::Stopped { .. }) {
        // After the last word: with MPI nothing comes after this.
        world.abandon(&error, status);
    }
    ExitCode::from(status)
}

/// Joins the other ranks, where the command shares its work with them.
fn start(command: &Command) -> Result<World, Failure> {
    let place = comm::place().map_err(Failure::before)?;
    if let Ok(Some((path, slot))) = env::var(heartbeat::VARIABLE).map(|variable| {
        variable.rsplit_once(':').and_then(|(path, slot)| Some((path.to_owned(), slot.parse().ok()?)))
    }) {
        let told = heartbeat::tell(Path::new(&path), slot);
        told.map_err(|error| Failure::during(Error::io("write signs of life to", path)(error)))?;
    }
    let Some(place) = place else { return Ok(World::solo()) };
    use Command::{Compare, Encode, Evaluate, Mine, Train};
    if !matches!(command, Train(_) | Encode(_) | Evaluate(_) | Compare(_) | Mine(_)) {
        let message = format!("this command does not share its work, and {} ranks were started", place.size);
        return Err(Failure::before(Error::Usage(format!("{message}\nhint: start it alone"))));
    }
    if let Some(threads) = place.threads.filter(|_| env::var_os("RAYON_NUM_THREADS").is_none()) {
        // It fails where threads run already, and then they stay as many as they are.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    World::connect().map_err(|error| match error {
        Error::Usage(_) => Failure::before(error),
        _ => Failure::during(error),
    })
}

fn run(command: Command, world: &World) -> Result<(), Failure> {
    match command {
        Command::Train(args) => train::run(&args, world),
        Command::Plan(args) => plan::run(&args),
        Command::Encode(args) => encode::run(&args, world).map_err(Failure::from),
        Command::Evaluate(args) => evaluate::run(&args, world).map_err(Failure::from),
        Command::Compare(args) => compare::run(&args, world).map_err(Failure::from),
        Command::Split(args) => split::run(&args).map_err(Failure::from),
        Command::Mine(args) => mine::run(&args, world).map_err(Failure::from),
        Command::Nano(args) => nano::run(&args).map_err(Failure::from),
        Command::Export(args) => export::run(&args).map_err(Failure::from),
        Command::Report(args) => report::run(&args).map_err(Failure::from),
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
