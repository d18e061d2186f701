//! Adapters of PEFT are loaded from a model folder or from `lora.path`, whatever class wrapped the model in
//! training.

use candle_core::Tensor;
use candle_core::safetensors::{load, save};
use tests::{golden, model_folder};
use trainer::config::{self, Lora, Targets};
use trainer::data::batch::Sequence;
use trainer::model::{Model, ModelFolder, Options};

fn open(lora: &Lora) -> trainer::Result<Model> {
    let folder = model_folder("mistral", false);
    let options =
        Options { model: config::Model::default(), lora: Some(lora), trained: true, ..Options::default() };
    Model::open(ModelFolder::open(folder.path()).unwrap(), &options)
}

fn embed(model: &Model) -> Vec<Vec<f32>> {
    let sequence = |n: u32| Sequence { ids: (3..3 + n).collect(), skip: 0 };
    model.embed(&[sequence(1), sequence(17), sequence(60)], 64).unwrap().to_vec2().unwrap()
}

fn at(path: &std::path::Path) -> Lora {
    Lora { path: Some(path.to_str().unwrap().to_owned()), ..Lora::default() }
}

/// Copies the golden adapter with renamed tensors and edited settings.
fn changed(rename: impl Fn(&str) -> String, edit: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let from = golden("mistral").join("adapter");
    let tensors = load(from.join("adapter_model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let renamed = tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
    save(&renamed, place.path().join("adapter_model.safetensors")).unwrap();
    let text = std::fs::read(from.join("adapter_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    config["base_model_name_or_path"] = golden("mistral").to_str().unwrap().into();
    edit(&mut config);
    std::fs::write(place.path().join("adapter_config.json"), config.to_string()).unwrap();
    place
}

#[test]
fn an_adapter_in_the_model_folder_or_of_lora_path_is_the_same() {
    let adapted = model_folder("mistral", true);
    let options = Options { trained: true, ..Options::default() };
    let in_folder = Model::open(ModelFolder::open(adapted.path()).unwrap(), &options).unwrap();
    let plain = changed(str::to_owned, |_| ());
    let named = open(&at(plain.path())).unwrap();
    assert_eq!(embed(&in_folder), embed(&named));
    assert_eq!(in_folder.flat().entries(), named.flat().entries());
    let same = |tensor: &Tensor| tensor.to_vec1::<f32>().unwrap();
    assert_eq!(same(in_folder.flat().values()), same(named.flat().values()));
    let lora = named.lora().unwrap();
    assert_eq!((lora.rank, lora.alpha), (4, 8.0));
}

#[test]
fn adapters_of_a_wrapped_model_are_found_by_their_modules() {
    let plain = changed(str::to_owned, |_| ());
    let causal = changed(|name| name.replace("base_model.model.", "base_model.model.model."), |_| ());
    assert_eq!(embed(&open(&at(plain.path())).unwrap()), embed(&open(&at(causal.path())).unwrap()));
}

#[test]
fn rslora_and_dropout_are_those_of_the_adapter() {
    let root = changed(str::to_owned, |config| {
        config["use_rslora"] = true.into();
        config["lora_dropout"] = 0.25.into();
    });
    let plain = changed(str::to_owned, |config| config["lora_alpha"] = 16.into());
    let model = open(&at(root.path())).unwrap();
    // 8/√4 = 16/4.
    assert_eq!(embed(&model), embed(&open(&at(plain.path())).unwrap()));
    assert_eq!(model.lora().unwrap().dropout, 0.25);
    let changed_dropout = Lora { dropout: Some(0.5), rank: Some(4), ..at(root.path()) };
    assert_eq!(open(&changed_dropout).unwrap().lora().unwrap().dropout, 0.5);
    // Also if it equals the default of a new adapter.
    let none = Lora { dropout: Some(0.0), ..at(root.path()) };
    assert_eq!(open(&none).unwrap().lora().unwrap().dropout, 0.0);
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let plain = changed(str::to_owned, |_| ());
    let named = |edit: &dyn Fn(&mut serde_json::Value)| changed(str::to_owned, edit);
    let dora = named(&|config| config["use_dora"] = true.into());
    let pissa = named(&|config| config["init_lora_weights"] = "pissa".into());
    let other = changed(|name| name.replace("layers.1.", "layers.7."), |_| ());
    let none = changed(|name| name.replace("_proj", "_x"), |_| ());
    for (lora, expected) in [
        (Lora { rank: Some(8), ..at(plain.path()) }, "lora.rank is 8, but the adapter"),
        (Lora { alpha: Some(16.0), ..at(plain.path()) }, "lora.alpha is 16, but the adapter"),
        (Lora { rslora: Some(true), ..at(plain.path()) }, "lora.rslora is true, but the adapter"),
        (Lora { rank: Some(16), ..at(plain.path()) }, "lora.rank is 16, but the adapter"),
        (
            Lora { targets: Some(Targets::Names(vec!["q_proj".into()])), ..at(plain.path()) },
            "lora.targets is for 2 layers",
        ),
        (at(dora.path()), "`use_dora` is true, which is not supported"),
        (at(pissa.path()), "`init_lora_weights` is `pissa`"),
        (at(other.path()), "but this model has no such layer"),
        (at(none.path()), "but no linear layer of this model has that name"),
        (at(&golden("bert")), "has no adapter_config.json"),
    ] {
        let error = open(&lora).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
