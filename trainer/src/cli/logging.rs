//! Log messages: they go to standard error, above the progress bars, and to the log file of a run once it has a folder.

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

/// Installs the subscriber. `RUST_LOG` sets the level on the terminal; the default is `info`, and `error` if `quiet` is set or on
/// every rank but the first.
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
    // Tests call this several times; only the first call has an effect.
    let _ = tracing_subscriber::registry().with(terminal).with(log).try_init();
}

/// Writes messages to OUTPUT/logs/rank-K.log from now on.
///
/// # Errors
/// The folder or the file cannot be created.
pub(super) fn keep(output: &Path, rank: usize) -> Result<()> {
    let folder = output.join("logs");
    fs::create_dir_all(&folder).map_err(Error::write("create", &folder))?;
    let path = folder.join(format!("rank-{rank}.log"));
    let file =
        OpenOptions::new().create(true).append(true).open(&path).map_err(Error::write("open", &path))?;
    let _ = LOG.set(file);
    Ok(())
}

/// The format of the terminal: the message alone, with `warning:` or `error:` before it.
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
