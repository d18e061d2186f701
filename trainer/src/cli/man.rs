//! The command `trainer man`.

use std::fs;
use std::path::PathBuf;

use clap_mangen::Man;

use super::{command, print};
use crate::{Error, Result};

/// Print the man page of `trainer` or of one of its commands
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  trainer man | man -l -\n  trainer man train | man -l -\n  \
    trainer man --output ~/.local/share/man/man1")]
pub(super) struct Args {
    /// A command of `trainer`. Default: the page of `trainer` itself
    command: Option<String>,
    /// Write all pages to this folder instead of printing one
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    output: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    // `help` repeats every command, and its pages would too.
    let mut cli = command().disable_help_subcommand(true);
    cli.build();
    if let Some(folder) = &args.output {
        fs::create_dir_all(folder).map_err(Error::write("create", folder))?;
        return clap_mangen::generate_to(cli, folder).map_err(Error::write("write to", folder));
    }
    let command = match &args.command {
        None => cli,
        Some(name) => cli.find_subcommand(name).cloned().ok_or_else(|| {
            let names: Vec<&str> = cli.get_subcommands().map(clap::Command::get_name).collect();
            Error::Usage(format!(
                "`{name}` is not a command of trainer, expected one of {}",
                names.join(", ")
            ))
        })?,
    };
    let mut page = Vec::new();
    let rendered = Man::new(command).render(&mut page);
    rendered.map_err(|error| Error::Bug(format!("the man page cannot be written: {error}")))?;
    print(String::from_utf8_lossy(&page).trim_end());
    Ok(())
}
