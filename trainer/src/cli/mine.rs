//! `trainer mine`.

use std::fs;
use std::path::{Path, PathBuf};

use super::encode::at_least_one;
use super::encoding::Encoding;
use super::print;
use crate::comm::World;
use crate::mine::{Filter, Inputs, Miner, Sampling, fingerprint};
use crate::{Error, Result};

/// Mine hard negatives: documents that are similar to a query but are not its positives
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer mine --model intfloat/multilingual-e5-base --pairs data/train.jsonl --output data/mined.jsonl\n  \
    trainer mine --model runs/first/model --pairs data/scifact --output data/mined.jsonl --range 10..100 \
    --relative-margin none --max-score 0.9 --sampling random\n  \
    launch --cpus 2 -- mine --model runs/first/model --pairs data/train.jsonl --output data/mined.jsonl\n\n\
    Writes training rows with query, positive, negatives and, with --output-scores, scores. Prints statistics as \
    JSON: rows, scores, and candidates dropped by each filter. An interrupted run resumes when the same command runs \
    again.")]
pub(super) struct Args {
    /// Model folder, or model id on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Training rows with queries and positives, or a BEIR folder
    #[arg(long, value_name = "FILE")]
    pairs: PathBuf,
    /// More documents to search, in addition to all positives: rows with "text" (and "title"), or one text
    /// per line. Default for a BEIR folder: its corpus
    #[arg(long, value_name = "FILE")]
    corpus: Option<PathBuf>,
    /// The JSONL file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Maximum number of negatives per query
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    negatives: usize,
    /// How far a negative's score must be below the positive's, as a fraction of the positive's score: 0.05
    /// allows negatives up to 95 % of it. `none`: no limit
    #[arg(
        long,
        value_name = "FRACTION",
        default_value = "0.05",
        value_parser = margin,
        allow_hyphen_values = true
    )]
    relative_margin: Margin,
    /// How far a negative's score must be below the positive's. Default: no limit
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true)]
    absolute_margin: Option<f32>,
    /// Minimum score of a negative
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true)]
    min_score: Option<f32>,
    /// Maximum score of a negative
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true)]
    max_score: Option<f32>,
    /// Positions in the ranking to choose negatives from, after filtering: `10..50` skips the top ten.
    /// Default: from the top
    #[arg(long, value_name = "A..B", value_parser = range)]
    range: Option<(usize, Option<usize>)>,
    /// How to choose from the range: `top` takes the best, `random` draws
    #[arg(long, default_value = "top")]
    sampling: Sampling,
    /// Seed of `--sampling random`
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Do not remove the positives from the candidates. For data to evaluate rerankers; do not train on it
    #[arg(long)]
    include_positives: bool,
    /// Also write `scores` of the positive and the negatives, for the losses margin_mse and kl
    #[arg(long)]
    output_scores: bool,
    /// Folder of intermediate results. Embeddings stay there, so that another run with the same texts can use
    /// them. Default: a folder beside the output, deleted at the end
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    #[command(flatten)]
    encoding: Encoding,
}

pub(super) fn run(args: &Args, world: &World) -> Result<()> {
    let (range_min, range_max) = args.range.unwrap_or((0, None));
    let filter = Filter {
        negatives: args.negatives,
        range_min,
        range_max,
        absolute_margin: args.absolute_margin,
        relative_margin: args.relative_margin.0,
        min_score: args.min_score,
        max_score: args.max_score,
        sampling: args.sampling,
        seed: args.seed,
        include_positives: args.include_positives,
    };
    let Some(name) = args.output.file_name() else {
        return Err(Error::Usage(format!("--output {} is not a file name", args.output.display())));
    };
    for input in [Some(&args.pairs), args.corpus.as_ref()].into_iter().flatten() {
        if args.output == *input
            || args
                .output
                .canonicalize()
                .ok()
                .is_some_and(|path| input.canonicalize().is_ok_and(|input| input == path))
        {
            return Err(Error::Usage(format!("--output: {} is an input", input.display())));
        }
    }
    let folder =
        args.output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let work = args.work.clone().unwrap_or_else(|| folder.join(format!(".{}.work", name.display())));
    fs::create_dir_all(folder).map_err(Error::write("create", folder))?;
    let inputs = Inputs::read(&args.pairs, args.corpus.as_deref(), folder)?;
    filter.check(&inputs)?;

    let opened = args.encoding.model(&args.model)?;
    let embedder = args.encoding.embedder(&opened, world)?;
    // Rank 0's: on other nodes the modification times may differ.
    let fingerprint = world.broadcast_bytes(fingerprint(&opened.model.folder().path)?.into_bytes())?;
    let model = format!(
        "{} {:?} {} {} {:?}",
        String::from_utf8_lossy(&fingerprint),
        (embedder.query_prompt, embedder.document_prompt),
        embedder.max_query_length,
        args.encoding.random_weights,
        opened.model.folder().pooling,
    );
    let scores = args.output_scores;
    let miner =
        Miner { filter, scores, output: args.output.clone(), work, keep_embeddings: args.work.is_some() };
    let stats = miner.run(&inputs, &model, world, |texts, role| embedder.encode(texts, role))?;
    if world.is_rank_zero() {
        if stats.pairs_without > 0 {
            tracing::warn!(
                "{} of {} pairs have no negative and are not written\n\
                 hint: a wider --range or smaller margins keep more candidates",
                stats.pairs_without,
                stats.pairs_without + stats.rows
            );
        }
        tracing::info!("wrote {} rows to {}", stats.rows, args.output.display());
        print(serde_json::to_string_pretty(&stats.json()).unwrap_or_default());
    }
    Ok(())
}

/// A margin, or `none`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Margin(Option<f32>);

fn margin(text: &str) -> std::result::Result<Margin, String> {
    if text == "none" { Ok(Margin(None)) } else { finite(text).map(|margin| Margin(Some(margin))) }
}

fn finite(text: &str) -> std::result::Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| number.is_finite());
    number.ok_or_else(|| "expected a number".to_owned())
}

fn range(text: &str) -> std::result::Result<(usize, Option<usize>), String> {
    let wrong = || "expected A..B, A.. or ..B with whole numbers".to_owned();
    let (first, last) = text.split_once("..").ok_or_else(wrong)?;
    let number = |text: &str| text.trim().parse().map_err(|_| wrong());
    let first = if first.is_empty() { 0 } else { number(first)? };
    Ok((first, if last.is_empty() { None } else { Some(number(last)?) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_margins_are_parsed() {
        assert_eq!(range("10..50"), Ok((10, Some(50))));
        assert_eq!((range("3.."), range("..9")), (Ok((3, None)), Ok((0, Some(9)))));
        assert!(["3", "a..4", "1...2", "-1..4"].iter().all(|text| range(text).is_err()));
        assert_eq!((margin("none"), margin("-0.5")), (Ok(Margin(None)), Ok(Margin(Some(-0.5)))));
        assert!(["nan", "inf", "", "x"].iter().all(|text| margin(text).is_err()));
    }
}
