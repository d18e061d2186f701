//! The keys of the configuration in which runs differ.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Keys that say what a run is called and where it is.
const NAMES: [&str; 2] = ["name", "output"];

/// `[{"key": "training.learning_rate", "values": ["5e-5", "1e-4"]}, …]`, a value for each run, null where a
/// run does not have the key. Empty for one run, or if a run's configuration cannot be read.
pub(super) fn between(runs: &[Value]) -> Value {
    let parse = |run: &Value| Some(leaves(&serde_yaml::from_str(run["config"].as_str()?).ok()?));
    let Some(configs) = runs.iter().map(parse).collect::<Option<Vec<_>>>() else { return json!([]) };
    let mut keys: Vec<&String> = configs.iter().flat_map(BTreeMap::keys).collect();
    keys.sort();
    keys.dedup();
    let differs = |key: &&String| configs.iter().any(|config| config.get(*key) != configs[0].get(*key));
    let values = |key: &String| configs.iter().map(|config| config.get(key).cloned()).collect::<Vec<_>>();
    keys.into_iter()
        .filter(|key| !NAMES.contains(&key.as_str()))
        .filter(differs)
        .map(|key| json!({ "key": key, "values": values(key) }))
        .collect()
}

/// The values of a configuration by their dotted keys.
fn leaves(config: &Value) -> BTreeMap<String, String> {
    fn walk(key: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
        let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
        match value {
            Value::Object(map) => map.iter().for_each(|(name, value)| walk(&below(name), value, leaves)),
            Value::Array(list) if list.iter().any(Value::is_object) => {
                list.iter().enumerate().for_each(|(n, value)| walk(&below(&n.to_string()), value, leaves));
            }
            Value::String(text) => drop(leaves.insert(key.to_owned(), text.clone())),
            other => drop(leaves.insert(key.to_owned(), other.to_string())),
        }
    }
    let mut found = BTreeMap::new();
    walk("", config, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_differ_are_listed() {
        let run = |text: &str| json!({ "config": text });
        let one = run(
            "name: a\noutput: x\nseed: 1\ntraining: {batch_size: 8, betas: [0.9, 0.99]}\ndata: {train: [{path: p}]}\n",
        );
        let other = run(
            "name: b\noutput: y\nseed: 1\ntraining: {batch_size: 8, betas: [0.9, 0.95]}\nlora: {rank: 4}\ndata: {train: [{path: q}]}\n",
        );
        let expected = json!([
            {"key": "data.train.0.path", "values": ["p", "q"]},
            {"key": "lora.rank", "values": [null, "4"]},
            {"key": "training.betas", "values": ["[0.9,0.99]", "[0.9,0.95]"]},
        ]);
        assert_eq!(between(&[one.clone(), other]), expected);
        assert_eq!(between(std::slice::from_ref(&one)), json!([]));
        assert_eq!(between(&[one, json!({ "config": null })]), json!([]));
    }
}
