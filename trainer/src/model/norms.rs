//! Layer norm (Ba et al. 2016) and RMS norm (Zhang & Sennrich 2019) with their parameters.

use candle_core::{DType, Tensor};
use kernels::norm;

use super::params::{Gradients, Parameter, ParameterKind, ParameterVisitor};
use super::pass::Pass;
use super::weights::{Init, Weights};
use crate::Result;

/// Layer norm `y = (x − mean) / √(variance + ε) · w + b` with an optional bias.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Parameter,       // (D)
    bias: Option<Parameter>, // (D)
    epsilon: f64,
}

impl LayerNorm {
    /// Takes `{name}.weight` (D) and, if `biased`, `{name}.bias` (D), where D is `width`.
    pub fn new(weights: &Weights, name: &str, width: usize, epsilon: f64, biased: bool) -> Result<Self> {
        let bias = || weights.tensor(&format!("{name}.bias"), &[width], Init::Zeros);
        Ok(Self {
            weight: Parameter::new(
                weights.tensor(&format!("{name}.weight"), &[width], Init::Ones)?,
                ParameterKind::Norm,
            ),
            bias: biased.then(bias).transpose()?.map(|bias| Parameter::new(bias, ParameterKind::Norm)),
            epsilon,
        })
    }

    /// Normalises x + residual, both (T, D). The tape holds the sum.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        pass: &Pass,
    ) -> Result<(Tensor, norm::Tape)> {
        let (weight, bias) = (pass.value(&self.weight)?, self.bias(pass)?);
        let (y, tape) = norm::layer_norm(x, residual, &weight, bias.as_ref(), self.epsilon)?;
        Ok((pass.round(y)?, tape))
    }

    /// Recomputes the result of [`Self::forward`] from its tape.
    pub fn recompute(&self, tape: &norm::Tape, pass: &Pass) -> Result<Tensor> {
        pass.round(norm::layer_norm_recompute(tape, &pass.value(&self.weight)?, self.bias(pass)?.as_ref())?)
    }

    /// Maps dy (T, D) to d(x + residual) (T, D). `dsum` is added to it: the gradient of the sum from its
    /// other uses.
    pub fn backward(
        &self,
        tape: &norm::Tape,
        dy: &Tensor,
        dsum: Option<&Tensor>,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let dw = gradients.scratch_grad(&self.weight)?;
        let db = self.bias.as_ref().map(|bias| gradients.scratch_grad(bias)).transpose()?.flatten();
        let weight = pass.value(&self.weight)?;
        pass.round(norm::layer_norm_backward(tape, &weight, dy, dsum, dw.as_ref(), db.as_ref())?)
    }

    /// Whether the weight or the bias is trained.
    pub fn is_trained(&self) -> bool {
        self.weight.is_trained() || self.bias.as_ref().is_some_and(Parameter::is_trained)
    }

    /// Visits the parameters, whose names begin with `name`.
    pub fn visit(&mut self, name: &str, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        visitor.parameter(&format!("{name}.weight"), &mut self.weight)?;
        match &mut self.bias {
            Some(bias) => visitor.parameter(&format!("{name}.bias"), bias),
            None => Ok(()),
        }
    }

    fn bias(&self, pass: &Pass) -> Result<Option<Tensor>> {
        self.bias.as_ref().map(|bias| pass.value(bias)).transpose()
    }
}

/// RMS norm `y = x / √(mean(x²) + ε) · w`, or `· (1 + w)` as in Gemma.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Parameter, // (D)
    epsilon: f64,
    /// Whether 1 is added to the weight, as in Gemma.
    unit_offset: bool,
}

impl RmsNorm {
    /// Takes `{name}.weight` (D), where D is `width`.
    pub fn new(weights: &Weights, name: &str, width: usize, epsilon: f64, unit_offset: bool) -> Result<Self> {
        let init = if unit_offset { Init::Zeros } else { Init::Ones };
        let weight = weights.tensor(&format!("{name}.weight"), &[width], init)?;
        Ok(Self { weight: Parameter::new(weight, ParameterKind::Norm), epsilon, unit_offset })
    }

    /// Normalises x + residual, both (T, D). The tape holds the sum.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        pass: &Pass,
    ) -> Result<(Tensor, norm::Tape)> {
        let (y, tape) = norm::rms_norm(x, residual, &self.factor(pass)?, self.epsilon)?;
        Ok((pass.round(y)?, tape))
    }

    /// Normalises each head of x (T, H·K); the weight is (K).
    pub fn forward_heads(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, norm::Tape)> {
        let (y, tape) = self.forward(&self.split_heads(x)?, None, pass)?;
        Ok((y.reshape(x.shape())?, tape))
    }

    /// Recomputes the result of [`Self::forward`] from its tape.
    pub fn recompute(&self, tape: &norm::Tape, pass: &Pass) -> Result<Tensor> {
        pass.round(norm::rms_norm_recompute(tape, &self.factor(pass)?)?)
    }

    /// Recomputes the result of [`Self::forward_heads`] from its tape.
    pub fn recompute_heads(&self, tape: &norm::Tape, pass: &Pass) -> Result<Tensor> {
        let (x, tokens) = (self.recompute(tape, pass)?, pass.packing.tokens());
        Ok(x.reshape((tokens, x.elem_count() / tokens.max(1)))?)
    }

    /// Maps dy (T, D) to d(x + residual) (T, D). `dsum` is added to it: the gradient of the sum from its
    /// other uses.
    pub fn backward(
        &self,
        tape: &norm::Tape,
        dy: &Tensor,
        dsum: Option<&Tensor>,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let dw = gradients.scratch_grad(&self.weight)?;
        pass.round(norm::rms_norm_backward(tape, &self.factor(pass)?, dy, dsum, dw.as_ref())?)
    }

    /// Maps dy (T, H·K) to dx (T, H·K), for [`Self::forward_heads`].
    pub fn backward_heads(
        &self,
        tape: &norm::Tape,
        dy: &Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let dx = self.backward(tape, &self.split_heads(dy)?, None, pass, gradients)?;
        Ok(dx.reshape(dy.shape())?)
    }

    /// Whether the weight is trained.
    pub fn is_trained(&self) -> bool {
        self.weight.is_trained()
    }

    /// Visits the weight `{name}.weight`.
    pub fn visit(&mut self, name: &str, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        visitor.parameter(&format!("{name}.weight"), &mut self.weight)
    }

    /// Factor w or 1 + w (K). 1 + w is f32 as in transformers, because in half precision a small w would lose
    /// most of its digits.
    fn factor(&self, pass: &Pass) -> Result<Tensor> {
        let weight = pass.value(&self.weight)?;
        Ok(if self.unit_offset { (weight.to_dtype(DType::F32)? + 1.0)? } else { weight })
    }

    /// Views x (T, H·K) as (T·H, K).
    fn split_heads(&self, x: &Tensor) -> Result<Tensor> {
        let width = self.weight.value().elem_count();
        Ok(x.reshape((x.elem_count() / width, width))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use kernels::Packing;
    use kernels::precision::Precision;

    #[test]
    fn one_is_added_to_a_weight_in_half_precision_in_f32() {
        let packing = Packing::new(&[], vec![]);
        let pass = Pass { packing: &packing, dropout_key: None, precision: Precision::F32 };
        // 1 + w would be 1 in bf16.
        let w = 0.001_953_125f32;
        let weight = Tensor::new(&[w, -w], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let weight = Parameter::new(weight, ParameterKind::Norm);
        let rms = RmsNorm { weight, epsilon: 1e-6, unit_offset: true };
        let factor = rms.factor(&pass).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(factor, [1.0 + w, 1.0 - w]);
    }
}
