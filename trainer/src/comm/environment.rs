//! Which rank this process is, by the environment of what started it: `launch` and torchrun (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
//! `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), srun (`SLURM_PROCID`, …), or mpirun (`OMPI_COMM_WORLD_RANK`, …; `PMI_RANK`, …).

use std::env;
use std::net::IpAddr;
use std::num::NonZero;
use std::time::Duration;

use super::rendezvous::Token;
use crate::{Error, Result};

/// The run's secret, the same on all hosts.
pub const VARIABLE_TOKEN: &str = "LODESTONE_TOKEN";
/// Set by `launch`, which hosts the rendezvous at `MASTER_ADDR` and `MASTER_PORT`; else rank 0 does.
pub const VARIABLE_RENDEZVOUS: &str = "LODESTONE_RENDEZVOUS";
/// Seconds that another rank may show no sign of work.
pub const VARIABLE_TIMEOUT: &str = "LODESTONE_TIMEOUT";

/// Set to 1 by `launch` for ranks that have a GPU each: they talk over NCCL. Under torchrun, srun and mpirun it is the user's to set.
pub const VARIABLE_NCCL: &str = "LODESTONE_NCCL";

/// As long as torch's collectives wait.
const TIMEOUT: u64 = 1800;

/// The longest timeout, in seconds: a year. A clock has an end, too.
pub const LONGEST_TIMEOUT: u64 = 365 * 24 * 3600;

/// One of several processes that train together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number among all.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Its number on this host.
    pub local_rank: usize,
    /// How many are on this host.
    pub local_size: usize,
    /// Whether that is known to be all of them: then nobody outside is listened to.
    pub one_host: bool,
    /// Where they meet; none under mpirun, which has its own ways.
    pub master: Option<(String, u16)>,
    /// Whether the launcher waits there.
    pub hosted: bool,
    /// The run's secret.
    pub secret: Option<String>,
    /// How long a rank may show no sign of work.
    pub timeout: Duration,
    /// Threads of this rank, where those that started it have not bound it to cores of its own.
    pub threads: Option<usize>,
    /// Whether each rank has a GPU of its own.
    pub gpu: bool,
}

/// The place of this process; none if it is alone.
///
/// # Errors
/// A variable that is missing or is no number.
pub fn place() -> Result<Option<Place>> {
    read(&|name| env::var(name).ok().filter(|value| !value.is_empty()))
}

impl Place {
    /// What shows that a process belongs to this run.
    ///
    /// # Errors
    /// There are several hosts, and no secret.
    pub fn token(&self) -> Result<Token> {
        match &self.secret {
            Some(secret) => Ok(Token::new(secret)),
            // Only this host can come.
            None if self.one_host => Ok(Token::new("")),
            None => Err(Error::Usage(format!(
                "{VARIABLE_TOKEN} is not set: on several hosts, ranks must know each other by a secret\n\
                 hint: set it to the same on all hosts, from `openssl rand -hex 16` say"
            ))),
        }
    }

    /// What to say of ranks with GPUs that do not talk over NCCL.
    pub(super) fn detour(&self, on_gpu: bool) -> Option<String> {
        let by = if self.master.is_some() { "sockets" } else { "MPI" };
        (on_gpu && !self.gpu).then(|| {
            format!(
                "messages between the GPUs go by {by}, through the memory of the processor\n\
                 hint: {VARIABLE_NCCL}=1 lets them go over NCCL, which is faster, if each rank has a GPU of its own"
            )
        })
    }
}

/// Whether a host's name or address can only be reached from the same host.
pub fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

fn read(get: Get) -> Result<Option<Place>> {
    let place = if get("RANK").is_some() || get("WORLD_SIZE").is_some() {
        torchrun(get)?
    } else if let Some(names) = MPI.iter().find(|names| get(names[1]).is_some() && !of_srun(get, names)) {
        mpirun(get, names)?
    } else if get("SLURM_STEP_NUM_TASKS").is_some() && get("SLURM_PROCID").is_some() {
        srun(get)?
    } else {
        return Ok(None);
    };
    if place.rank >= place.size || place.local_rank >= place.local_size || place.local_size > place.size {
        let Place { rank, size, local_rank, local_size, .. } = place;
        return Err(Error::Usage(format!(
            "the environment contradicts itself: rank {rank} of {size}, {local_rank} of {local_size} on this host"
        )));
    }
    Ok((place.size > 1).then_some(place))
}

fn torchrun(get: Get) -> Result<Place> {
    let (rank, size): (usize, usize) = (need(get, "RANK")?, need(get, "WORLD_SIZE")?);
    // Without them, as torch: every process on this host.
    let local_rank = number(get, "LOCAL_RANK")?.unwrap_or(rank);
    let counted = number(get, "LOCAL_WORLD_SIZE")?;
    let (local_size, one_host) =
        (counted.unwrap_or(size), counted.is_some_and(|local_size| local_size == size));
    let hosted = get(VARIABLE_RENDEZVOUS).is_some();
    let master = if size > 1 {
        let port: u16 = need(get, "MASTER_PORT")?;
        // torchrun's own store listens there: the next port is taken.
        let taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True") && !hosted;
        let host = get("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?;
        Some((host, if taken { port.wrapping_add(1) } else { port }))
    } else {
        None
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = Some((cores / local_size.max(1)).max(1));
    common(
        get,
        Place { rank, size, local_rank, local_size, one_host, master, hosted, threads, ..Place::default() },
    )
}

/// Rank, size, rank and size on the host: of Open MPI, and of MPICH and Intel MPI.
const MPI: [[&str; 4]; 2] = [
    [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
];

/// Whether it was srun that set MPI's variables: its plugin pmi2 gives them to every step, with MPI or without.
fn of_srun(get: Get, [rank, size, ..]: &[&str; 4]) -> bool {
    [("SLURM_PROCID", *rank), ("SLURM_STEP_NUM_TASKS", *size)]
        .into_iter()
        .all(|(slurm, mpi)| get(slurm).is_some_and(|value| get(mpi) == Some(value)))
}

fn mpirun(get: Get, [rank, size, local_rank, local_size]: &[&str; 4]) -> Result<Place> {
    let (rank, size): (usize, usize) = (need(get, rank)?, need(get, size)?);
    if size > 1 && !cfg!(feature = "mpi") {
        return Err(Error::Usage(format!(
            "mpirun has started {size} ranks, but this build has no MPI\n\
             hint: build with `--features mpi`, or let `launch --cpus {size}` start them"
        )));
    }
    let local_rank = number(get, local_rank)?.unwrap_or(rank);
    let local_size = number(get, local_size)?.unwrap_or(size);
    let one_host = local_size == size;
    let threads = Some(share_of_cores(local_size));
    common(get, Place { rank, size, local_rank, local_size, one_host, threads, ..Place::default() })
}

/// Cores for one of so many ranks, which mpirun may have bound: each to cores of its own, or some to the same.
fn share_of_cores(ranks: usize) -> usize {
    let available = std::thread::available_parallelism().map_or(1, NonZero::get);
    let parent = std::os::unix::process::parent_id().to_string();
    let cores = |process: &str| {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        listed(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim())
    };
    // Whoever started the ranks is not bound itself.
    let all = match (cores("self"), cores(&parent)) {
        (Some(own), Some(all)) if own < all => all,
        _ => available,
    };
    (all / ranks.max(1)).clamp(1, available)
}

/// `0-3,8` → 5.
fn listed(list: &str) -> Option<usize> {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some((last + 1).saturating_sub(first))
    };
    list.split(',').map(count).sum()
}

fn srun(get: Get) -> Result<Place> {
    let (rank, size): (usize, usize) = (need(get, "SLURM_PROCID")?, need(get, "SLURM_STEP_NUM_TASKS")?);
    let local_rank = need(get, "SLURM_LOCALID")?;
    // `2(x3),1`: tasks of each node, in the order of the nodes.
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
        Place {
            rank,
            size,
            local_rank,
            local_size,
            one_host: local_size == size,
            master: Some(master),
            threads,
            ..Place::default()
        },
    )
}

/// Where the ranks of a step of SLURM meet: on its first node, at a port that follows from the job's and the step's number.
///
/// # Errors
/// This process is in no step.
pub fn slurm_master() -> Result<(String, u16)> {
    master(&|name| env::var(name).ok())
}

fn master(get: Get) -> Result<(String, u16)> {
    let nodes = get("SLURM_STEP_NODELIST").ok_or_else(|| missing("SLURM_STEP_NODELIST"))?;
    let (job, step): (u64, u64) = (need(get, "SLURM_JOB_ID")?, number(get, "SLURM_STEP_ID")?.unwrap_or(0));
    Ok((first_node(&nodes), 20_000 + ((job * 16 + step) % 12_000) as u16))
}

/// `n[03-05,7],x` → `n03`.
fn first_node(list: &str) -> String {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let numbers = list[end..].strip_prefix('[').unwrap_or_default();
    let first = numbers.split(['-', ',', ']']).next().unwrap_or_default();
    format!("{}{first}", &list[..end])
}

/// `2(x3),1` → 2, 2, 2, 1.
fn repeated(list: &str) -> impl Iterator<Item = usize> + '_ {
    list.split(',')
        .filter_map(|part| {
            let (count, times) = part.split_once("(x").unwrap_or((part, "1"));
            Some(std::iter::repeat_n(count.parse().ok()?, times.trim_end_matches(')').parse().ok()?))
        })
        .flatten()
}

fn common(get: Get, place: Place) -> Result<Place> {
    let timeout = number(get, VARIABLE_TIMEOUT)?.unwrap_or(TIMEOUT).clamp(1, LONGEST_TIMEOUT);
    let one_host = place.one_host || place.master.as_ref().is_some_and(|(host, _)| is_loopback(host));
    let gpu = get(VARIABLE_NCCL).is_some_and(|value| value != "0");
    if gpu && !cfg!(feature = "cuda") {
        return Err(Error::Usage(format!(
            "{VARIABLE_NCCL}: this build has no NCCL\nhint: build with `--features cuda`"
        )));
    }
    Ok(Place { gpu, one_host, secret: get(VARIABLE_TOKEN), timeout: Duration::from_secs(timeout), ..place })
}

impl Default for Place {
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
    Error::Usage(format!("{name} is not set, but the variables beside it are\nhint: `launch` sets them all"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &str) -> Result<Option<Place>> {
        read(&|name| {
            let named = variables.split(' ').filter_map(|variable| variable.split_once('='));
            named.into_iter().find(|(other, _)| *other == name).map(|(_, value)| value.to_owned())
        })
    }

    fn numbers(place: &Place) -> [usize; 4] {
        [place.rank, place.size, place.local_rank, place.local_size]
    }

    #[test]
    fn a_process_that_nobody_started_is_alone() {
        assert_eq!(of("").unwrap(), None);
        assert_eq!(of("RANK=0 WORLD_SIZE=1").unwrap(), None);
        // Inside of a batch script, outside of srun.
        assert_eq!(of("SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_ID=1").unwrap(), None);
    }

    #[test]
    fn the_environment_of_torchrun() {
        let variables = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29500";
        let place = of(variables).unwrap().unwrap();
        assert_eq!(numbers(&place), [3, 4, 1, 2]);
        assert_eq!((place.master, place.hosted), (Some(("a".to_owned(), 29500)), false));
        let store = format!("{variables} TORCHELASTIC_USE_AGENT_STORE=True");
        assert_eq!(of(&store).unwrap().unwrap().master, Some(("a".to_owned(), 29501)));
        let hosted = format!("{store} {VARIABLE_RENDEZVOUS}=1 {VARIABLE_TIMEOUT}=7 {VARIABLE_TOKEN}=x");
        let place = of(&hosted).unwrap().unwrap();
        assert_eq!((place.master.unwrap().1, place.hosted), (29500, true));
        assert_eq!((place.timeout, place.secret), (Duration::from_secs(7), Some("x".to_owned())));
    }

    #[test]
    fn the_environment_of_srun() {
        let variables = "SLURM_PROCID=4 SLURM_STEP_NUM_TASKS=5 SLURM_LOCALID=0 SLURM_NODEID=2 \
                         SLURM_STEP_TASKS_PER_NODE=2(x2),1 SLURM_STEP_NODELIST=gpu[07-08,11] SLURM_JOB_ID=12 SLURM_STEP_ID=1";
        let place = of(variables).unwrap().unwrap();
        assert_eq!(numbers(&place), [4, 5, 0, 1]);
        assert_eq!(place.master, Some(("gpu07".to_owned(), 20_193)));
        for (list, first) in [("n1", "n1"), ("n1,n2", "n1"), ("n[1,3]", "n1"), ("a[9],b", "a9")] {
            assert_eq!(first_node(list), first);
        }
        // Its plugin pmi2 is not mpirun.
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
    fn gpus_that_do_not_talk_over_nccl_are_told_of() {
        let place = Place { size: 2, master: Some(("a".to_owned(), 1)), ..Place::default() };
        assert!(place.detour(true).unwrap().contains("by sockets, through"));
        assert_eq!(place.detour(false), None);
        assert_eq!(Place { gpu: true, ..place.clone() }.detour(true), None);
        let message = Place { master: None, ..place }.detour(true).unwrap();
        assert!(message.contains("by MPI, through") && message.contains("LODESTONE_NCCL=1"), "{message}");
    }

    #[test]
    fn several_hosts_need_a_secret() {
        let token = |host: &str, more: &str| {
            let variables =
                format!("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR={host} MASTER_PORT=7 {more}");
            let place = of(&variables).unwrap().unwrap();
            assert_eq!(place.one_host, place.secret.is_none() && place.token().is_ok());
            place.token().map(drop).map_err(|error| error.to_string())
        };
        // Nobody says that all are here.
        for more in ["LOCAL_WORLD_SIZE=2", ""] {
            assert!(token("10.0.0.1", more).unwrap_err().contains(VARIABLE_TOKEN));
            assert!(token("10.0.0.1", &format!("{more} {VARIABLE_TOKEN}=s")).is_ok());
            assert!(token("127.0.0.1", more).is_ok() && token("localhost", more).is_ok());
        }
        assert!(token("10.0.0.1", "LOCAL_WORLD_SIZE=4").is_ok());
    }

    #[test]
    fn a_timeout_that_no_clock_reaches_is_cut() {
        let place =
            of(&format!("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 {VARIABLE_TIMEOUT}={}", u64::MAX));
        assert_eq!(place.unwrap().unwrap().timeout, Duration::from_secs(LONGEST_TIMEOUT));
    }

    #[test]
    fn ranks_of_mpirun_share_the_cores() {
        let available = std::thread::available_parallelism().unwrap().get();
        assert!((1..=available).contains(&share_of_cores(1)));
        assert_eq!(share_of_cores(usize::MAX), 1);
        assert_eq!(["0", "0-3,8", "2-2,5-6"].map(|list| listed(list).unwrap()), [1, 5, 3]);
        assert_eq!(listed("x"), None);
    }
}
