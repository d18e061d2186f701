//! Tests of the configuration as a whole: they load files.

use super::*;

const SMALL: &str = "\
model:
  path: some/model
data:
  train:
    - path: a.jsonl
";

fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zeta.yaml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

fn load(text: &str, overrides: &[&str]) -> Result<Config> {
    let (_folder, path) = file(text);
    Config::load(&path, &overrides.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
}

/// The message, without the temporary folder.
fn message(text: &str, overrides: &[&str]) -> String {
    let error = load(text, overrides).unwrap_err().to_string();
    error.find("zeta.yaml").map_or(error.clone(), |at| error[at..].to_owned())
}

#[test]
fn a_small_file_takes_its_defaults() {
    let config = load(SMALL, &[]).unwrap();
    assert_eq!((config.name.as_str(), config.seed), ("zeta", 42));
    assert_eq!(config.output, Path::new("runs/zeta"));
    assert_eq!(config.training, Training::default());
    assert_eq!(config.lora, None);
    assert_eq!(config.data.train[0].weight, 1.0);
}

/// A value that the key's schema allows and that is not its default.
fn sample(schema: &serde_json::Value, property: &serde_json::Value) -> serde_json::Value {
    use serde_json::{Value, json};
    let reference = property["$ref"].as_str().and_then(|path| path.rsplit('/').next());
    let inner = |name: &str| property[name].as_array().and_then(|list| list.first());
    if let Some(name) = reference {
        return sample(schema, &schema["definitions"][name]);
    }
    if let Some(first) = inner("allOf").or(inner("anyOf")) {
        return sample(schema, first);
    }
    if let Some(choices) = property["oneOf"].as_array() {
        return choices[choices.len() - 1]["const"].clone();
    }
    if let Value::Object(properties) = &property["properties"] {
        return properties
            .iter()
            .filter(|(_, property)| property["deprecated"] != true)
            .map(|(name, property)| (name.clone(), sample(schema, property)))
            .collect();
    }
    let kind = property["type"].as_str().or(property["type"][0].as_str());
    match kind {
        Some("boolean") => json!(property["default"] != true),
        Some("integer") => json!(7),
        Some("number") => json!(0.25),
        Some("string") => json!("text"),
        Some("array") => match &property["items"] {
            Value::Array(items) => items.iter().map(|item| sample(schema, item)).collect(),
            item => json!([sample(schema, item)]),
        },
        _ => property["const"].clone(),
    }
}

/// The dotted keys of a value, with what each holds.
fn leaves(value: &serde_json::Value, at: &str, all: &mut Vec<(String, serde_json::Value)>) {
    let within = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
    match value {
        serde_json::Value::Object(map) => {
            map.iter().for_each(|(key, value)| leaves(value, &within(key), all))
        }
        serde_json::Value::Array(items) if items.iter().any(serde_json::Value::is_object) => {
            items.iter().enumerate().for_each(|(i, value)| leaves(value, &within(&i.to_string()), all));
        }
        value => all.push((at.to_owned(), value.clone())),
    }
}

#[test]
fn every_key_of_the_schema_is_read_and_written() {
    let schema = reference::schema();
    let mut keys = Vec::new();
    leaves(&sample(&schema, &schema), "", &mut keys);
    assert_eq!(keys.len(), reference::keys().iter().filter(|key| !is_section(key)).count(), "{keys:?}");
    let default = serde_json::to_value(load(SMALL, &[]).unwrap()).unwrap();
    for (key, value) in keys {
        let matryoshka =
            if key == "loss.matryoshka.weights" { "loss.matryoshka.dims=[8]" } else { "seed=42" };
        let set = if key.starts_with("evaluation.") { "evaluation.sets.0.path=x" } else { "seed=42" };
        let config = load(SMALL, &[matryoshka, set, &format!("{key}={value}")]).unwrap();
        let pointer = format!("/{}", key.replace('.', "/"));
        let written = serde_json::to_value(config).unwrap();
        // A list of one column is written as its name.
        let one = serde_json::json!([written.pointer(&pointer)]);
        assert!(written.pointer(&pointer) == Some(&value) || one == value, "{key}: {value}");
        assert_ne!(default.pointer(&pointer), Some(&value), "{key}: the sample is the default");
    }
}

fn is_section(key: &str) -> bool {
    let prefix = format!("{key}.");
    reference::keys().iter().any(|other| other.starts_with(&prefix))
}

#[test]
fn values_that_are_written_in_several_forms_are_read() {
    let config = load(
        SMALL,
        &[
            "lora.targets=[q_proj, v_proj]",
            "data.train.0.columns.positive=[a, b]",
            "training.activation_memory=2GiB",
            "training.betas=[0.8, 0.99]",
            "checkpoint.every=epoch",
        ],
    )
    .unwrap();
    let lora = config.lora.unwrap();
    assert_eq!(lora.targets, Some(Targets::Names(vec!["q_proj".into(), "v_proj".into()])));
    assert_eq!(config.data.train[0].columns.positive, Some(ColumnNames(vec!["a".into(), "b".into()])));
    assert_eq!(config.training.activation_memory, Some(Bytes(2 << 30)));
    assert_eq!(config.training.betas, (0.8, 0.99));
    assert_eq!(config.checkpoint.every, Interval::Epoch);
}

#[test]
fn the_resolved_configuration_reloads_to_the_same() {
    for overrides in
        [&[][..], &["lora.rank=4", "training.activation_memory=1.5GiB", "checkpoint.every=epoch"]]
    {
        let yaml = load(SMALL, overrides).unwrap().to_yaml().unwrap();
        let again = load(&yaml, &[]).unwrap().to_yaml().unwrap();
        assert_eq!(yaml, again);
        assert!(yaml.contains("output: runs/zeta"), "{yaml}");
    }
}

#[test]
fn an_unknown_key_names_the_nearest_known_one_and_its_place() {
    assert_eq!(
        message(&format!("{SMALL}training:\n  epochs: 1\n  learning-rate: 1\n"), &[]),
        "zeta.yaml:8: training.learning-rate: unknown key in `training`\nhint: did you mean `learning_rate`?"
    );
    assert_eq!(
        message(&format!("{SMALL}trainig: {{}}\n"), &[]),
        "zeta.yaml:6: trainig: unknown key\nhint: did you mean `training`?"
    );
    assert_eq!(
        message(&SMALL.replace("- path: a.jsonl", "- path: a.jsonl\n      sample: 3"), &[]),
        "zeta.yaml:6: data.train.0.sample: unknown key in `data.train.0`\nhint: did you mean `samples`?"
    );
    let far = message(&format!("{SMALL}checkpoint: {{zzzzzz: 1}}\n"), &[]);
    assert_eq!(
        far,
        "zeta.yaml:6: checkpoint.zzzzzz: unknown key in `checkpoint`, expected one of every, keep"
    );
}

#[test]
fn a_wrong_type_names_the_value_and_what_was_expected() {
    for (section, expected) in [
        (
            "training:\n  batch_size: many",
            "7: training.batch_size: expected a whole number, 0 or above, found string \"many\"",
        ),
        (
            "training:\n  batch_size: -3",
            "7: training.batch_size: expected a whole number, 0 or above, found integer `-3`",
        ),
        (
            "training:\n  batch_size: 1.5",
            "7: training.batch_size: expected a whole number, 0 or above, found floating point `1.5`",
        ),
        ("training:\n  epochs: null", "7: training.epochs: expected a whole number, 0 or above, found null"),
        ("training:\n  epochs: [1]", "7: training.epochs: expected a whole number, 0 or above, found a list"),
        ("training:\n  learning_rate: {}", "7: training.learning_rate: expected a number, found a mapping"),
        ("training:\n  decay_all: 1", "7: training.decay_all: expected true or false, found integer `1`"),
        (
            "training:\n  betas: [1]",
            "7: training.betas: expected two numbers, as [0.9, 0.999], found a list of 1",
        ),
        ("training: 3", "6: training: expected `key: value` lines, found integer `3`"),
        ("name: 3", "6: name: expected a string, found integer `3`\nhint: quote it if it is meant as text"),
        (
            "checkpoint:\n  every: often",
            "7: checkpoint.every: expected a number of steps or `epoch`, found string \"often\"",
        ),
        (
            "training:\n  activation_memory: 2 cups",
            "7: training.activation_memory: expected a number of bytes, or an amount like 2GiB, found string \"2 cups\"",
        ),
        (
            "training:\n  schedule: liner",
            "7: training.schedule: `liner` is none of linear, cosine, constant\nhint: did you mean `linear`?",
        ),
    ] {
        assert_eq!(message(&format!("{SMALL}{section}\n"), &[]), format!("zeta.yaml:{expected}"));
    }
}

#[test]
fn a_list_entry_is_found_by_its_line() {
    let text = "model: {path: m}\ndata:\n  train:\n    - path: a.jsonl\n    -\n      path: b.jsonl\n      samples: x\n    - 3\n";
    assert!(message(text, &[]).starts_with("zeta.yaml:7: data.train.1.samples: "), "{}", message(text, &[]));
    let text = text.replace("samples: x", "samples: 2");
    assert_eq!(
        message(&text, &[]),
        "zeta.yaml:8: data.train.2: expected `key: value` lines, found integer `3`"
    );
}

#[test]
fn values_outside_their_range_are_refused() {
    for (section, field, part) in [
        ("training: {batch_size: 0}", "training.batch_size", "at least 1, found 0"),
        ("training: {learning_rate: -1}", "training.learning_rate", "found -1"),
        ("training: {learning_rate: .nan}", "training.learning_rate", "found NaN"),
        ("training: {betas: [0.9, 1.0]}", "training.betas.1", "below 1, found 1"),
        ("training: {warmup_ratio: 1.1}", "training.warmup_ratio", "found 1.1"),
        ("training: {warmup_ratio: 0.1, warmup_steps: 3}", "training.warmup_steps", "either"),
        ("training: {chunk_size: 1, chunk_tokens: 3}", "training.chunk_size", "either"),
        ("loss: {temperature: 0}", "loss.temperature", "above 0, found 0"),
        (
            "loss: {symmetric: true, in_batch_negatives: false}",
            "loss.symmetric",
            "loss.in_batch_negatives is false",
        ),
        ("lora: {rank: 0}", "lora.rank", "at least 1"),
        ("lora: {targets: []}", "lora.targets", "at least one"),
        ("checkpoint: {every: 0}", "checkpoint.every", "from 1"),
        ("evaluation: {sets: [{name: a}]}", "evaluation.sets.0.path", "missing"),
        ("evaluation: {sets: [{name: a, path: b}, {name: a, path: c}]}", "evaluation.sets.1.name", "earlier"),
    ] {
        let text = message(&format!("{SMALL}{section}\n"), &[]);
        assert!(text.starts_with(&format!("zeta.yaml:6: {field}: ")) && text.contains(part), "{text}");
    }
    let text = message(&format!("{SMALL}lora: {{}}\n"), &["model.freeze=[norms]"]);
    assert!(text.contains("model.freeze") && text.contains("which freezes the whole encoder"), "{text}");
    assert_eq!(
        message("seed: 1\n", &[]),
        "zeta.yaml: model.path: missing: expected a model folder or the id of a model on the hub"
    );
    assert!(
        message("model:\n  path: m\ndata:\n  shuffle: true\n", &[])
            .starts_with("zeta.yaml:3: data.train: missing")
    );
}

#[test]
fn kinds_of_rows_and_losses_that_do_not_go_together_are_refused() {
    for (kind, loss, expected) in [
        ("similarity", "info_nce", "`info_nce` is not defined for similarity rows"),
        ("pairs", "cosent", "`cosent` needs similarity rows (two texts and a score), these rows are pairs"),
        ("labelled", "kl", "`kl` needs a teacher's scores, which labelled rows do not have"),
    ] {
        let text =
            message(SMALL, &[&format!("data.train.0.kind={kind}"), &format!("data.train.0.loss={loss}")]);
        assert!(text.starts_with("command line: data.train.0.loss: ") && text.contains(expected), "{text}");
    }
    for (value, expected) in [
        ("loss.matryoshka={dims: []}", "loss.matryoshka.dims: missing: expected a list of lengths"),
        ("loss.matryoshka={dims: [8, 0]}", "loss.matryoshka.dims.1: expected at least 1, found 0"),
        ("loss.matryoshka={dims: [8, 8]}", "loss.matryoshka.dims.1: 8 is in the list twice"),
        (
            "loss.matryoshka={dims: [8, 4], weights: [1]}",
            "loss.matryoshka.weights: expected 2, one for each of `dims`, found 1",
        ),
        (
            "loss.matryoshka={dims: [8], weights: [-1]}",
            "loss.matryoshka.weights.0: expected a number above 0",
        ),
        ("loss.margin=-1", "loss.margin: expected 0 or above"),
        ("loss.scale=0", "loss.scale: expected a number above 0"),
    ] {
        let text = message(SMALL, &[value]);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn the_command_line_overrides_the_file_and_its_errors_say_so() {
    let config = load(
        SMALL,
        &[
            "training.learning_rate=2e-5",
            "data.train.0.samples=1000",
            "data.train.1.path=b.csv",
            "data.train.0.query_prompt=query: ",
            "lora.targets=[query, value]",
            "name=other=name",
        ],
    )
    .unwrap();
    assert_eq!(config.training.learning_rate, 2e-5);
    assert_eq!(config.data.train[0].samples, Some(1000));
    assert_eq!(config.data.train[0].query_prompt, "query: ");
    assert_eq!(config.data.train[1].path, Path::new("b.csv"));
    assert_eq!(config.name, "other=name");
    assert_eq!(config.lora.unwrap().targets, Some(Targets::Names(vec!["query".into(), "value".into()])));

    assert_eq!(
        message(SMALL, &["training.epoch=3"]),
        "command line: training.epoch: unknown key in `training`\nhint: did you mean `epochs`?"
    );
    assert_eq!(
        message(SMALL, &["training.epochs=x"]),
        "command line: training.epochs: expected a whole number, 0 or above, found string \"x\""
    );
    assert_eq!(
        message(SMALL, &["data.train.5.path=x"]),
        "command line: data.train.5.path: `data.train` is a list of 1: expected a number from 0 to 1, found `5`"
    );
    assert_eq!(
        message(SMALL, &["model.path.x=1"]),
        "command line: model.path.x: `model.path` is a single value and has no keys"
    );
    assert!(message(SMALL, &["--epochs"]).starts_with("command line: --epochs: expected KEY=VALUE"));
    assert!(message(SMALL, &["=3"]).contains("expected KEY=VALUE"));
    assert!(
        message(SMALL, &["training.betas=[0.9"])
            .starts_with("command line: training.betas: `[0.9` is not YAML")
    );
}

#[test]
fn a_file_that_is_not_yaml_is_an_error_with_its_line() {
    assert!(message("model:\n\tpath: x\n", &[]).starts_with("zeta.yaml:2: this is not YAML"));
    assert!(message("model: {}\nmodel: {}\n", &[]).contains("duplicate"));
    assert!(message("- 1\n", &[]).contains("expected `key: value` lines"));
    let missing = Config::load(Path::new("no/such.yaml"), &[]).unwrap_err().to_string();
    assert!(missing.starts_with("no/such.yaml: cannot read: "), "{missing}");
}

#[test]
fn an_amount_of_memory_is_read_in_any_unit() {
    for (text, bytes) in [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("10kb", 10_000), ("0", 0), ("7B", 7)] {
        let config = load(SMALL, &[&format!("training.activation_memory={text}")]).unwrap();
        assert_eq!(config.training.activation_memory, Some(Bytes(bytes)), "{text}");
    }
    assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
    assert_eq!(Bytes(12).to_string(), "12 B");
}

#[test]
fn warm_up_is_counted_as_transformers_counts_it() {
    let training = Training::default();
    assert_eq!((training.warmup(10), training.warmup(11), training.warmup(0)), (1, 2, 0));
}

#[test]
fn a_renamed_key_is_read_under_its_former_name_and_refused_under_both() {
    let former = format!("{SMALL}training:\n  tape_memory: 2GiB\n");
    let config = load(&former, &[]).unwrap();
    assert_eq!(config.training.activation_memory, Some(Bytes(2 << 30)));
    let yaml = config.to_yaml().unwrap();
    assert!(yaml.contains("activation_memory: 2147483648") && !yaml.contains("tape_memory"), "{yaml}");

    let both = message(&format!("{SMALL}training:\n  activation_memory: 1\n  tape_memory: 2\n"), &[]);
    assert_eq!(
        both,
        "zeta.yaml:8: training.tape_memory: `activation_memory` is the current name of this key, and the configuration has \
         both\nhint: keep `activation_memory` and delete `tape_memory`"
    );
    // The command line overrides either name by either name.
    for (text, name) in
        [(former.as_str(), "activation_memory"), (SMALL, "tape_memory"), (&former, "tape_memory")]
    {
        let config = load(text, &[&format!("training.{name}=7")]).unwrap();
        assert_eq!(config.training.activation_memory, Some(Bytes(7)));
    }
    let section = load(&former, &["training={tape_memory: 3}"]).unwrap();
    assert_eq!(section.training.activation_memory, Some(Bytes(3)));
    // An error points to the line of the name that the file has.
    let wrong = message(&former.replace("2GiB", "much"), &[]);
    assert!(
        wrong.starts_with("zeta.yaml:7: training.activation_memory: expected a number of bytes"),
        "{wrong}"
    );
}

#[test]
fn an_unknown_key_of_another_program_is_answered_with_the_key_here() {
    for (section, expected) in [
        (
            "training: {per_device_train_batch_size: 8}",
            "training.per_device_train_batch_size: unknown key in `training`\nhint: use `training.batch_size`: ",
        ),
        ("bf16: true", "bf16: unknown key\nhint: use `model.dtype`: `bf16: true` is `dtype: bf16`"),
        (
            "lora: {lora-r: 8}",
            "lora.lora-r: unknown key in `lora`\nhint: use `lora.rank`: the value is the same",
        ),
        (
            "gradient_accumulation_steps: 4",
            "gradient_accumulation_steps: unknown key\nhint: use `training.batch_size`: ",
        ),
        ("loss: {guide: m}", "loss.guide: unknown key in `loss`\nhint: use `loss.false_negative_margin`: "),
        (
            "training: {push_to_hub: true}",
            "training.push_to_hub: unknown key in `training`\nhint: there is no such key: ",
        ),
        // A key of this program in the wrong section.
        ("warmup_steps: 3", "warmup_steps: unknown key\nhint: this key is `training.warmup_steps`"),
        (
            "evaluation: {query_prompt: x}",
            "evaluation.query_prompt: unknown key in `evaluation`\nhint: this key is `data.train.N.query_prompt` or \
             `evaluation.sets.N.query_prompt`",
        ),
    ] {
        let text = message(&format!("{SMALL}{section}\n"), &[]);
        assert!(text.starts_with(&format!("zeta.yaml:6: {expected}")), "{text}");
    }
}
