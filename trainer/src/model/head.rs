//! From hidden states to embeddings: pooling, the dense layers that some models have after it, the scaling to length 1.

use std::ops::Range;

use candle_core::{DType, Tensor};
use kernels::activation::{self, Activation};
use kernels::pool;

use super::folder;
use super::linear::{self, Linear};
use super::params::{Gradients, Visit};
use super::pass::Pass;
use super::weights::{Init, Weights};
use crate::Result;

/// What follows the encoder.
#[derive(Debug)]
pub struct Head {
    dense: Vec<Dense>,
    normalize: bool,
}

/// A `Dense` module of sentence-transformers: `y = f(x Wᵀ + b)`.
#[derive(Debug)]
struct Dense {
    /// Its folder, which is the beginning of its parameters' names.
    name: String,
    linear: Linear,
    function: folder::Function,
}

/// What the backward pass needs of a forward pass.
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
    /// Takes the weights of the folder's dense layers; `open` opens those of one.
    pub fn new(
        modules: &[folder::Dense],
        normalize: bool,
        open: impl Fn(&folder::Dense) -> Result<Weights>,
    ) -> Result<Self> {
        let dense = modules
            .iter()
            .map(|module| {
                let weights = open(module)?;
                let bias = || weights.tensor("linear.bias", &[module.outputs], Init::Zeros);
                let bias = module.bias.then(bias).transpose()?;
                let weight = weights.matrix("linear.weight", module.outputs, module.inputs)?;
                Ok(Dense {
                    name: module.name.clone(),
                    linear: Linear::new(weight, bias, 0),
                    function: module.function,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { dense, normalize })
    }

    /// Hidden states (T, D) and the rows of each sequence (N) → embeddings (N, D).
    pub fn forward(&self, x: &Tensor, spans: &[Range<usize>], pass: &Pass) -> Result<(Tensor, Tape)> {
        let plain = self.dense.is_empty();
        let (mut e, mut norms) = pool::forward(x, spans, self.normalize && plain)?;
        let mut dense = Vec::with_capacity(self.dense.len());
        for layer in &self.dense {
            let x = pass.round(e)?;
            let (before, linear) = layer.linear.forward(&x, pass)?;
            let y = pass.round(layer.function.forward(&before)?)?;
            dense.push(DenseTape { x, before, y: y.clone(), linear });
            e = y;
        }
        if self.normalize && !plain {
            (e, norms) = pool::forward(&e, &rows(spans.len()), true)?;
        }
        // A dense layer's result is of half precision; embeddings are f32 everywhere.
        let e = e.to_dtype(DType::F32)?;
        Ok((e.clone(), Tape { dense, embeddings: e, norms }))
    }

    /// d(embeddings) (N, D) → d(hidden states) (T, D) of `tokens` tokens, and the gradients of the dense layers.
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
            let dy = pass.round(layer.function.backward(&tape.before, &tape.y, &pass.round(d)?)?)?;
            d = layer.linear.backward(&tape.x, &tape.linear, &dy, None, pass, gradients)?;
            pooled = tape.x;
        }
        // Without the scaling lengths play no part.
        let (pooled, d) = (pooled.to_dtype(DType::F32)?, d.to_dtype(DType::F32)?);
        Ok(pool::backward(&pooled, &norms, spans, &d, tokens, false)?)
    }

    /// Parameters, each layer's under the name of its folder.
    pub fn visit(&mut self, visit: &mut dyn Visit) -> Result<()> {
        self.dense
            .iter_mut()
            .try_for_each(|dense| dense.linear.visit(&format!("{}.linear", dense.name), visit))
    }
}

impl folder::Function {
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

/// Every row a sequence of its own.
fn rows(count: usize) -> Vec<Range<usize>> {
    (0..count).map(|row| row..row + 1).collect()
}
