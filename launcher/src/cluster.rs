//! The ranks of this node among all nodes: their devices, environment and rendezvous.

use std::net::{TcpListener, ToSocketAddrs};

use trainer::comm::{
    self, Token, VARIABLE_NCCL, VARIABLE_RENDEZVOUS, VARIABLE_TIMEOUT, VARIABLE_TOKEN, rendezvous,
};
use trainer::system::device;

use crate::args::{Hardware, Job, Nodes};
use crate::gpu::Machine;

/// The ranks of this node, and how they find those of the other nodes.
#[derive(Debug)]
pub(crate) struct Cluster {
    nodes: u32,
    node: u32,
    /// The GPU of each rank of this node, if any.
    devices: Vec<Option<String>>,
    hardware: Hardware,
    host: String,
    port: u16,
    secret: String,
    timeout: u64,
}

impl Cluster {
    /// Finds the devices and nodes, and starts the rendezvous server on node 0. An error is a message and an
    /// exit status.
    pub(crate) fn new(job: &Job) -> Result<Self, (String, u8)> {
        let wrong = |message: String| (message, 2);
        let devices = devices(job.hardware, &Machine::new()).map_err(wrong)?;
        let nodes = match &job.nodes {
            Some(nodes) => Some(nodes.clone()),
            None => slurm().map_err(wrong)?,
        };
        let (nodes, node, meeting) = match nodes {
            Some(Nodes { count, node, rendezvous }) if count > 1 => (count, node, Some(rendezvous)),
            _ => (1, 0, None),
        };
        let size = nodes as usize * devices.len();
        let cannot =
            |error: std::io::Error| (format!("cannot start the rendezvous of the ranks: {error}"), 1);
        let secret = match (std::env::var(VARIABLE_TOKEN), &meeting) {
            (Ok(secret), _) if !secret.is_empty() => secret,
            // Only the ranks of this launcher need to know it.
            (_, None) => Token::draw().map_err(cannot)?,
            // Other hosts cannot connect.
            (_, Some(meeting)) if comm::is_loopback(address(meeting).map_err(wrong)?.0.as_str()) => {
                String::new()
            }
            (_, Some(_)) => {
                return Err(wrong(format!(
                    "{VARIABLE_TOKEN} is not set, but ranks on several nodes need a secret to recognise each other\n\
                     hint: set it to the same value on all nodes, for example the output of `openssl rand -hex 16`"
                )));
            }
        };
        let (host, port) = match &meeting {
            None if size == 1 => ("127.0.0.1".to_owned(), free_port()),
            None => {
                let address =
                    rendezvous::host(("127.0.0.1", 0), size, Token::new(&secret)).map_err(cannot)?;
                (address.ip().to_string(), address.port())
            }
            Some(meeting) => {
                let (host, port) = address(meeting).map_err(wrong)?;
                if node == 0 {
                    let ip = if comm::is_loopback(&host) { "127.0.0.1" } else { "0.0.0.0" };
                    rendezvous::host((ip, port), size, Token::new(&secret)).map_err(|error| {
                        wrong(format!("--rendezvous {meeting}: cannot listen there: {error}"))
                    })?;
                }
                (host, port)
            }
        };
        Ok(Self { nodes, node, devices, hardware: job.hardware, host, port, secret, timeout: job.timeout })
    }

    /// Number of ranks on this node.
    pub(crate) fn ranks(&self) -> usize {
        self.devices.len()
    }

    /// The global rank of a local one.
    pub(crate) fn rank(&self, local: usize) -> usize {
        self.node as usize * self.devices.len() + local
    }

    /// The environment variables of a rank: those of torchrun, and lodestone's own.
    pub(crate) fn environment(&self, local: usize) -> Vec<(&'static str, String)> {
        let ranks = self.devices.len();
        let mut variables = vec![
            ("RANK", self.rank(local).to_string()),
            ("WORLD_SIZE", (self.nodes as usize * ranks).to_string()),
            ("LOCAL_RANK", local.to_string()),
            ("LOCAL_WORLD_SIZE", ranks.to_string()),
            ("MASTER_ADDR", self.host.clone()),
            ("MASTER_PORT", self.port.to_string()),
            (VARIABLE_RENDEZVOUS, "launch".to_owned()),
            (VARIABLE_TOKEN, self.secret.clone()),
            (VARIABLE_TIMEOUT, self.timeout.to_string()),
        ];
        match (&self.devices[local], self.hardware) {
            (Some(device), _) => {
                variables.push(("CUDA_VISIBLE_DEVICES", device.clone()));
                variables.push((VARIABLE_NCCL, "1".to_owned()));
                variables.push((device::VARIABLE, "cuda".to_owned()));
            }
            // No device was requested, so the rank chooses one.
            (None, Hardware::Any | Hardware::One) => {}
            (None, _) => variables.push((device::VARIABLE, "cpu".to_owned())),
        }
        variables
    }
}

fn devices(hardware: Hardware, machine: &Machine) -> Result<Vec<Option<String>>, String> {
    Ok(match hardware {
        Hardware::Cpus(ranks) => vec![None; ranks as usize],
        Hardware::Gpus(wanted) => machine.devices(wanted)?.into_iter().map(Some).collect(),
        Hardware::Any if machine.cuda.is_some() && !machine.list().is_empty() => {
            machine.devices(None)?.into_iter().map(Some).collect()
        }
        Hardware::Any | Hardware::One => vec![None],
    })
}

/// The nodes from srun's environment, if it started one launcher on each of several nodes.
fn slurm() -> Result<Option<Nodes>, String> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
    let (Some(count), Some(node)) = (number("SLURM_STEP_NUM_NODES"), number("SLURM_NODEID")) else {
        return Ok(None);
    };
    if number("SLURM_STEP_NUM_TASKS").is_some_and(|tasks| tasks > count) {
        return Err(
            "srun started several launchers on a node\nhint: use `srun --ntasks-per-node=1`; the launcher \
                    starts all ranks of its node"
                .to_owned(),
        );
    }
    if count == 1 {
        return Ok(None);
    }
    let (host, port) = comm::slurm_master().map_err(|error| error.to_string())?;
    Ok(Some(Nodes { count, node, rendezvous: format!("{host}:{port}") }))
}

/// Splits `HOST:PORT` and checks that the host has an address.
fn address(meeting: &str) -> Result<(String, u16), String> {
    let split = meeting.rsplit_once(':').and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)));
    let (host, port): (String, u16) =
        split.ok_or_else(|| format!("--rendezvous {meeting}: expected HOST:PORT"))?;
    match (host.as_str(), port).to_socket_addrs().map(|mut found| found.next()) {
        Ok(Some(_)) => Ok((host, port)),
        Ok(None) => Err(format!("--rendezvous {meeting}: {host} has no address")),
        Err(error) => Err(format!("--rendezvous {meeting}: {error}")),
    }
}

/// A free port; torchrun's default if the system gives none.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr()).map_or(29500, |address| address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(hardware: Hardware, nodes: Option<Nodes>) -> Job {
        Job { command: Vec::new(), hardware, nodes, restarts: 0, timeout: 9 }
    }

    fn get(cluster: &Cluster, local: usize, name: &str) -> String {
        cluster.environment(local).into_iter().find(|(other, _)| *other == name).unwrap().1
    }

    #[test]
    fn ranks_get_the_environment_of_torchrun() {
        let cluster = Cluster::new(&job(Hardware::Cpus(3), None)).unwrap();
        assert_eq!(cluster.ranks(), 3);
        let of = |local| {
            ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"].map(|name| get(&cluster, local, name))
        };
        assert_eq!(of(0), ["0", "3", "0", "3"]);
        assert_eq!(of(2), ["2", "3", "2", "3"]);
        assert_eq!(get(&cluster, 1, "MASTER_ADDR"), "127.0.0.1");
        assert_ne!(get(&cluster, 1, "MASTER_PORT"), "0");
        assert!(get(&cluster, 1, VARIABLE_TOKEN).len() >= 32 || std::env::var(VARIABLE_TOKEN).is_ok());
        assert_eq!(get(&cluster, 1, VARIABLE_TIMEOUT), "9");
        assert_eq!(get(&cluster, 1, device::VARIABLE), "cpu");
    }

    #[test]
    fn a_single_rank_has_the_same_environment() {
        let cluster = Cluster::new(&job(Hardware::Any, None)).unwrap();
        assert_eq!(
            (get(&cluster, 0, "RANK"), get(&cluster, 0, "WORLD_SIZE")),
            ("0".to_owned(), "1".to_owned())
        );
        assert_ne!(get(&cluster, 0, "MASTER_PORT").parse::<u16>().unwrap(), 0);
    }

    #[test]
    fn several_nodes_need_a_secret_and_an_address() {
        let nodes = |rendezvous: &str| Some(Nodes { count: 2, node: 1, rendezvous: rendezvous.to_owned() });
        if std::env::var(VARIABLE_TOKEN).is_err() {
            let (message, status) = Cluster::new(&job(Hardware::Cpus(1), nodes("192.0.2.1:1"))).unwrap_err();
            assert!(message.contains(VARIABLE_TOKEN) && status == 2, "{message}");
            assert_eq!(Cluster::new(&job(Hardware::Cpus(1), nodes("127.0.0.1:1"))).unwrap().secret, "");
        }
        let (port, free) = (free_port(), |address: &str, port| TcpListener::bind((address, port)).is_ok());
        let first = Nodes { node: 0, ..nodes(&format!("localhost:{port}")).unwrap() };
        Cluster::new(&job(Hardware::Cpus(1), Some(first))).unwrap();
        assert!(
            free("127.0.0.2", port) && !free("127.0.0.1", port),
            "it accepts connections from this host only"
        );
        assert!(address("127.0.0.1").unwrap_err().contains("expected HOST:PORT"));
        assert!(address("no.such.host.invalid:7").unwrap_err().contains("no.such.host.invalid"));
        assert_eq!(address("127.0.0.1:7").unwrap(), ("127.0.0.1".to_owned(), 7));
    }
}
