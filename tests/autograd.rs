//! Compares a whole training step of a tiny BERT with candle's autograd in f64: the losses and the gradient
//! of each parameter.
//!
//! The reference encodes one sequence at a time and is composed of elementary ops of candle and candle-nn.
//! The fused ops of candle-nn cannot be used: they do not propagate gradients.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{Embedding, Linear, Module, loss, ops};
use serde_json::Value;
use tests::{golden, golden_json, is_zero, relative_error, tensors};
use trainer::data::batch::Batch;
use trainer::model::chunk::Limit;

use crate::gradcache::{batch, info_nce, model, step};

/// f32 against f64, through two layers, a temperature of 0.05 and the backward pass.
const TOLERANCE: f64 = 2e-5;

/// BERT with the weights of the checkpoint as variables of autograd.
struct Bert {
    weights: HashMap<String, Var>,
    config: Value,
}

impl Bert {
    fn weight(&self, name: &str) -> Tensor {
        self.weights[name].as_tensor().clone()
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap() as usize
    }

    fn lookup(&self, table: &str, ids: Vec<u32>) -> Result<Tensor> {
        let table = self.weight(&format!("embeddings.{table}_embeddings.weight"));
        let width = table.dims()[1];
        Embedding::new(table, width).forward(&Tensor::new(ids, &Device::Cpu)?)
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight(&format!("{name}.weight")), self.weight(&format!("{name}.bias")));
        Linear::new(weight, Some(bias)).forward(x)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let deviations = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = deviations.sqr()?.mean_keepdim(D::Minus1)?;
        let epsilon = self.config["layer_norm_eps"].as_f64().unwrap();
        let normed = deviations.broadcast_div(&(variance + epsilon)?.sqrt()?)?;
        let (weight, bias) = (self.weight(&format!("{name}.weight")), self.weight(&format!("{name}.bias")));
        normed.broadcast_mul(&weight)?.broadcast_add(&bias)
    }

    fn attention(&self, layer: &str, x: &Tensor) -> Result<Tensor> {
        let heads = self.size("num_attention_heads");
        let width = x.dims()[1] / heads;
        let [q, k, v] =
            ["query", "key", "value"].map(|name| self.linear(&format!("{layer}.attention.self.{name}"), x));
        let (q, k, v) = (q?, k?, v?);
        let head = |head: usize| {
            let of = |x: &Tensor| x.narrow(1, head * width, width)?.contiguous();
            let scores = (of(&q)?.matmul(&of(&k)?.t()?)? / (width as f64).sqrt())?;
            ops::softmax(&scores, D::Minus1)?.matmul(&of(&v)?)
        };
        Tensor::cat(&(0..heads).map(head).collect::<Result<Vec<_>>>()?, 1)
    }

    /// The normalised mean of the hidden states of one sequence, `(1, D)`.
    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let words = self.lookup("word", ids.to_vec())?;
        let positions = self.lookup("position", (0..ids.len() as u32).collect())?;
        let token_types = self.lookup("token_type", vec![0; ids.len()])?;
        let mut x = self.norm("embeddings.LayerNorm", &((words + positions)? + token_types)?)?;
        for layer in 0..self.size("num_hidden_layers") {
            let layer = format!("encoder.layer.{layer}");
            let o = self.linear(&format!("{layer}.attention.output.dense"), &self.attention(&layer, &x)?)?;
            x = self.norm(&format!("{layer}.attention.output.LayerNorm"), &(o + &x)?)?;
            let inner = self.linear(&format!("{layer}.intermediate.dense"), &x)?.gelu_erf()?;
            let y = self.linear(&format!("{layer}.output.dense"), &inner)?;
            x = self.norm(&format!("{layer}.output.LayerNorm"), &(y + &x)?)?;
        }
        let mean = x.mean_keepdim(0)?;
        mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)
    }

    /// The logits `(B, M)` of InfoNCE with in-batch negatives, and the columns of the positives `(B)`.
    fn logits(&self, batch: &Batch) -> Result<(Tensor, Tensor)> {
        let table = &batch.tables[0];
        let embeddings = |sequences: &[u32]| {
            let embed = |&n: &u32| self.embed(&batch.sequences[n as usize].ids);
            Tensor::cat(&sequences.iter().map(embed).collect::<Result<Vec<_>>>()?, 0)
        };
        let scores = embeddings(&table.queries)?.matmul(&embeddings(&table.candidates)?.t()?)?;
        let positives = Tensor::new(table.positives.as_slice(), &Device::Cpu)?;
        Ok(((scores / info_nce().temperature)?, positives))
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "autograd is the reference of this test")]
fn a_training_step_of_bert_equals_autograd() -> Result<()> {
    let (_folder, ours) = model("bert", false, 0.0);
    let batch = batch(0);
    let (losses, gradient) = step(&ours, &batch, Limit::Tokens(128), 0, &info_nce());

    let variable = |(name, weight): (String, Tensor)| {
        Ok::<_, candle_core::Error>((name, Var::from_tensor(&weight.to_dtype(DType::F64)?)?))
    };
    let bert = Bert {
        weights: tensors(&golden("bert").join("model.safetensors"))
            .into_iter()
            .map(variable)
            .collect::<Result<_>>()?,
        config: golden_json("bert", "config.json"),
    };
    let (logits, positives) = bert.logits(&batch)?;
    let log_likelihoods = ops::log_softmax(&logits, 1)?.gather(&positives.unsqueeze(1)?, 1)?;
    for (row, (got, want)) in losses.iter().zip(log_likelihoods.flatten_all()?.to_vec1::<f64>()?).enumerate()
    {
        let (got, want) = (f64::from(*got), -want);
        assert!((got - want).abs() < TOLERANCE * want.max(1.0), "row {row}: loss {got}, autograd {want}");
    }

    let store = loss::cross_entropy(&logits, &positives)?.backward()?;
    let mut compared = 0;
    for named in ours.flat().named(&gradient) {
        let (parameter, got) = named.unwrap();
        let want = store.get(bert.weights[&parameter].as_tensor()).unwrap().to_dtype(DType::F32)?;
        let error = relative_error(&got, &want);
        assert!(
            is_zero(&parameter, "bert") || error < TOLERANCE,
            "the gradient of {parameter} differs by {error:e}"
        );
        compared += 1;
    }
    // All weights of the checkpoint but the two of the pooler, which has no part in the embedding.
    assert_eq!(compared, bert.weights.len() - 2);
    Ok(())
}
