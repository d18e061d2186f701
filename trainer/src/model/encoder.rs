//! The interface of an encoder stack.
//!
//! A stack has its own module, which reads config.json ([`EncoderConfig`]), takes the weights
//! ([`EncoderConfig::build`]) and runs forward and backward ([`Encoder`]). `model/architecture.rs` lists the
//! stacks.

use std::any::Any;
use std::fmt;

use candle_core::Tensor;

use super::linear::Linear;
use super::params::{Gradients, ParameterVisitor};
use super::pass::{Pass, Saved};
use super::weights::Weights;
use crate::config::Pooling;
use crate::{Error, Result};

/// Maps token ids to hidden states, with a written backward pass.
pub trait Encoder: fmt::Debug + Send + Sync {
    /// The configuration that the encoder was built from.
    fn config(&self) -> &dyn EncoderConfig;

    /// Maps ids (T) to hidden states (T, D). The tape holds what `save` asks for; it is `None` for
    /// [`Saved::None`].
    fn forward(&self, ids: &Tensor, pass: &Pass, save: Saved) -> Result<(Tensor, Option<Tape>)>;

    /// Adds the gradients of all trained parameters, given those of the hidden states: dy (T, D).
    fn backward(
        &self,
        ids: &Tensor,
        tape: Tape,
        dy: Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()>;

    /// Visits all parameters, in the order of the checkpoint.
    fn visit(&mut self, visitor: &mut dyn ParameterVisitor) -> Result<()>;

    /// Lists all linear layers with their names in the checkpoint: the layers that LoRA can adapt.
    fn linears(&mut self) -> Vec<(String, &mut Linear)>;
}

/// The checked config.json of an encoder.
pub trait EncoderConfig: fmt::Debug + Send + Sync {
    /// Sizes that the rest of the program needs.
    fn sizes(&self) -> Sizes;

    /// Name of a tensor that every checkpoint has. What precedes it there (`bert.`, `model.`) precedes all
    /// names.
    fn anchor(&self) -> &'static str;

    /// Prefix of tensors that the encoder does not use but that an export keeps, such as BERT's pooler.
    fn passthrough(&self) -> Option<&'static str> {
        None
    }

    /// Pooling of a bare transformer, which has no modules.json.
    fn default_pooling(&self) -> Pooling {
        Pooling::Mean
    }

    /// Numbers of floats that the tape holds for each token.
    fn saved_floats(&self) -> SavedFloats;

    /// Takes the weights. RoPE angles are computed for texts of up to `max_length` tokens.
    fn build(self: Box<Self>, weights: &Weights, max_length: usize) -> Result<Box<dyn Encoder>>;
}

/// Sizes of an encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// V: rows of the table of token embeddings.
    pub vocab_size: usize,
    /// D: elements of a hidden state.
    pub hidden_size: usize,
    /// L: number of layers.
    pub layers: usize,
    /// Number of tokens of the longest text that has positions.
    pub max_positions: usize,
}

/// Numbers of floats that a tape holds for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedFloats {
    /// Floats that [`Saved::LayerInputs`] saves.
    pub layer_inputs: usize,
    /// Floats that [`Saved::All`] saves in addition.
    pub inside_layers: usize,
}

impl SavedFloats {
    /// Total for `save`.
    pub fn total(self, save: Saved) -> usize {
        match save {
            Saved::None => 0,
            Saved::LayerInputs => self.layer_inputs,
            Saved::All => self.layer_inputs + self.inside_layers,
        }
    }
}

/// Activations that an encoder saved in its forward pass. Their type depends on the stack.
#[derive(Debug)]
pub struct Tape(Box<dyn Any + Send>);

impl Tape {
    /// Wraps the tape of one encoder.
    pub fn new(tape: impl Any + Send) -> Self {
        Self(Box::new(tape))
    }

    /// Returns the tape of the encoder that made it.
    ///
    /// # Errors
    /// Another encoder made it, which is a bug.
    pub fn into_inner<T: Any>(self) -> Result<T> {
        let tape = self.0.downcast::<T>();
        tape.map(|tape| *tape).map_err(|_| Error::Bug("the tape is of another encoder".to_owned()))
    }
}
