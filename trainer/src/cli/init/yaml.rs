//! The configuration that `trainer init` writes: short, with comments, and with values that follow from the
//! data.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::{Evaluation, TrainingSet};
use crate::Result;
use crate::config::{ColumnNames, Columns, DataSet, EvaluationKind, RowKind};
use crate::eval::EvalSpec;

/// Rows whose texts are measured.
const SAMPLED: u64 = 10_000;

/// Estimated number of characters per token: 4 in English, fewer in other languages.
const CHARACTERS_PER_TOKEN: usize = 3;

/// Maximum lengths to choose from, in tokens.
const LENGTHS: [usize; 4] = [32, 64, 128, 256];

/// Maximum lengths of texts, in tokens.
pub(super) struct Lengths {
    query: Length,
    document: Length,
}

/// A maximum length, and whether more than 5 % of the texts are estimated to be longer.
#[derive(Clone, Copy)]
struct Length {
    tokens: usize,
    truncates: bool,
}

impl Lengths {
    /// Chooses lengths that 95 % of the texts fit in, up to 256 tokens and the positions of a model folder.
    pub(super) fn measure(training: &[TrainingSet], model: &str) -> Result<Self> {
        let (mut queries, mut documents) = (Vec::new(), Vec::new());
        for TrainingSet { source, .. } in training {
            let step = source.len().div_ceil(SAMPLED).max(1);
            for number in (0..source.len()).step_by(step as usize) {
                let row = source.row(number)?;
                let length = |text: &String| text.chars().count();
                queries.push(length(&row.query));
                documents.extend(row.positives.iter().chain(&row.negatives).map(length));
                // In these rows both texts play both roles.
                if matches!(source.kind(), RowKind::Labelled | RowKind::Similarity) {
                    documents.push(length(&row.query));
                    queries.extend(row.positives.iter().map(length));
                }
            }
        }
        let positions = positions(model).unwrap_or(usize::MAX);
        let choose = |mut lengths: Vec<usize>| {
            lengths.sort_unstable();
            let characters = lengths.get(lengths.len() * 95 / 100).copied().unwrap_or_default();
            let needed = characters / CHARACTERS_PER_TOKEN + 2; // special tokens
            let tokens = LENGTHS.iter().copied().find(|&length| length >= needed).unwrap_or(LENGTHS[3]);
            let tokens = tokens.min(positions);
            Length { tokens, truncates: tokens < needed }
        };
        Ok(Self { query: choose(queries), document: choose(documents) })
    }
}

/// The number of positions of a model folder, rounded down to a power of two; none for a model on the hub.
fn positions(model: &str) -> Option<usize> {
    let text = std::fs::read(Path::new(model).join("config.json")).ok()?;
    let config: Value = serde_json::from_slice(&text).ok()?;
    let positions = config.get("max_position_embeddings")?.as_u64().filter(|&positions| positions > 0)?;
    Some(1 << positions.ilog2())
}

/// What the configuration says.
pub(super) struct Recipe<'a> {
    pub(super) name: &'a str,
    pub(super) config: &'a Path,
    pub(super) model: &'a str,
    pub(super) lengths: Lengths,
    pub(super) trained: &'a [DataSet],
    /// Number of rows to train on.
    pub(super) rows: u64,
    pub(super) evaluation: &'a [Evaluation],
}

impl Recipe<'_> {
    /// The configuration file.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let Self { name, model, lengths, trained, rows, evaluation, .. } = self;
        writeln!(text, "# Written by `trainer init`. Then:\n#")?;
        for command in self.commands() {
            writeln!(text, "#   {command}")?;
        }
        writeln!(text, "#\n# To change a value for one run: {} training.learning_rate=1e-5", self.launch())?;
        writeln!(text, "# `trainer config` describes all keys.")?;
        writeln!(text, "name: {}  # the run is written to runs/NAME", scalar(name))?;
        writeln!(text, "model:\n  path: {}", scalar(model))?;
        for (key, length) in [("max_query_length", lengths.query), ("max_document_length", lengths.document)]
        {
            let comment = if length.truncates {
                "tokens; longer texts are cut off"
            } else {
                "tokens; most texts are shorter"
            };
            writeln!(text, "  {key}: {}  # {comment}", length.tokens)?;
        }
        writeln!(text, "data:\n  train:")?;
        for set in *trained {
            writeln!(text, "    - name: {}", scalar(&set.name))?;
            writeln!(text, "      path: {}", scalar(&set.path.to_string_lossy()))?;
            if let Some(kind) = set.kind {
                writeln!(text, "      kind: {kind}  # {}", meaning(kind))?;
            }
            if let Some(columns) = flow(&set.columns) {
                writeln!(text, "      columns: {columns}")?;
            }
        }
        if trained.iter().any(|set| set.kind != Some(RowKind::Similarity)) {
            writeln!(text, "loss:\n  temperature: 0.05  # 1 / the scale of 20 in sentence-transformers")?;
        }
        let (batch_size, epochs) = (self.batch_size(), self.epochs());
        let steps = rows.div_ceil(batch_size) * epochs;
        writeln!(text, "training:\n  epochs: {epochs}  # {steps} steps for {rows} rows")?;
        writeln!(
            text,
            "  batch_size: {batch_size}  # rows per step; more rows are more negatives, and a better model"
        )?;
        writeln!(text, "  learning_rate: 2.0e-5")?;
        let Some(first) = evaluation.first() else {
            return writeln!(
                text,
                "# evaluation: no rows could be held out; `trainer config evaluation` says how to add a set"
            );
        };
        writeln!(text, "evaluation:\n  every: {}  # steps", (steps / 4).max(1))?;
        if !evaluation.iter().any(|set| set.kind == EvaluationKind::Retrieval) {
            writeln!(
                text,
                "  metric: {}  # decides which checkpoint is the best",
                EvalSpec::of(first.kind).primary_metric
            )?;
        }
        writeln!(text, "  sets:")?;
        for Evaluation { name, path, kind } in *evaluation {
            let path = scalar(&path.to_string_lossy());
            writeln!(text, "    - {{name: {}, path: {path}, kind: {kind}}}", scalar(name))?;
        }
        Ok(())
    }

    /// The commands that come next: training, and a comparison for each kind of evaluation set.
    pub(super) fn commands(&self) -> Vec<String> {
        let mut commands = vec![self.launch()];
        for kind in [EvaluationKind::Retrieval, EvaluationKind::Triplet, EvaluationKind::Similarity] {
            let sets = self.evaluation.iter().filter(|set| set.kind == kind);
            let sets: Vec<String> = sets.map(|set| quoted(&set.path.to_string_lossy())).collect();
            if sets.is_empty() {
                continue;
            }
            let mut command = format!(
                "trainer compare --base {} --tuned {} --set {}",
                quoted(self.model),
                quoted(&format!("runs/{}/model", self.name)),
                sets.join(" ")
            );
            if kind != EvaluationKind::Retrieval {
                command += &format!(" --kind {kind}");
            }
            // Both models read the same part of a text.
            command +=
                &format!(" --max-length {}", self.lengths.document.tokens.max(self.lengths.query.tokens));
            commands.push(command);
        }
        commands
    }

    fn launch(&self) -> String {
        format!("launch {}", quoted(&self.config.to_string_lossy()))
    }

    /// 64 rows, or so few that an epoch has about 16 steps.
    fn batch_size(&self) -> u64 {
        let most = (self.rows / 16).clamp(4, 64);
        (1 << most.ilog2()).min(self.rows)
    }

    /// More epochs for fewer rows.
    fn epochs(&self) -> u64 {
        match self.rows {
            0..1_000 => 3,
            1_000..10_000 => 2,
            _ => 1,
        }
    }
}

/// What rows of a kind are, for a comment.
fn meaning(kind: RowKind) -> &'static str {
    match kind {
        RowKind::Pairs | RowKind::Triplets => {
            "a query, what answers it, and negatives where the data has some"
        }
        RowKind::Labelled => "a text and its class",
        RowKind::Similarity => "two texts and how similar they are",
    }
}

/// `{query: Frage, positive: Antwort}`; none if no column is named.
fn flow(columns: &Columns) -> Option<String> {
    let one = |name: &Option<String>| name.as_deref().map(scalar);
    let several = |names: &Option<ColumnNames>| {
        names.as_ref().map(|names| match names.0.as_slice() {
            [name] => scalar(name),
            names => format!("[{}]", names.iter().map(|name| scalar(name)).collect::<Vec<_>>().join(", ")),
        })
    };
    let parts = [
        ("query", one(&columns.query)),
        ("positive", several(&columns.positive)),
        ("negatives", several(&columns.negatives)),
        ("text", one(&columns.text)),
        ("label", one(&columns.label)),
        ("sentence1", one(&columns.sentence1)),
        ("sentence2", one(&columns.sentence2)),
        ("score", one(&columns.score)),
    ];
    let named = parts.into_iter().filter_map(|(part, name)| Some(format!("{part}: {}", name?)));
    let named: Vec<String> = named.collect();
    (!named.is_empty()).then(|| format!("{{{}}}", named.join(", ")))
}

/// A YAML scalar, in quotes unless it is plainly a text.
fn scalar(text: &str) -> String {
    let plain = text.starts_with(char::is_alphabetic)
        && text.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c))
        && !["true", "false", "yes", "no", "on", "off", "null", "y", "n"]
            .contains(&text.to_lowercase().as_str());
    // A JSON string is a YAML string.
    if plain { text.to_owned() } else { Value::from(text).to_string() }
}

/// A word of a shell command.
fn quoted(text: &str) -> String {
    let plain = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "/._-@:+".contains(c));
    if plain { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_recipe_is_a_configuration_with_these_values() {
        let columns = Columns {
            query: Some("Frage: kurz".to_owned()),
            positive: Some(ColumnNames(vec!["no".to_owned(), "12".to_owned()])),
            ..Columns::default()
        };
        let path = "data/a b/train.csv".into();
        let trained = [DataSet {
            name: "a b".to_owned(),
            path,
            columns,
            kind: Some(RowKind::Pairs),
            ..DataSet::default()
        }];
        let evaluation = [Evaluation {
            name: "a b".to_owned(),
            path: "data/a b/test.jsonl".into(),
            kind: EvaluationKind::Triplet,
        }];
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("a b.yaml");
        let recipe = Recipe {
            name: "a b",
            config: &config,
            model: "org/name",
            lengths: Lengths {
                query: Length { tokens: 32, truncates: false },
                document: Length { tokens: 256, truncates: true },
            },
            trained: &trained,
            rows: 500,
            evaluation: &evaluation,
        };
        std::fs::write(&config, recipe.text()).unwrap();
        let loaded = Config::load(&config, &[]).unwrap();
        assert_eq!(loaded.data.train, trained);
        assert_eq!((loaded.training.batch_size, loaded.training.epochs), (16, 3));
        assert_eq!((loaded.model.max_query_length, loaded.model.max_document_length), (Some(32), Some(256)));
        assert_eq!(loaded.evaluation.metric, "max_accuracy");
        assert_eq!(
            (&loaded.evaluation.sets[0].path, loaded.evaluation.every),
            (&evaluation[0].path, crate::config::Interval::Steps(24))
        );
        assert!(recipe.commands()[1].ends_with(
            "--tuned 'runs/a b/model' --set 'data/a b/test.jsonl' --kind triplet --max-length 256"
        ));
    }
}
