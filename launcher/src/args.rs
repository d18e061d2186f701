//! The command line, and the trainer's command line that it stands for.

use std::ffi::OsString;

use clap::Parser;
use trainer::comm::LONGEST_TIMEOUT;

/// Starts a training run, or another of the trainer's commands, on one or many ranks, and brings them home.
#[derive(Debug, Parser)]
#[command(
    name = "launch",
    version,
    override_usage = "launch [OPTIONS] CONFIG [KEY=VALUE …]\n       launch [OPTIONS] -- COMMAND ARGS …",
    after_help = "Examples:
  launch configs/quickstart.yaml                               train
  launch configs/quickstart.yaml training.learning_rate=5e-4   with another value
  launch --resume configs/quickstart.yaml                      go on from the newest checkpoint
  launch --cpus 2 --restarts 3 configs/quickstart.yaml         on two ranks, started anew when one fails
  launch -- evaluate --model runs/quickstart/model --set data/quickstart/test
  LODESTONE_TOKEN=… launch --gpus 8 --nodes 2 --node 0 --rendezvous n1:29400 configs/minilm.yaml    on each of two nodes

Exit status: that of the run. 0 done; 1 the run failed; 2 the command line, the configuration or an input is wrong; \
128+S after a checkpoint, because signal S (TERM, INT or USR1) asked for a stop."
)]
pub(crate) struct Arguments {
    /// Ranks on the processor of this node, which share its cores. Default, where no GPU is to be seen: 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// Ranks on GPUs of this node, one each. Default: all that are to be seen
    #[arg(long, value_name = "N", conflicts_with = "cpus", value_parser = clap::value_parser!(u32).range(1..))]
    gpus: Option<u32>,
    /// Go on from the newest checkpoint, or start anew where there is none
    #[arg(long)]
    resume: bool,
    /// How often a run that fails is started again, from its newest checkpoint
    #[arg(long, value_name = "K", default_value_t = 0)]
    restarts: u32,
    /// How long a rank may show no sign of work before the run is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=LONGEST_TIMEOUT))]
    timeout: u64,
    /// Nodes that train together, as many ranks on each; LODESTONE_TOKEN is their secret. Default: 1, or srun's
    #[arg(long, value_name = "N", requires_all = ["node", "rendezvous"], value_parser = clap::value_parser!(u32).range(1..))]
    nodes: Option<u32>,
    /// The number of this node, from 0
    #[arg(long, value_name = "I", requires = "nodes")]
    node: Option<u32>,
    /// Where node 0 can be reached by all
    #[arg(long, value_name = "HOST:PORT", requires = "nodes")]
    rendezvous: Option<String>,
    /// Show errors only
    #[arg(long)]
    quiet: bool,
    /// The configuration of a training run
    #[arg(required_unless_present = "command")]
    config: Option<OsString>,
    /// Values that override the configuration's
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<OsString>,
    /// A command of the trainer with its arguments
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "config")]
    command: Vec<OsString>,
}

/// What ranks run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hardware {
    /// So many ranks.
    Cpus(u32),
    /// So many, or all that are to be seen.
    Gpus(Option<u32>),
    /// GPUs where there are any, else one rank.
    Any,
    /// One rank, for a command that does not share its work.
    One,
}

/// The nodes by which a run was asked to be shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nodes {
    /// How many.
    pub(crate) count: u32,
    /// Which one this is.
    pub(crate) node: u32,
    /// Where node 0 waits.
    pub(crate) rendezvous: String,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    /// What each rank's trainer is told.
    pub(crate) command: Vec<OsString>,
    pub(crate) hardware: Hardware,
    pub(crate) nodes: Option<Nodes>,
    pub(crate) restarts: u32,
    /// Seconds.
    pub(crate) timeout: u64,
}

/// Commands that share their work among ranks.
const SHARED: [&str; 5] = ["train", "encode", "evaluate", "compare", "mine"];

impl Arguments {
    /// What is asked for. An error is for the person at the terminal: nothing was started.
    pub(crate) fn job(self) -> Result<Job, String> {
        let mut command = self.command;
        if let Some(config) = self.config {
            command.extend(["train".into(), config]);
            command.extend(self.overrides);
        }
        let name =
            command.iter().find_map(|argument| argument.to_str().filter(|name| !name.starts_with('-')));
        let train = name == Some("train");
        let shared = name.is_some_and(|name| SHARED.contains(&name));
        let several = self.nodes.is_some_and(|nodes| nodes > 1)
            || self.cpus.or(self.gpus).is_some_and(|ranks| ranks > 1);
        if let Some(name) = name.filter(|_| several && !shared) {
            return Err(format!(
                "`{name}` does not share its work among ranks\nhint: {} do",
                SHARED.join(", ")
            ));
        }
        if self.resume {
            if !train {
                return Err("--resume: only training goes on from a checkpoint".into());
            }
            command.push("--resume".into());
        }
        if self.restarts > 0 && !train {
            return Err("--restarts: only training goes on from a checkpoint".into());
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
            return Err(format!("--node {node}: of {count} nodes the last one is {}", count - 1));
        }
        Ok(Job { command, hardware, nodes, restarts: self.restarts, timeout: self.timeout })
    }
}

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
    fn a_configuration_is_trained() {
        assert_eq!(command("launch a.yaml").unwrap(), "train a.yaml");
        assert_eq!(command("launch --cpus 2 a.yaml x.y=1 z=2").unwrap(), "train a.yaml x.y=1 z=2");
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
        assert!(command("launch --restarts 1 -- encode").unwrap_err().starts_with("--restarts"));
        assert!(
            command("launch --cpus 2 -- export --run r").unwrap_err().contains("`export` does not share")
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
