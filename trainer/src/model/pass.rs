//! Parameters of one pass through the encoder that every layer needs: packing, dropout, precision.

use candle_core::Tensor;
use kernels::Packing;
use kernels::dropout::{self, Dropout};
use kernels::precision::{self, Precision};

use super::params::Parameter;
use crate::Result;

/// One pass over one chunk, forward or backward.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Offsets of the chunk's sequences.
    pub packing: &'a Packing,
    /// Key of the dropout masks; `None` outside training, where nothing is dropped.
    pub dropout_key: Option<DropoutKey>,
    /// Precision that every op's result is rounded to.
    pub precision: Precision,
}

/// Key of a step's dropout masks. Masks are a pure function of it, so a pass can be repeated with the same
/// masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the optimizer step.
    pub step: u32,
}

/// Number of dropout sites that are reserved for each layer: site `n` of layer `l` has the number `l *
/// DROPOUT_SITES + n`.
pub const DROPOUT_SITES: u32 = 16;

impl Pass<'_> {
    /// Dropout of rate `p` at `site`; `None` where nothing is dropped.
    pub fn dropout_mask(&self, p: f32, site: u32) -> Option<Dropout> {
        let DropoutKey { seed, step } = self.dropout_key.filter(|_| p > 0.0)?;
        Some(Dropout { p, seed, step, site })
    }

    /// Rounds an activation, or the gradient of one, to the precision of this pass.
    pub fn round(&self, x: Tensor) -> Result<Tensor> {
        Ok(precision::round(x, self.precision)?)
    }

    /// Value of a parameter in the precision of this pass.
    pub fn value(&self, parameter: &Parameter) -> Result<Tensor> {
        let value = parameter.value().clone();
        if parameter.is_rounded() { Ok(value) } else { self.round(value) }
    }

    /// Applies dropout to x (T, D) in the forward pass, or the same mask to dx (T, D) in the backward pass.
    pub fn apply_dropout(&self, x: Tensor, p: f32, site: u32) -> Result<Tensor> {
        match self.dropout_mask(p, site) {
            Some(mask) => self.round(dropout::apply(&x, self.packing, &mask)?),
            None => Ok(x),
        }
    }
}

/// Which activations a forward pass saves for the backward pass, from fewest to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Saved {
    /// Nothing is saved: there is no backward pass, or it recomputes the whole forward pass.
    None,
    /// The input of each layer is saved. Backward recomputes the other activations of a layer, except its
    /// last matrix product: one saved float of an input replaces four times as many operations as one saved
    /// float inside a layer.
    LayerInputs,
    /// All results of matrix products and attention are saved. Norms and activation functions are still
    /// recomputed: each is one pass over memory.
    All,
}
