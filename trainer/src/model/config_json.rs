//! Reads the fields of a model's config.json. A setting that changes the result is checked, never ignored.

use std::path::{Path, PathBuf};

use kernels::activation::Activation;
use serde_json::Value;

use crate::{Error, Result};

/// Fields of one config.json. Errors name the file, the field, its value and what was expected.
#[derive(Clone, Debug)]
pub struct ConfigJson {
    path: PathBuf,
    fields: Value,
}

impl ConfigJson {
    /// Takes the `fields` that were read from `folder`/config.json.
    pub fn new(folder: &Path, fields: Value) -> Self {
        Self { path: folder.join("config.json"), fields }
    }

    /// The field `name`, unless it is missing or null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// Whether a field is null, which transformers distinguishes from a missing one.
    pub fn is_null(&self, name: &str) -> bool {
        self.fields.get(name).is_some_and(Value::is_null)
    }

    /// Makes an error about this file.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::file(&self.path, message)
    }

    /// A whole number above 0. The field is required.
    pub fn size(&self, name: &str) -> Result<usize> {
        let value = self.get(name).ok_or_else(|| self.error(format!("lacks `{name}`, a whole number")))?;
        self.whole(name, value)
    }

    /// A whole number above 0, or `default`.
    pub fn size_or(&self, name: &str, default: usize) -> Result<usize> {
        self.get(name).map_or(Ok(default), |value| self.whole(name, value))
    }

    /// A whole number above 0, or `None` if the field is missing or null.
    pub fn optional_size(&self, name: &str) -> Result<Option<usize>> {
        self.get(name).map(|value| self.whole(name, value)).transpose()
    }

    /// A whole number that may be 0, or `default`.
    pub fn count(&self, name: &str, default: usize) -> Result<usize> {
        match self.get(name) {
            Some(Value::Number(number)) if number.as_u64() == Some(0) => Ok(0),
            _ => self.size_or(name, default),
        }
    }

    /// True or false, or `default`.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.error(format!("`{name}` is {other}, expected true or false"))),
        }
    }

    /// Whether layer `l` of `layers` has a sliding window, from `layer_types` or else from `default`.
    pub fn windowed(&self, l: usize, layers: usize, default: impl Fn(usize) -> bool) -> Result<bool> {
        let Some(types) = self.get("layer_types") else { return Ok(default(l)) };
        let types = types.as_array().map_or(&[][..], Vec::as_slice);
        if types.len() != layers {
            let found = types.len();
            return Err(self.error(format!("`layer_types` has {found} entries for {layers} layers")));
        }
        match types[l].as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(self.error(format!(
                "`layer_types` has {}, supported are full_attention, sliding_attention",
                types[l]
            ))),
        }
    }

    /// A finite number, or `default`.
    pub fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.error(format!("`{name}` is {value}, expected a number"))),
        }
    }

    /// A dropout rate, 0 ≤ p < 1, or `default`.
    pub fn rate(&self, name: &str, default: f64) -> Result<f32> {
        let rate = self.number(name, default)?;
        if (0.0..1.0).contains(&rate) {
            Ok(rate as f32)
        } else {
            Err(self.error(format!("`{name}` is {rate}, expected a rate of at least 0 and below 1")))
        }
    }

    /// An activation function by its name in transformers, or `default`.
    pub fn activation(&self, name: &str, default: &str) -> Result<Activation> {
        let expected = "supported are gelu, gelu_new, silu, relu";
        let name_of_function = match self.get(name) {
            None => default,
            Some(Value::String(function)) => function,
            Some(other) => return Err(self.error(format!("`{name}` is {other}, {expected}"))),
        };
        match name_of_function {
            "gelu" | "gelu_python" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate" => {
                Ok(Activation::GeluTanh)
            }
            "silu" | "swish" => Ok(Activation::Silu),
            "relu" => Ok(Activation::Relu),
            other => Err(self.error(format!("`{name}` is `{other}`, {expected}"))),
        }
    }

    /// Refuses any value but the one that is `supported`.
    pub fn expect(&self, name: &str, supported: impl Into<Value>) -> Result<()> {
        let supported = supported.into();
        let same = |value: &Value| match (value.as_f64(), supported.as_f64()) {
            (Some(value), Some(supported)) => value == supported,
            _ => *value == supported,
        };
        match self.get(name) {
            Some(value) if !same(value) => {
                Err(self.error(format!("`{name}` is {value}, supported is {supported}")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a number of `parts` that does not divide `width`.
    pub fn divides(&self, part: &str, parts: usize, whole: &str, width: usize) -> Result<()> {
        if width.is_multiple_of(parts) {
            Ok(())
        } else {
            Err(self.error(format!("`{part}` is {parts}, which does not divide `{whole}`, {width}")))
        }
    }

    fn whole(&self, name: &str, value: &Value) -> Result<usize> {
        value
            .as_u64()
            .filter(|&number| number > 0)
            .and_then(|number| usize::try_from(number).ok())
            .ok_or_else(|| self.error(format!("`{name}` is {value}, expected a whole number above 0")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_missing_activation_is_the_familys_default() {
        let read = |fields| ConfigJson::new(Path::new("m"), fields).activation("hidden_act", "relu");
        assert_eq!(read(json!({"hidden_act": "gelu_new"})).unwrap(), Activation::GeluTanh);
        assert_eq!(read(json!({"hidden_act": null})).unwrap(), Activation::Relu);
        assert_eq!(read(json!({})).unwrap(), Activation::Relu);
        for (value, expected) in
            [(json!("mish"), "`hidden_act` is `mish`"), (json!(["gelu"]), "`hidden_act` is [\"gelu\"]")]
        {
            let error = read(json!({"hidden_act": value})).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("supported are gelu"), "{error}");
        }
    }
}
