//! The progress of a run on the terminal: a bar with step, loss, tokens/s and time left; a line every few seconds where
//! standard error is no terminal.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::metrics::Step;

/// All bars of this process; logs are written around them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);
static QUIET: Mutex<bool> = Mutex::new(false);

/// Between two lines where there is no terminal.
const PAUSE: Duration = Duration::from_secs(5);

/// Shows no progress from here on.
pub fn quiet() {
    BARS.set_draw_target(ProgressDrawTarget::hidden());
    if let Ok(mut quiet) = QUIET.lock() {
        *quiet = true;
    }
}

/// Runs `f`, which writes to the terminal, without tearing a bar.
pub fn suspend<R>(f: impl FnOnce() -> R) -> R {
    BARS.suspend(f)
}

/// One long piece of work.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    lines: bool,
    last: Instant,
    recent: VecDeque<(f64, f64)>, // tokens and seconds of the last steps
}

impl Progress {
    /// Work of `total` pieces, of which `done` are done, called `what`.
    pub fn new(what: &str, total: u64, done: u64) -> Self {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} {eta} left");
        let bar = ProgressBar::new(total).with_prefix(what.to_owned()).with_position(done);
        let bar = BARS.add(bar);
        bar.reset_eta();
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("━╸─"));
        }
        let quiet = QUIET.lock().is_ok_and(|quiet| *quiet);
        let lines = !quiet && !std::io::stderr().is_terminal();
        Self { bar, lines, last: Instant::now(), recent: VecDeque::new() }
    }

    /// Shows an optimizer step.
    pub fn step(&mut self, step: &Step) {
        self.recent.push_back((step.tokens as f64, step.seconds));
        if self.recent.len() > 20 {
            self.recent.pop_front();
        }
        let (tokens, seconds) =
            self.recent.iter().fold((0.0, 0.0), |(tokens, seconds), (t, s)| (tokens + t, seconds + s));
        let rate = tokens / seconds.max(1e-9);
        self.bar.set_message(format!("loss {:.4} · {rate:.0} tokens/s ·", step.loss));
        self.bar.set_position(step.step);
        self.line(&format!("loss {:.4}, {rate:.0} tokens/s", step.loss));
    }

    /// Shows that `done` more pieces are done.
    pub fn advance(&mut self, done: u64) {
        self.bar.inc(done);
        let rate = self.bar.per_sec();
        let digits = if rate < 10.0 { 1 } else { 0 };
        self.bar.set_message(format!("{rate:.digits$}/s ·"));
        self.line(&format!("{rate:.digits$}/s"));
    }

    /// How many pieces are done.
    pub fn position(&self) -> u64 {
        self.bar.position()
    }

    fn line(&mut self, message: &str) {
        let (position, length) = (self.bar.position(), self.bar.length().unwrap_or(0));
        if !self.lines || (self.last.elapsed() < PAUSE && position < length) {
            return;
        }
        self.last = Instant::now();
        let left = self.bar.eta().as_secs();
        let message = if message.is_empty() { String::new() } else { format!(", {message}") };
        tracing::info!("{} {position}/{length}{message}, {left} s left", self.bar.prefix());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
