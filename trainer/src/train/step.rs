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

/// Model, optimizer and settings of a run, which make optimizer steps.
///
/// The example `train_in_memory` (`trainer/examples`) builds one and trains with it.
pub struct Stepper<'a> {
    /// The encoder, whose trained parameters change.
    pub model: &'a Model,
    /// Of all trained parameters; zeroed at the start of each step.
    pub gradients: Gradients,
    /// The moments.
    pub optimizer: Optimizer,
    /// What is minimised.
    pub losses: Losses,
    /// The learning rate.
    pub schedule: LrSchedule,
    /// How a batch is cut into chunks.
    pub budget: Budget,
    /// The seed of dropout.
    pub seed: u64,
    /// The ranks.
    pub world: World,
}

/// What a step has found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The loss of each row of the batch.
    pub losses: Vec<f32>,
    /// Their mean.
    pub loss: f64,
    /// The global norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// The rate that was used.
    pub learning_rate: f64,
    /// Whether the parameters were updated: not if the loss or the norm is not finite.
    pub applied: bool,
}

impl Stepper<'_> {
    /// Step `step`, counted from 1.
    pub fn step(&mut self, batch: &Batch, step: u64) -> Result<Outcome> {
        let Self { model, gradients, optimizer, losses, schedule, budget, seed, world } = self;
        let dropout_key = Some(DropoutKey { seed: *seed, step: step as u32 });
        let rows = batch.rows.len();

        let share = world.partition(&batch.sequences);
        let local = share.of(world.rank());
        let (embeddings, encoded) = gradcache::encode(model, &batch.sequences, local, *budget, dropout_key)?;
        let embeddings = world.all_gather_rows(embeddings, &share)?; // (N, D)
        let (losses, d) = losses.evaluate(&embeddings, &batch.tables, world.local_rows(rows))?; // (B of this rank), (N, D)
        let losses = world.all_gather_tensor(losses)?; // (B)
        gradients.clear()?;
        encoded.backward(model, &world.reduce_scatter_rows(d, &share)?, gradients)?;
        world.all_reduce(gradients)?;

        let learning_rate = schedule.learning_rate(step);
        let norm = optimizer.step(model.flat(), gradients, &losses, step, learning_rate)?; // (1)

        // All work is queued; here alone a GPU is waited for.
        let found = Tensor::cat(&[norm, losses.to_dtype(DType::F64)?], 0)?.to_vec1::<f64>()?; // (1 + B)
        let (grad_norm, losses) = (found[0], found[1..].iter().map(|&loss| loss as f32).collect());
        let loss = found[1..].iter().sum::<f64>() / rows as f64;
        let applied = loss.is_finite() && grad_norm.is_finite();
        Ok(Outcome { losses, loss, grad_norm, learning_rate, applied })
    }
}
