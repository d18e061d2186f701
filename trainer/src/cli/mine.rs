//! `trainer mine`.

use std::fs;
use std::path::{Path, PathBuf};

use super::encode::at_least_one;
use super::encoding::Encoding;
use super::print;
use crate::comm::World;
use crate::mine::{Filter, Inputs, Mine, Sampling, identity};
use crate::{Error, Result};

/// Find hard negatives: documents near a query that do not answer it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer mine --model intfloat/multilingual-e5-base --pairs data/train.jsonl --output data/mined.jsonl\n  \
    trainer mine --model runs/first/model --pairs data/scifact --output data/mined.jsonl --range 10..100 \
    --relative-margin none --max-score 0.9 --sampling random\n  \
    launch --cpus 2 -- mine --model runs/first/model --pairs data/train.jsonl --output data/mined.jsonl\n\n\
    Writes rows for training: query, positive, negatives, and scores if asked for. What was found and dropped, and why, \
    is printed as JSON. A run that was ended goes on where it was when it is started again.")]
pub(super) struct Args {
    /// A model folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Rows of queries and positives, as for training; or a BEIR folder, which brings its corpus
    #[arg(long, value_name = "FILE")]
    pairs: PathBuf,
    /// Texts that are searched beside all positives: rows with "text" (and "title"), or one text a line
    #[arg(long, value_name = "FILE")]
    corpus: Option<PathBuf>,
    /// Where the rows go: .jsonl
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Negatives for each query
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    negatives: usize,
    /// How far below the positive's score a negative's must be, as a share of it; or `none`
    #[arg(long, value_name = "SHARE", default_value = "0.05", value_parser = margin, allow_hyphen_values = true)]
    relative_margin: Margin,
    /// How far below the positive's score a negative's must be
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true)]
    absolute_margin: Option<f32>,
    /// The lowest score of a negative
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true)]
    min_score: Option<f32>,
    /// The highest score of a negative
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true)]
    max_score: Option<f32>,
    /// Which of the best documents, after all others were dropped: `10..50` passes over ten. Default: from the best on, far enough
    #[arg(long, value_name = "A..B", value_parser = range)]
    range: Option<(usize, Option<usize>)>,
    /// Which of the range: the best, or any
    #[arg(long, default_value = "top")]
    sampling: Sampling,
    /// What random choices follow from
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Leave the positives in the ranking, for rerankers to be measured with; such rows are nothing to train on
    #[arg(long)]
    include_positives: bool,
    /// Write also the `scores` of the positive and the negatives, which the losses margin_mse and kl learn from
    #[arg(long)]
    output_scores: bool,
    /// Where embeddings and finished rows are kept meanwhile; the embeddings stay, for another run with the same texts. Default: beside the
    /// output, and nothing stays
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
        return Err(Error::Usage(format!("--output: {} is no name for a file", args.output.display())));
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
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let inputs = Inputs::read(&args.pairs, args.corpus.as_deref(), folder)?;
    filter.check(&inputs)?;

    let opened = args.encoding.model(&args.model)?;
    let embedder = args.encoding.embedder(&opened, world)?;
    // The first rank's: on other nodes the same files may have other times.
    let identity = world.of_first(identity(&opened.model.folder().path)?.into_bytes())?;
    let model = format!(
        "{} {:?} {} {} {:?}",
        String::from_utf8_lossy(&identity),
        (embedder.query_prompt, embedder.document_prompt),
        embedder.max_query_length,
        args.encoding.random_weights,
        opened.model.folder().pooling,
    );
    let scores = args.output_scores;
    let mine = Mine { filter, scores, output: args.output.clone(), work, keep: args.work.is_some() };
    let counts = mine.run(&inputs, &model, world, |texts, role| embedder.encode(texts, role))?;
    if world.first() {
        if counts.pairs_without > 0 {
            tracing::warn!(
                "{} of {} pairs have no negative left and are not written\nhint: a larger --range or smaller margins leave more",
                counts.pairs_without,
                counts.pairs_without + counts.rows
            );
        }
        tracing::info!("{} rows in {}", counts.rows, args.output.display());
        print(serde_json::to_string_pretty(&counts.json()).unwrap_or_default());
    }
    Ok(())
}

/// A margin, or none.
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
    let wrong = || "expected A..B, two whole numbers, either of which may be missing".to_owned();
    let (first, last) = text.split_once("..").ok_or_else(wrong)?;
    let number = |text: &str| text.trim().parse().map_err(|_| wrong());
    let first = if first.is_empty() { 0 } else { number(first)? };
    Ok((first, if last.is_empty() { None } else { Some(number(last)?) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_margins_are_understood() {
        assert_eq!(range("10..50"), Ok((10, Some(50))));
        assert_eq!((range("3.."), range("..9")), (Ok((3, None)), Ok((0, Some(9)))));
        assert!(["3", "a..4", "1...2", "-1..4"].iter().all(|text| range(text).is_err()));
        assert_eq!((margin("none"), margin("-0.5")), (Ok(Margin(None)), Ok(Margin(Some(-0.5)))));
        assert!(["nan", "inf", "", "x"].iter().all(|text| margin(text).is_err()));
    }
}
