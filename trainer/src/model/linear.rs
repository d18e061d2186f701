//! Linear layer, frozen or trained, with an optional LoRA adapter: `y = x Wᵀ + b + (α/r)·dropout(x) Aᵀ Bᵀ`
//! (Hu et al. 2021). Names and initialisation are those of PEFT.

use std::ops::Range;

use candle_core::Tensor;
use kernels::{linear, lora};

use super::params::{Gradients, Parameter, ParameterKind, ParameterVisitor};
use super::pass::Pass;
use super::weights::{Init, Weights};
use crate::Result;

/// Linear layer `y = x Wᵀ + b` with an optional LoRA adapter.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Parameter,       // (O, I)
    bias: Option<Parameter>, // (O)
    adapter: Option<Adapter>,
    /// Site of the adapter's dropout, distinct among all linear layers of the model.
    dropout_site: u32,
}

/// LoRA adapter of a linear layer.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// A (R, I), `lora_A` in PEFT.
    pub a: Parameter,
    /// B (O, R), `lora_B` in PEFT.
    pub b: Parameter,
    /// Factor of the adapter's output: α/r, or α/√r with rsLoRA.
    pub scale: f32,
    /// Dropout rate of the adapter's input.
    pub dropout: f32,
}

/// Activation that the backward pass needs besides the input: `dropout(x) Aᵀ` (T, R) of a layer with an
/// adapter.
#[derive(Debug)]
pub struct Tape(Option<Tensor>);

impl Linear {
    /// Takes `{name}.weight` (O, I) and, if `biased`, `{name}.bias` (O). The layer has no adapter yet.
    ///
    /// # Errors
    /// The checkpoint lacks a tensor, or it has another shape.
    pub fn new(
        weights: &Weights,
        name: &str,
        (outputs, inputs): (usize, usize),
        biased: bool,
        dropout_site: u32,
    ) -> Result<Self> {
        let weight = weights.matrix(&format!("{name}.weight"), outputs, inputs)?;
        let bias = || weights.tensor(&format!("{name}.bias"), &[outputs], Init::Zeros);
        let bias = biased.then(bias).transpose()?;
        Ok(Self {
            weight: Parameter::new(weight, ParameterKind::Weight),
            bias: bias.map(|bias| Parameter::new(bias, ParameterKind::Bias)),
            adapter: None,
            dropout_site,
        })
    }

    /// Shape of the weight, (O, I).
    pub fn shape(&self) -> Result<(usize, usize)> {
        Ok(self.weight.value().dims2()?)
    }

    /// Returns the layer of some of the outputs: a checkpoint may have one weight for query, key and value.
    /// The parts share the memory, the adapter's A and its dropout mask.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let adapter = |adapter: &Adapter| {
            let b = adapter.b.rows(rows.clone())?;
            Ok::<_, crate::Error>(Adapter { b, ..adapter.clone() })
        };
        Ok(Self {
            weight: self.weight.rows(rows.clone())?,
            bias: self.bias.as_ref().map(|bias| bias.rows(rows.clone())).transpose()?,
            adapter: self.adapter.as_ref().map(adapter).transpose()?,
            dropout_site: self.dropout_site,
        })
    }

    /// Attaches an adapter.
    pub fn attach(&mut self, adapter: Adapter) {
        self.adapter = Some(adapter);
    }

    /// The attached adapter.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// Maps x (T, I) to y (T, O).
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, Tape)> {
        let bias = self.bias.as_ref().map(|bias| pass.value(bias)).transpose()?;
        let y = linear::forward(x, &pass.value(&self.weight)?, bias.as_ref())?;
        let reduced = match &self.adapter {
            Some(adapter) => Some(lora::forward(x, &y, &self.low_rank(adapter, pass), pass.packing)?),
            None => None,
        };
        Ok((pass.round(y)?, Tape(reduced)))
    }

    /// Maps dy (T, O) to dx (T, I) and adds the gradients of the trained parameters. dx is added to `into`,
    /// the dx of other layers with the same input. `x` and `dy` must not change until [`Gradients::flush`].
    pub fn backward(
        &self,
        x: &Tensor,
        tape: &Tape,
        dy: &Tensor,
        into: Option<Tensor>,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<Tensor> {
        let weight = pass.value(&self.weight)?;
        let dx = match into {
            None => linear::backward_input(dy, &weight)?,
            Some(dx) => linear::add_backward_input(dy, &weight, &dx).map(|()| dx)?,
        };
        self.backward_parameters(x, tape, dy, Some(&dx), pass, gradients)?;
        pass.round(dx)
    }

    /// Adds the gradients of the trained parameters, and the adapter's part of dx to `dx`, which is `None`
    /// where no layer below is trained.
    pub fn backward_parameters(
        &self,
        x: &Tensor,
        Tape(reduced): &Tape,
        dy: &Tensor,
        dx: Option<&Tensor>,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()> {
        if let Some(dw) = gradients.grad_slot(&self.weight)? {
            let (x, dy) = (x.clone(), dy.clone());
            gradients.defer(move || Ok(linear::backward_weight(&x, &dy, &dw)?))?;
        }
        if let Some(bias) = &self.bias
            && let Some(db) = gradients.grad_slot(bias)?
        {
            let dy = dy.clone();
            gradients.defer(move || Ok(linear::backward_bias(&dy, &db)?))?;
        }
        if let (Some(adapter), Some(reduced)) = (&self.adapter, reduced)
            && let (Some(da), Some(db)) = (gradients.grad_slot(&adapter.a)?, gradients.grad_slot(&adapter.b)?)
        {
            let low_rank = self.low_rank(adapter, pass);
            lora::backward(x, reduced, dy, &low_rank, pass.packing, dx, &da, &db)?;
        }
        Ok(())
    }

    /// Weight with the adapter merged into it, `W + (α/r)·B A` (O, I), for an export of the whole model.
    pub fn merged(&self) -> Result<Tensor> {
        match &self.adapter {
            None => Ok(self.weight.value().clone()),
            Some(Adapter { a, b, scale, .. }) => {
                let delta = (b.value().matmul(a.value())? * f64::from(*scale))?;
                Ok((self.weight.value() + delta)?)
            }
        }
    }

    /// Visits the parameters, whose names begin with `name`.
    pub fn visit(&mut self, name: &str, visitor: &mut dyn ParameterVisitor) -> Result<()> {
        visitor.parameter(&format!("{name}.weight"), &mut self.weight)?;
        if let Some(bias) = &mut self.bias {
            visitor.parameter(&format!("{name}.bias"), bias)?;
        }
        if let Some(adapter) = &mut self.adapter {
            visitor.parameter(&format!("{name}.lora_A.weight"), &mut adapter.a)?;
            visitor.parameter(&format!("{name}.lora_B.weight"), &mut adapter.b)?;
        }
        Ok(())
    }

    fn low_rank<'a>(&self, adapter: &'a Adapter, pass: &Pass) -> lora::Adapter<'a> {
        lora::Adapter {
            a: adapter.a.value(),
            b: adapter.b.value(),
            scale: adapter.scale,
            dropout: pass.dropout_mask(adapter.dropout, self.dropout_site),
        }
    }
}
