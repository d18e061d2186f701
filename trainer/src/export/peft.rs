//! Writes LoRA adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use candle_core::Tensor;
use serde_json::json;

use crate::Result;
use crate::model::peft::LoraConfig;
use crate::system::safetensors;

/// Prefix of module names: the two wrappers that PEFT puts around a model.
const PREFIX: &str = "base_model.model.";

/// Writes the adapters of the model `base` into `folder`. Their names are those of PEFT without its prefix:
/// `layers.0.self_attn.q_proj.lora_A.weight` (R, I), `….lora_B.weight` (O, R).
pub(super) fn write(
    folder: &Path,
    base: &str,
    lora: LoraConfig,
    adapters: Vec<(String, Tensor)>,
) -> Result<()> {
    // Whole paths: the name `dense` alone would also match the pooler, which has no adapter.
    let mut modules: Vec<_> = adapters
        .iter()
        .filter_map(|(name, _)| name.strip_suffix(".lora_A.weight"))
        .map(str::to_owned)
        .collect();
    modules.sort_unstable();
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let config = json!({
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": modules,
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": false,
        "use_rslora": lora.rslora,
    });
    super::write_json(&folder.join("adapter_config.json"), &config)?;
    let named: Vec<_> =
        adapters.into_iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect();
    safetensors::write(&folder.join("adapter_model.safetensors"), &named)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, safetensors::load};
    use serde_json::Value;

    use super::*;

    #[test]
    fn names_and_settings_are_those_of_peft() {
        let folder = tempfile::tempdir().unwrap();
        let zeros = |r: usize, c: usize| Tensor::zeros((r, c), DType::F32, &Device::Cpu).unwrap();
        let adapters = vec![
            ("layers.0.mlp.up_proj.lora_A.weight".to_owned(), zeros(2, 5)),
            ("layers.0.mlp.up_proj.lora_B.weight".to_owned(), zeros(7, 2)),
        ];
        let lora = LoraConfig { rank: 2, alpha: 32.0, dropout: 0.1, rslora: true };
        write(folder.path(), "org/name", lora, adapters).unwrap();
        let config: Value =
            serde_json::from_slice(&std::fs::read(folder.path().join("adapter_config.json")).unwrap())
                .unwrap();
        assert_eq!(config["target_modules"], json!(["layers.0.mlp.up_proj"]));
        assert_eq!(
            (&config["r"], &config["lora_alpha"], &config["use_rslora"]),
            (&json!(2), &json!(32), &json!(true))
        );
        assert_eq!(config["base_model_name_or_path"], "org/name");
        let back = load(folder.path().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(back["base_model.model.layers.0.mlp.up_proj.lora_A.weight"].dims(), [2, 5]);
        assert_eq!(back["base_model.model.layers.0.mlp.up_proj.lora_B.weight"].dims(), [7, 2]);
    }
}
