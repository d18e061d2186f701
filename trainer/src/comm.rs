//! The ranks of a run, as the step sees them: what it calls is the same for one rank and for many.
//!
//! Models, losses and kernels know nothing of ranks. A rank holds some of the batch's sequences and some of its rows; it
//! returns the *sum* of its rows' losses over the *global* row count, so gradients are summed over ranks and nothing is
//! scaled by their number.

use candle_core::Tensor;

use crate::Result;
use crate::model::params::Gradients;

/// The ranks of a run. This process is one of them.
#[derive(Clone, Debug)]
pub enum World {
    /// One rank: what is gathered or summed is already whole.
    Solo,
}

impl World {
    /// This process's number among the ranks.
    pub fn rank(&self) -> usize {
        match self {
            Self::Solo => 0,
        }
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        match self {
            Self::Solo => 1,
        }
    }

    /// The sequences of a batch that this rank encodes.
    pub fn share(&self, sequences: usize) -> Vec<usize> {
        match self {
            Self::Solo => (0..sequences).collect(),
        }
    }

    /// (N of this rank, D) in the order of [`World::share`] → (N, D) in the order of the batch, on every rank.
    pub fn gather(&self, embeddings: Tensor) -> Result<Tensor> {
        match self {
            Self::Solo => Ok(embeddings),
        }
    }

    /// (N, D) on every rank → the sum over ranks of the rows that this rank has encoded.
    pub fn scatter(&self, gradient: Tensor) -> Result<Tensor> {
        match self {
            Self::Solo => Ok(gradient),
        }
    }

    /// The sum over ranks, in place.
    pub fn sum(&self, _gradients: &Gradients) -> Result<()> {
        match self {
            Self::Solo => Ok(()),
        }
    }
}
