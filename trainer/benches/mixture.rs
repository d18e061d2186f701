//! Measures time and peak memory of opening and shuffling a large mixture.
//!
//!     cargo bench --bench mixture -- --rows 50000000 --folder /some/disk
//!
//! writes a file of short rows to the folder, unless it exists, opens it as training data and reads batches
//! in shuffled order.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use trainer::config::Config;
use trainer::data::batch::Cursor;
use trainer::data::mixture::Mixture;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
struct Args {
    /// Number of rows of the file
    #[arg(long, default_value_t = 100_000)]
    rows: u64,
    /// Folder of the file. Default: a temporary folder
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Number of batches of 64 rows to read
    #[arg(long, default_value_t = 500)]
    batches: u64,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[expect(clippy::print_stdout, reason = "a benchmark's output is its purpose")]
fn main() -> Result<()> {
    let args = Args::parse();
    let temporary = tempfile::tempdir()?;
    let folder = args.folder.as_deref().unwrap_or(temporary.path());
    let path = folder.join(format!("rows-{}.jsonl", args.rows));
    if !path.exists() {
        write(&path, args.rows)?;
    }
    let bytes = path.metadata()?.len();
    let config = folder.join("mixture.yaml");
    let yaml = format!(
        "model: {{path: none}}\ndata: {{train: [{{path: {:?}}}]}}\ntraining: {{batch_size: 64}}\n",
        path
    );
    std::fs::write(&config, yaml)?;
    let config = Config::load(&config, &[])?;

    let start = Instant::now();
    let mixture = Mixture::open(&config)?;
    let opened = start.elapsed().as_secs_f64();
    println!("rows       {} in {:.2} GB", mixture.rows(), bytes as f64 / 1e9);
    println!(
        "opening    {opened:.1} s, {:.2} M rows/s, {:.0} MB/s",
        args.rows as f64 / opened / 1e6,
        bytes as f64 / opened / 1e6
    );
    println!("memory     {} at most", peak()?);

    let start = Instant::now();
    let mut sampler = mixture.sampler(&Cursor::default())?;
    let mut rows = 0;
    let batches = args.batches.min(mixture.batches());
    let mut last = Cursor::default();
    for _ in 0..batches {
        let picked = sampler.next_rows()?;
        rows += picked.examples.len();
        last = picked.cursor;
    }
    let read = start.elapsed().as_secs_f64();
    println!("shuffled   {rows} rows in {read:.2} s, {:.1} µs a row", read * 1e6 / rows as f64);
    let start = Instant::now();
    mixture.sampler(&Cursor { position: last.position + mixture.rows() / 2 / 64 * 64, ..last })?;
    println!("resuming   {:.3} s in the middle of the epoch", start.elapsed().as_secs_f64());
    println!("memory     {} at most", peak()?);
    Ok(())
}

/// Writes pairs of about 60 bytes.
fn write(path: &Path, rows: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for row in 0..rows {
        let answer = row.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        writeln!(file, "{{\"query\": \"what is {row}?\", \"positive\": \"it is {answer:x}.{row}\"}}")?;
    }
    Ok(file.flush()?)
}

/// Returns the peak memory of this process.
fn peak() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    Ok(line.unwrap_or("unknown").trim().to_owned())
}
