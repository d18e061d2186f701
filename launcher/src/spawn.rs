//! The ranks of this node, from their start to the exit status to leave with. Signals that the launcher gets are theirs.

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
use trainer::system::heartbeat::{self, Pulse};

use crate::cluster::Cluster;
use crate::rank;

/// Signals that are handed on: those that ask for a stop, and those by which a shell suspends and continues a job.
const HANDED_ON: [i32; 5] = [SIGTERM, SIGINT, SIGUSR1, SIGTSTP, SIGCONT];
/// Between two looks at the ranks.
const LOOK: Duration = Duration::from_millis(10);
/// How long ranks may take to end once one has failed: the first may have a checkpoint to write to its end.
const GRACE: Duration = Duration::from_secs(30);
/// Lines that are kept of a rank's standard error.
const LINES: usize = 20;

/// One rank.
struct Rank {
    child: Child,
    /// None: its terminal is the launcher's.
    words: Option<JoinHandle<VecDeque<String>>>,
    ended: Option<(ExitStatus, Instant)>,
    pulse: (Pulse, [Instant; 2]), // when ticks and beats have last changed
}

/// How the ranks of this node have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// To leave with.
    pub(crate) status: u8,
    /// What to say about it: nothing where a rank has said it.
    pub(crate) message: Option<String>,
    /// Whether they failed, rather than being done, stopped, or refusing to start.
    pub(crate) failed: bool,
}

/// The command of a rank of this node.
pub(crate) fn command(cluster: &Cluster, local: usize, arguments: &[OsString], patience: u64) -> Command {
    // A build may have removed this binary while it runs; the kernel still has it.
    let own = env::current_exe().ok().filter(|path| path.exists()).unwrap_or("/proc/self/exe".into());
    let mut command = Command::new(own);
    let parent = std::process::id().to_string();
    command.arg0("launch").args([rank::ARGUMENT, &parent, &patience.min(120).to_string()]).args(arguments);
    command.envs(cluster.environment(local));
    command
}

/// The launcher's handling of signals, from before the first rank starts.
pub(crate) struct Launcher {
    signals: Signals,
    patience: Duration,
    stopped: bool,
}

impl Launcher {
    pub(crate) fn new(patience: u64) -> io::Result<Self> {
        let signals = Signals::new(HANDED_ON)?;
        Ok(Self { signals, patience: Duration::from_secs(patience), stopped: false })
    }

    /// Whether somebody asked for a stop: then nothing is started again.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Runs commands, the rank `first` and those after it, to their end.
    ///
    /// A rank is a process group of its own, so that Ctrl-C reaches it once, from here. Everything happens on the calling
    /// thread: the kernel ties a rank's life to the thread that started it.
    pub(crate) fn run(&mut self, commands: Vec<Command>, first: usize) -> io::Result<Ended> {
        let pulses = File::from(memfd_create("pulse", MemfdFlags::CLOEXEC)?);
        pulses.set_len(heartbeat::SLOT * commands.len() as u64)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), pulses.as_raw_fd());
        let mut ranks = Vec::with_capacity(commands.len());
        for (local, mut command) in commands.into_iter().enumerate() {
            command.env(heartbeat::VARIABLE, format!("{path}:{local}"));
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
        let mut looked = Instant::now();
        loop {
            if looked.elapsed() > 100 * LOOK {
                // This process was stopped for a while, and saw nobody work.
                ranks.iter_mut().for_each(|rank| rank.pulse.1 = [Instant::now(); 2]);
            }
            looked = Instant::now();
            for signal in self.signals.pending() {
                self.stopped |= [SIGTERM, SIGINT, SIGUSR1].contains(&signal);
                ranks.iter_mut().for_each(|rank| rank.hand_on(signal));
                if signal == SIGTSTP {
                    // The ranks first, then the launcher itself. It fails only where signals do not exist.
                    let _never = emulate_default_handler(signal);
                }
            }
            for (slot, rank) in (0..).zip(&mut ranks) {
                rank.look(Pulse::read(&pulses, slot)?)?;
            }
            if ranks.iter().all(|rank| rank.ended.is_some()) {
                return Ok(conclude(ranks, first, hung));
            }
            if failed.is_none() {
                if hung.is_none() {
                    hung = hanging(&ranks, self.patience);
                }
                if let Some((local, _)) = hung {
                    ranks[local].kill(Signal::KILL);
                }
                if hung.is_some() || ranks.iter().any(Rank::has_failed) {
                    failed = Some(Instant::now());
                    ranks.iter_mut().for_each(|rank| rank.kill(Signal::TERM));
                }
            } else if failed.is_some_and(|failed| failed.elapsed() > GRACE) {
                ranks.iter_mut().for_each(|rank| rank.kill(Signal::KILL));
            } else if let Some((local, _)) = hanging(&ranks, self.patience) {
                // It does not come to hear the TERM either.
                ranks[local].kill(Signal::KILL);
            }
            thread::sleep(LOOK);
        }
    }
}

fn start(command: &mut Command, quiet: bool) -> io::Result<Rank> {
    if quiet {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    }
    let mut child = command.process_group(0).spawn()?;
    let words = child.stderr.take().map(|stderr| thread::spawn(move || last_words(stderr)));
    let now = Instant::now();
    Ok(Rank { child, words, ended: None, pulse: (Pulse::default(), [now, now]) })
}

/// The last lines of what a rank says, read so that it never waits for a reader.
fn last_words(stderr: impl Read) -> VecDeque<String> {
    let mut words = VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        words.push_back(String::from_utf8_lossy(&line).into_owned());
        if words.len() > LINES {
            words.pop_front();
        }
    }
    words
}

impl Rank {
    /// Whether it lives and works.
    fn look(&mut self, pulse: Pulse) -> io::Result<()> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?.map(|status| (status, Instant::now()));
        }
        let (last, [ticked, beaten]) = &mut self.pulse;
        if pulse.ticks != last.ticks {
            *ticked = Instant::now();
        }
        // Who waits for another rank has nothing to do.
        if pulse.beats != last.beats || pulse.waiting {
            *beaten = Instant::now();
        }
        *last = pulse;
        Ok(())
    }

    fn has_failed(&self) -> bool {
        self.ended.is_some_and(|(status, _)| !status.success())
    }

    fn hand_on(&mut self, signal: i32) {
        if let Some(named) = Signal::from_named_raw(signal) {
            self.kill(named);
        }
    }

    /// The whole group; it fails only for one that has just ended.
    fn kill(&mut self, signal: Signal) {
        if self.ended.is_none()
            && let Some(group) = Pid::from_raw(self.child.id() as i32)
        {
            let _ended = kill_process_group(group, signal);
        }
    }
}

/// The rank of this node that hangs, and how it shows.
fn hanging(ranks: &[Rank], patience: Duration) -> Option<(usize, &'static str)> {
    let living = || ranks.iter().enumerate().filter(|(_, rank)| rank.ended.is_none());
    let silent = |which: usize| living().find(|(_, rank)| rank.pulse.1[which].elapsed() > patience);
    let stopped = silent(0).map(|(local, _)| (local, "its process does not run"));
    stopped.or_else(|| silent(1).map(|(local, _)| (local, "its work does not go on")))
}

/// What their ends mean together.
fn conclude(ranks: Vec<Rank>, first: usize, hung: Option<(usize, &str)>) -> Ended {
    let mut ranks: Vec<(usize, ExitStatus, Instant, Vec<String>)> = (first..)
        .zip(ranks)
        .filter_map(|(rank, Rank { ended, words, .. })| {
            let (status, at) = ended?;
            let words = words.and_then(|words| words.join().ok()).unwrap_or_default();
            Some((rank, status, at, words.into_iter().filter(|line| !line.trim().is_empty()).collect()))
        })
        .collect();
    if let Some((local, how)) = hung {
        let rank = first + local;
        let words = ranks.into_iter().find(|(other, ..)| *other == rank).map(|(.., words)| words);
        let message = format!("rank {rank} hangs: {how}{}", last(&words.unwrap_or_default()));
        return Ended { status: 1, message: Some(message), failed: true };
    }
    // Whose fault it was: a rank that was killed; else one that has something to say, others only lost it; else the first.
    // Signals are sent by this launcher only after a first one has failed.
    ranks.retain(|(_, status, ..)| !status.success());
    ranks.sort_by_key(|(rank, status, at, words)| {
        let killed = status.signal().is_some_and(|signal| signal != SIGTERM);
        (!killed, words.is_empty() && *rank > 0, *at)
    });
    let Some((rank, status, _, words)) = ranks.first() else {
        return Ended { status: 0, message: None, failed: false };
    };
    if let Some(signal) = status.signal() {
        let message = format!("{}{}", killed(*rank, signal), last(words));
        // 128 + S says that a stop was asked for; a rank that was killed is a run that failed.
        let asked = [SIGTERM, SIGINT, SIGUSR1].contains(&signal);
        let status = if asked { 128 + signal as u8 } else { 1 };
        return Ended { status, message: Some(message), failed: true };
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    let failed = code != 2 && code < 128;
    // What all ranks say, the first one says on its node's terminal.
    let message = (!words.is_empty() && (failed || code == 2 && first > 0))
        .then(|| format!("rank {rank} ended first, saying:\n  {}", words.join("\n  ")));
    Ended { status: code, message, failed }
}

/// What a rank that could not say why it ended has said before.
fn last(words: &[String]) -> String {
    if words.is_empty() {
        return String::new();
    }
    format!("\nits last lines:\n  {}", words.join("\n  "))
}

fn killed(rank: usize, signal: i32) -> String {
    let name = signal_name(signal).unwrap_or("an unknown signal");
    let hint = match Signal::from_named_raw(signal) == Some(Signal::KILL) {
        true => {
            "\nhint: often the system does that when memory runs out; a smaller training.chunk_tokens needs less"
        }
        false => "",
    };
    format!("rank {rank} was killed by signal {signal} ({name}){hint}")
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    /// The variable that makes `as_a_launcher` one.
    const SCRIPTS: &str = "LAUNCH_TEST_SCRIPTS";

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn run(scripts: &[&str]) -> Ended {
        let mut launcher = Launcher::new(60).unwrap();
        launcher.run(scripts.iter().map(|script| shell(script)).collect(), 0).unwrap()
    }

    /// Not a test: signals belong to a whole process, so the tests below start this binary again to have one.
    #[test]
    #[expect(clippy::exit, reason = "the status is what the tests look at")]
    fn as_a_launcher() {
        if let Ok(scripts) = env::var(SCRIPTS) {
            let scripts: Vec<&str> = scripts.split('|').collect();
            std::process::exit(run(&scripts).status.into());
        }
    }

    /// A launcher of the script, whose child has said `ready`, gets the signal; its status and the child's next line.
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
            let ended = run(&[script]);
            assert_eq!((ended.status, ended.failed), (status, failed), "{script}");
        }
        assert_eq!(run(&["exit 0", "exit 0", "exit 0"]), Ended { status: 0, message: None, failed: false });
    }

    #[test]
    fn a_rank_that_is_killed_is_named_whoever_ends_with_it() {
        let ended = run(&["sleep 2; exit 1", "kill -KILL $$", "echo lost rank 1 >&2; exit 1"]);
        assert_eq!((ended.status, ended.failed), (1, true));
        let message = ended.message.unwrap();
        assert!(message.starts_with("rank 1 was killed by signal 9"), "{message}");
        assert!(!message.contains("its last lines"), "it has said nothing: {message}");
    }

    #[test]
    fn the_last_lines_of_a_rank_that_dies_by_a_signal_are_shown() {
        let ended =
            run(&["sleep 600", "echo 'memory allocation of 7 bytes failed' >&2; echo >&2; kill -ABRT $$"]);
        assert_eq!((ended.status, ended.failed), (1, true));
        assert_eq!(
            ended.message.unwrap(),
            "rank 1 was killed by signal 6 (SIGABRT)\nits last lines:\n  memory allocation of 7 bytes failed"
        );
    }

    #[test]
    fn the_first_failure_ends_all_and_its_last_words_are_shown() {
        let start = Instant::now();
        let ended = run(&["sleep 600", "sleep 600", "seq 100 >&2; echo 'error: no memory' >&2; exit 7"]);
        assert_eq!((ended.status, ended.failed), (7, true));
        let message = ended.message.unwrap();
        assert!(message.starts_with("rank 2 ended first, saying:\n  82\n"), "{message}");
        assert!(message.ends_with("100\n  error: no memory"), "{message}");
        assert!(start.elapsed() < GRACE, "ranks that hear TERM need no KILL");
    }

    #[test]
    fn a_rank_that_does_not_run_or_work_is_named() {
        let mut launcher = Launcher { patience: Duration::from_millis(300), ..Launcher::new(60).unwrap() };
        // A shell gives no sign of life at all.
        let ended = launcher.run(vec![shell("echo reading rows >&2; exec sleep 600")], 4).unwrap();
        assert_eq!((ended.status, ended.failed), (1, true));
        assert_eq!(
            ended.message.unwrap(),
            "rank 4 hangs: its process does not run\nits last lines:\n  reading rows"
        );
    }

    #[test]
    fn a_rank_that_works_or_waits_does_not_hang() {
        let start = Instant::now();
        let later = start + Duration::from_secs(600);
        let rank = |changed| Rank {
            child: shell("exit 0").spawn().unwrap(),
            words: None,
            ended: None,
            pulse: (Pulse { ticks: 1, beats: 1, waiting: false }, changed),
        };
        let mut ranks = [rank([later, later]), rank([later, start]), rank([later, start])];
        thread::sleep(Duration::from_millis(20));
        let patience = Duration::from_millis(10);
        assert_eq!(hanging(&ranks, patience), Some((1, "its work does not go on")));
        assert_eq!(hanging(&ranks[..1], patience), None);
        for (rank, pulse) in ranks.iter_mut().zip([
            Pulse { ticks: 1, beats: 1, waiting: false },
            Pulse { ticks: 1, beats: 1, waiting: true },
            Pulse { ticks: 1, beats: 2, waiting: false },
        ]) {
            rank.look(pulse).unwrap();
            rank.ended = None;
        }
        assert!(
            ranks.iter().all(|rank| rank.pulse.1[1] > start),
            "who works or waits is looked at from now on"
        );
        ranks.into_iter().for_each(|mut rank| drop(rank.child.wait()));
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error() {
        let commands = vec![shell("sleep 600"), Command::new("/nonexistent")];
        assert!(Launcher::new(60).unwrap().run(commands, 0).is_err());
    }

    #[test]
    fn signals_are_handed_on_once() {
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
