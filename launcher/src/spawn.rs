//! A child, from its start to its exit status. Signals that the launcher gets are the child's.

use std::env;
use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};

use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGCHLD, SIGCONT, SIGINT, SIGTERM, SIGTSTP, SIGUSR1};
use signal_hook::iterator::Signals;
use signal_hook::low_level::{emulate_default_handler, signal_name};

use crate::rank;

/// Signals that are handed on: those that ask for a stop, and those by which a shell suspends and continues a job.
const HANDED_ON: [i32; 5] = [SIGTERM, SIGINT, SIGUSR1, SIGTSTP, SIGCONT];

/// Rank 0 of 1, with the environment that torchrun gives.
pub(crate) fn rank(arguments: &[OsString]) -> Command {
    // A build may have removed this binary while it runs; the kernel still has it.
    let own = env::current_exe().ok().filter(|path| path.exists()).unwrap_or("/proc/self/exe".into());
    let mut command = Command::new(own);
    command.arg0("launch").arg(rank::ARGUMENT).arg(std::process::id().to_string()).args(arguments);
    let variables = [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)];
    command.envs(variables.map(|(name, value)| (name, value.to_string())));
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", free_port().to_string());
    command
}

/// A port that nobody listens on just now; torchrun's where the system gives none.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr()).map_or(29500, |address| address.port())
}

/// Runs the command to its end, signals handed on, and returns the exit status to leave with.
///
/// The child shares the terminal but is a process group of its own, so that Ctrl-C reaches it once, from here.
/// Everything happens on the calling thread: the kernel ties a rank's life to the thread that started it.
pub(crate) fn supervise(command: &mut Command) -> io::Result<u8> {
    // Before the start, so that no signal is lost between.
    let mut signals = Signals::new(HANDED_ON.into_iter().chain([SIGCHLD]))?;
    let mut child = command.process_group(0).spawn()?;
    loop {
        for signal in signals.wait() {
            if signal != SIGCHLD {
                hand_on(signal, &child);
            } else if let Some(status) = child.try_wait()? {
                return Ok(leave_with(status));
            }
        }
    }
}

fn hand_on(signal: i32, child: &Child) {
    let group = Pid::from_raw(child.id() as i32);
    if let (Some(group), Some(named)) = (group, Signal::from_named_raw(signal)) {
        // It fails only for a child that has just ended; SIGCHLD comes next.
        let _ended = kill_process_group(group, named);
    }
    if signal == SIGTSTP {
        // The child first, then the launcher itself. It fails only where signals do not exist.
        let _never = emulate_default_handler(signal);
    }
}

/// The child's own status; 128+S if signal S killed it, which is worth a word: nothing else says why it ended.
fn leave_with(status: ExitStatus) -> u8 {
    let Some(signal) = status.signal() else {
        return status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    };
    died(signal);
    128 + signal as u8
}

#[expect(clippy::print_stderr, reason = "the launcher's own word, where the rank left none")]
fn died(signal: i32) {
    let name = signal_name(signal).unwrap_or("an unknown signal");
    eprintln!("error: rank 0 was killed by signal {signal} ({name})");
    if Signal::from_named_raw(signal) == Some(Signal::KILL) {
        eprintln!(
            "hint: often the system does that when memory runs out; a smaller training.chunk_tokens needs less"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    use super::*;

    /// The variable that makes `as_a_launcher` one.
    const SCRIPT: &str = "LAUNCH_TEST_SCRIPT";

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    /// Not a test: signals belong to a whole process, so the tests below start this binary again to have one.
    #[test]
    #[expect(clippy::exit, reason = "the status is what the tests look at")]
    fn as_a_launcher() {
        if let Ok(script) = env::var(SCRIPT) {
            std::process::exit(supervise(&mut shell(&script)).unwrap().into());
        }
    }

    /// A launcher of the script, whose child has said `ready`, gets the signal; its status and the child's next line.
    fn signalled(script: &str, signal: Signal) -> (Option<i32>, String) {
        let mut launcher = Command::new(env::current_exe().unwrap())
            .args(["--exact", "spawn::tests::as_a_launcher", "--nocapture"])
            .env(SCRIPT, script)
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
    fn the_status_of_the_child_is_the_status_of_the_launcher() {
        assert_eq!(supervise(&mut shell("exit 0")).unwrap(), 0);
        assert_eq!(supervise(&mut shell("exit 7")).unwrap(), 7);
        assert_eq!(supervise(&mut shell("exit 143")).unwrap(), 143);
        assert_eq!(supervise(&mut shell("kill -KILL $$")).unwrap(), 137);
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error() {
        assert!(supervise(&mut Command::new("/nonexistent")).is_err());
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

    #[test]
    fn a_rank_gets_the_environment_of_torchrun() {
        let command = rank(&["train".into(), "a.yaml".into()]);
        let get = |name: &str| {
            let (_, value) = command.get_envs().find(|(n, _)| *n == name).unwrap();
            value.unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(["RANK", "LOCAL_RANK"].map(get), ["0", "0"]);
        assert_eq!(["WORLD_SIZE", "LOCAL_WORLD_SIZE"].map(get), ["1", "1"]);
        assert_eq!(get("MASTER_ADDR"), "127.0.0.1");
        assert_ne!(get("MASTER_PORT").parse::<u16>().unwrap(), 0);
    }
}
