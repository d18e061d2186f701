//! The encoder stacks that are known, by `model_type` of config.json.
//!
//! A new stack needs its own module and a place in [`read_config`]. A new family of a stack needs changes
//! only in the stack's configuration, such as `model/bert/config.rs`.

use super::config_json::ConfigJson;
use super::encoder::EncoderConfig;
use super::{bert, decoder, modernbert};
use crate::Result;

/// Reads and checks config.json, whose `model_type` names the stack and the family. `dropout` replaces the
/// rates of config.json.
///
/// # Errors
/// The `model_type` is not supported, a field is missing or wrong, or a setting that changes the result is
/// not supported.
pub fn read_config(json: &ConfigJson, dropout: Option<f32>) -> Result<Box<dyn EncoderConfig>> {
    let model_type = json.get("model_type").and_then(|model_type| model_type.as_str());
    if let Some(family) = family(bert::MODEL_TYPES, model_type) {
        return Ok(Box::new(bert::Config::read(family, json, dropout)?));
    }
    if let Some(()) = family(modernbert::MODEL_TYPES, model_type) {
        return Ok(Box::new(modernbert::Config::read(json, dropout)?));
    }
    if let Some(family) = family(decoder::MODEL_TYPES, model_type) {
        return Ok(Box::new(decoder::Config::read(family, json, dropout)?));
    }
    let supported = [names(bert::MODEL_TYPES), names(modernbert::MODEL_TYPES), names(decoder::MODEL_TYPES)];
    let supported = supported.concat().join(", ");
    Err(json.error(match model_type {
        Some(model_type) => format!("`model_type` is `{model_type}`, supported are {supported}"),
        None => format!("lacks `model_type`; supported are {supported}"),
    }))
}

/// The family of `model_type` in the table of one stack.
fn family<F: Copy>(model_types: &[(&str, F)], model_type: Option<&str>) -> Option<F> {
    model_types.iter().find(|(name, _)| Some(*name) == model_type).map(|&(_, family)| family)
}

fn names<F>(model_types: &[(&'static str, F)]) -> Vec<&'static str> {
    model_types.iter().map(|&(name, _)| name).collect()
}
