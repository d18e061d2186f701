//! The command `trainer config`.

use super::print;
use crate::Result;
use crate::config::reference;

/// Describe the keys of the configuration: type, default and meaning
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer config | less\n  trainer config training\n  \
    trainer config training.batch_size\n  trainer config --schema > configuration.schema.json")]
pub(super) struct Args {
    /// A key or a section, such as `training.batch_size` or `training`. Default: all keys
    key: Option<String>,
    /// Print a JSON Schema, with which editors complete and check YAML files
    #[arg(long, conflicts_with = "key")]
    schema: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.key {
        _ if args.schema => print(format_args!("{:#}", reference::schema())),
        Some(key) => print(reference::find(key)?),
        None => print(reference::page()),
    }
    Ok(())
}
