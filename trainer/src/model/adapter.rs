//! LoRA adapters: which layers get one, where they begin, and reading PEFT's.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::encoder::Encoder;
use super::folder::Folder;
use super::linear::Adapter;
use super::params::Parameter;
use super::{hub, weights};
use crate::config::{Lora, Targets};
use crate::{Error, Result};

/// Puts new adapters beside the targeted layers: A uniform in ±1/√I, which is PEFT's Kaiming, B zero.
pub fn attach(encoder: &mut Encoder, lora: &Lora, seed: u64) -> Result<()> {
    each(encoder, lora, |name, rank, (o, i)| {
        let limit = (i as f32).sqrt().recip();
        let a = weights::uniform(seed, &format!("{name}.lora_A.weight"), &[rank, i], limit)?;
        Ok((a, Tensor::zeros((o, rank), DType::F32, &Device::Cpu)?))
    })
}

/// Puts the adapters of a PEFT folder beside their layers, and says how they were configured.
pub fn load(encoder: &mut Encoder, folder: &Folder, config: &Value) -> Result<Lora> {
    let path = folder.path.join("adapter_model.safetensors");
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
        .map_err(|error| Error::file(&path, format!("cannot be read as safetensors: {error}")))?;
    let lora = settings(folder, config)?;
    // PEFT writes the path of the module inside the class that it wrapped: one more `model.` for a …ForCausalLM.
    let find = |name: &str| {
        ["base_model.model.", "base_model.model.model.", "base_model.model.bert."]
            .iter()
            .find_map(|prefix| tensors.get(&format!("{prefix}{name}")))
            .ok_or_else(|| Error::file(&path, format!("lacks `base_model.model.{name}`")))
    };
    each(encoder, &lora, |name, rank, (o, i)| {
        let (a, b) = (find(&format!("{name}.lora_A.weight"))?, find(&format!("{name}.lora_B.weight"))?);
        if a.dims() != [rank, i] || b.dims() != [o, rank] {
            let (a, b) = (a.dims(), b.dims());
            return Err(Error::file(
                &path,
                format!("`{name}` has A {a:?} and B {b:?}, expected [{rank}, {i}] and [{o}, {rank}]"),
            ));
        }
        Ok((a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?))
    })?;
    Ok(lora)
}

/// The folder of the weights: an adapter's base model, else the folder itself.
pub fn base(folder: &Folder) -> Result<PathBuf> {
    match &folder.adapter {
        Some(config) if !folder.path.join("model.safetensors").is_file() => {
            match config["base_model_name_or_path"].as_str() {
                Some(base) => hub::resolve(base),
                None => Err(Error::file(
                    folder.path.join("adapter_config.json"),
                    "lacks `base_model_name_or_path`, the model that the adapter belongs to",
                )),
            }
        }
        _ => Ok(folder.path.clone()),
    }
}

/// Attaches `make(name, rank, (O, I))` to every targeted layer.
fn each(
    encoder: &mut Encoder,
    lora: &Lora,
    mut make: impl FnMut(&str, usize, (usize, usize)) -> Result<(Tensor, Tensor)>,
) -> Result<()> {
    let rank = lora.rank as f64;
    let scale = lora.alpha / if lora.rslora { rank.sqrt() } else { rank };
    let mut linears = encoder.linears();
    if let Targets::Names(wanted) = &lora.targets {
        let unknown = wanted.iter().find(|target| !linears.iter().any(|(name, _)| is(name, target)));
        if let Some(target) = unknown {
            let mut known: Vec<&str> =
                linears.iter().filter_map(|(name, _)| name.rsplit('.').next()).collect();
            known.sort_unstable();
            known.dedup();
            return Err(Error::Usage(format!(
                "lora.targets: no linear layer of this model is called `{target}`; there are {}",
                known.join(", ")
            )));
        }
    }
    for (name, linear) in &mut linears {
        let targeted = match &lora.targets {
            Targets::AllLinear => true,
            Targets::Names(wanted) => wanted.iter().any(|target| is(name, target)),
        };
        if targeted {
            let (a, b) = make(name, lora.rank, linear.shape()?)?;
            linear.attach(Adapter {
                a: Parameter::frozen(a),
                b: Parameter::frozen(b),
                scale: scale as f32,
                dropout: lora.dropout as f32,
            });
        }
    }
    Ok(())
}

/// PEFT's rule: the whole name, or its end after a dot.
fn is(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|before| before.ends_with('.'))
}

/// adapter_config.json as a section of a configuration. What would change the result and is not supported is refused.
fn settings(folder: &Folder, config: &Value) -> Result<Lora> {
    let path = folder.path.join("adapter_config.json");
    let wrong = |message: String| Error::file(&path, message);
    if config["peft_type"].as_str() != Some("LORA") {
        return Err(wrong(format!("`peft_type` is {}, supported is LORA", config["peft_type"])));
    }
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text == "none",
        _ => false,
    };
    for name in [
        "use_dora",
        "bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "fan_in_fan_out",
    ] {
        if !off(&config[name]) {
            return Err(wrong(format!("`{name}` is {}, which is not supported", config[name])));
        }
    }
    let targets = match &config["target_modules"] {
        Value::String(all) if all == "all-linear" => Targets::AllLinear,
        Value::Array(names) => {
            Targets::Names(names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect())
        }
        other => {
            return Err(wrong(format!(
                "`target_modules` is {other}, expected a list of names or all-linear"
            )));
        }
    };
    Ok(Lora {
        rank: config["r"]
            .as_u64()
            .filter(|&r| r > 0)
            .ok_or_else(|| wrong("lacks `r`, a whole number".to_owned()))? as usize,
        alpha: config["lora_alpha"]
            .as_f64()
            .ok_or_else(|| wrong("lacks `lora_alpha`, a number".to_owned()))?,
        dropout: config["lora_dropout"].as_f64().unwrap_or(0.0),
        targets,
        rslora: config["use_rslora"].as_bool().unwrap_or(false),
    })
}
