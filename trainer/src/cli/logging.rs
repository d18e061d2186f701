//! Where messages go: to standard error, around the progress bars, and once a run has a folder, to its log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;

use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, time};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::system::progress;
use crate::{Error, Result};

static LOG: OnceLock<File> = OnceLock::new();

/// Starts to show messages; `RUST_LOG` chooses which, `info` by default, `error` if `quiet` and on all ranks but the first.
pub(super) fn start(quiet: bool, rank: usize) {
    let default = if quiet || rank > 0 { LevelFilter::ERROR } else { LevelFilter::INFO };
    let filter = EnvFilter::builder().with_default_directive(default.into());
    let terminal = tracing_subscriber::fmt::layer()
        .event_format(Terminal)
        .with_writer(|| Stderr)
        .with_filter(filter.from_env_lossy());
    let log = tracing_subscriber::fmt::layer()
        .with_timer(time::SystemTime)
        .with_target(false)
        .with_ansi(false)
        .with_writer(|| Log)
        .with_filter(LevelFilter::INFO);
    // A second start, in a test, changes nothing.
    let _ = tracing_subscriber::registry().with(terminal).with(log).try_init();
}

/// Keeps messages in OUTPUT/logs/rank-K.log from here on.
pub(super) fn keep(output: &Path, rank: usize) -> Result<()> {
    let folder = output.join("logs");
    fs::create_dir_all(&folder).map_err(Error::write("create", &folder))?;
    let path = folder.join(format!("rank-{rank}.log"));
    let file =
        OpenOptions::new().create(true).append(true).open(&path).map_err(Error::write("open", &path))?;
    let _ = LOG.set(file);
    Ok(())
}

/// A message as it is; warnings and errors say what they are.
struct Terminal;

impl<S, N> FormatEvent<S, N> for Terminal
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut to: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        match *event.metadata().level() {
            Level::ERROR => write!(to, "error: ")?,
            Level::WARN => write!(to, "warning: ")?,
            _ => {}
        }
        ctx.format_fields(to.by_ref(), event)?;
        writeln!(to)
    }
}

struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        progress::suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.get().map_or(Ok(bytes.len()), |mut file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
