//! What config.json says of rotary positions, in both of its spellings: `rope_theta` with `rope_scaling`, and transformers
//! 5's `rope_parameters`, flat or by the kind of layer.

use kernels::rope::Table;
use serde_json::{Map, Value};

use super::settings::Settings;
use crate::Result;

/// The rotary positions of one kind of layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    base: f64,
    scaling: Scaling,
}

/// How angles are stretched for texts longer than those of the pretraining.
#[derive(Clone, Debug, PartialEq)]
enum Scaling {
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: long waves are divided by `factor`, short ones kept, those between blended.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        positions: f64,
    },
}

/// Where the positions of a kind of layer stand in config.json.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its key in a `rope_parameters` that tells kinds of layers apart.
    pub kind: &'static str,
    /// The older spelling of its base.
    pub base: &'static str,
    /// The base where neither is there.
    pub default: f64,
    /// Whether the older `rope_scaling` is about it.
    pub scaled: bool,
}

impl Place {
    /// Of models whose layers have the same positions.
    pub const ALL: Self =
        Self { kind: "full_attention", base: "rope_theta", default: 10_000.0, scaled: true };
}

impl Rotary {
    /// Reads and checks what stands at `place`.
    pub fn read(settings: &Settings, place: Place) -> Result<Self> {
        settings.expect("partial_rotary_factor", 1.0)?;
        let object = |name: &str| match settings.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(settings.wrong(format!("`{name}` is {other}, expected an object"))),
        };
        let scaling = if place.scaled { object("rope_scaling")? } else { None };
        let (name, own) = match (scaling, object("rope_parameters")?) {
            (Some(own), _) => ("rope_scaling", Some(own)),
            (None, Some(own)) if own.values().any(Value::is_object) => {
                ("rope_parameters", own.get(place.kind).and_then(Value::as_object))
            }
            (None, own) => ("rope_parameters", own),
        };
        let fields = Fields { settings, name, own };
        let base = match fields.number("rope_theta")? {
            Some(base) => base,
            None => settings.number(place.base, place.default)?,
        };
        let kind = ["rope_type", "type"].iter().find_map(|key| own?.get(*key)).and_then(Value::as_str);
        let (scaling, known): (_, &[&str]) = match kind.unwrap_or("default") {
            "default" => (Scaling::None, &[]),
            "linear" => (Scaling::Linear { factor: fields.needed("factor")? }, &["factor"]),
            "llama3" => (
                Scaling::Llama3 {
                    factor: fields.needed("factor")?,
                    low: fields.needed("low_freq_factor")?,
                    high: fields.needed("high_freq_factor")?,
                    positions: fields.needed("original_max_position_embeddings")?,
                },
                &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            ),
            other => {
                return Err(settings.wrong(format!(
                    "`{name}.rope_type` is `{other}`, supported are default, linear, llama3"
                )));
            }
        };
        fields.only(known)?;
        Ok(Self { base, scaling })
    }

    /// Angles of `positions` positions, for heads of `head_width`.
    pub fn table(&self, positions: usize, head_width: usize) -> Table {
        let frequency = |i: usize| self.base.powf(-(2.0 * i as f64) / head_width as f64);
        let frequencies: Vec<f64> = (0..head_width / 2).map(|i| self.scaled(frequency(i))).collect();
        Table::of(positions, &frequencies)
    }

    fn scaled(&self, frequency: f64) -> f64 {
        match self.scaling {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low, high, positions } => {
                // Waves in the texts of the pretraining: fewer than `low` is a long wave, more than `high` a short one.
                let waves = positions * frequency / std::f64::consts::TAU;
                let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }
}

/// The object that describes the positions.
struct Fields<'a> {
    settings: &'a Settings,
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
                    .settings
                    .wrong(format!("`{}.{key}` is {value}, expected a number above 0", self.name))),
            },
        }
    }

    fn needed(&self, key: &str) -> Result<f64> {
        self.number(key)?
            .ok_or_else(|| self.settings.wrong(format!("`{}` lacks `{key}`, a number", self.name)))
    }

    /// Refuses what would change the angles and is not `known`.
    fn only(&self, known: &[&str]) -> Result<()> {
        for (key, value) in self.own.into_iter().flatten() {
            let harmless = ["rope_type", "type", "rope_theta"].contains(&key.as_str())
                || value.is_null()
                || (key == "partial_rotary_factor" && value.as_f64() == Some(1.0));
            if !harmless && !known.contains(&key.as_str()) {
                return Err(self
                    .settings
                    .wrong(format!("`{}.{key}` is {value}, which is not supported", self.name)));
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

    fn read(fields: Value) -> Result<Rotary> {
        Rotary::read(&Settings::new(Path::new("m"), fields), Place::ALL)
    }

    #[test]
    fn both_spellings_say_the_same() {
        let plain = Rotary { base: 5e5, scaling: Scaling::None };
        assert_eq!(read(json!({"rope_theta": 5e5})).unwrap(), plain);
        assert_eq!(
            read(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000}})).unwrap(),
            plain
        );
        let nested = json!({"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1.0}}});
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
    fn what_is_not_supported_is_named() {
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
    fn llama_3_keeps_short_waves_and_stretches_long_ones() {
        let rotary = Rotary {
            base: 1e4,
            scaling: Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, positions: 64.0 },
        };
        let turn = std::f64::consts::TAU / 64.0;
        assert_eq!(rotary.scaled(5.0 * turn), 5.0 * turn);
        assert_eq!(rotary.scaled(0.5 * turn), 0.5 * turn / 8.0);
        let middle = rotary.scaled(2.5 * turn) / (2.5 * turn);
        assert!((middle - (0.5 + 0.5 / 8.0)).abs() < 1e-12, "{middle}");
    }
}
