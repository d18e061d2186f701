//! The progress of a run on the terminal: a bar with step, loss, tokens/s and time left; a line every few seconds where
//! standard error is no terminal.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

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
    /// When this began, and how much was done by then: only what came since tells the pace.
    begun: (Instant, u64),
    last: Instant,
    ended: bool,
    recent: VecDeque<(f64, f64)>, // tokens and seconds of the last steps
}

impl Progress {
    /// Work of `total` pieces, of which `done` are done, called `what`.
    pub fn new(what: &str, total: u64, done: u64) -> Self {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} left");
        let bar = ProgressBar::new(total).with_prefix(what.to_owned()).with_position(done);
        let bar = BARS.add(bar);
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("━╸─"));
        }
        let quiet = QUIET.lock().is_ok_and(|quiet| *quiet);
        let lines = !quiet && !std::io::stderr().is_terminal();
        let now = Instant::now();
        Self { bar, lines, begun: (now, done), last: now, ended: false, recent: VecDeque::new() }
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
        self.bar.set_position(step.step);
        self.tell([format!("loss {:.4}", step.loss), format!("{rate:.0} tokens/s")]);
    }

    /// Shows that `done` more pieces are done, as far as there are so many.
    pub fn advance(&mut self, done: u64) {
        self.bar.inc(done.min(self.left()));
        let (since, before) = self.begun;
        let rate = (self.position() - before) as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let digits = if rate < 10.0 { 1 } else { 0 };
        self.tell([format!("{rate:.digits$}/s")]);
    }

    /// How many pieces are done.
    pub fn position(&self) -> u64 {
        self.bar.position()
    }

    fn left(&self) -> u64 {
        self.bar.length().unwrap_or(0).saturating_sub(self.position())
    }

    fn tell<const N: usize>(&mut self, facts: [String; N]) {
        let (since, before) = self.begun;
        let done = self.position().saturating_sub(before).max(1);
        let seconds = since.elapsed().mul_f64(self.left() as f64 / done as f64).as_secs();
        self.bar.set_message(format!(
            "{} · {}",
            facts.join(" · "),
            HumanDuration(Duration::from_secs(seconds))
        ));
        let ends = self.left() == 0;
        if !self.lines || self.ended || (self.last.elapsed() < PAUSE && !ends) {
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
    }
}
