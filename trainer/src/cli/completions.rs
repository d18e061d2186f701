//! The command `trainer completions`.

use clap_complete::Shell;

use super::{command, print};
use crate::Result;

/// Print a script that completes the commands and flags of `trainer` in a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer completions bash > ~/.local/share/bash-completion/completions/trainer\n  \
    trainer completions zsh > \"${fpath[1]}/_trainer\"\n  \
    trainer completions fish > ~/.config/fish/completions/trainer.fish")]
pub(super) struct Args {
    /// The shell
    shell: Shell,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "trainer", &mut script);
    print(String::from_utf8_lossy(&script).trim_end());
    Ok(())
}
