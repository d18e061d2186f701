//! AdamW (Loshchilov & Hutter 2017) over the flat parameter buffer, with gradient clipping as in torch's `clip_grad_norm_`.

use candle_core::Tensor;
use kernels::adamw::{self, AdamW};

use crate::Result;
use crate::config::Training;
use crate::model::params::{FlatParameters, Gradients};

/// AdamW's moments and hyperparameters.
#[derive(Debug)]
pub struct Optimizer {
    /// (P) first moment.
    pub exp_avg: Tensor,
    /// (P) second moment.
    pub exp_avg_sq: Tensor,
    hyperparameters: AdamW,
    decayed: usize, // the first elements of the buffer, which weight decay applies to
    max_norm: Option<f64>,
}

impl Optimizer {
    /// Zero moments for the parameters `flat`, with the hyperparameters of `training`.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(flat: &FlatParameters, training: &Training) -> Result<Self> {
        let (beta1, beta2) = training.betas;
        Ok(Self {
            exp_avg: flat.zeros()?,
            exp_avg_sq: flat.zeros()?,
            hyperparameters: AdamW {
                learning_rate: training.learning_rate,
                beta1,
                beta2,
                epsilon: training.epsilon,
                weight_decay: training.weight_decay,
            },
            decayed: if training.decay_all { flat.len() } else { flat.decayed() },
            max_norm: Some(training.max_grad_norm).filter(|&norm| norm > 0.0),
        })
    }

    /// Updates the parameters from their gradients; returns the gradients' global norm (1), f64. If the norm or one of `losses`
    /// (B) is not finite, nothing is updated. `step` counts from 1.
    pub fn step(
        &mut self,
        flat: &FlatParameters,
        gradients: &Gradients,
        losses: &Tensor,
        step: u64,
        learning_rate: f64,
    ) -> Result<Tensor> {
        let clip = adamw::clip_grad_norm(gradients.flat(), losses, self.max_norm)?;
        self.hyperparameters.learning_rate = learning_rate;
        adamw::step(
            flat.values(),
            gradients.flat(),
            &self.exp_avg,
            &self.exp_avg_sq,
            self.decayed,
            step,
            &clip.scale,
            &self.hyperparameters,
        )?;
        Ok(clip.norm)
    }
}
