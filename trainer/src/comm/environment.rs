//! Reads which rank this process is from the environment of its starter: `launch` and torchrun (`RANK`,
//! `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), srun (`SLURM_PROCID`, …),
//! or mpirun (`OMPI_COMM_WORLD_RANK`, …; `PMI_RANK`, …).

use std::env;
use std::net::IpAddr;
use std::num::NonZero;
use std::time::Duration;

use super::token::Token;
use crate::{Error, Result};

/// The run's secret. It must be the same on all hosts.
pub const VARIABLE_TOKEN: &str = "LODESTONE_TOKEN";
/// Set by `launch`, which then serves the rendezvous at `MASTER_ADDR` and `MASTER_PORT`. Without it rank 0
/// serves it.
pub const VARIABLE_RENDEZVOUS: &str = "LODESTONE_RENDEZVOUS";
/// Seconds without progress after which a rank counts as hanging.
pub const VARIABLE_TIMEOUT: &str = "LODESTONE_TIMEOUT";

/// `1` lets ranks communicate over NCCL; each needs a GPU of its own. `launch` sets it; under torchrun, srun
/// and mpirun the user does.
pub const VARIABLE_NCCL: &str = "LODESTONE_NCCL";

/// Default of [`VARIABLE_TIMEOUT`], in seconds: that of PyTorch's collectives.
const TIMEOUT: u64 = 1800;

/// The longest timeout that is accepted, in seconds: a year. Longer ones would overflow clocks.
pub const LONGEST_TIMEOUT: u64 = 365 * 24 * 3600;

/// What the environment says about this rank: which of how many it is, and how it reaches the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankEnv {
    /// Rank of this process, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Rank among those of this host, from 0.
    pub local_rank: usize,
    /// Number of ranks on this host.
    pub local_size: usize,
    /// Whether all ranks are known to run on this host. Then connections from other hosts are not accepted.
    pub one_host: bool,
    /// Host and port of the rendezvous; `None` under mpirun, which connects the ranks itself.
    pub master: Option<(String, u16)>,
    /// Whether the launcher serves the rendezvous; otherwise rank 0 does.
    pub hosted: bool,
    /// The run's secret.
    pub secret: Option<String>,
    /// Time without progress after which a rank counts as hanging.
    pub timeout: Duration,
    /// Number of threads for this rank; `None` where it may use all cores.
    pub threads: Option<usize>,
    /// Whether each rank has a GPU of its own and NCCL is used.
    pub gpu: bool,
}

impl RankEnv {
    /// Reads which rank this process is; none if it runs alone.
    ///
    /// # Errors
    /// A variable is missing, is not a number or contradicts another.
    pub fn from_env() -> Result<Option<Self>> {
        read(&|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The token by which the processes of this run recognise each other.
    ///
    /// # Errors
    /// The run has several hosts, but no secret.
    pub fn token(&self) -> Result<Token> {
        match &self.secret {
            Some(secret) => Ok(Token::new(secret)),
            // Only processes of this host can connect.
            None if self.one_host => Ok(Token::new("")),
            None => Err(Error::Usage(format!(
                "{VARIABLE_TOKEN} is not set, but ranks on several hosts need a secret to recognise each other\n\
                 hint: set it to the same value on all hosts, for example the output of `openssl rand -hex 16`"
            ))),
        }
    }

    /// A warning for ranks on GPUs that do not use NCCL.
    pub(super) fn slow_path_warning(&self, on_gpu: bool) -> Option<String> {
        let by = if self.master.is_some() { "sockets" } else { "MPI" };
        (on_gpu && !self.gpu).then(|| {
            format!(
                "the GPUs communicate over {by}, through host memory\n\
                 hint: set {VARIABLE_NCCL}=1 to use NCCL, which is faster, if each rank has a GPU of its own"
            )
        })
    }
}

/// Whether a host name or address is that of the loopback interface, which other hosts cannot reach.
pub fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

fn read(get: Get) -> Result<Option<RankEnv>> {
    let env = if get("RANK").is_some() || get("WORLD_SIZE").is_some() {
        torchrun(get)?
    } else if let Some(names) = MPI.iter().find(|names| get(names[1]).is_some() && !of_srun(get, names)) {
        mpirun(get, names)?
    } else if get("SLURM_STEP_NUM_TASKS").is_some() && get("SLURM_PROCID").is_some() {
        srun(get)?
    } else {
        return Ok(None);
    };
    if env.rank >= env.size || env.local_rank >= env.local_size || env.local_size > env.size {
        let RankEnv { rank, size, local_rank, local_size, .. } = env;
        return Err(Error::Usage(format!(
            "the environment variables contradict each other: rank {rank} of {size}, local rank {local_rank} of {local_size}"
        )));
    }
    Ok((env.size > 1).then_some(env))
}

fn torchrun(get: Get) -> Result<RankEnv> {
    let (rank, size): (usize, usize) = (need(get, "RANK")?, need(get, "WORLD_SIZE")?);
    // Without LOCAL_RANK and LOCAL_WORLD_SIZE, as in torch, all processes count as being on this host. That
    // is not certain, so `one_host` is false then and other hosts may connect.
    let local_rank = number(get, "LOCAL_RANK")?.unwrap_or(rank);
    let counted = number(get, "LOCAL_WORLD_SIZE")?;
    let (local_size, one_host) =
        (counted.unwrap_or(size), counted.is_some_and(|local_size| local_size == size));
    let hosted = get(VARIABLE_RENDEZVOUS).is_some();
    let master = if size > 1 {
        let port: u16 = need(get, "MASTER_PORT")?;
        // torchrun's own store listens on MASTER_PORT, so the rendezvous uses the next port.
        let store = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True") && !hosted;
        let host = get("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?;
        Some((host, if store { port.wrapping_add(1) } else { port }))
    } else {
        None
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = Some((cores / local_size.max(1)).max(1));
    common(
        get,
        RankEnv {
            rank,
            size,
            local_rank,
            local_size,
            one_host,
            master,
            hosted,
            threads,
            ..RankEnv::default()
        },
    )
}

/// Variables for rank, size, local rank and local size: of Open MPI, and of MPICH and Intel MPI.
const MPI: [[&str; 4]; 2] = [
    [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
];

/// Whether srun set MPI's variables. Its plugin pmi2 sets them for every step, also for programs without MPI.
fn of_srun(get: Get, [rank, size, ..]: &[&str; 4]) -> bool {
    [("SLURM_PROCID", *rank), ("SLURM_STEP_NUM_TASKS", *size)]
        .into_iter()
        .all(|(slurm, mpi)| get(slurm).is_some_and(|value| get(mpi) == Some(value)))
}

fn mpirun(get: Get, [rank, size, local_rank, local_size]: &[&str; 4]) -> Result<RankEnv> {
    let (rank, size): (usize, usize) = (need(get, rank)?, need(get, size)?);
    if size > 1 && !cfg!(feature = "mpi") {
        return Err(Error::Usage(format!(
            "mpirun started {size} ranks, but this build has no MPI\n\
             hint: build with `--features mpi`, or start them with `launch --cpus {size}`"
        )));
    }
    let local_rank = number(get, local_rank)?.unwrap_or(rank);
    let local_size = number(get, local_size)?.unwrap_or(size);
    let one_host = local_size == size;
    let threads = Some(cores_per_rank(local_size));
    common(get, RankEnv { rank, size, local_rank, local_size, one_host, threads, ..RankEnv::default() })
}

/// Number of cores for each of `ranks` ranks on this host. mpirun may have bound each rank to cores of its
/// own, or several to the same.
fn cores_per_rank(ranks: usize) -> usize {
    let own_cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let parent = std::os::unix::process::parent_id().to_string();
    let cores = |process: &str| {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        listed(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim())
    };
    // The parent process, mpirun, is not bound itself.
    let all = match (cores("self"), cores(&parent)) {
        (Some(own), Some(all)) if own < all => all,
        _ => own_cores,
    };
    (all / ranks.max(1)).clamp(1, own_cores)
}

/// Counts the cores of a list: `0-3,8` → 5.
fn listed(list: &str) -> Option<usize> {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some((last + 1).saturating_sub(first))
    };
    list.split(',').map(count).sum()
}

fn srun(get: Get) -> Result<RankEnv> {
    let (rank, size): (usize, usize) = (need(get, "SLURM_PROCID")?, need(get, "SLURM_STEP_NUM_TASKS")?);
    let local_rank = need(get, "SLURM_LOCALID")?;
    // Tasks of each node in the order of the nodes: `2(x3),1`.
    let node: usize = need(get, "SLURM_NODEID")?;
    let tasks = get("SLURM_STEP_TASKS_PER_NODE").unwrap_or_default();
    let local_size = repeated(&tasks).nth(node).ok_or_else(|| missing("SLURM_STEP_TASKS_PER_NODE"))?;
    let master = match (get("MASTER_ADDR"), number(get, "MASTER_PORT")?) {
        (Some(host), Some(port)) => (host, port),
        _ => master(get)?,
    };
    let threads = Some(number(get, "SLURM_CPUS_PER_TASK")?.unwrap_or(1).max(1));
    common(
        get,
        RankEnv {
            rank,
            size,
            local_rank,
            local_size,
            one_host: local_size == size,
            master: Some(master),
            threads,
            ..RankEnv::default()
        },
    )
}

/// Host and port of the rendezvous of a SLURM step: its first node, and a port derived from the numbers of
/// job and step.
///
/// # Errors
/// This process does not run in a step.
pub fn slurm_master() -> Result<(String, u16)> {
    master(&|name| env::var(name).ok())
}

fn master(get: Get) -> Result<(String, u16)> {
    let nodes = get("SLURM_STEP_NODELIST").ok_or_else(|| missing("SLURM_STEP_NODELIST"))?;
    let (job, step): (u64, u64) = (need(get, "SLURM_JOB_ID")?, number(get, "SLURM_STEP_ID")?.unwrap_or(0));
    Ok((first_node(&nodes), 20_000 + ((job * 16 + step) % 12_000) as u16))
}

/// The first node of a list: `n[03-05,7],x` → `n03`.
fn first_node(list: &str) -> String {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let numbers = list[end..].strip_prefix('[').unwrap_or_default();
    let first = numbers.split(['-', ',', ']']).next().unwrap_or_default();
    format!("{}{first}", &list[..end])
}

/// Expands repetitions: `2(x3),1` → 2, 2, 2, 1.
fn repeated(list: &str) -> impl Iterator<Item = usize> + '_ {
    list.split(',')
        .filter_map(|part| {
            let (count, times) = part.split_once("(x").unwrap_or((part, "1"));
            Some(std::iter::repeat_n(count.parse().ok()?, times.trim_end_matches(')').parse().ok()?))
        })
        .flatten()
}

/// Adds what is read in the same way under every starter.
fn common(get: Get, env: RankEnv) -> Result<RankEnv> {
    let timeout = number(get, VARIABLE_TIMEOUT)?.unwrap_or(TIMEOUT).clamp(1, LONGEST_TIMEOUT);
    let one_host = env.one_host || env.master.as_ref().is_some_and(|(host, _)| is_loopback(host));
    let gpu = get(VARIABLE_NCCL).is_some_and(|value| value != "0");
    if gpu && !cfg!(feature = "cuda") {
        return Err(Error::Usage(format!(
            "{VARIABLE_NCCL} is set, but this build has no NCCL\nhint: build with `--features cuda`"
        )));
    }
    Ok(RankEnv { gpu, one_host, secret: get(VARIABLE_TOKEN), timeout: Duration::from_secs(timeout), ..env })
}

impl Default for RankEnv {
    fn default() -> Self {
        Self {
            rank: 0,
            size: 1,
            local_rank: 0,
            local_size: 1,
            one_host: true,
            master: None,
            hosted: false,
            secret: None,
            timeout: Duration::from_secs(TIMEOUT),
            threads: None,
            gpu: false,
        }
    }
}

fn number<T: std::str::FromStr>(get: Get, name: &str) -> Result<Option<T>> {
    let Some(text) = get(name) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Error::Usage(format!("{name}={text}: expected a number")))
}

fn need<T: std::str::FromStr>(get: Get, name: &str) -> Result<T> {
    number(get, name)?.ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Error {
    Error::Usage(format!(
        "{name} is not set, although other variables of its group are\nhint: `launch` sets all of them"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &str) -> Result<Option<RankEnv>> {
        read(&|name| {
            let named = variables.split(' ').filter_map(|variable| variable.split_once('='));
            named.into_iter().find(|(other, _)| *other == name).map(|(_, value)| value.to_owned())
        })
    }

    fn numbers(env: &RankEnv) -> [usize; 4] {
        [env.rank, env.size, env.local_rank, env.local_size]
    }

    #[test]
    fn a_process_without_a_starter_is_the_only_rank() {
        assert_eq!(of("").unwrap(), None);
        assert_eq!(of("RANK=0 WORLD_SIZE=1").unwrap(), None);
        // In a batch script, but not under srun.
        assert_eq!(of("SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_ID=1").unwrap(), None);
    }

    #[test]
    fn the_environment_of_torchrun() {
        let variables = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29500";
        let env = of(variables).unwrap().unwrap();
        assert_eq!(numbers(&env), [3, 4, 1, 2]);
        assert_eq!((env.master, env.hosted), (Some(("a".to_owned(), 29500)), false));
        let store = format!("{variables} TORCHELASTIC_USE_AGENT_STORE=True");
        assert_eq!(of(&store).unwrap().unwrap().master, Some(("a".to_owned(), 29501)));
        let hosted = format!("{store} {VARIABLE_RENDEZVOUS}=1 {VARIABLE_TIMEOUT}=7 {VARIABLE_TOKEN}=x");
        let env = of(&hosted).unwrap().unwrap();
        assert_eq!((env.master.unwrap().1, env.hosted), (29500, true));
        assert_eq!((env.timeout, env.secret), (Duration::from_secs(7), Some("x".to_owned())));
    }

    #[test]
    fn the_environment_of_srun() {
        let variables = "SLURM_PROCID=4 SLURM_STEP_NUM_TASKS=5 SLURM_LOCALID=0 SLURM_NODEID=2 \
                         SLURM_STEP_TASKS_PER_NODE=2(x2),1 SLURM_STEP_NODELIST=gpu[07-08,11] SLURM_JOB_ID=12 SLURM_STEP_ID=1";
        let env = of(variables).unwrap().unwrap();
        assert_eq!(numbers(&env), [4, 5, 0, 1]);
        assert_eq!(env.master, Some(("gpu07".to_owned(), 20_193)));
        for (list, first) in [("n1", "n1"), ("n1,n2", "n1"), ("n[1,3]", "n1"), ("a[9],b", "a9")] {
            assert_eq!(first_node(list), first);
        }
        // Variables of the plugin pmi2 do not come from mpirun.
        let pmi = format!("{variables} PMI_RANK=4 PMI_SIZE=5 PMI_FD=9");
        assert_eq!(of(&pmi).unwrap().unwrap().master, Some(("gpu07".to_owned(), 20_193)));
    }

    #[test]
    fn mpirun_needs_a_build_with_mpi() {
        let found = of("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2");
        if cfg!(feature = "mpi") {
            assert_eq!(numbers(&found.unwrap().unwrap()), [1, 2, 1, 2]);
        } else {
            assert!(found.unwrap_err().to_string().contains("--features mpi"));
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for (variables, word) in [
            ("RANK=0", "WORLD_SIZE"),
            ("RANK=x WORLD_SIZE=2", "RANK=x"),
            ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "rank 2 of 2"),
            ("RANK=1 WORLD_SIZE=2 MASTER_PORT=1", "MASTER_ADDR"),
            ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000", "MASTER_PORT=70000"),
        ] {
            let error = of(variables).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn gpus_without_nccl_are_a_warning() {
        let env = RankEnv { size: 2, master: Some(("a".to_owned(), 1)), ..RankEnv::default() };
        assert!(env.slow_path_warning(true).unwrap().contains("over sockets, through"));
        assert_eq!(env.slow_path_warning(false), None);
        assert_eq!(RankEnv { gpu: true, ..env.clone() }.slow_path_warning(true), None);
        let message = RankEnv { master: None, ..env }.slow_path_warning(true).unwrap();
        assert!(message.contains("over MPI, through") && message.contains("LODESTONE_NCCL=1"), "{message}");
    }

    #[test]
    fn several_hosts_need_a_secret() {
        let token = |host: &str, more: &str| {
            let variables =
                format!("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR={host} MASTER_PORT=7 {more}");
            let env = of(&variables).unwrap().unwrap();
            assert_eq!(env.one_host, env.secret.is_none() && env.token().is_ok());
            env.token().map(drop).map_err(|error| error.to_string())
        };
        // The number of local ranks is unknown, or smaller than that of all.
        for more in ["LOCAL_WORLD_SIZE=2", ""] {
            assert!(token("10.0.0.1", more).unwrap_err().contains(VARIABLE_TOKEN));
            assert!(token("10.0.0.1", &format!("{more} {VARIABLE_TOKEN}=s")).is_ok());
            assert!(token("127.0.0.1", more).is_ok() && token("localhost", more).is_ok());
        }
        assert!(token("10.0.0.1", "LOCAL_WORLD_SIZE=4").is_ok());
    }

    #[test]
    fn a_timeout_that_would_overflow_a_clock_is_capped() {
        let env =
            of(&format!("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 {VARIABLE_TIMEOUT}={}", u64::MAX));
        assert_eq!(env.unwrap().unwrap().timeout, Duration::from_secs(LONGEST_TIMEOUT));
    }

    #[test]
    fn ranks_of_mpirun_share_the_cores() {
        let own_cores = std::thread::available_parallelism().unwrap().get();
        assert!((1..=own_cores).contains(&cores_per_rank(1)));
        assert_eq!(cores_per_rank(usize::MAX), 1);
        assert_eq!(["0", "0-3,8", "2-2,5-6"].map(|list| listed(list).unwrap()), [1, 5, 3]);
        assert_eq!(listed("x"), None);
    }
}
