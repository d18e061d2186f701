//! `training`: the length of the run, its batches and the optimizer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::check::Check;
use crate::config::{Bytes, ScheduleKind};

/// Length of the run, batch and chunk sizes, and the optimizer (AdamW).
///
/// A batch is encoded in chunks (GradCache), so that its size is not limited by memory: `batch_size` is the number of rows that
/// compete in the loss, `chunk_tokens` what is in memory at once. There is no gradient accumulation to set.
///
/// ```yaml
/// training: {epochs: 3, batch_size: 256, learning_rate: 2.0e-5, warmup_ratio: 0.1}
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Training {
    /// Number of passes over the data.
    pub epochs: u64,
    /// Number of optimizer steps. It overrides `epochs`: the run ends earlier, or passes over the data again. Default: as many steps
    /// as `epochs` have.
    pub max_steps: Option<u64>,
    /// Number of rows per optimizer step, summed over ranks.
    pub batch_size: usize,
    /// Maximum number of tokens encoded at once; a longer text is encoded alone. Changes speed and memory, not the result.
    /// Default: 1,024 on a CPU, 16,384 on a GPU, fewer if memory is short.
    pub chunk_tokens: Option<usize>,
    /// Maximum number of texts encoded at once, instead of `chunk_tokens`. Default: unset.
    pub chunk_size: Option<usize>,
    /// Memory budget for saved activations: bytes, or an amount like `2GiB`. 0 recomputes every chunk. Changes speed and memory, not
    /// the result. Default: all free memory on a GPU; on a CPU max(512 MiB, 1.5 × the size of parameters, gradients and
    /// optimizer state).
    pub activation_memory: Option<Bytes>,
    /// Peak learning rate, reached at the end of the warm-up.
    pub learning_rate: f64,
    /// Learning rate after the warm-up.
    pub schedule: ScheduleKind,
    /// Warm-up as a fraction of all steps, in [0, 1]: the learning rate rises from 0 to its peak.
    /// Default: 0.1, unless `warmup_steps` is given.
    pub warmup_ratio: Option<f64>,
    /// Number of warm-up steps, instead of `warmup_ratio`. Default: unset.
    pub warmup_steps: Option<u64>,
    /// Weight decay of AdamW, decoupled from the gradient.
    pub weight_decay: f64,
    /// Apply weight decay to biases and norms too.
    pub decay_all: bool,
    /// Decay rates of AdamW's first and second moments, each in [0, 1).
    pub betas: (f64, f64),
    /// AdamW's term that avoids division by zero, above 0.
    pub epsilon: f64,
    /// Maximum norm of the gradient; a larger one is scaled down to it. 0 disables clipping.
    pub max_grad_norm: f64,
    /// The run fails after this number of consecutive steps whose loss or gradient is not finite. Such a step
    /// leaves the parameters unchanged.
    pub max_nonfinite: u64,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            epochs: 1,
            max_steps: None,
            batch_size: 64,
            chunk_tokens: None,
            chunk_size: None,
            activation_memory: None,
            learning_rate: 5e-5,
            schedule: ScheduleKind::Linear,
            warmup_ratio: None,
            warmup_steps: None,
            weight_decay: 0.01,
            decay_all: false,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            max_nonfinite: 1,
        }
    }
}

impl Training {
    /// `warmup_ratio`, if neither it nor `warmup_steps` is given.
    pub const WARMUP_RATIO: f64 = 0.1;

    /// Number of warm-up steps in a run of `total` steps: ceil(total × ratio), as in transformers.
    pub fn warmup(&self, total: u64) -> u64 {
        self.warmup_steps
            .unwrap_or_else(|| (total as f64 * self.warmup_ratio.unwrap_or(Self::WARMUP_RATIO)).ceil() as u64)
    }

    pub(in crate::config) fn check(&self, check: &Check) -> Result<()> {
        check.at_least_1("epochs", self.epochs)?;
        check.at_least_1("max_steps", self.max_steps.unwrap_or(1))?;
        check.at_least_1("batch_size", self.batch_size as u64)?;
        check.at_least_1("chunk_tokens", self.chunk_tokens.unwrap_or(1) as u64)?;
        check.at_least_1("chunk_size", self.chunk_size.unwrap_or(1) as u64)?;
        check.that(
            self.chunk_tokens.is_none() || self.chunk_size.is_none(),
            "chunk_size",
            "expected either this or training.chunk_tokens, found both",
        )?;
        check.non_negative("learning_rate", self.learning_rate)?;
        check.that(
            self.warmup_ratio.is_none() || self.warmup_steps.is_none(),
            "warmup_steps",
            "expected either this or training.warmup_ratio, found both",
        )?;
        let ratio = self.warmup_ratio.unwrap_or(0.0);
        let message = format!("expected a fraction from 0 to 1, found {ratio}");
        check.that((0.0..=1.0).contains(&ratio), "warmup_ratio", &message)?;
        check.non_negative("weight_decay", self.weight_decay)?;
        check.probability("betas.0", self.betas.0)?;
        check.probability("betas.1", self.betas.1)?;
        check.positive("epsilon", self.epsilon)?;
        check.non_negative("max_grad_norm", self.max_grad_norm)?;
        check.at_least_1("max_nonfinite", self.max_nonfinite)
    }
}
