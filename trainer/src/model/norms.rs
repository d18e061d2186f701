//! Norms with their parameters: layer norm, as encoders have it, and RMS norm, as decoders have it.

use candle_core::{DType, Tensor};
use kernels::norm;

use super::params::{Gradients, Parameter, Visit};
use super::pass::Pass;
use super::weights::{Init, Weights};
use crate::Result;

/// `y = (x − mean) / deviation · w + b`.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Parameter,       // (D)
    bias: Option<Parameter>, // (D)
    epsilon: f64,
}

impl LayerNorm {
    /// Takes `{name}.weight` and, where it is `biased`, `{name}.bias`, of `width` elements each.
    pub fn new(weights: &Weights, name: &str, width: usize, epsilon: f64, biased: bool) -> Result<Self> {
        let bias = || weights.tensor(&format!("{name}.bias"), &[width], Init::Zeros);
        Ok(Self {
            weight: Parameter::frozen(weights.tensor(&format!("{name}.weight"), &[width], Init::Ones)?),
            bias: biased.then(bias).transpose()?.map(Parameter::frozen),
            epsilon,
        })
    }

    /// Of x + residual, both (T, D).
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

    /// What [`Self::forward`] returned, once more.
    pub fn again(&self, tape: &norm::Tape, pass: &Pass) -> Result<Tensor> {
        pass.round(norm::layer_norm_again(tape, &pass.value(&self.weight)?, self.bias(pass)?.as_ref())?)
    }

    /// dy (T, D) → dx (T, D). `dsum` is what reaches x + residual from elsewhere.
    pub fn backward(
        &self,
        tape: &norm::Tape,
        dy: &Tensor,
        dsum: Option<&Tensor>,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let dw = gradients.aside(&self.weight)?;
        let db = self.bias.as_ref().map(|bias| gradients.aside(bias)).transpose()?.flatten();
        let weight = pass.value(&self.weight)?;
        pass.round(norm::layer_norm_backward(tape, &weight, dy, dsum, dw.as_ref(), db.as_ref())?)
    }

    /// Whether any of it is trained.
    pub fn trained(&self) -> bool {
        self.weight.slot().is_some() || self.bias.as_ref().is_some_and(|bias| bias.slot().is_some())
    }

    /// Its parameters under `name`.
    pub fn visit(&mut self, name: &str, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter(&format!("{name}.weight"), &mut self.weight)?;
        match &mut self.bias {
            Some(bias) => visit.parameter(&format!("{name}.bias"), bias),
            None => Ok(()),
        }
    }

    fn bias(&self, pass: &Pass) -> Result<Option<Tensor>> {
        self.bias.as_ref().map(|bias| pass.value(bias)).transpose()
    }
}

/// `y = x / rms(x) · w`, or Gemma's `· (1 + w)`.
#[derive(Debug)]
pub struct Rms {
    weight: Parameter, // (D)
    epsilon: f64,
    /// Whether 1 is added to the weight.
    offset: bool,
}

impl Rms {
    /// Takes the weight `{name}.weight` of `width` elements.
    pub fn new(weights: &Weights, name: &str, width: usize, epsilon: f64, offset: bool) -> Result<Self> {
        let init = if offset { Init::Zeros } else { Init::Ones };
        let weight = weights.tensor(&format!("{name}.weight"), &[width], init)?;
        Ok(Self { weight: Parameter::frozen(weight), epsilon, offset })
    }

    /// Of x + residual, both (T, D).
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        pass: &Pass,
    ) -> Result<(Tensor, norm::Tape)> {
        let (y, tape) = norm::rms_norm(x, residual, &self.factor(pass)?, self.epsilon)?;
        Ok((pass.round(y)?, tape))
    }

    /// Of each head: x (T, H·K), the weight (K).
    pub fn forward_heads(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, norm::Tape)> {
        let (y, tape) = self.forward(&self.in_heads(x)?, None, pass)?;
        Ok((y.reshape(x.shape())?, tape))
    }

    /// What [`Self::forward`] returned, once more.
    pub fn again(&self, tape: &norm::Tape, pass: &Pass) -> Result<Tensor> {
        pass.round(norm::rms_norm_again(tape, &self.factor(pass)?)?)
    }

    /// What [`Self::forward_heads`] returned, once more.
    pub fn again_heads(&self, tape: &norm::Tape, pass: &Pass) -> Result<Tensor> {
        let (x, tokens) = (self.again(tape, pass)?, pass.packing.tokens());
        Ok(x.reshape((tokens, x.elem_count() / tokens.max(1)))?)
    }

    /// dy (T, D) → dx (T, D). `dsum` is what reaches x + residual from elsewhere.
    pub fn backward(
        &self,
        tape: &norm::Tape,
        dy: &Tensor,
        dsum: Option<&Tensor>,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let dw = gradients.aside(&self.weight)?;
        pass.round(norm::rms_norm_backward(tape, &self.factor(pass)?, dy, dsum, dw.as_ref())?)
    }

    /// Of [`Self::forward_heads`]: dy and dx (T, H·K).
    pub fn backward_heads(
        &self,
        tape: &norm::Tape,
        dy: &Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let dx = self.backward(tape, &self.in_heads(dy)?, None, pass, gradients)?;
        Ok(dx.reshape(dy.shape())?)
    }

    /// Whether its weight is trained.
    pub fn trained(&self) -> bool {
        self.weight.slot().is_some()
    }

    /// Its weight under `name`.
    pub fn visit(&mut self, name: &str, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter(&format!("{name}.weight"), &mut self.weight)
    }

    /// What x is multiplied by. 1 + w is f32, as in transformers: of a w near 0, a half would lose most digits.
    fn factor(&self, pass: &Pass) -> Result<Tensor> {
        let weight = pass.value(&self.weight)?;
        Ok(if self.offset { (weight.to_dtype(DType::F32)? + 1.0)? } else { weight })
    }

    /// (T, H·K) → (T·H, K), the same memory.
    fn in_heads(&self, x: &Tensor) -> Result<Tensor> {
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
    fn one_is_added_to_a_weight_of_a_half_in_f32() {
        let packing = Packing::new(&[], vec![]);
        let pass = Pass { packing: &packing, noise: None, precision: Precision::F32 };
        // 1 + w would be 1 in bf16.
        let w = 0.001_953_125f32;
        let weight = Tensor::new(&[w, -w], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let rms = Rms { weight: Parameter::frozen(weight), epsilon: 1e-6, offset: true };
        let factor = rms.factor(&pass).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(factor, [1.0 + w, 1.0 - w]);
    }
}
