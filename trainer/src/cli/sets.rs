//! The evaluation sets of `evaluate` and `compare`, and how their texts are embedded.

use std::path::PathBuf;

use super::encoding::Encoding;
use crate::config::{Config, EvaluationKind, EvaluationSet};
use crate::eval::EvalSet;
use crate::{Error, Result};

#[derive(Debug, clap::Args)]
pub(super) struct Sets {
    /// A BEIR folder, or a file of pairs, triplets or scored pairs; one or several
    #[arg(long = "set", value_name = "PATH", required = true, num_args = 1..)]
    sets: Vec<PathBuf>,
    /// What is measured. `loss` is computed with a default configuration: InfoNCE at temperature 0.02, CoSENT
    /// for scored pairs, in batches of 64 rows. Default: similarity for scored pairs, else retrieval
    #[arg(long)]
    kind: Option<EvaluationKind>,
    /// The split of a BEIR folder, qrels/SPLIT.tsv. Default: test, else dev, else the only one
    #[arg(long)]
    split: Option<String>,
    #[command(flatten)]
    pub(super) encoding: Encoding,
}

impl Sets {
    /// Reads the sets into memory.
    ///
    /// # Errors
    /// A set cannot be read, or two sets have the same name.
    pub(super) fn open(&self) -> Result<Vec<EvalSet>> {
        let config = Config::default();
        let open = |path: &PathBuf| {
            let (kind, split) = (self.kind, self.split.clone());
            EvalSet::open(
                &EvaluationSet { path: path.clone(), kind, split, ..EvaluationSet::default() },
                &config,
            )
        };
        let sets = self.sets.iter().map(open).collect::<Result<Vec<_>>>()?;
        for (index, set) in sets.iter().enumerate() {
            if sets[..index].iter().any(|other| other.name() == set.name()) {
                let message =
                    format!("--set: two sets have the name `{}`, expected different names", set.name());
                return Err(Error::Usage(format!("{message}\nhint: measure them with two commands")));
            }
        }
        Ok(sets)
    }
}
