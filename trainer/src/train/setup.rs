//! Builds a [`Stepper`] from the values of a configuration.

use crate::Result;
use crate::comm::World;
use crate::config;
use crate::loss::Losses;
use crate::model::Model;
use crate::model::params::Gradients;
use crate::train::gradcache::Budget;
use crate::train::optimizer::Optimizer;
use crate::train::schedule::LrSchedule;
use crate::train::step::Stepper;

/// The values of a configuration that decide what an optimizer step computes.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings<'a> {
    /// Optimizer and learning rate.
    pub training: &'a config::Training,
    /// The losses.
    pub loss: &'a config::Loss,
    /// Seed of dropout.
    pub seed: u64,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Size of the chunks, and memory for saved activations.
    pub budget: Budget,
}

impl<'a> Stepper<'a> {
    /// A stepper before the first step: gradients and moments are zero.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(model: &'a Model, settings: &StepSettings, world: World) -> Result<Self> {
        Ok(Self {
            model,
            gradients: Gradients::zeros(model.flat())?,
            optimizer: Optimizer::new(model.flat(), settings.training)?,
            losses: Losses::new(settings.loss, model.normalize()),
            schedule: LrSchedule::new(settings.training, settings.steps),
            budget: settings.budget,
            seed: settings.seed,
            world,
        })
    }
}
