//! LoRA adapters: which layers get one, where they begin, and reading PEFT's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use regex::Regex;
use serde_json::Value;

use super::bert::Bert;
use super::encoder::Encoder;
use super::folder::Folder;
use super::linear::Adapter;
use super::params::Parameter;
use super::{hub, weights};
use crate::config::{Lora, Targets};
use crate::{Error, Result};

/// How the adapters of a model are configured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Width between A and B.
    pub rank: usize,
    /// The adapter's product is scaled by alpha / rank.
    pub alpha: f64,
    /// On the adapter's input.
    pub dropout: f64,
    /// Whether the scale is alpha / √rank instead.
    pub rslora: bool,
}

/// PEFT's own.
impl Default for Settings {
    fn default() -> Self {
        Self { rank: 8, alpha: 8.0, dropout: 0.0, rslora: false }
    }
}

impl Settings {
    /// What `section` says, and of the rest the default.
    fn new(section: &Lora) -> Self {
        let Self { rank, alpha, dropout, rslora } = Self::default();
        Self {
            rank: section.rank.unwrap_or(rank),
            alpha: section.alpha.unwrap_or(alpha),
            dropout: section.dropout.unwrap_or(dropout),
            rslora: section.rslora.unwrap_or(rslora),
        }
    }

    /// Says so in a section of a configuration.
    pub fn write_into(self, section: &mut Lora) {
        let Self { rank, alpha, dropout, rslora } = self;
        (section.rank, section.alpha) = (Some(rank), Some(alpha));
        (section.dropout, section.rslora) = (Some(dropout), Some(rslora));
    }
}

/// An adapter of PEFT: its folder and its adapter_config.json.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    config: Value,
}

impl Source {
    /// The adapter that a model starts from: its folder's own, or the one that `lora.path` names; none begins anew.
    pub fn find(folder: &Folder, lora: Option<&Lora>) -> Result<Option<Self>> {
        let path = lora.and_then(|lora| lora.path.as_deref());
        match (&folder.adapter, path) {
            (None, None) => Ok(None),
            (Some(config), None) => Ok(Some(Self { path: folder.path.clone(), config: config.clone() })),
            (None, Some(path)) => Self::open(&hub::resolve_adapter(path)?).map(Some),
            (Some(_), Some(path)) => Err(Error::Usage(format!(
                "lora.path: `{path}` cannot be put on {}, which is an adapter itself\nhint: model.path names the base model, \
                 or lora.path is left out",
                folder.path.display()
            ))),
        }
    }

    fn open(path: &Path) -> Result<Self> {
        let place = path.join("adapter_config.json");
        let text = std::fs::read(&place).map_err(Error::read("read", &place))?;
        let config = serde_json::from_slice(&text)
            .map_err(|error| Error::file(&place, format!("malformed: {error}")))?;
        Ok(Self { path: path.to_owned(), config })
    }

    /// Puts the adapters beside their layers, and says how they were configured. `section` is what the run's
    /// configuration says of them.
    pub fn load(&self, encoder: &mut Encoder, section: Option<&Lora>) -> Result<Settings> {
        let path = self.path.join("adapter_model.safetensors");
        let mut tensors: BTreeMap<String, Tensor> = candle_core::safetensors::load(&path, &Device::Cpu)
            .map_err(|error| Error::file(&path, format!("cannot be read as safetensors: {error}")))?
            .into_iter()
            .collect();
        let own = settings(&self.path, &self.config)?;
        let own =
            Settings { dropout: section.and_then(|section| section.dropout).unwrap_or(own.dropout), ..own };
        let pooled = matches!(encoder, Encoder::Bert(_));
        let mut linears = encoder.linears();
        // Before a module's name stands the path of the model inside the classes that wrapped it: `base_model.model.`, with
        // another `model.` for a …ForCausalLM, `bert.` and the like.
        let known = |module: &str| {
            let before = |name: &str| module.strip_suffix(name).filter(|before| before.ends_with('.'));
            linears.iter().find_map(|(name, _)| before(name).map(str::to_owned))
        };
        let modules = || tensors.keys().filter_map(|name| name.strip_suffix(".lora_A.weight"));
        let prefix = modules().find_map(known).ok_or_else(|| {
            let first = modules().next().map_or_else(|| "no `….lora_A.weight`".to_owned(), |m| format!("`{m}`"));
            let (name, _) = &linears[0];
            let message = format!(
                "has {first}, and no linear layer of this model is called so; the first is `{name}`\nhint: an adapter \
                 belongs to the model that it was trained with"
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
                    return Err(Error::file(
                        &path,
                        format!("has only one half of `{prefix}{name}`'s adapter"),
                    ));
                }
            };
            let ((o, i), rank) = (linear.shape()?, own.rank);
            if a.dims() != [rank, i] || b.dims() != [o, rank] {
                let (a, b) = (a.dims(), b.dims());
                let message =
                    format!("`{name}` has A {a:?} and B {b:?}, expected [{rank}, {i}] and [{o}, {rank}]");
                return Err(Error::file(&path, message));
            }
            linear.attach(beside(own, a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?));
            adapted.insert(name.clone());
        }
        if pooled {
            // PEFT's `all-linear` means the pooler too, which no embedding goes through.
            let (pooler, count) = (format!("{prefix}{}", Bert::PASSTHROUGH), tensors.len());
            tensors.retain(|name, _| !name.starts_with(&pooler));
            if tensors.len() < count {
                tracing::info!(
                    "{}: the pooler's adapter is left out: no embedding goes through it",
                    path.display()
                );
            }
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::file(&path, format!("has `{name}`, for which this model has no place")));
        }
        let names: Vec<&str> = linears.iter().map(|(name, _)| name.as_str()).collect();
        if let Some(section) = section {
            self.agrees(own, section, &names, &adapted)?;
        }
        Ok(own)
    }

    /// Whether the run's section says nothing else than the adapter: but for the dropout it can only repeat that.
    fn agrees(
        &self,
        own: Settings,
        section: &Lora,
        names: &[&str],
        adapted: &BTreeSet<String>,
    ) -> Result<()> {
        let differs = |field: &str, value: String, own: String| {
            Err(Error::Usage(format!(
                "lora.{field} is {value}, but the adapter {} has {own}\nhint: leave it out, the adapter's own is taken",
                self.path.display()
            )))
        };
        if let Some(rank) = section.rank.filter(|&rank| rank != own.rank) {
            return differs("rank", rank.to_string(), own.rank.to_string());
        }
        if let Some(alpha) = section.alpha.filter(|&alpha| alpha != own.alpha) {
            return differs("alpha", alpha.to_string(), own.alpha.to_string());
        }
        if let Some(rslora) = section.rslora.filter(|&rslora| rslora != own.rslora) {
            return differs("rslora", rslora.to_string(), own.rslora.to_string());
        }
        if let Some(targets) = &section.targets {
            let targeted = targeted(targets, names)?;
            if targeted.iter().any(|name| !adapted.contains(*name)) || targeted.len() != adapted.len() {
                let counted = |n: usize| format!("for {n} layers");
                return differs("targets", counted(targeted.len()), counted(adapted.len()));
            }
        }
        Ok(())
    }
}

/// Puts new adapters beside the targeted layers: A uniform in ±1/√I, which is PEFT's Kaiming, B zero.
pub fn attach(encoder: &mut Encoder, section: &Lora, seed: u64) -> Result<Settings> {
    let own = Settings::new(section);
    let mut linears = encoder.linears();
    let names: Vec<String> = linears.iter().map(|(name, _)| name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let wanted = targeted(section.targets.as_ref().unwrap_or(&Targets::AllLinear), &names)?;
    for (name, linear) in linears.iter_mut().filter(|(name, _)| wanted.contains(name.as_str())) {
        let ((o, i), rank) = (linear.shape()?, own.rank);
        let limit = (i as f32).sqrt().recip();
        let a = weights::uniform(seed, &format!("{name}.lora_A.weight"), &[rank, i], limit)?;
        linear.attach(beside(own, a, Tensor::zeros((o, rank), DType::F32, &Device::Cpu)?));
    }
    Ok(own)
}

/// The folder of the weights: an adapter's base model, else the folder itself.
pub fn base(folder: &Folder) -> Result<PathBuf> {
    match &folder.adapter {
        Some(config) if !folder.path.join("model.safetensors").is_file() => {
            match config["base_model_name_or_path"].as_str() {
                Some(base) => hub::resolve_base(base),
                None => Err(Error::file(
                    folder.path.join("adapter_config.json"),
                    "lacks `base_model_name_or_path`, the model that the adapter belongs to",
                )),
            }
        }
        _ => Ok(folder.path.clone()),
    }
}

/// Refuses an adapter whose configuration this program does not read, before its tensors are there.
pub(super) fn check(folder: &Path) -> Result<()> {
    let source = Source::open(folder)?;
    settings(&source.path, &source.config).map(drop)
}

fn beside(lora: Settings, a: Tensor, b: Tensor) -> Adapter {
    let rank = lora.rank as f64;
    Adapter {
        a: Parameter::frozen(a),
        b: Parameter::frozen(b),
        scale: (lora.alpha / if lora.rslora { rank.sqrt() } else { rank }) as f32,
        dropout: lora.dropout as f32,
    }
}

/// Which of the linear layers `names` are meant.
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
            let meant = |name: &&&str| wanted.iter().any(|target| is(name, target));
            Ok(names.iter().filter(meant).copied().collect())
        }
        Targets::Pattern(pattern) => {
            // As PEFT, the whole name must match.
            let whole = Regex::new(&format!("^(?:{pattern})$"))
                .map_err(|error| Error::Usage(format!("lora.targets: {error}")))?;
            let meant: BTreeSet<_> = names.iter().filter(|name| whole.is_match(name)).copied().collect();
            if meant.is_empty() {
                return nothing(format!("has a name like `{pattern}`"));
            }
            Ok(meant)
        }
    }
}

/// PEFT's rule: the whole name, or its end after a dot.
fn is(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|before| before.ends_with('.'))
}

/// What adapter_config.json says. What would change the result and is not supported is refused; which layers are adapted the
/// tensors say.
fn settings(folder: &Path, config: &Value) -> Result<Settings> {
    let path = folder.join("adapter_config.json");
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
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "alora_invocation_tokens",
        "trainable_token_indices",
    ] {
        if !off(&config[name]) {
            return Err(wrong(format!("`{name}` is {}, which is not supported", config[name])));
        }
    }
    // The others take something off the base model's weights.
    if let Some(init) =
        config["init_lora_weights"].as_str().filter(|init| !["gaussian", "eva"].contains(init))
    {
        return Err(wrong(format!("`init_lora_weights` is `{init}`, which is not supported")));
    }
    let number = |name: &str| config[name].as_f64().filter(|number| number.is_finite());
    Ok(Settings {
        rank: config["r"]
            .as_u64()
            .filter(|&r| r > 0)
            .ok_or_else(|| wrong("lacks `r`, a whole number".to_owned()))? as usize,
        alpha: number("lora_alpha").ok_or_else(|| wrong("lacks `lora_alpha`, a number".to_owned()))?,
        dropout: number("lora_dropout").unwrap_or(0.0),
        rslora: config["use_rslora"].as_bool().unwrap_or(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = [
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.up_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    ];

    /// A golden adapter of BERT, with `more` among its tensors, on its model.
    fn load_with(more: &[&str]) -> Result<crate::model::Model> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/bert");
        let place = tempfile::tempdir().unwrap();
        let [config, weights] = ["adapter_config.json", "adapter_model.safetensors"];
        std::fs::copy(golden.join("adapter").join(config), place.path().join(config)).unwrap();
        let mut tensors =
            candle_core::safetensors::load(golden.join("adapter").join(weights), &Device::Cpu).unwrap();
        for name in more {
            let shape = if name.contains("lora_A") { (4, 32) } else { (32, 4) };
            tensors.insert((*name).to_owned(), Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap());
        }
        candle_core::safetensors::save(&tensors, place.path().join(weights)).unwrap();
        let lora = Lora { path: Some(place.path().to_str().unwrap().to_owned()), ..Lora::default() };
        let options = crate::model::Options { lora: Some(&lora), dry: true, ..Default::default() };
        crate::model::Model::open(Folder::open(&golden).unwrap(), &options)
    }

    #[test]
    fn the_poolers_adapter_is_left_out_and_nothing_else() {
        let named = |model: crate::model::Model| {
            model.adapters().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
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
        assert!(error.contains("`base_model.model.classifier.dense.lora_A.weight`, for which"), "{error}");
    }

    #[test]
    fn targets_are_chosen_as_peft_does() {
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
            (pattern("q_proj"), "no linear layer of this model has a name like `q_proj`"),
            (pattern("("), "lora.targets: regex parse error"),
        ] {
            let error = chosen(&targets).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
