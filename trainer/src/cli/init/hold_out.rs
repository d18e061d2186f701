//! Rows that are held out of training, to measure the model on texts that it has not seen.

use serde_json::{Value, json};

use super::TrainingSet;
use crate::config::{EvaluationKind, RowKind};
use crate::data::reader::{self, Format};
use crate::data::row::Row;
use crate::data::split::Grouping;
use crate::system::atomic::StagedDir;
use crate::{Error, Result};

/// Maximum number of rows that are held out: more would make evaluations slow.
const MOST: u64 = 1000;

/// Number of rows below which none is held out.
const FEWEST: u64 = 20;

/// Seed of the random choice, which a second `init` of the same data makes again.
const SEED: u64 = 42;

/// Which rows of each training set are held out.
pub(super) struct HeldOut(Vec<Vec<bool>>);

/// What was written for one training set.
pub(super) struct Part {
    /// File of the rows to train on.
    pub(super) file: String,
    /// Their number.
    pub(super) trained: u64,
    /// File and kind of the set to evaluate on; none if too few rows were held out of this set.
    pub(super) evaluation: Option<(String, EvaluationKind)>,
}

impl HeldOut {
    /// Chooses a tenth of all rows so that none of their texts is trained on; none, with a warning, where
    /// that is impossible.
    pub(super) fn choose(training: &[TrainingSet]) -> Result<Option<Self>> {
        let rows: u64 = training.iter().map(|training| training.source.len()).sum();
        if rows < FEWEST {
            tracing::warn!("{rows} rows are too few to hold some out: the model will not be measured");
            return Ok(None);
        }
        let fraction = (rows / 10).min(MOST) as f64 / rows as f64;
        // Mined negatives join nearly all rows into one group; then they may be in both parts.
        for with_negatives in [true, false] {
            let mut grouping = Grouping::default();
            for TrainingSet { source, .. } in training {
                for number in 0..source.len() {
                    let (row, group) = (source.row(number)?, grouping.add_row());
                    grouping.join(group, &row.query);
                    row.positives.iter().for_each(|text| grouping.join(group, text));
                    if with_negatives {
                        row.negatives.iter().for_each(|text| grouping.join(group, text));
                    }
                }
            }
            let groups = grouping.finish();
            if groups.largest() as u64 > rows / 2 {
                continue;
            }
            if !with_negatives {
                tracing::warn!(
                    "held-out rows share negatives with rows that are trained on, because most rows have the same ones"
                );
            }
            let mut held_out =
                groups.parts_of_rows(&[1.0 - fraction, fraction], SEED).into_iter().map(|part| part == 1);
            let of_set =
                |training: &TrainingSet| held_out.by_ref().take(training.source.len() as usize).collect();
            return Ok(Some(Self(training.iter().map(of_set).collect())));
        }
        tracing::warn!(
            "more than half of the rows share texts, so none can be held out: the model will not be measured"
        );
        Ok(None)
    }

    /// Writes the rows of set `number` to train on, and those to evaluate on.
    pub(super) fn write(&self, number: usize, training: &TrainingSet, draft: &StagedDir) -> Result<Part> {
        let TrainingSet { set, source, .. } = training;
        let held_out = &self.0[number];
        let prefix = if self.0.len() > 1 { format!("{}-", set.name) } else { String::new() };
        let ending = Format::of(&set.path).map_or("jsonl", Format::written_ending);
        let file = format!("{prefix}train.{ending}");
        let mut trained = draft.file(&file)?;
        if set.path.is_dir() {
            for number in (0..source.len()).filter(|&number| !held_out[number as usize]) {
                let Row { query, positives, .. } = source.row(number)?;
                trained.write(json!({"query": query, "positive": positives}).to_string().as_bytes())?;
            }
        } else {
            let mut row = 0;
            reader::raw(&set.path, |_, bytes, object| {
                if object.is_some() {
                    row += 1;
                    if *held_out
                        .get(row - 1)
                        .ok_or_else(|| Error::file(&set.path, "has changed meanwhile"))?
                    {
                        return Ok(());
                    }
                }
                trained.write(bytes)
            })?;
        }
        trained.finish()?;

        let rows = (0..source.len()).filter(|&number| held_out[number as usize]);
        let rows = rows.map(|number| source.row(number)).collect::<Result<Vec<Row>>>()?;
        let count = source.len() - rows.len() as u64;
        let evaluation = match evaluation(source.kind(), rows) {
            None => None,
            Some((kind, rows)) => {
                let name = format!("{prefix}test.jsonl");
                let mut test = draft.file(&name)?;
                rows.iter().try_for_each(|row| test.write(row.to_string().as_bytes()))?;
                test.finish()?;
                Some((name, kind))
            }
        };
        Ok(Part { file, trained: count, evaluation })
    }
}

/// Rows of an evaluation set under the names that evaluation understands; none if they are too few to measure
/// anything.
fn evaluation(kind: RowKind, rows: Vec<Row>) -> Option<(EvaluationKind, Vec<Value>)> {
    match kind {
        RowKind::Similarity => {
            let row = |row: &Row| {
                let (second, score) = (row.positives.first()?, row.scores.first()?);
                Some(json!({"sentence1": row.query, "sentence2": second, "score": score}))
            };
            let rows: Vec<Value> = rows.iter().filter_map(row).collect();
            (rows.len() > 1).then_some((EvaluationKind::Similarity, rows))
        }
        RowKind::Labelled => {
            let rows = triplets_of_classes(&rows);
            (!rows.is_empty()).then_some((EvaluationKind::Triplet, rows))
        }
        RowKind::Pairs | RowKind::Triplets if rows.iter().all(|row| !row.negatives.is_empty()) => {
            let row = |row: &Row| json!({"query": row.query, "positive": row.positives, "negatives": row.negatives});
            (!rows.is_empty()).then(|| (EvaluationKind::Triplet, rows.iter().map(row).collect()))
        }
        RowKind::Pairs | RowKind::Triplets => {
            let first = rows.first()?.positives.first()?;
            let differs = rows.iter().flat_map(|row| &row.positives).any(|positive| positive != first);
            let row = |row: &Row| json!({"query": row.query, "positive": row.positives});
            differs.then(|| (EvaluationKind::Retrieval, rows.iter().map(row).collect()))
        }
    }
}

/// For each text with a class, another text of its class and one of another class.
fn triplets_of_classes(rows: &[Row]) -> Vec<Value> {
    let count = rows.len();
    let other = |from: usize, fits: &dyn Fn(&Row) -> bool| {
        (0..count).map(|step| &rows[(from + step) % count]).find(|row| fits(row))
    };
    let triplet = |(number, row): (usize, &Row)| {
        let positive = other(number + 1, &|other| other.label == row.label && other.query != row.query)?;
        let negative =
            other(number + count / 2, &|other| other.label != row.label && other.query != row.query)?;
        Some(json!({"query": row.query, "positive": positive.query, "negatives": [negative.query]}))
    };
    rows.iter().enumerate().filter_map(triplet).collect()
}
