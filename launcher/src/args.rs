//! The command line, and the trainer's command line that it stands for.

use std::ffi::OsString;

use clap::Parser;

/// Starts a training run, or another of the trainer's commands, and hands signals on to it.
#[derive(Debug, Parser)]
#[command(
    name = "launch",
    version,
    override_usage = "launch [OPTIONS] CONFIG [KEY=VALUE …]\n       launch [OPTIONS] -- COMMAND ARGS …",
    after_help = "Examples:
  launch configs/quickstart.yaml                               train
  launch configs/quickstart.yaml training.learning_rate=5e-4   with another value
  launch --resume configs/quickstart.yaml                      go on from the newest checkpoint
  launch -- evaluate --model runs/quickstart/model --set data/quickstart/test

Exit status: that of the run. 0 done; 1 the run failed; 2 the command line, the configuration or an input is wrong;
128+S after a checkpoint, because signal S (TERM, INT or USR1) asked for a stop."
)]
pub(crate) struct Arguments {
    /// Ranks on the processor: 1, which uses all cores. The default.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// Ranks on GPUs, one each; needs a build with CUDA.
    #[arg(long, value_name = "N", conflicts_with = "cpus")]
    gpus: Option<u32>,
    /// Go on from the newest checkpoint, or start anew where there is none.
    #[arg(long)]
    resume: bool,
    /// Show warnings and errors only.
    #[arg(long)]
    quiet: bool,
    /// The configuration of a training run.
    #[arg(required_unless_present = "command")]
    config: Option<OsString>,
    /// Values that override the configuration's.
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<OsString>,
    /// A command of the trainer with its arguments.
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "config")]
    command: Vec<OsString>,
}

impl Arguments {
    /// What the rank's trainer is told. An error is for the person at the terminal: nothing was started.
    pub(crate) fn command(self) -> Result<Vec<OsString>, String> {
        if self.gpus.is_some() {
            return Err(
                "--gpus: this build has no GPU support\nhint: leave it out to train on the processor".into(),
            );
        }
        if let Some(n @ 2..) = self.cpus {
            return Err(format!(
                "--cpus {n}: this build runs one rank, which uses all cores\nhint: leave it out"
            ));
        }
        let mut command = self.command;
        if let Some(config) = self.config {
            command.extend(["train".into(), config]);
            command.extend(self.overrides);
        }
        if self.resume {
            if command.first().is_some_and(|name| name != "train") {
                return Err("--resume: only training goes on from a checkpoint".into());
            }
            command.push("--resume".into());
        }
        if self.quiet {
            command.push("--quiet".into());
        }
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str) -> Result<String, String> {
        let arguments = Arguments::try_parse_from(line.split(' ')).map_err(|e| e.to_string())?;
        let command = arguments.command()?;
        Ok(command.join(" ".as_ref()).into_string().unwrap())
    }

    #[test]
    fn a_configuration_is_trained() {
        assert_eq!(command("launch a.yaml").unwrap(), "train a.yaml");
        assert_eq!(command("launch --cpus 1 a.yaml x.y=1 z=2").unwrap(), "train a.yaml x.y=1 z=2");
    }

    #[test]
    fn resume_and_quiet_are_handed_on_wherever_they_stand() {
        for line in ["launch --resume --quiet a.yaml k=v", "launch a.yaml --resume k=v --quiet"] {
            assert_eq!(command(line).unwrap(), "train a.yaml k=v --resume --quiet");
        }
    }

    #[test]
    fn a_command_after_two_dashes_is_taken_as_it_is() {
        assert_eq!(command("launch -- encode --model m --input -").unwrap(), "encode --model m --input -");
        assert_eq!(command("launch --resume -- train a.yaml").unwrap(), "train a.yaml --resume");
        assert!(command("launch --resume -- encode").unwrap_err().starts_with("--resume"));
    }

    #[test]
    fn what_this_build_cannot_do_is_refused() {
        assert!(command("launch --gpus 4 a.yaml").unwrap_err().contains("no GPU support"));
        assert!(command("launch --cpus 2 a.yaml").unwrap_err().contains("one rank"));
    }

    #[test]
    fn a_wrong_command_line_is_refused() {
        for line in
            ["launch", "launch --cpus 0 a.yaml", "launch --cpus 1 --gpus 1 a.yaml", "launch a.yaml -- encode"]
        {
            assert!(command(line).is_err(), "{line}");
        }
    }
}
