//! `trainer compare`.

use std::fs;
use std::path::PathBuf;

use super::encoding::Encoding;
use super::print;
use super::sets::Sets;
use crate::comm::World;
use crate::eval::compare::Comparison;
use crate::eval::{Bootstrap, EvalOutput, EvalSet};
use crate::{Error, Result};

/// Compare two models on the same sets, with confidence intervals
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    trainer compare --base sentence-transformers/all-MiniLM-L6-v2 --tuned runs/minilm/model --set data/scifact\n  \
    trainer compare --base intfloat/multilingual-e5-base --tuned runs/e5-base/model --set data/qa/test.csv \
    --query-prompt 'query: ' --document-prompt 'passage: ' --output results\n\n\
    The interval of a difference is its 95 % confidence interval by the paired bootstrap: queries, triplets or pairs are \
    resampled with replacement, and both models are evaluated on the same resample.")]
pub(super) struct Args {
    /// The base model: a folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    base: String,
    /// The fine-tuned model: a folder, or an id on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    tuned: String,
    #[command(flatten)]
    sets: Sets,
    /// Folder for compare.json
    #[arg(long, value_name = "DIR", default_value = ".")]
    output: PathBuf,
    /// Number of bootstrap resamples
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = super::encode::at_least_one)]
    resamples: usize,
    /// Seed of the resamples
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
}

pub(super) fn run(args: &Args, world: &World) -> Result<()> {
    let sets = args.sets.open()?;
    // Both models are looked up before hours are spent on the first, the tuned one first because its path is
    // more often wrong.
    let encoding = &args.sets.encoding;
    let of_tuned = encoding.of_trained();
    let (tuned, base) = (of_tuned.find(&args.tuned)?, encoding.find(&args.base)?);
    if world.is_rank_zero() {
        if let Some(warning) = encoding.lengths_differ(&base, &tuned) {
            tracing::warn!("{warning}");
        }
        fs::create_dir_all(&args.output).map_err(Error::write("create", &args.output))?;
    }
    let base = measure(encoding, &args.base, "base", &sets, world)?;
    let tuned = measure(&of_tuned, &args.tuned, "tuned", &sets, world)?;
    if !world.is_rank_zero() {
        return Ok(());
    }
    let bootstrap = Bootstrap { resamples: args.resamples, seed: args.seed };
    let comparison = Comparison::new(&sets, &base, &tuned, bootstrap);
    comparison.write(&args.output, &args.base, &args.tuned, bootstrap)?;
    print(comparison.to_string().trim_end());
    Ok(())
}

/// Evaluates one model. Two may not fit into memory.
fn measure(
    encoding: &Encoding,
    model: &str,
    what: &str,
    sets: &[EvalSet],
    world: &World,
) -> Result<Vec<EvalOutput>> {
    let opened = encoding.model(model)?;
    let embedder = encoding.embedder(&opened, world)?;
    sets.iter()
        .map(|set| {
            let measured = set.evaluate(&embedder)?;
            let primary = set.primary_metric();
            tracing::info!("{what}: {primary} {:.4}", measured.scores.get(&primary).unwrap_or(f64::NAN));
            Ok(measured)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::model::ModelFolder;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn a_missing_model_is_an_error_before_anything_is_evaluated() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert");
        let place = tempfile::tempdir().unwrap();
        // A model that is refused when it is evaluated, because it has no weights.
        let base = place.path().join("base");
        fs::create_dir(&base).unwrap();
        for name in ["config.json", "tokenizer.json"] {
            fs::copy(golden.join(name), base.join(name)).unwrap();
        }
        let set = golden.join("rows.jsonl");
        let compare = |tuned: &str, output: &Path, flags: &[&str]| {
            let [base, set, output] =
                [base.as_path(), set.as_path(), output].map(|path| path.to_str().unwrap());
            let line = ["compare", "--base", base, "--tuned", tuned, "--set", set, "--output", output];
            run(&Line::parse_from(line.iter().chain(flags)).args, &World::solo())
        };
        let refused = |tuned: &str, output: &Path| compare(tuned, output, &[]).unwrap_err().to_string();
        let output = place.path().join("results");
        assert!(refused("/no/such", &output).contains("/no/such: no such model folder"));
        let golden = golden.to_str().unwrap();
        let taken = refused(golden, &set);
        assert!(taken.contains("rows.jsonl: cannot create"), "{taken}");
        assert!(refused(golden, &output).contains("has no model.safetensors"));
        assert!(output.is_dir());
        // Random weights are for the base alone.
        compare(golden, &output, &["--random-weights"]).unwrap();
        let tuned = compare(base.to_str().unwrap(), &output, &["--random-weights"]);
        assert!(tuned.unwrap_err().to_string().contains("has no model.safetensors"));
    }

    #[test]
    fn models_that_truncate_texts_at_different_lengths_are_warned_about() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert");
        let base = ModelFolder::open(&golden).unwrap();
        let tuned = ModelFolder { max_length: Some(7), ..ModelFolder::open(&golden).unwrap() };
        let warning = |flags: &[&str], tuned: &ModelFolder| {
            let line = ["compare", "--base", "a", "--tuned", "b", "--set", "c"];
            Line::parse_from(line.iter().chain(flags)).args.sets.encoding.lengths_differ(&base, tuned)
        };
        assert!(warning(&[], &tuned).unwrap().contains("the tuned model at 7 tokens: use --max-length"));
        assert_eq!(warning(&["--max-length", "7"], &tuned), None);
        assert_eq!(warning(&[], &base), None);
    }
}
