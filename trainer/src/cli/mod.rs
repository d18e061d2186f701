//! The commands of `trainer`: the command line, the ranks, the exit status.
//!
//! A command is a module with `Args` and `run`, and a line in the table `commands!` below. Results go to standard output, everything
//! else to standard error.

mod compare;
mod completions;
mod config;
mod encode;
mod encoding;
mod evaluate;
mod export;
mod init;
mod logging;
mod man;
mod mine;
mod nano;
mod plan;
mod report;
mod sets;
mod split;
mod train;
mod version;

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

pub use self::version::version;
use crate::comm::{RankEnv, World};
use crate::system::heartbeat;
use crate::system::progress;
use crate::train::memory;
use crate::{Error, Result};

/// Train, evaluate and use text-embedding models
#[derive(Debug, Parser)]
#[command(name = "trainer", version, long_version = version(), propagate_version = true)]
#[command(after_help = "Examples:\n  trainer train configs/quickstart.yaml training.learning_rate=2e-4\n  \
    trainer evaluate --model runs/quickstart/model --set data/quickstart/test\n  trainer help mine\n\n\
    Exit status: 0 if done; 1 if the run failed; 2 if the command line, the configuration or an input is \
    wrong, and nothing was started; 128+S if the run got signal S (TERM, INT or USR1), wrote a checkpoint \
    and stopped.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Show results and errors only
    #[arg(long, short, global = true)]
    quiet: bool,
}

/// Declares the commands, in the order of `--help`: name, module, and whether several ranks can share the work (`shared`) or one
/// rank does it (`alone`).
macro_rules! commands {
    ($($name:ident $module:ident $ranks:ident,)+) => {
        #[derive(Debug, Subcommand)]
        enum Command {
            $($name($module::Args)),+
        }

        impl Command {
            fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => stringify!($module)),+
                }
            }

            fn run(&self, world: &World) -> Result<()> {
                match self {
                    $(Self::$name(args) => commands!(@run $module $ranks args world)),+
                }
            }
        }

        /// Names of the commands whose work several ranks can share.
        pub fn shared_commands() -> Vec<&'static str> {
            let all = [$((stringify!($module), commands!(@is_shared $ranks))),+];
            all.into_iter().filter(|(_, shared)| *shared).map(|(name, _)| name).collect()
        }
    };
    (@run $module:ident shared $args:ident $world:ident) => { $module::run($args, $world) };
    (@run $module:ident alone $args:ident $world:ident) => { $module::run($args) };
    (@is_shared shared) => { true };
    (@is_shared alone) => { false };
}

commands! {
    Init init alone,
    Train train shared,
    Plan plan alone,
    Config config alone,
    Split split alone,
    Mine mine shared,
    Nano nano alone,
    Evaluate evaluate shared,
    Compare compare shared,
    Report report alone,
    Encode encode shared,
    Export export alone,
    Completions completions alone,
    Man man alone,
}

/// Runs the command line `args`, which begins with the name of the program, and returns the exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    memory::keep_pages();
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // --help and --version come here too. They are results on standard output, and their status is 0.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let env = RankEnv::from_env().ok().flatten();
    let rank = env.as_ref().map_or(0, |env| env.rank);
    // Rank 0 speaks for all: the other ranks print errors only, and write the rest to their log files.
    logging::start(cli.quiet, rank);
    if cli.quiet || rank > 0 {
        progress::quiet();
    }
    let (done, world) = match start(&cli.command) {
        // On a thread of rayon's pool: an op called from another thread would put that thread to sleep and wake it up again.
        Ok(world) => (rayon::scope(|_| cli.command.run(&world)), world),
        Err(error) => (Err(error), World::solo()),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    let status = error.exit_status();
    match error {
        // The rank that failed prints the error itself. Under MPI (no master address) it may be ended before it can.
        Error::Rank { rank: other, .. }
            if rank > 0 && rank != other && env.is_some_and(|env| env.master.is_some()) =>
        {
            tracing::warn!("{error}");
        }
        // A stop that was requested is not an error.
        Error::Stopped { .. } => tracing::warn!("{error}"),
        _ => tracing::error!("{error}"),
    }
    if !matches!(error, Error::Stopped { .. }) {
        // Last, because MPI ends the process here.
        world.abort(&error, status);
    }
    ExitCode::from(status)
}

/// Starts to publish heartbeats if a launcher reads them, and connects this rank to the others if the
/// environment names some.
///
/// # Errors
/// The environment names other ranks, but the command does not share its work; the ranks cannot connect.
fn start(command: &Command) -> Result<World> {
    let env = RankEnv::from_env()?;
    if let Ok(Some((path, slot))) = env::var(heartbeat::VARIABLE).map(|variable| {
        variable.rsplit_once(':').and_then(|(path, slot)| Some((path.to_owned(), slot.parse().ok()?)))
    }) {
        heartbeat::publish(Path::new(&path), slot)
            .map_err(Error::system("write heartbeats for the launcher"))?;
    }
    let Some(env) = env else { return Ok(World::solo()) };
    if !shared_commands().contains(&command.name()) {
        let (name, shared) = (command.name(), shared_commands().join(", "));
        let message =
            format!("`trainer {name}` does not share its work, but {} ranks were started", env.size);
        return Err(Error::Usage(format!("{message}\nhint: start one rank; {shared} can use several")));
    }
    if let Some(threads) = env.threads.filter(|_| env::var_os("RAYON_NUM_THREADS").is_none()) {
        // An error means that the pool runs already; it then keeps its number of threads.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    World::connect()
}

/// The command line of `trainer`, for completion scripts, man pages and tests.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Prints a result to standard output. A closed pipe (`| head`) is not an error.
pub(crate) fn print(result: impl std::fmt::Display) {
    progress::suspend(|| {
        let _ = writeln!(std::io::stdout(), "{result}");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

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
