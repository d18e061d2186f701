//! AdamW (Loshchilov & Hutter 2017) over the flat buffer, with gradient clipping as in torch's `clip_grad_norm_`.

use candle_core::Tensor;
use kernels::adamw::{self, AdamW};

use crate::Result;
use crate::model::params::{FlatParameters, Gradients};

/// The moments, and how they are used.
#[derive(Debug)]
pub struct Optimizer {
    /// (P) first moment, `exp_avg`.
    pub exp_avg: Tensor,
    /// (P) second moment, `exp_avg_sq`.
    pub exp_avg_sq: Tensor,
    rule: AdamW,
    decayed: usize,
    max_norm: Option<f64>,
}

impl Optimizer {
    /// Zero moments. `decay_all` applies weight decay to biases and norms too; without `max_norm` nothing is clipped.
    pub fn new(flat: &FlatParameters, rule: AdamW, decay_all: bool, max_norm: Option<f64>) -> Result<Self> {
        let decayed = if decay_all { flat.len() } else { flat.decayed() };
        Ok(Self { exp_avg: flat.zeros()?, exp_avg_sq: flat.zeros()?, rule, decayed, max_norm })
    }

    /// Updates the parameters from their gradients; returns the gradients' global norm (1), f64. If it or one of `losses` (B) is not
    /// finite, nothing is updated. `step` counts from 1.
    pub fn step(
        &mut self,
        flat: &FlatParameters,
        gradients: &Gradients,
        losses: &Tensor,
        step: u64,
        rate: f64,
    ) -> Result<Tensor> {
        let clip = adamw::clip_grad_norm(gradients.flat(), losses, self.max_norm)?;
        self.rule.learning_rate = rate;
        adamw::step(
            flat.values(),
            gradients.flat(),
            &self.exp_avg,
            &self.exp_avg_sq,
            self.decayed,
            step,
            &clip.scale,
            &self.rule,
        )?;
        Ok(clip.norm)
    }
}
