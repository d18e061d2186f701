//! Starts the ranks of this node, forwards signals to them, watches their heartbeats and decides the exit
//! status of `launch`.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGCONT, SIGINT, SIGTERM, SIGTSTP, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level::{emulate_default_handler, signal_name};
use trainer::system::command as command_line;
use trainer::system::heartbeat::{self, Heartbeat};

use crate::cluster::Cluster;
use crate::rank;

/// Signals that are forwarded: those that request a stop, and those by which a shell suspends and continues a
/// job.
const FORWARDED: [i32; 5] = [SIGTERM, SIGINT, SIGUSR1, SIGTSTP, SIGCONT];
/// Time between two checks of the ranks.
const POLL: Duration = Duration::from_millis(10);
/// How long the other ranks may take to end after one has failed: rank 0 may be writing a checkpoint.
const GRACE: Duration = Duration::from_secs(30);
/// Number of lines of a rank's standard error that are kept.
const TAIL_LINES: usize = 20;

/// The process of one rank.
struct Rank {
    child: Child,
    /// Collects the last lines of its standard error; `None` if the rank writes to the launcher's terminal.
    stderr: Option<JoinHandle<VecDeque<String>>>,
    ended: Option<(ExitStatus, Instant)>,
    last: Heartbeat,
    /// When the ticks and the work count last changed.
    ticked: Instant,
    worked: Instant,
}

/// The result of all ranks of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Exit status for `launch`.
    pub(crate) status: u8,
    /// An error message, unless a rank has already printed it.
    pub(crate) message: Option<String>,
    /// Whether the run failed, so that it may be restarted. False if the run is done or was stopped, or if an
    /// input is wrong.
    pub(crate) failed: bool,
}

/// The command that starts a rank of this node.
pub(crate) fn command(cluster: &Cluster, local: usize, arguments: &[OsString], timeout: u64) -> Command {
    // A build may have replaced this binary while it runs; the kernel still has the old one.
    let own = env::current_exe().ok().filter(|path| path.exists()).unwrap_or("/proc/self/exe".into());
    let mut command = Command::new(own);
    let parent = std::process::id().to_string();
    command.arg0("launch").args([rank::ARGUMENT, &parent, &timeout.min(120).to_string()]).args(arguments);
    command.envs(cluster.environment(local));
    command
}

/// Runs the ranks of this node and forwards signals to them.
pub(crate) struct Launcher {
    signals: Signals,
    timeout: Duration,
    stopped: bool,
}

impl Launcher {
    /// Starts to listen to signals. `timeout`: seconds without progress after which a rank counts as hanging.
    pub(crate) fn new(timeout: u64) -> io::Result<Self> {
        let signals = Signals::new(FORWARDED)?;
        Ok(Self { signals, timeout: Duration::from_secs(timeout), stopped: false })
    }

    /// Whether a signal has requested a stop. Then the ranks are not restarted.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Starts one rank for each command, numbered from `first`, and waits until all have ended.
    ///
    /// Each rank is a process group, so that Ctrl-C reaches it only through the launcher. The calling thread
    /// does all the work, because the kernel sends the parent-death signal when the thread that started a
    /// rank ends.
    ///
    /// # Errors
    /// A rank cannot be started, or its heartbeat cannot be read.
    pub(crate) fn run(&mut self, commands: Vec<Command>, first: usize) -> io::Result<Outcome> {
        let heartbeats = File::from(memfd_create("heartbeat", MemfdFlags::CLOEXEC)?);
        heartbeats.set_len(heartbeat::SLOT * commands.len() as u64)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), heartbeats.as_raw_fd());
        let mut ranks = Vec::with_capacity(commands.len());
        for (local, mut command) in commands.into_iter().enumerate() {
            command.env(heartbeat::VARIABLE, format!("{path}:{local}"));
            command.env(command_line::VARIABLE, command_line::line());
            match start(&mut command, first + local > 0) {
                Ok(rank) => ranks.push(rank),
                Err(error) => {
                    ranks.iter_mut().for_each(|rank: &mut Rank| rank.kill(Signal::KILL));
                    ranks.iter_mut().for_each(|rank| drop(rank.child.wait()));
                    return Err(error);
                }
            }
        }
        let mut hung = None;
        let mut failed: Option<Instant> = None;
        let mut polled = Instant::now();
        loop {
            if polled.elapsed() > 100 * POLL {
                // This process was suspended and read no heartbeats meanwhile, so the timeouts start anew.
                ranks.iter_mut().for_each(Rank::restart_timeouts);
            }
            polled = Instant::now();
            for signal in self.signals.pending() {
                self.stopped |= [SIGTERM, SIGINT, SIGUSR1].contains(&signal);
                ranks.iter_mut().for_each(|rank| rank.forward(signal));
                if signal == SIGTSTP {
                    // The ranks are suspended; now the launcher suspends itself. That fails only for invalid
                    // signals.
                    let _never = emulate_default_handler(signal);
                }
            }
            for (slot, rank) in (0..).zip(&mut ranks) {
                rank.update(Heartbeat::read(&heartbeats, slot)?)?;
            }
            if ranks.iter().all(|rank| rank.ended.is_some()) {
                return Ok(conclude(ranks, first, hung));
            }
            if failed.is_none() {
                if hung.is_none() {
                    hung = find_hung(&ranks, self.timeout);
                }
                if let Some(hung) = hung {
                    ranks[hung.local].kill(Signal::KILL);
                }
                if hung.is_some() || ranks.iter().any(Rank::has_failed) {
                    failed = Some(Instant::now());
                    ranks.iter_mut().for_each(|rank| rank.kill(Signal::TERM));
                }
            } else if failed.is_some_and(|failed| failed.elapsed() > GRACE) {
                ranks.iter_mut().for_each(|rank| rank.kill(Signal::KILL));
            } else if let Some(hung) = find_hung(&ranks, self.timeout) {
                // A rank that hangs does not react to TERM either.
                ranks[hung.local].kill(Signal::KILL);
            }
            thread::sleep(POLL);
        }
    }
}

fn start(command: &mut Command, quiet: bool) -> io::Result<Rank> {
    if quiet {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    }
    let mut child = command.process_group(0).spawn()?;
    let stderr = child.stderr.take().map(|stderr| thread::spawn(move || last_lines(stderr)));
    let now = Instant::now();
    Ok(Rank { child, stderr, ended: None, last: Heartbeat::default(), ticked: now, worked: now })
}

/// Reads the standard error of a rank to its end and returns the last lines.
fn last_lines(stderr: impl Read) -> VecDeque<String> {
    let mut lines = VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        lines.push_back(String::from_utf8_lossy(&line).into_owned());
        if lines.len() > TAIL_LINES {
            lines.pop_front();
        }
    }
    lines
}

impl Rank {
    /// Checks whether the rank has ended, and records its heartbeat.
    fn update(&mut self, heartbeat: Heartbeat) -> io::Result<()> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?.map(|status| (status, Instant::now()));
        }
        if heartbeat.ticks != self.last.ticks {
            self.ticked = Instant::now();
        }
        // A rank that waits for another one has no work to do.
        if heartbeat.work != self.last.work || heartbeat.waiting {
            self.worked = Instant::now();
        }
        self.last = heartbeat;
        Ok(())
    }

    fn restart_timeouts(&mut self) {
        (self.ticked, self.worked) = (Instant::now(), Instant::now());
    }

    fn has_failed(&self) -> bool {
        self.ended.is_some_and(|(status, _)| !status.success())
    }

    fn forward(&mut self, signal: i32) {
        if let Some(named) = Signal::from_named_raw(signal) {
            self.kill(named);
        }
    }

    /// Sends a signal to the rank's process group. It fails only for a group that has just ended.
    fn kill(&mut self, signal: Signal) {
        if self.ended.is_none()
            && let Some(group) = Pid::from_raw(self.child.id() as i32)
        {
            let _ended = kill_process_group(group, signal);
        }
    }
}

/// A rank of this node that hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hung {
    local: usize,
    timeout: Duration,
    how: &'static str,
}

impl Hung {
    fn message(self, rank: usize) -> String {
        let Self { how, timeout, .. } = self;
        format!(
            "rank {rank} hangs: {how} for {} s\nhint: OUTPUT/logs/rank-{rank}.log shows what it did last; if it was only slow, \
             give a longer --timeout SECONDS",
            timeout.as_secs()
        )
    }
}

/// Finds a rank whose process is stopped or that makes no progress.
fn find_hung(ranks: &[Rank], timeout: Duration) -> Option<Hung> {
    let find = |how, since: fn(&Rank) -> Instant| {
        let hangs = |rank: &Rank| rank.ended.is_none() && since(rank).elapsed() > timeout;
        ranks.iter().position(hangs).map(|local| Hung { local, timeout, how })
    };
    find("its process did not run", |rank| rank.ticked)
        .or_else(|| find("it made no progress", |rank| rank.worked))
}

/// A rank that has ended.
struct Ended {
    rank: usize,
    status: ExitStatus,
    at: Instant,
    /// The last lines of its standard error that are not blank.
    lines: Vec<String>,
}

/// Decides the outcome from the exit statuses of all ranks, which are numbered from `first`.
fn conclude(ranks: Vec<Rank>, first: usize, hung: Option<Hung>) -> Outcome {
    let mut ranks: Vec<Ended> = (first..)
        .zip(ranks)
        .filter_map(|(rank, Rank { ended, stderr, .. })| {
            let (status, at) = ended?;
            let lines = stderr.and_then(|stderr| stderr.join().ok()).unwrap_or_default();
            let lines = lines.into_iter().filter(|line| !line.trim().is_empty()).collect();
            Some(Ended { rank, status, at, lines })
        })
        .collect();
    if let Some(hung) = hung {
        let rank = first + hung.local;
        let lines = ranks.into_iter().find(|other| other.rank == rank).map(|other| other.lines);
        let message = hung.message(rank) + &format_last_lines(&lines.unwrap_or_default());
        return Outcome { status: 1, message: Some(message), failed: true };
    }
    // The rank that failed first comes first. If a rank was killed by a signal other than TERM, it is that
    // one: this launcher kills only after a failure, so the signal came from outside. Otherwise it is the
    // first that printed an error, because the others may only have lost the connection to it; otherwise the
    // first that ended.
    ranks.retain(|rank| !rank.status.success());
    ranks.sort_by_key(|Ended { rank, status, at, lines }| {
        let killed = status.signal().is_some_and(|signal| signal != SIGTERM);
        (!killed, lines.is_empty() && *rank > 0, *at)
    });
    let Some(Ended { rank, status, lines, .. }) = ranks.first() else {
        return Outcome { status: 0, message: None, failed: false };
    };
    if let Some(signal) = status.signal() {
        let message = killed(*rank, signal) + &format_last_lines(lines);
        // The status 128 + signal tells the caller that a stop was requested. Any other signal is a failure.
        let requested = [SIGTERM, SIGINT, SIGUSR1].contains(&signal);
        let status = if requested { 128 + signal as u8 } else { 1 };
        return Outcome { status, message: Some(message), failed: true };
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    let failed = code != 2 && code < 128;
    // If an input is wrong, all ranks say so, and rank 0 has printed it on the terminal of its node.
    let message = (!lines.is_empty() && (failed || code == 2 && first > 0))
        .then(|| format!("rank {rank} failed first; its last lines:\n  {}", lines.join("\n  ")));
    Outcome { status: code, message, failed }
}

/// The end of a message about a rank that could not report its error itself.
fn format_last_lines(lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    format!("\nits last lines:\n  {}", lines.join("\n  "))
}

fn killed(rank: usize, signal: i32) -> String {
    let name = signal_name(signal).unwrap_or("an unknown signal");
    let hint = match Signal::from_named_raw(signal) == Some(Signal::KILL) {
        true => {
            "\nhint: the operating system often does this when memory runs out; a smaller training.chunk_tokens needs less"
        }
        false => "",
    };
    format!("rank {rank} was killed by signal {signal} ({name}){hint}")
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    /// Environment variable with the scripts that `as_a_launcher` runs.
    const SCRIPTS: &str = "LAUNCH_TEST_SCRIPTS";

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn run(scripts: &[&str]) -> Outcome {
        let mut launcher = Launcher::new(60).unwrap();
        launcher.run(scripts.iter().map(|script| shell(script)).collect(), 0).unwrap()
    }

    /// Not a test. Signals concern a whole process, so the tests below start this binary again as a launcher.
    #[test]
    #[expect(clippy::exit, reason = "the status is what the tests look at")]
    fn as_a_launcher() {
        if let Ok(scripts) = env::var(SCRIPTS) {
            let scripts: Vec<&str> = scripts.split('|').collect();
            std::process::exit(run(&scripts).status.into());
        }
    }

    /// Sends `signal` to a launcher once its script has printed `ready`. Returns its exit status and the
    /// script's next line.
    fn signalled(script: &str, signal: Signal) -> (Option<i32>, String) {
        let mut launcher = Command::new(env::current_exe().unwrap())
            .args(["--exact", "spawn::tests::as_a_launcher", "--nocapture"])
            .env(SCRIPTS, script)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines().map(Result::unwrap);
        lines.find(|line| line.ends_with("ready")).unwrap();
        let id = Pid::from_raw(launcher.id() as i32).unwrap();
        rustix::process::kill_process(id, signal).unwrap();
        let said = lines.next().unwrap_or_default();
        (launcher.wait().unwrap().code(), said)
    }

    #[test]
    fn the_status_of_the_ranks_is_the_status_of_the_launcher() {
        for (script, status, failed) in
            [("exit 0", 0, false), ("exit 1", 1, true), ("exit 2", 2, false), ("exit 143", 143, false)]
        {
            let outcome = run(&[script]);
            assert_eq!((outcome.status, outcome.failed), (status, failed), "{script}");
        }
        assert_eq!(run(&["exit 0", "exit 0", "exit 0"]), Outcome { status: 0, message: None, failed: false });
    }

    #[test]
    fn a_rank_that_is_killed_is_named_although_others_fail_too() {
        let outcome = run(&["sleep 2; exit 1", "kill -KILL $$", "sleep 0.3; echo lost rank 1 >&2; exit 1"]);
        assert_eq!((outcome.status, outcome.failed), (1, true));
        let message = outcome.message.unwrap();
        assert!(message.starts_with("rank 1 was killed by signal 9"), "{message}");
        assert!(!message.contains("its last lines"), "it has printed nothing: {message}");
    }

    #[test]
    fn the_last_lines_of_a_rank_that_dies_by_a_signal_are_shown() {
        let outcome =
            run(&["sleep 600", "echo 'memory allocation of 7 bytes failed' >&2; echo >&2; kill -ABRT $$"]);
        assert_eq!((outcome.status, outcome.failed), (1, true));
        assert_eq!(
            outcome.message.unwrap(),
            "rank 1 was killed by signal 6 (SIGABRT)\nits last lines:\n  memory allocation of 7 bytes failed"
        );
    }

    #[test]
    fn the_first_failure_ends_all_ranks_and_its_last_lines_are_shown() {
        let start = Instant::now();
        let outcome = run(&["sleep 600", "sleep 600", "seq 100 >&2; echo 'error: no memory' >&2; exit 7"]);
        assert_eq!((outcome.status, outcome.failed), (7, true));
        let message = outcome.message.unwrap();
        assert!(message.starts_with("rank 2 failed first; its last lines:\n  82\n"), "{message}");
        assert!(message.ends_with("100\n  error: no memory"), "{message}");
        assert!(start.elapsed() < GRACE, "ranks that react to TERM need no KILL");
    }

    #[test]
    fn a_rank_without_heartbeats_is_named() {
        let mut launcher = Launcher { timeout: Duration::from_millis(300), ..Launcher::new(60).unwrap() };
        // A shell writes no heartbeats at all.
        let outcome = launcher.run(vec![shell("echo reading rows >&2; exec sleep 600")], 4).unwrap();
        assert_eq!((outcome.status, outcome.failed), (1, true));
        let message = outcome.message.unwrap();
        assert!(message.starts_with("rank 4 hangs: its process did not run for 0 s\nhint: "), "{message}");
        assert!(message.ends_with("\nits last lines:\n  reading rows"), "{message}");
    }

    #[test]
    fn a_rank_that_works_or_waits_does_not_hang() {
        let start = Instant::now();
        let later = start + Duration::from_secs(600);
        let rank = |ticked, worked| Rank {
            child: shell("exit 0").spawn().unwrap(),
            stderr: None,
            ended: None,
            last: Heartbeat { ticks: 1, work: 1, waiting: false },
            ticked,
            worked,
        };
        let mut ranks = [rank(later, later), rank(later, start), rank(later, start)];
        thread::sleep(Duration::from_millis(20));
        let timeout = Duration::from_millis(10);
        assert_eq!(find_hung(&ranks, timeout), Some(Hung { local: 1, timeout, how: "it made no progress" }));
        assert_eq!(find_hung(&ranks[..1], timeout), None);
        for (rank, heartbeat) in ranks.iter_mut().zip([
            Heartbeat { ticks: 1, work: 1, waiting: false },
            Heartbeat { ticks: 1, work: 1, waiting: true },
            Heartbeat { ticks: 1, work: 2, waiting: false },
        ]) {
            rank.update(heartbeat).unwrap();
            rank.ended = None;
        }
        assert!(
            ranks.iter().all(|rank| rank.worked > start),
            "the timeout of a rank that works or waits starts anew"
        );
        ranks.into_iter().for_each(|mut rank| drop(rank.child.wait()));
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error() {
        let commands = vec![shell("sleep 600"), Command::new("/nonexistent")];
        assert!(Launcher::new(60).unwrap().run(commands, 0).is_err());
    }

    #[test]
    fn signals_are_forwarded_once() {
        for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::USR1, "USR1")] {
            // A second signal would end the script with status 9.
            let script = format!(
                "trap 'echo got {name}; trap \"exit 9\" {name}; sleep 0.3; exit 42' {name}; echo ready; \
                 while :; do sleep 0.02; done"
            );
            assert_eq!(signalled(&script, signal), (Some(42), format!("got {name}")));
        }
    }

    #[test]
    fn a_child_that_dies_of_the_signal_gives_128_and_its_number() {
        assert_eq!(signalled("echo ready; exec sleep 60", Signal::TERM).0, Some(143));
        assert_eq!(signalled("echo ready; exec sleep 60", Signal::INT).0, Some(130));
    }
}
