//! The command line of `launch`, and the trainer's command line that follows from it.

use std::ffi::OsString;

use clap::Parser;
use trainer::comm::LONGEST_TIMEOUT;

/// Runs a training, or another command of `trainer`, on one or several ranks
///
/// `launch` starts one process per rank on this node, restarts a failed run and forwards signals; it is the
/// usual way to train. Use `trainer train` where torchrun, mpirun or srun starts the processes.
#[derive(Debug, Parser)]
#[command(
    name = "launch",
    version,
    long_version = trainer::cli::version(),
    override_usage = "launch [OPTIONS] CONFIG [KEY=VALUE …]\n       launch [OPTIONS] -- COMMAND ARGS …",
    after_help = "Examples:
  launch configs/quickstart.yaml                               train
  launch configs/quickstart.yaml training.learning_rate=5e-4   override a value of the configuration
  launch --resume configs/quickstart.yaml                      continue from the newest checkpoint
  launch --cpus 2 --restarts 3 configs/quickstart.yaml         train on 2 CPU ranks; restart up to 3 times on failure
  launch -- evaluate --model runs/quickstart/model --set data/quickstart/test
  LODESTONE_TOKEN=… launch --gpus 8 --nodes 2 --node 0 --rendezvous n1:29400 configs/minilm.yaml    on each of 2 nodes

Exit status: 0 if done; 1 if the run failed; 2 if the command line, the configuration or an input is wrong, \
and nothing was started; 128+S if the run got signal S (TERM, INT or USR1), wrote a checkpoint and stopped."
)]
pub(crate) struct Arguments {
    /// Number of CPU ranks on this node, which share its cores. Default: 1 if no GPU is visible
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// Number of ranks with a GPU each on this node. Default: all visible GPUs, or 1 CPU rank
    #[arg(long, value_name = "N", conflicts_with = "cpus", value_parser = clap::value_parser!(u32).range(1..))]
    gpus: Option<u32>,
    /// Continue from the newest checkpoint; without one, start at the beginning
    #[arg(long)]
    resume: bool,
    /// How many times to restart a failed run, from its newest checkpoint
    #[arg(long, value_name = "K", default_value_t = 0)]
    restarts: u32,
    /// End the run if a rank makes no progress for this long
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=LONGEST_TIMEOUT))]
    timeout: u64,
    /// Number of nodes. All have the same number of ranks and the same secret in LODESTONE_TOKEN. Default:
    /// the nodes of srun, or 1
    #[arg(long, value_name = "N", requires_all = ["node", "rendezvous"], value_parser = clap::value_parser!(u32).range(1..))]
    nodes: Option<u32>,
    /// Number of this node, from 0
    #[arg(long, value_name = "I", requires = "nodes")]
    node: Option<u32>,
    /// Address of node 0 that all nodes can reach
    #[arg(long, value_name = "HOST:PORT", requires = "nodes")]
    rendezvous: Option<String>,
    /// Show results and errors only
    #[arg(long)]
    quiet: bool,
    /// Configuration file of a training run
    #[arg(required_unless_present = "command")]
    config: Option<OsString>,
    /// Values that override the configuration, such as training.learning_rate=5e-4
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<OsString>,
    /// Another command of `trainer` with its arguments, after `--`
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "config")]
    command: Vec<OsString>,
}

/// The devices for the ranks of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hardware {
    /// This number of CPU ranks.
    Cpus(u32),
    /// This number of GPUs, or all visible ones.
    Gpus(Option<u32>),
    /// All visible GPUs, or one CPU rank.
    Any,
    /// One rank, for a command that does not divide its work among ranks.
    One,
}

/// The nodes of a run, from the command line or SLURM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nodes {
    /// Number of nodes.
    pub(crate) count: u32,
    /// Number of this node, from 0.
    pub(crate) node: u32,
    /// Address of node 0, `HOST:PORT`.
    pub(crate) rendezvous: String,
}

/// What `launch` is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    /// Arguments of `trainer` for every rank.
    pub(crate) command: Vec<OsString>,
    pub(crate) hardware: Hardware,
    pub(crate) nodes: Option<Nodes>,
    pub(crate) restarts: u32,
    /// Seconds without progress after which a rank counts as hanging.
    pub(crate) timeout: u64,
}

impl Arguments {
    /// Checks the command line. The error is a message for the user.
    pub(crate) fn job(self) -> Result<Job, String> {
        let mut command = self.command;
        if let Some(config) = self.config {
            command.extend(["train".into(), config]);
            command.extend(self.overrides);
        }
        let name =
            command.iter().find_map(|argument| argument.to_str().filter(|name| !name.starts_with('-')));
        let train = name == Some("train");
        let can_share = trainer::cli::shared_commands();
        let shared = name.is_some_and(|name| can_share.contains(&name));
        let several = self.nodes.is_some_and(|nodes| nodes > 1)
            || self.cpus.or(self.gpus).is_some_and(|ranks| ranks > 1);
        if let Some(name) = name.filter(|_| several && !shared) {
            return Err(format!(
                "`{name}` runs on one rank only\nhint: {} can use several",
                can_share.join(", ")
            ));
        }
        if self.resume {
            if !train {
                return Err("--resume: only training can be resumed".into());
            }
            command.push("--resume".into());
        }
        if self.restarts > 0 && !train {
            return Err("--restarts: only training can be restarted".into());
        }
        if self.quiet {
            command.push("--quiet".into());
        }
        let hardware = match (self.cpus, self.gpus) {
            (Some(ranks), _) => Hardware::Cpus(ranks),
            (None, Some(ranks)) => Hardware::Gpus(Some(ranks)),
            (None, None) if shared => Hardware::Any,
            (None, None) => Hardware::One,
        };
        let nodes = match (self.nodes, self.node, self.rendezvous) {
            (Some(count), Some(node), Some(rendezvous)) => Some(Nodes { count, node, rendezvous }),
            _ => None,
        };
        if let Some(Nodes { count, node, .. }) = &nodes
            && node >= count
        {
            return Err(format!(
                "--node {node}: expected 0 to {}, the number of the last of {count} nodes",
                count - 1
            ));
        }
        Ok(Job { command, hardware, nodes, restarts: self.restarts, timeout: self.timeout })
    }
}

#[cfg(test)]
mod documents;
#[cfg(test)]
mod tests {
    use super::*;

    fn job(line: &str) -> Result<Job, String> {
        Arguments::try_parse_from(line.split(' ')).map_err(|e| e.to_string())?.job()
    }

    fn command(line: &str) -> Result<String, String> {
        Ok(job(line)?.command.join(" ".as_ref()).into_string().unwrap())
    }

    #[test]
    fn a_configuration_means_train() {
        assert_eq!(command("launch a.yaml").unwrap(), "train a.yaml");
        assert_eq!(command("launch --cpus 2 a.yaml x.y=1 z=2").unwrap(), "train a.yaml x.y=1 z=2");
    }

    #[test]
    fn resume_and_quiet_are_passed_on_wherever_they_stand() {
        for line in ["launch --resume --quiet a.yaml k=v", "launch a.yaml --resume k=v --quiet"] {
            assert_eq!(command(line).unwrap(), "train a.yaml k=v --resume --quiet");
        }
    }

    #[test]
    fn a_command_after_two_dashes_is_passed_on_unchanged() {
        assert_eq!(command("launch -- encode --model m --input -").unwrap(), "encode --model m --input -");
        assert_eq!(command("launch --resume -- train a.yaml").unwrap(), "train a.yaml --resume");
        assert!(command("launch --resume -- encode").unwrap_err().starts_with("--resume"));
        assert!(command("launch --restarts 1 -- encode").unwrap_err().starts_with("--restarts"));
        assert!(
            command("launch --cpus 2 -- export --run r")
                .unwrap_err()
                .contains("`export` runs on one rank only")
        );
        assert!(command("launch --cpus 2 -- encode --model m").is_ok());
    }

    #[test]
    fn hardware_and_nodes() {
        let hardware = |line: &str| job(line).unwrap().hardware;
        assert_eq!(hardware("launch a.yaml"), Hardware::Any);
        assert_eq!(hardware("launch --cpus 3 a.yaml"), Hardware::Cpus(3));
        assert_eq!(hardware("launch --gpus 4 a.yaml"), Hardware::Gpus(Some(4)));
        assert_eq!(hardware("launch -- --quiet mine --model m"), Hardware::Any);
        for alone in
            ["export --run r", "plan a.yaml", "nano --set s", "split --input i", "report r", "--version"]
        {
            assert_eq!(hardware(&format!("launch -- {alone}")), Hardware::One, "{alone}");
        }
        let job = job("launch --nodes 2 --node 1 --rendezvous h:1 --restarts 3 --timeout 9 a.yaml").unwrap();
        assert_eq!(job.nodes, Some(Nodes { count: 2, node: 1, rendezvous: "h:1".to_owned() }));
        assert_eq!((job.restarts, job.timeout), (3, 9));
    }

    #[test]
    fn a_wrong_command_line_is_refused() {
        for line in [
            "launch",
            "launch --cpus 0 a.yaml",
            "launch --cpus 1 --gpus 1 a.yaml",
            "launch a.yaml -- encode",
            "launch --nodes 2 a.yaml",
            "launch --nodes 2 --node 2 --rendezvous h:1 a.yaml",
            "launch --timeout 0 a.yaml",
            "launch --timeout 18446744073709551615 a.yaml",
            "launch --gpus 2 -- --quiet export --run r",
            "launch --nodes 2 --node 0 --rendezvous h:1 -- report r",
        ] {
            assert!(job(line).is_err(), "{line}");
        }
    }
}
