//! Head of the model, from hidden states to embeddings: pooling, optional dense layers, normalisation to
//! length 1.

use std::ops::Range;

use candle_core::{DType, Tensor};
use kernels::activation::{self, Activation};
use kernels::pool;

use super::folder::{self, DenseActivation};
use super::linear::{self, Linear};
use super::params::{Gradients, ParameterVisitor};
use super::pass::Pass;
use super::weights::Weights;
use crate::Result;

/// Pooling, dense layers and normalisation.
#[derive(Debug)]
pub struct Head {
    dense: Vec<Dense>,
    normalize: bool,
}

/// A `Dense` module of sentence-transformers: `y = f(x Wᵀ + b)`.
#[derive(Debug)]
struct Dense {
    /// Name of its folder, which is the prefix of its parameters' names.
    name: String,
    linear: Linear,
    activation: DenseActivation,
}

/// Activations that the backward pass needs.
#[derive(Debug)]
pub struct Tape {
    dense: Vec<DenseTape>,
    embeddings: Tensor, // (N, D)
    norms: Tensor,      // (N)
}

#[derive(Debug)]
struct DenseTape {
    x: Tensor,      // (N, I)
    before: Tensor, // (N, O)
    y: Tensor,      // (N, O)
    linear: linear::Tape,
}

impl Head {
    /// Takes the weights of the dense layers; `open` opens those of one module.
    pub fn new(
        modules: &[folder::Dense],
        normalize: bool,
        open: impl Fn(&folder::Dense) -> Result<Weights>,
    ) -> Result<Self> {
        let dense = modules
            .iter()
            .map(|module| {
                let shape = (module.outputs, module.inputs);
                Ok(Dense {
                    name: module.name.clone(),
                    linear: Linear::new(&open(module)?, "linear", shape, module.bias, 0)?,
                    activation: module.activation,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { dense, normalize })
    }

    /// Maps hidden states x (T, D) to embeddings (N, D), f32. `spans` (N) are the tokens of each sequence
    /// that are pooled.
    pub fn forward(&self, x: &Tensor, spans: &[Range<usize>], pass: &Pass) -> Result<(Tensor, Tape)> {
        let plain = self.dense.is_empty();
        let (mut e, mut norms) = pool::forward(x, spans, self.normalize && plain)?;
        let mut dense = Vec::with_capacity(self.dense.len());
        for layer in &self.dense {
            let x = pass.round(e)?;
            let (before, linear) = layer.linear.forward(&x, pass)?;
            let y = pass.round(layer.activation.forward(&before)?)?;
            dense.push(DenseTape { x, before, y: y.clone(), linear });
            e = y;
        }
        if self.normalize && !plain {
            (e, norms) = pool::forward(&e, &rows(spans.len()), true)?;
        }
        // The result of a dense layer may be in half precision, but embeddings are always f32.
        let e = e.to_dtype(DType::F32)?;
        Ok((e.clone(), Tape { dense, embeddings: e, norms }))
    }

    /// Maps d(embeddings) (N, D) to d(hidden states) (T, D), where T is `tokens`, and adds the gradients of
    /// the dense layers.
    pub fn backward(
        &self,
        tape: Tape,
        d: &Tensor,
        spans: &[Range<usize>],
        tokens: usize,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let Tape { dense, embeddings, norms } = tape;
        if dense.is_empty() {
            return Ok(pool::backward(&embeddings, &norms, spans, d, tokens, self.normalize)?);
        }
        let mut d = d.clone();
        if self.normalize {
            d = pool::backward(&embeddings, &norms, &rows(spans.len()), &d, spans.len(), true)?;
        }
        let mut pooled = embeddings;
        for (layer, tape) in self.dense.iter().zip(dense).rev() {
            let dy = pass.round(layer.activation.backward(&tape.before, &tape.y, &pass.round(d)?)?)?;
            d = layer.linear.backward(&tape.x, &tape.linear, &dy, None, pass, gradients)?;
            pooled = tape.x;
        }
        // `norms` are not used: here pooling does not normalise.
        let (pooled, d) = (pooled.to_dtype(DType::F32)?, d.to_dtype(DType::F32)?);
        Ok(pool::backward(&pooled, &norms, spans, &d, tokens, false)?)
    }

    /// Visits the parameters of the dense layers, whose names begin with that of their folder.
    pub fn visit(&mut self, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        self.dense
            .iter_mut()
            .try_for_each(|dense| dense.linear.visit(&format!("{}.linear", dense.name), visitor))
    }
}

impl DenseActivation {
    fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self.kernel() {
            Some(function) => Ok(activation::forward(x, function)?),
            None if self == Self::Tanh => Ok(x.tanh()?),
            None => Ok(x.clone()),
        }
    }

    fn backward(self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
        match self.kernel() {
            Some(function) => Ok(activation::backward(x, dy, function)?),
            None if self == Self::Tanh => Ok((dy * (1.0 - y.sqr()?)?)?),
            None => Ok(dy.clone()),
        }
    }

    fn kernel(self) -> Option<Activation> {
        match self {
            Self::Identity | Self::Tanh => None,
            Self::Gelu => Some(Activation::Gelu),
            Self::Relu => Some(Activation::Relu),
            Self::Silu => Some(Activation::Silu),
        }
    }
}

/// Ranges of one row each.
fn rows(count: usize) -> Vec<Range<usize>> {
    (0..count).map(|row| row..row + 1).collect()
}
