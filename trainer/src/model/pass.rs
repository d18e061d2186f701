//! What every layer of one pass through the encoder must know.

use kernels::Packing;
use kernels::dropout::Dropout;

/// One pass over one chunk, forward or backward.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Where the sequences lie.
    pub packing: &'a Packing,
    /// Dropout's source; none outside training.
    pub noise: Option<Noise>,
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
