//! RoPE parameters of config.json, in both of its schemas: `rope_theta` with `rope_scaling`, and
//! `rope_parameters` of transformers 5, which may have an entry for each layer type.

use kernels::rope::Table;
use serde_json::{Map, Value};

use super::config_json::ConfigJson;
use crate::Result;

/// RoPE parameters of one layer type.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParameters {
    base: f64,
    scaling: Scaling,
}

/// Scaling of the frequencies, for texts longer than those of the pretraining.
#[derive(Clone, Debug, PartialEq)]
enum Scaling {
    /// Frequencies are not scaled.
    None,
    /// All frequencies are divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1: low frequencies are divided by `factor`, high ones are kept, those between are
    /// interpolated.
    Llama3 { factor: f64, low: f64, high: f64, positions: f64 },
}

/// Keys of config.json that hold the RoPE parameters of one layer type.
#[derive(Clone, Copy, Debug)]
pub struct RopeKeys {
    /// Key in a `rope_parameters` that has an entry for each layer type.
    pub layer_type: &'static str,
    /// Key of the base in the older schema.
    pub base: &'static str,
    /// Base if neither schema has one.
    pub default: f64,
    /// Whether `rope_scaling` of the older schema applies.
    pub scaled: bool,
}

impl RopeKeys {
    /// Keys of models whose layers all have the same RoPE.
    pub const DEFAULT: Self =
        Self { layer_type: "full_attention", base: "rope_theta", default: 10_000.0, scaled: true };
}

impl RopeParameters {
    /// Reads and checks the parameters at `keys`.
    ///
    /// # Errors
    /// A value is wrong, or a setting that changes the angles is not supported.
    pub fn read(json: &ConfigJson, keys: RopeKeys) -> Result<Self> {
        json.expect("partial_rotary_factor", 1.0)?;
        let object = |name: &str| match json.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(json.error(format!("`{name}` is {other}, expected an object"))),
        };
        let scaling = if keys.scaled { object("rope_scaling")? } else { None };
        let (name, own) = match (scaling, object("rope_parameters")?) {
            (Some(own), _) => ("rope_scaling", Some(own)),
            (None, Some(own)) if own.values().any(Value::is_object) => {
                ("rope_parameters", own.get(keys.layer_type).and_then(Value::as_object))
            }
            (None, own) => ("rope_parameters", own),
        };
        let fields = Fields { json, name, own };
        let base = match fields.number("rope_theta")? {
            Some(base) => base,
            None => json.number(keys.base, keys.default)?,
        };
        let rope_type = ["rope_type", "type"].iter().find_map(|key| own?.get(*key)).and_then(Value::as_str);
        let (scaling, known): (_, &[&str]) = match rope_type.unwrap_or("default") {
            "default" => (Scaling::None, &[]),
            "linear" => (Scaling::Linear { factor: fields.required("factor")? }, &["factor"]),
            "llama3" => (
                Scaling::Llama3 {
                    factor: fields.required("factor")?,
                    low: fields.required("low_freq_factor")?,
                    high: fields.required("high_freq_factor")?,
                    positions: fields.required("original_max_position_embeddings")?,
                },
                &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            ),
            other => {
                return Err(json.error(format!(
                    "`{name}.rope_type` is `{other}`, supported are default, linear, llama3"
                )));
            }
        };
        fields.only(known)?;
        Ok(Self { base, scaling })
    }

    /// Computes the cosines and sines of `positions` positions, for heads of `head_dim` elements.
    pub fn table(&self, positions: usize, head_dim: usize) -> Table {
        let frequency = |i: usize| self.base.powf(-(2.0 * i as f64) / head_dim as f64);
        let frequencies: Vec<f64> = (0..head_dim / 2).map(|i| self.scale(frequency(i))).collect();
        Table::from_frequencies(positions, &frequencies)
    }

    fn scale(&self, frequency: f64) -> f64 {
        match self.scaling {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low, high, positions } => {
                // Number of waves in the longest text of the pretraining.
                let waves = positions * frequency / std::f64::consts::TAU;
                let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }
}

/// The object of config.json that holds the parameters.
struct Fields<'a> {
    json: &'a ConfigJson,
    name: &'static str,
    own: Option<&'a Map<String, Value>>,
}

impl Fields<'_> {
    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.own.and_then(|own| own.get(key)).filter(|value| !value.is_null()) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.is_finite() && *number > 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(self
                    .json
                    .error(format!("`{}.{key}` is {value}, expected a number above 0", self.name))),
            },
        }
    }

    fn required(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.json.error(format!("`{}` lacks `{key}`, a number", self.name)))
    }

    /// Refuses keys that change the angles and are not `known`.
    fn only(&self, known: &[&str]) -> Result<()> {
        for (key, value) in self.own.into_iter().flatten() {
            let harmless = ["rope_type", "type", "rope_theta"].contains(&key.as_str())
                || value.is_null()
                || (key == "partial_rotary_factor" && value.as_f64() == Some(1.0));
            if !harmless && !known.contains(&key.as_str()) {
                return Err(self
                    .json
                    .error(format!("`{}.{key}` is {value}, which is not supported", self.name)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn read(fields: Value) -> Result<RopeParameters> {
        RopeParameters::read(&ConfigJson::new(Path::new("m"), fields), RopeKeys::DEFAULT)
    }

    #[test]
    fn both_schemas_are_read_alike() {
        let plain = RopeParameters { base: 5e5, scaling: Scaling::None };
        assert_eq!(read(json!({"rope_theta": 5e5})).unwrap(), plain);
        assert_eq!(
            read(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000}})).unwrap(),
            plain
        );
        let nested = json!({"rope_parameters":
            {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1.0}}});
        assert_eq!(read(nested).unwrap(), plain);
        assert_eq!(read(json!({})).unwrap().base, 1e4);
        let llama = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"});
        let mut flat = llama.clone();
        flat["rope_theta"] = 5e5.into();
        let older = read(json!({"rope_theta": 5e5, "rope_scaling": llama})).unwrap();
        assert_eq!(older, read(json!({"rope_parameters": flat})).unwrap());
        assert_ne!(older, plain);
        let linear = read(json!({"rope_scaling": {"type": "linear", "factor": 4}})).unwrap();
        assert_eq!(linear.scaling, Scaling::Linear { factor: 4.0 });
    }

    #[test]
    fn unsupported_settings_are_named() {
        for (fields, expected) in [
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4}}),
                "`rope_scaling.rope_type` is `yarn`",
            ),
            (
                json!({"rope_parameters": {"rope_theta": 1e4, "beta_fast": 3}}),
                "`rope_parameters.beta_fast` is 3",
            ),
            (json!({"rope_scaling": {"type": "linear"}}), "`rope_scaling` lacks `factor`"),
            (json!({"rope_theta": "big"}), "`rope_theta` is \"big\""),
            (json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` is 0.5"),
            (json!({"rope_parameters": 3}), "`rope_parameters` is 3"),
        ] {
            let error = read(fields).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn llama_3_keeps_high_frequencies_and_scales_low_ones() {
        let rope = RopeParameters {
            base: 1e4,
            scaling: Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, positions: 64.0 },
        };
        let unit = std::f64::consts::TAU / 64.0;
        assert_eq!(rope.scale(5.0 * unit), 5.0 * unit);
        assert_eq!(rope.scale(0.5 * unit), 0.5 * unit / 8.0);
        let middle = rope.scale(2.5 * unit) / (2.5 * unit);
        assert!((middle - (0.5 + 0.5 / 8.0)).abs() < 1e-12, "{middle}");
    }
}
