//! Progress on the terminal: a bar with step, loss, tokens/s and the time left, or a line every few seconds
//! where standard error is not a terminal.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Read};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// All bars of this process. Log lines are written above them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);
static QUIET: Mutex<bool> = Mutex::new(false);
/// Number of [`Progress`] values that exist.
static SHOWN: AtomicUsize = AtomicUsize::new(0);

/// Time between two lines where standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Hides all progress from now on.
pub fn quiet() {
    BARS.set_draw_target(ProgressDrawTarget::hidden());
    if let Ok(mut quiet) = QUIET.lock() {
        *quiet = true;
    }
}

/// Runs `f`, which writes to the terminal, while the bars are hidden.
pub fn suspend<R>(f: impl FnOnce() -> R) -> R {
    BARS.suspend(f)
}

/// The progress of one long piece of work.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    lines: bool,
    /// When this started, and the number of units done by then. The rate counts only what came after.
    started: (Instant, u64),
    last: Instant,
    ended: bool,
    recent: VecDeque<(f64, f64)>, // tokens and seconds of the latest steps
}

impl Progress {
    /// Shows the work `what` of `total` units, of which `done` are done.
    pub fn new(what: &str, total: u64, done: u64) -> Self {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} left");
        let bar = ProgressBar::new(total).with_prefix(what.to_owned()).with_position(done);
        let bar = BARS.add(bar);
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("━╸─"));
        }
        let quiet = QUIET.lock().is_ok_and(|quiet| *quiet);
        let lines = !quiet && !io::stderr().is_terminal();
        let now = Instant::now();
        SHOWN.fetch_add(1, Ordering::Relaxed);
        Self { bar, lines, started: (now, done), last: now, ended: false, recent: VecDeque::new() }
    }

    /// Shows optimizer step `step`, its loss, its number of tokens and its time in seconds.
    pub fn step(&mut self, step: u64, loss: f64, tokens: usize, seconds: f64) {
        self.recent.push_back((tokens as f64, seconds));
        if self.recent.len() > 20 {
            self.recent.pop_front();
        }
        let (tokens, seconds) =
            self.recent.iter().fold((0.0, 0.0), |(tokens, seconds), (t, s)| (tokens + t, seconds + s));
        let rate = tokens / seconds.max(1e-9);
        self.bar.set_position(step);
        self.show([format!("loss {loss:.4}"), format!("{rate:.0} tokens/s")]);
    }

    /// Adds `done` units to those done, up to the total.
    pub fn advance(&mut self, done: u64) {
        self.bar.inc(done.min(self.left()));
        let (since, before) = self.started;
        let rate = (self.position() - before) as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let digits = if rate < 10.0 { 1 } else { 0 };
        self.show([format!("{rate:.digits$}/s")]);
    }

    /// Number of units done.
    pub fn position(&self) -> u64 {
        self.bar.position()
    }

    fn left(&self) -> u64 {
        self.bar.length().unwrap_or(0).saturating_sub(self.position())
    }

    fn show<const N: usize>(&mut self, facts: [String; N]) {
        let (since, before) = self.started;
        let done = self.position().saturating_sub(before).max(1);
        let seconds = since.elapsed().mul_f64(self.left() as f64 / done as f64).as_secs();
        self.bar.set_message(format!(
            "{} · {}",
            facts.join(" · "),
            HumanDuration(Duration::from_secs(seconds))
        ));
        let ends = self.left() == 0;
        if !self.lines || self.ended || (self.last.elapsed() < LINE_INTERVAL && !ends) {
            return;
        }
        (self.last, self.ended) = (Instant::now(), ends);
        let (what, length) = (self.bar.prefix(), self.bar.length().unwrap_or(0));
        tracing::info!("{what} {}/{length}, {}, {seconds} s left", self.position(), facts.join(", "));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        SHOWN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Progress that appears only after two seconds, and only if no other progress is shown. It is for
/// work that is usually short.
#[derive(Debug)]
pub struct DelayedProgress {
    what: String,
    total: u64,
    done: u64,
    last: Instant,
    shown: Option<Progress>,
}

/// Time before a [`DelayedProgress`] appears.
const DELAY: Duration = Duration::from_secs(2);
/// Time between two updates, because rows pass faster than the terminal can be written.
const REDRAW: Duration = Duration::from_millis(100);

impl DelayedProgress {
    /// For `total` `unit`s of the file at `path`. `verb` says what is done with it: `reading`.
    pub fn new(verb: &str, path: &Path, unit: &str, total: u64) -> Self {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        Self { what: format!("{verb} {name}, {unit}"), total, done: 0, last: Instant::now(), shown: None }
    }

    /// Adds `done` units to those done.
    pub fn advance(&mut self, done: u64) {
        self.done += done;
        let ends = self.done >= self.total;
        match &mut self.shown {
            Some(progress) if ends || self.last.elapsed() >= REDRAW => {
                progress.advance(self.done - progress.position());
            }
            None if !ends && self.last.elapsed() >= DELAY && SHOWN.load(Ordering::Relaxed) == 0 => {
                self.shown = Some(Progress::new(&self.what, self.total, self.done));
            }
            _ => return,
        }
        self.last = Instant::now();
    }
}

/// A reader that shows how much of a file it has read.
#[derive(Debug)]
pub struct ProgressReader<R> {
    inner: R,
    bytes: u64,
    progress: DelayedProgress,
}

const MB: u64 = 1_000_000;

impl<R: Read> ProgressReader<R> {
    /// Wraps the reader of the file at `path`, which has `bytes` bytes. `verb` says what is done with it:
    /// `reading`.
    pub fn new(inner: R, verb: &str, path: &Path, bytes: u64) -> Self {
        Self { inner, bytes: 0, progress: DelayedProgress::new(verb, path, "MB", bytes / MB) }
    }
}

impl<R: Read> Read for ProgressReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let before = self.bytes / MB;
        self.bytes += count as u64;
        self.progress.advance(self.bytes / MB - before);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delayed_progress_appears_with_what_is_done_by_then() {
        let mut progress = DelayedProgress::new("reading", Path::new("a/b.jsonl"), "rows", 10);
        progress.advance(3);
        assert!(progress.shown.is_none());
        let later = |progress: &mut DelayedProgress, done| {
            progress.last -= DELAY;
            progress.advance(done);
            progress.shown.as_ref().map(Progress::position)
        };
        assert_eq!(later(&mut progress, 2), Some(5));
        assert_eq!(later(&mut progress, 4), Some(9));
    }

    #[test]
    fn a_progress_reader_returns_the_bytes_of_the_file() {
        let text = vec![7u8; 2_500_000];
        let mut file = ProgressReader::new(&text[..], "reading", Path::new("a/b.jsonl"), text.len() as u64);
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, text);
        assert_eq!((file.progress.done, file.progress.total), (2, 2));
        assert_eq!(file.progress.what, "reading b.jsonl, MB");
    }
}
