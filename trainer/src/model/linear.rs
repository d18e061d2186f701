//! A linear layer, frozen or trained, with or without a LoRA adapter: `y = x Wᵀ + b + (α/r)·drop(x) Aᵀ Bᵀ`
//! (Hu et al. 2021; names and initialisation as in PEFT).

use std::ops::Range;

use candle_core::Tensor;
use kernels::{linear, lora};

use super::params::{Gradients, Parameter, Visit};
use super::pass::Pass;
use crate::Result;

/// `y = x Wᵀ + b`, and an adapter beside it if one is attached.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Parameter,       // (O, I)
    bias: Option<Parameter>, // (O)
    adapter: Option<Adapter>,
    /// The site of its dropout, distinct among all linears of the model.
    site: u32,
}

/// The low-rank addition to a linear layer.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// (R, I)
    pub a: Parameter,
    /// (O, R)
    pub b: Parameter,
    /// α/r, or α/√r with rsLoRA.
    pub scale: f32,
    /// Of the adapter's input.
    pub dropout: f32,
}

/// What the backward pass needs besides the input: `drop(x) Aᵀ` (T, R) where there is an adapter.
#[derive(Debug)]
pub struct Tape(Option<Tensor>);

impl Linear {
    /// A layer without an adapter. `site` numbers its dropout.
    pub fn new(weight: Tensor, bias: Option<Tensor>, site: u32) -> Self {
        Self { weight: Parameter::frozen(weight), bias: bias.map(Parameter::frozen), adapter: None, site }
    }

    /// (O, I).
    pub fn shape(&self) -> Result<(usize, usize)> {
        Ok(self.weight.value().dims2()?)
    }

    /// Some of its outputs, as a layer of their own: query, key and value of a checkpoint that has one weight for them. Its
    /// adapter shares A, and with it the dropout, with the other parts'.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let adapter = |adapter: &Adapter| {
            let b = adapter.b.rows(rows.clone())?;
            Ok::<_, crate::Error>(Adapter { b, ..adapter.clone() })
        };
        Ok(Self {
            weight: self.weight.rows(rows.clone())?,
            bias: self.bias.as_ref().map(|bias| bias.rows(rows.clone())).transpose()?,
            adapter: self.adapter.as_ref().map(adapter).transpose()?,
            site: self.site,
        })
    }

    /// Puts an adapter beside the weight, which stays frozen.
    pub fn attach(&mut self, adapter: Adapter) {
        self.adapter = Some(adapter);
    }

    /// The adapter, if any.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// x (T, I) → y (T, O).
    pub fn forward(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, Tape)> {
        let bias = self.bias.as_ref().map(|bias| pass.value(bias)).transpose()?;
        let y = linear::forward(x, &pass.value(&self.weight)?, bias.as_ref())?;
        let reduced = match &self.adapter {
            Some(adapter) => Some(lora::forward(x, &y, &self.low_rank(adapter, pass), pass.packing)?),
            None => None,
        };
        Ok((pass.round(y)?, Tape(reduced)))
    }

    /// dy (T, O) → dx (T, I), added to `into` where other layers share the input, and the gradients of what is trained. `x` and `dy`
    /// must not change until the gradients are settled.
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

    /// The gradients of what is trained here. The adapter's share of dx is added to `dx`; none where nothing below is
    /// trained.
    pub fn backward_parameters(
        &self,
        x: &Tensor,
        Tape(reduced): &Tape,
        dy: &Tensor,
        dx: Option<&Tensor>,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()> {
        if let Some(dw) = gradients.of(&self.weight)? {
            let (x, dy) = (x.clone(), dy.clone());
            gradients.later(move || Ok(linear::backward_weight(&x, &dy, &dw)?))?;
        }
        if let Some(bias) = &self.bias
            && let Some(db) = gradients.of(bias)?
        {
            let dy = dy.clone();
            gradients.later(move || Ok(linear::backward_bias(&dy, &db)?))?;
        }
        if let (Some(adapter), Some(reduced)) = (&self.adapter, reduced)
            && let (Some(da), Some(db)) = (gradients.of(&adapter.a)?, gradients.of(&adapter.b)?)
        {
            let low_rank = self.low_rank(adapter, pass);
            lora::backward(x, reduced, dy, &low_rank, pass.packing, dx, &da, &db)?;
        }
        Ok(())
    }

    /// `W + (α/r)·B A`: the layer without its adapter, for a model that is exported whole.
    pub fn merged(&self) -> Result<Tensor> {
        match &self.adapter {
            None => Ok(self.weight.value().clone()),
            Some(Adapter { a, b, scale, .. }) => {
                let delta = (b.value().matmul(a.value())? * f64::from(*scale))?;
                Ok((self.weight.value() + delta)?)
            }
        }
    }

    /// Its parameters under `name`.
    pub fn visit(&mut self, name: &str, visit: &mut dyn Visit) -> Result<()> {
        visit.parameter(&format!("{name}.weight"), &mut self.weight)?;
        if let Some(bias) = &mut self.bias {
            visit.parameter(&format!("{name}.bias"), bias)?;
        }
        if let Some(adapter) = &mut self.adapter {
            visit.parameter(&format!("{name}.lora_A.weight"), &mut adapter.a)?;
            visit.parameter(&format!("{name}.lora_B.weight"), &mut adapter.b)?;
        }
        Ok(())
    }

    fn low_rank<'a>(&self, adapter: &'a Adapter, pass: &Pass) -> lora::Adapter<'a> {
        lora::Adapter {
            a: adapter.a.value(),
            b: adapter.b.value(),
            scale: adapter.scale,
            dropout: pass.dropout(adapter.dropout, self.site),
        }
    }
}
