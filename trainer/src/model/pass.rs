//! What every layer of one pass through the encoder must know.

use candle_core::Tensor;
use kernels::Packing;
use kernels::dropout::{self, Dropout};
use kernels::precision::{self, Precision};

use super::params::Parameter;
use crate::Result;

/// One pass over one chunk, forward or backward.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Where the sequences lie.
    pub packing: &'a Packing,
    /// Dropout's source; none outside training.
    pub noise: Option<Noise>,
    /// What goes from one op to the next is rounded to.
    pub precision: Precision,
}

/// Where a step's dropout masks come from. Nothing else decides them, so a pass can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u32,
}

/// Places in a layer that draw a mask of their own; a layer has fewer.
pub const SITES: u32 = 16;

impl Pass<'_> {
    /// The mask of rate `p` at `site`; none where nothing is dropped.
    pub fn dropout(&self, p: f32, site: u32) -> Option<Dropout> {
        let Noise { seed, step } = self.noise.filter(|_| p > 0.0)?;
        Some(Dropout { p, seed, step, site })
    }

    /// An activation, or a gradient of one, in the precision of this pass.
    pub fn round(&self, x: Tensor) -> Result<Tensor> {
        Ok(precision::round(x, self.precision)?)
    }

    /// A parameter's value in the precision of this pass. Most that are not trained have it already.
    pub fn value(&self, parameter: &Parameter) -> Result<Tensor> {
        let value = parameter.value().clone();
        if parameter.is_rounded() { Ok(value) } else { self.round(value) }
    }

    /// Dropout, forward on x and backward on dx: the same mask.
    pub fn drop(&self, x: Tensor, p: f32, site: u32) -> Result<Tensor> {
        match self.dropout(p, site) {
            Some(mask) => self.round(dropout::apply(&x, self.packing, &mask)?),
            None => Ok(x),
        }
    }
}

/// What a forward pass leaves for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// Nothing: no backward pass follows, or it starts with a forward pass of its own.
    Nothing,
    /// What goes from layer to layer: backward computes the rest of a layer again, all but its last product. A float a token spares
    /// four times the work here that it spares anywhere inside of a layer.
    Inputs,
    /// All that a matrix product or attention would have to compute again.
    Whole,
}
