//! The families behind one face.

use candle_core::Tensor;

use super::bert::{self, Bert};
use super::decoder::{self, Decoder};
use super::linear::Linear;
use super::modernbert::{self, ModernBert};
use super::params::{Gradients, Visit};
use super::pass::{Keep, Pass};
use super::settings::Settings;
use super::weights::Weights;
use crate::Result;

/// An encoder of one of the supported families.
#[derive(Debug)]
pub enum Encoder {
    /// `BertModel` and its likes.
    Bert(Bert),
    /// `MistralModel` and its likes.
    Decoder(Decoder),
    /// `ModernBertModel`.
    ModernBert(ModernBert),
}

/// What the backward pass needs of a forward pass.
#[derive(Debug)]
pub enum Tape {
    /// Of [`Encoder::Bert`].
    Bert(bert::Tape),
    /// Of [`Encoder::Decoder`].
    Decoder(decoder::Tape),
    /// Of [`Encoder::ModernBert`].
    ModernBert(modernbert::Tape),
}

impl Encoder {
    /// Builds the family that config.json's `model_type` names; `weights` are opened by names that it has. `dropout` stands in
    /// for config.json's rates, `longest` is the longest text of the run.
    pub fn new(
        settings: &Settings,
        weights: impl FnOnce(&[&str]) -> Result<Weights>,
        dropout: Option<f32>,
        longest: usize,
    ) -> Result<(Self, Vec<(String, Tensor)>)> {
        let name = settings.get("model_type").and_then(|kind| kind.as_str());
        let supported = "bert, roberta, xlm-roberta, camembert, mpnet, distilbert, modernbert, mistral, llama, qwen2, qwen3, gemma3_text";
        let Some(name) = name else {
            return Err(settings.wrong(format!("lacks `model_type`; supported are {supported}")));
        };
        if let Some(family) = decoder::Family::named(name) {
            let shape = decoder::Shape::read(family, settings, dropout)?;
            let weights = weights(Decoder::ANCHORS)?;
            return Ok((Self::Decoder(Decoder::new(shape, &weights, longest)?), Vec::new()));
        }
        if let Some(family) = bert::Family::named(name) {
            let shape = bert::Shape::read(family, settings, dropout)?;
            let weights = weights(Bert::ANCHORS)?;
            return Ok((Self::Bert(Bert::new(shape, &weights)?), weights.passthrough(Bert::PASSTHROUGH)?));
        }
        if name == "modernbert" {
            let shape = modernbert::Shape::read(settings, dropout)?;
            let weights = weights(ModernBert::ANCHORS)?;
            return Ok((Self::ModernBert(ModernBert::new(shape, &weights, longest)?), Vec::new()));
        }
        Err(settings.wrong(format!("`model_type` is `{name}`, supported are {supported}")))
    }

    /// ids (T) → hidden states (T, D), and the tape if any of it is to be kept.
    pub fn forward(&self, ids: &Tensor, pass: &Pass, keep: Keep) -> Result<(Tensor, Option<Tape>)> {
        match self {
            Self::Bert(encoder) => {
                let (x, tape) = encoder.forward(ids, pass, keep)?;
                Ok((x, tape.map(Tape::Bert)))
            }
            Self::Decoder(encoder) => {
                let (x, tape) = encoder.forward(ids, pass, keep)?;
                Ok((x, tape.map(Tape::Decoder)))
            }
            Self::ModernBert(encoder) => {
                let (x, tape) = encoder.forward(ids, pass, keep)?;
                Ok((x, tape.map(Tape::ModernBert)))
            }
        }
    }

    /// d(hidden states) (T, D) → the gradients of everything trained.
    pub fn backward(
        &self,
        ids: &Tensor,
        tape: Tape,
        dx: Tensor,
        pass: &Pass,
        gradients: &Gradients,
    ) -> Result<()> {
        match (self, tape) {
            (Self::Bert(encoder), Tape::Bert(tape)) => encoder.backward(ids, tape, dx, pass, gradients),
            (Self::Decoder(encoder), Tape::Decoder(tape)) => encoder.backward(ids, tape, dx, pass, gradients),
            (Self::ModernBert(encoder), Tape::ModernBert(tape)) => {
                encoder.backward(ids, tape, dx, pass, gradients)
            }
            _ => Err(crate::Error::Bug("the tape is of another encoder".to_owned())),
        }
    }

    /// Parameters, in the order of the checkpoint.
    pub fn visit(&mut self, visit: &mut dyn Visit) -> Result<()> {
        match self {
            Self::Bert(encoder) => encoder.visit(visit),
            Self::Decoder(encoder) => encoder.visit(visit),
            Self::ModernBert(encoder) => encoder.visit(visit),
        }
    }

    /// Every linear layer with its name.
    pub fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        match self {
            Self::Bert(encoder) => encoder.linears(),
            Self::Decoder(encoder) => encoder.linears(),
            Self::ModernBert(encoder) => encoder.linears(),
        }
    }

    /// D.
    pub fn width(&self) -> usize {
        match self {
            Self::Bert(encoder) => encoder.width(),
            Self::Decoder(encoder) => encoder.width(),
            Self::ModernBert(encoder) => encoder.width(),
        }
    }

    /// P, the longest text that has positions.
    pub fn positions(&self) -> usize {
        match self {
            Self::Bert(encoder) => encoder.positions(),
            Self::Decoder(encoder) => encoder.positions(),
            Self::ModernBert(encoder) => encoder.positions(),
        }
    }

    /// V.
    pub fn vocabulary(&self) -> usize {
        match self {
            Self::Bert(encoder) => encoder.vocabulary(),
            Self::Decoder(encoder) => encoder.vocabulary(),
            Self::ModernBert(encoder) => encoder.vocabulary(),
        }
    }

    /// Bytes of tape that one token leaves.
    pub fn tape_bytes_per_token(&self, keep: Keep) -> usize {
        match self {
            Self::Bert(encoder) => encoder.tape_bytes_per_token(keep),
            Self::Decoder(encoder) => encoder.tape_bytes_per_token(keep),
            Self::ModernBert(encoder) => encoder.tape_bytes_per_token(keep),
        }
    }
}
