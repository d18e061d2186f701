//! Measures the exact search of `trainer mine`: the k best documents of each query, with all embeddings on
//! disk. `scripts/search_faiss.py` writes the files and searches them with FAISS.
//!
//! ```text
//! search QUERIES.npy DOCUMENTS.npy [k] [FOUND.bin]     k: 60; FOUND.bin: the documents' numbers, u32
//! ```
//!
//! Prints seconds, GFLOP/s and peak memory.

#![expect(clippy::print_stdout, reason = "a benchmark reports")]

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::time::Instant;

use trainer::mine::{Embeddings, search};

/// Queries per block, as in `trainer mine`.
const BLOCK: usize = 8192;

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let [queries, documents, rest @ ..] = words.as_slice() else {
        println!("search QUERIES.npy DOCUMENTS.npy [k] [FOUND.bin]");
        return Ok(());
    };
    let (queries, documents) = (Embeddings::open([queries])?, Embeddings::open([documents])?);
    let k = rest.first().map_or(Ok(60), |word| word.parse())?;
    let mut found = rest.get(1).map(File::create).transpose()?.map(BufWriter::new);

    let start = Instant::now();
    let mut block = Vec::new();
    for first in (0..queries.rows()).step_by(BLOCK) {
        queries.read(first..queries.rows().min(first + BLOCK), &mut block)?;
        for hits in search(&block, &documents, k)? {
            if let Some(found) = &mut found {
                let numbers = hits.iter().flat_map(|hit| hit.document.to_le_bytes());
                found.write_all(&numbers.collect::<Vec<u8>>())?;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let flop = 2.0 * queries.rows() as f64 * documents.rows() as f64 * queries.width() as f64;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default().trim();
    println!(
        "{} × {} × {}, k {k}: {seconds:.1} s, {:.0} GFLOP/s, peak {peak}",
        queries.rows(),
        documents.rows(),
        queries.width(),
        flop / seconds / 1e9
    );
    Ok(())
}
