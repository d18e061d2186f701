//! Measures BM25 over synthetic documents, as `trainer nano` uses it.
//!
//! ```text
//! bm25 [DOCUMENTS] [QUERIES]     default: 1000000 documents, 50 queries
//! ```
//!
//! Words follow Zipf's law over a vocabulary of 200,000; documents have 20 to 100 words, queries 4 to 12.
//! Prints seconds and peak memory. Documents are generated one at a time, so the memory is that of the index.

#![expect(clippy::print_stdout, reason = "a benchmark reports")]

use std::error::Error;
use std::fmt::Write;
use std::hint::black_box;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use rand::distr::Distribution;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::Zipf;
use trainer::mine::nano::Bm25;

const VOCABULARY: f64 = 200_000.0;
/// Documents for each query, as `trainer nano` takes by default.
const TOP: usize = 200;

struct Texts {
    rng: ChaCha8Rng,
    words: Zipf<f64>,
    text: String,
}

impl Texts {
    fn next(&mut self, length: RangeInclusive<usize>) -> &str {
        self.text.clear();
        for _ in 0..self.rng.random_range(length) {
            let _ = write!(self.text, "w{} ", self.words.sample(&mut self.rng));
        }
        &self.text
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let number = |place: usize, default: u32| arguments.get(place).map_or(Ok(default), |word| word.parse());
    let (documents, queries) = (number(0, 1_000_000)?, number(1, 50)?);
    let rng = ChaCha8Rng::seed_from_u64(42);
    let mut texts = Texts { rng, words: Zipf::new(VOCABULARY, 1.0)?, text: String::new() };

    let drawn: Vec<String> = (0..queries).map(|_| texts.next(4..=12).to_owned()).collect();
    let mut index = Bm25::new(drawn.iter().map(String::as_str));
    let (mut bytes, mut spent) = (0, Duration::ZERO);
    for document in 0..documents {
        let text = texts.next(20..=100);
        bytes += text.len();
        let start = Instant::now();
        index.add(document, text);
        spent += start.elapsed();
    }
    let start = Instant::now();
    for query in 0..drawn.len() {
        black_box(index.top(query, TOP));
    }
    let ranked = start.elapsed();
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default().trim();
    println!(
        "{documents} documents, {} MB of text: indexed in {:.1} s; {queries} queries in {:.2} s; peak {peak}",
        bytes / 1_000_000,
        spent.as_secs_f64(),
        ranked.as_secs_f64(),
    );
    Ok(())
}
