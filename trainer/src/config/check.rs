//! Whether the values make sense, as far as the configuration alone can tell.

use std::collections::BTreeSet;

use regex::Regex;

use super::{Config, Interval, Matryoshka, Targets};
use crate::Result;

/// Refuses values outside their range and keys that exclude each other.
pub(super) fn values(config: &Config) -> Result<()> {
    let Config { model, lora, data, loss, training, evaluation, checkpoint, logging, .. } = config;
    let check = Check { config };

    check.that(
        !model.path.is_empty(),
        "model.path",
        "missing: expected a model folder or an id of the hub",
    )?;
    for (field, value) in [
        ("model.max_query_length", model.max_query_length),
        ("model.max_document_length", model.max_document_length),
    ] {
        check.that(value != Some(0), field, "expected at least 1 token, found 0")?;
    }
    if let Some(p) = model.dropout {
        check.share("model.dropout", p)?;
    }
    if let Some(lora) = lora {
        let told = "is for training the whole model; beside adapters everything is frozen: leave it out";
        check.that(model.freeze.is_empty(), "model.freeze", told)?;
        check.at_least_1("lora.rank", lora.rank.map_or(1, |rank| rank as u64))?;
        check.above_0("lora.alpha", lora.alpha.unwrap_or(1.0))?;
        check.share("lora.dropout", lora.dropout.unwrap_or(0.0))?;
        check.that(
            lora.targets != Some(Targets::Names(Vec::new())),
            "lora.targets",
            "expected `all-linear` or at least one module name, found an empty list",
        )?;
        if let Some(Targets::Pattern(pattern)) = &lora.targets {
            let wrong = Regex::new(pattern).err().map(|error| {
                format!("`{pattern}` is neither `all-linear` nor a list nor a regular expression: {error}")
            });
            check.that(wrong.is_none(), "lora.targets", &wrong.unwrap_or_default())?;
        }
    }

    check.that(
        !data.train.is_empty(),
        "data.train",
        "missing: expected at least one data set with a `path`",
    )?;
    let mut names = BTreeSet::new();
    for (i, set) in data.train.iter().enumerate() {
        let field = |key: &str| format!("data.train.{i}.{key}");
        check.that(
            !set.path.as_os_str().is_empty(),
            &field("path"),
            "missing: expected a file or a BEIR folder",
        )?;
        check.that(set.samples != Some(0), &field("samples"), "expected at least 1 row, found 0")?;
        check.above_0(&field("weight"), set.weight)?;
        if let (Some(kind), Some(given)) = (set.kind, set.loss) {
            let wrong = given.misfit(kind);
            check.that(wrong.is_none(), &field("loss"), &wrong.unwrap_or_default())?;
        }
        check.that(
            set.name.is_empty() || names.insert(&set.name),
            &field("name"),
            &format!("`{}` is the name of an earlier data set too", set.name),
        )?;
    }

    check.above_0("loss.temperature", loss.temperature)?;
    check.that(
        loss.in_batch_negatives || !loss.symmetric,
        "loss.symmetric",
        "expected false where loss.in_batch_negatives is false: a positive looks for its query among those of the batch",
    )?;
    if let Some(margin) = loss.false_negative_margin {
        check.that(
            margin.is_finite(),
            "loss.false_negative_margin",
            "expected a number, a difference of cosines",
        )?;
    }

    check.not_negative("loss.margin", loss.margin)?;
    check.above_0("loss.scale", loss.scale)?;
    check.above_0("loss.teacher_temperature", loss.teacher_temperature)?;
    if let Some(Matryoshka { dims, weights }) = &loss.matryoshka {
        check.that(!dims.is_empty(), "loss.matryoshka.dims", "missing: expected a list of widths")?;
        for (i, &dim) in dims.iter().enumerate() {
            let field = format!("loss.matryoshka.dims.{i}");
            check.at_least_1(&field, dim as u64)?;
            check.that(!dims[..i].contains(&dim), &field, &format!("{dim} is in the list twice"))?;
        }
        if let Some(weights) = weights {
            check.that(
                weights.len() == dims.len(),
                "loss.matryoshka.weights",
                &format!("{} weights for {} widths", weights.len(), dims.len()),
            )?;
            for (i, &weight) in weights.iter().enumerate() {
                check.above_0(&format!("loss.matryoshka.weights.{i}"), weight)?;
            }
        }
    }

    check.at_least_1("training.epochs", training.epochs)?;
    check.that(training.max_steps != Some(0), "training.max_steps", "expected at least 1, found 0")?;
    check.at_least_1("training.batch_size", training.batch_size as u64)?;
    check.that(training.chunk_tokens != Some(0), "training.chunk_tokens", "expected at least 1, found 0")?;
    check.that(training.chunk_size != Some(0), "training.chunk_size", "expected at least 1, found 0")?;
    check.that(
        training.chunk_tokens.is_none() || training.chunk_size.is_none(),
        "training.chunk_size",
        "expected either this or training.chunk_tokens, found both",
    )?;
    check.not_negative("training.learning_rate", training.learning_rate)?;
    check.that(
        training.warmup_ratio.is_none() || training.warmup_steps.is_none(),
        "training.warmup_steps",
        "expected either this or training.warmup_ratio, found both",
    )?;
    if let Some(ratio) = training.warmup_ratio {
        check.that(
            (0.0..=1.0).contains(&ratio),
            "training.warmup_ratio",
            &format!("expected a share from 0 to 1, found {ratio}"),
        )?;
    }
    check.not_negative("training.weight_decay", training.weight_decay)?;
    check.share("training.betas.0", training.betas.0)?;
    check.share("training.betas.1", training.betas.1)?;
    check.above_0("training.epsilon", training.epsilon)?;
    check.not_negative("training.max_grad_norm", training.max_grad_norm)?;
    check.at_least_1("training.max_nonfinite", training.max_nonfinite)?;

    let mut names = BTreeSet::new();
    for (i, set) in evaluation.sets.iter().enumerate() {
        let field = |key: &str| format!("evaluation.sets.{i}.{key}");
        check.that(
            !set.path.as_os_str().is_empty(),
            &field("path"),
            "missing: expected a folder or a file",
        )?;
        check.that(
            set.name.is_empty() || names.insert(&set.name),
            &field("name"),
            &format!(
                "`{}` is the name of an earlier set too: their metrics could not be told apart",
                set.name
            ),
        )?;
    }
    check.that(!evaluation.metric.is_empty(), "evaluation.metric", "expected a metric, as cosine_ndcg@10")?;
    check.that(
        evaluation.patience != Some(0),
        "evaluation.patience",
        "expected at least 1 evaluation, found 0",
    )?;
    check.that(
        checkpoint.every != Interval::Steps(0),
        "checkpoint.every",
        "expected a number of steps from 1, or `epoch`, found 0",
    )?;
    check.at_least_1("checkpoint.keep", checkpoint.keep as u64)?;
    check.at_least_1("logging.every", logging.every)
}

struct Check<'a> {
    config: &'a Config,
}

impl Check<'_> {
    fn that(&self, holds: bool, field: &str, message: &str) -> Result<()> {
        if holds { Ok(()) } else { Err(self.config.error(field, message)) }
    }

    fn at_least_1(&self, field: &str, value: u64) -> Result<()> {
        self.that(value >= 1, field, "expected at least 1, found 0")
    }

    fn above_0(&self, field: &str, value: f64) -> Result<()> {
        self.that(
            value > 0.0 && value.is_finite(),
            field,
            &format!("expected a number above 0, found {value}"),
        )
    }

    fn not_negative(&self, field: &str, value: f64) -> Result<()> {
        self.that(value >= 0.0 && value.is_finite(), field, &format!("expected 0 or above, found {value}"))
    }

    fn share(&self, field: &str, value: f64) -> Result<()> {
        self.that(
            (0.0..1.0).contains(&value),
            field,
            &format!("expected 0 or above and below 1, found {value}"),
        )
    }
}
