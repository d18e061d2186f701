//! LoRA adapters of a model (Hu et al. 2021): new ones on the targeted layers, or those that PEFT has
//! written.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use regex::Regex;

use super::encoder::Encoder;
use super::folder::ModelFolder;
use super::linear::Adapter;
use super::params::{Parameter, ParameterKind};
use super::peft::{self, AdapterConfig, LoraConfig};
use super::{locate, weights};
use crate::config::{Lora, Targets};
use crate::{Error, Result};

/// Gives `encoder` the adapters that `section` asks for, or those of the folder, and returns their settings;
/// `None` if there are none.
///
/// An adapter of PEFT is that of the model folder, or the one that `lora.path` names.
///
/// # Errors
/// The adapter cannot be read, does not fit the model, or contradicts `section`; no layer is targeted.
pub fn add(
    encoder: &mut dyn Encoder,
    folder: &ModelFolder,
    section: Option<&Lora>,
    seed: u64,
) -> Result<Option<LoraConfig>> {
    match (saved_adapter(folder, section)?, section) {
        (Some(adapter), section) => attach_saved(&adapter, encoder, section).map(Some),
        (None, Some(section)) => attach_new(encoder, section, seed).map(Some),
        (None, None) => Ok(None),
    }
}

/// Finds the adapter that training starts from; `None` if there is none.
fn saved_adapter(folder: &ModelFolder, section: Option<&Lora>) -> Result<Option<AdapterConfig>> {
    let path = section.and_then(|section| section.path.as_deref());
    match (&folder.adapter, path) {
        (None, None) => Ok(None),
        (Some(adapter), None) => Ok(Some(adapter.clone())),
        (None, Some(path)) => locate::adapter(path).map(Some),
        (Some(_), Some(path)) => Err(Error::Usage(format!(
            "lora.path: `{path}` cannot be attached to {}, which is an adapter itself\n\
             hint: let model.path name the \
             base model, or leave out lora.path",
            folder.path.display()
        ))),
    }
}

/// Attaches an adapter that PEFT has written and returns its settings. `section` may change the dropout rate.
fn attach_saved(
    saved: &AdapterConfig,
    encoder: &mut dyn Encoder,
    section: Option<&Lora>,
) -> Result<LoraConfig> {
    let path = saved.folder().join(peft::WEIGHTS_FILE);
    let mut tensors: BTreeMap<String, Tensor> = candle_core::safetensors::load(&path, &Device::Cpu)
        .map_err(|error| Error::file(&path, format!("cannot be read as safetensors: {error}")))?
        .into_iter()
        .collect();
    let lora = saved.lora()?;
    let dropout = section.and_then(|section| section.dropout).unwrap_or(lora.dropout);
    let lora = LoraConfig { dropout, ..lora };
    let passthrough = encoder.config().passthrough();
    let mut linears = encoder.linears();
    // The classes that wrap a model put prefixes before the names of its modules: `base_model.model.`, then
    // another `model.` of a ...ForCausalLM, `bert.` and so on.
    let prefix_of = |module: &str| {
        let before = |name: &str| module.strip_suffix(name).filter(|before| before.ends_with('.'));
        linears.iter().find_map(|(name, _)| before(name).map(str::to_owned))
    };
    let modules = || tensors.keys().filter_map(|name| name.strip_suffix(".lora_A.weight"));
    let prefix = modules().find_map(prefix_of).ok_or_else(|| {
        let found = modules().next();
        let found = found.map_or_else(|| "no `….lora_A.weight`".to_owned(), |module| format!("`{module}`"));
        let (name, _) = &linears[0];
        let message = format!(
            "has {found}, but no linear layer of this model has that name; its first is `{name}`\n\
             hint: use the adapter \
             with the model that it was trained on"
        );
        Error::file(&path, message)
    })?;
    let mut adapted = BTreeSet::new();
    for (name, linear) in &mut linears {
        let mut take = |part: &str| tensors.remove(&format!("{prefix}{name}.{part}.weight"));
        let (a, b) = match (take("lora_A"), take("lora_B")) {
            (None, None) => continue,
            (Some(a), Some(b)) => (a, b),
            _ => {
                let message = format!("has only one of `lora_A` and `lora_B` of `{prefix}{name}`");
                return Err(Error::file(&path, message));
            }
        };
        let ((o, i), rank) = (linear.shape()?, lora.rank);
        if a.dims() != [rank, i] || b.dims() != [o, rank] {
            let (a, b) = (a.dims(), b.dims());
            let message =
                format!("`{name}` has A {a:?} and B {b:?}, expected [{rank}, {i}] and [{o}, {rank}]");
            return Err(Error::file(&path, message));
        }
        linear.attach(adapter(lora, a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?));
        adapted.insert(name.clone());
    }
    if let Some(passthrough) = passthrough {
        // PEFT's `all-linear` includes modules that embeddings do not depend on: BERT's pooler.
        let (module, count) = (format!("{prefix}{passthrough}"), tensors.len());
        tensors.retain(|name, _| !name.starts_with(&module));
        if tensors.len() < count {
            tracing::info!(
                "{}: the adapter of `{module}` is ignored: embeddings do not depend on it",
                path.display()
            );
        }
    }
    if let Some(name) = tensors.keys().next() {
        let message = format!("has `{name}`, but this model has no such layer");
        return Err(Error::file(&path, message));
    }
    let names: Vec<&str> = linears.iter().map(|(name, _)| name.as_str()).collect();
    if let Some(section) = section {
        check_section(saved, lora, section, &names, &adapted)?;
    }
    Ok(lora)
}

/// Refuses a section that contradicts the adapter.
fn check_section(
    saved: &AdapterConfig,
    lora: LoraConfig,
    section: &Lora,
    names: &[&str],
    adapted: &BTreeSet<String>,
) -> Result<()> {
    let differs = |field: &str, value: String, of_adapter: String| {
        Err(Error::Usage(format!(
            "lora.{field} is {value}, but the adapter {} has {of_adapter}\n\
             hint: leave it out, the adapter's value is \
             used",
            saved.folder().display()
        )))
    };
    if let Some(rank) = section.rank.filter(|&rank| rank != lora.rank) {
        return differs("rank", rank.to_string(), lora.rank.to_string());
    }
    if let Some(alpha) = section.alpha.filter(|&alpha| alpha != lora.alpha) {
        return differs("alpha", alpha.to_string(), lora.alpha.to_string());
    }
    if let Some(rslora) = section.rslora.filter(|&rslora| rslora != lora.rslora) {
        return differs("rslora", rslora.to_string(), lora.rslora.to_string());
    }
    if let Some(targets) = &section.targets {
        let targeted = targeted(targets, names)?;
        if targeted.iter().any(|name| !adapted.contains(*name)) || targeted.len() != adapted.len() {
            let layers = |n: usize| format!("for {n} layers");
            return differs("targets", layers(targeted.len()), layers(adapted.len()));
        }
    }
    Ok(())
}

/// Attaches new adapters to the targeted layers. As in PEFT, A is uniform in ±1/√I and B is zero.
fn attach_new(encoder: &mut dyn Encoder, section: &Lora, seed: u64) -> Result<LoraConfig> {
    let lora = LoraConfig::new(section);
    let mut linears = encoder.linears();
    let names: Vec<String> = linears.iter().map(|(name, _)| name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let wanted = targeted(section.targets.as_ref().unwrap_or(&Targets::AllLinear), &names)?;
    for (name, linear) in linears.iter_mut().filter(|(name, _)| wanted.contains(name.as_str())) {
        let ((o, i), rank) = (linear.shape()?, lora.rank);
        let limit = (i as f32).sqrt().recip();
        let a = weights::uniform(seed, &format!("{name}.lora_A.weight"), &[rank, i], limit)?;
        linear.attach(adapter(lora, a, Tensor::zeros((o, rank), DType::F32, &Device::Cpu)?));
    }
    Ok(lora)
}

fn adapter(lora: LoraConfig, a: Tensor, b: Tensor) -> Adapter {
    Adapter {
        a: Parameter::new(a, ParameterKind::Lora),
        b: Parameter::new(b, ParameterKind::Lora),
        scale: lora.scale(),
        dropout: lora.dropout as f32,
    }
}

/// The linear layers among `names` that `targets` selects.
fn targeted<'a>(targets: &Targets, names: &[&'a str]) -> Result<BTreeSet<&'a str>> {
    let nothing = |what: String| {
        let mut known: Vec<&str> = names.iter().filter_map(|name| name.rsplit('.').next()).collect();
        known.sort_unstable();
        known.dedup();
        let known = known.join(", ");
        Err(Error::Usage(format!("lora.targets: no linear layer of this model {what}; there are {known}")))
    };
    match targets {
        Targets::AllLinear => Ok(names.iter().copied().collect()),
        Targets::Names(wanted) => {
            if let Some(target) = wanted.iter().find(|target| !names.iter().any(|name| is(name, target))) {
                return nothing(format!("is called `{target}`"));
            }
            let selected = |name: &&&str| wanted.iter().any(|target| is(name, target));
            Ok(names.iter().filter(selected).copied().collect())
        }
        Targets::Pattern(pattern) => {
            // As in PEFT, the whole name must match.
            let whole = Regex::new(&format!("^(?:{pattern})$"))
                .map_err(|error| Error::Usage(format!("lora.targets: {error}")))?;
            let selected: BTreeSet<_> = names.iter().filter(|name| whole.is_match(name)).copied().collect();
            if selected.is_empty() {
                return nothing(format!("has a name that matches `{pattern}`"));
            }
            Ok(selected)
        }
    }
}

/// Whether `target` is the whole name, or its end after a dot, which is PEFT's rule.
fn is(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|before| before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const NAMES: [&str; 4] = [
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.up_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    ];

    /// Opens the golden BERT with its golden adapter, which has the tensors `more` in addition.
    fn load_with(more: &[&str]) -> Result<crate::model::Model> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert");
        let place = tempfile::tempdir().unwrap();
        let [config, weights] = [peft::CONFIG_FILE, peft::WEIGHTS_FILE];
        std::fs::copy(golden.join("adapter").join(config), place.path().join(config)).unwrap();
        let mut tensors =
            candle_core::safetensors::load(golden.join("adapter").join(weights), &Device::Cpu).unwrap();
        for name in more {
            let shape = if name.contains("lora_A") { (4, 32) } else { (32, 4) };
            tensors.insert((*name).to_owned(), Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap());
        }
        candle_core::safetensors::save(&tensors, place.path().join(weights)).unwrap();
        let lora = Lora { path: Some(place.path().to_str().unwrap().to_owned()), ..Lora::default() };
        let options = crate::model::Options { lora: Some(&lora), shapes_only: true, ..Default::default() };
        crate::model::Model::open(ModelFolder::open(&golden).unwrap(), &options)
    }

    #[test]
    fn only_the_poolers_adapter_is_ignored() {
        let named = |model: crate::model::Model| {
            model.adapter_tensors().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let dense = |module: &str| {
            ["lora_A", "lora_B"].map(|part| format!("base_model.model.{module}.dense.{part}.weight"))
        };
        let pooler = dense("pooler");
        let with = named(load_with(&pooler.each_ref().map(String::as_str)).unwrap());
        assert_eq!(with, named(load_with(&[]).unwrap()));
        assert_eq!(with.len(), 24);
        let head = dense("classifier");
        let error = load_with(&head.each_ref().map(String::as_str)).unwrap_err().to_string();
        assert!(
            error.contains(
                "`base_model.model.classifier.dense.lora_A.weight`, but this model has no such layer"
            ),
            "{error}"
        );
    }

    #[test]
    fn targets_are_selected_as_in_peft() {
        let chosen =
            |targets: &Targets| targeted(targets, &NAMES).map(|set| set.into_iter().collect::<Vec<_>>());
        assert_eq!(chosen(&Targets::AllLinear).unwrap().len(), 4);
        let names = |list: &[&str]| Targets::Names(list.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(chosen(&names(&["q_proj"])).unwrap(), [NAMES[0], NAMES[2]]);
        assert_eq!(chosen(&names(&["1.mlp.up_proj", NAMES[0]])).unwrap(), [NAMES[0], NAMES[3]]);
        let pattern = |text: &str| Targets::Pattern(text.to_owned());
        assert_eq!(chosen(&pattern(r".*\.1\..*_proj")).unwrap(), [NAMES[3], NAMES[2]]);
        for (targets, expected) in [
            (names(&["proj"]), "no linear layer of this model is called `proj`; there are q_proj, up_proj"),
            (pattern("q_proj"), "no linear layer of this model has a name that matches `q_proj`"),
            (pattern("("), "lora.targets: regex parse error"),
        ] {
            let error = chosen(&targets).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
