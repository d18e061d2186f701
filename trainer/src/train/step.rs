//! One optimizer step: the numerics and nothing else.

use candle_core::{DType, Tensor};

use crate::Result;
use crate::comm::World;
use crate::data::batch::Batch;
use crate::loss::Losses;
use crate::model::Model;
use crate::model::params::Gradients;
use crate::model::pass::DropoutKey;
use crate::train::gradcache::{self, Budget};
use crate::train::optimizer::Optimizer;
use crate::train::schedule::LrSchedule;

/// Model, optimizer and settings of a run: what an optimizer step needs besides its batch. [`Stepper::new`] builds it.
///
/// The example `train_in_memory` (`trainer/examples`) trains with it.
pub struct Stepper<'a> {
    /// The encoder, whose trained parameters are updated.
    pub model: &'a Model,
    /// Gradients of all trained parameters; each step zeroes them before its backward pass.
    pub gradients: Gradients,
    /// AdamW with its moments.
    pub optimizer: Optimizer,
    /// The losses.
    pub losses: Losses,
    /// The learning-rate schedule.
    pub schedule: LrSchedule,
    /// Size of the chunks, and memory for saved activations.
    pub budget: Budget,
    /// Seed of dropout.
    pub seed: u64,
    /// The ranks of the run.
    pub world: World,
}

/// The result of a step.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The loss of each row of the batch.
    pub losses: Vec<f32>,
    /// Mean of the losses.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Whether the parameters were updated. They are not if the loss or the norm is not finite.
    pub applied: bool,
}

impl Stepper<'_> {
    /// Does step `step`, counted from 1.
    ///
    /// # Errors
    /// There is not enough memory; another rank has failed.
    pub fn step(&mut self, batch: &Batch, step: u64) -> Result<Outcome> {
        let Self { model, gradients, optimizer, losses, schedule, budget, seed, world } = self;
        let dropout_key = Some(DropoutKey { seed: *seed, step: step as u32 });
        let rows = batch.rows.len();

        let share = world.partition(&batch.sequences);
        let local = share.of(world.rank());
        let (embeddings, encoded) = gradcache::encode(model, &batch.sequences, local, *budget, dropout_key)?;
        let embeddings = world.all_gather_rows(embeddings, &share)?; // (N, D)
        // The losses of this rank's rows (b), and their part of the gradient of the embeddings (N, D).
        let (local_losses, d) = losses.evaluate(&embeddings, &batch.tables, world.local_rows(rows))?;
        let losses = world.all_gather_tensor(local_losses)?; // (B)
        gradients.clear()?;
        encoded.backward(model, &world.reduce_scatter_rows(d, &share)?, gradients)?;
        world.all_reduce(gradients)?;

        let learning_rate = schedule.learning_rate(step);
        let norm = optimizer.step(model.flat(), gradients, &losses, step, learning_rate)?; // (1)

        // Everything up to here is queued; only this read waits for the GPU.
        let found = Tensor::cat(&[norm, losses.to_dtype(DType::F64)?], 0)?.to_vec1::<f64>()?; // (1 + B)
        let (grad_norm, losses) = (found[0], found[1..].iter().map(|&loss| loss as f32).collect());
        let loss = found[1..].iter().sum::<f64>() / rows as f64;
        let applied = loss.is_finite() && grad_norm.is_finite();
        Ok(Outcome { losses, loss, grad_norm, learning_rate, applied })
    }
}
