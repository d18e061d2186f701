use super::*;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

const LEGACY: &str = r#"[
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;
const COMPACT: &str = r#"[
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling",
     "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"}]"#;

#[test]
fn legacy_schema_is_read() {
    let folder = folder(&[
        ("modules.json", LEGACY),
        (
            "1_Pooling/config.json",
            r#"{"word_embedding_dimension": 8, "pooling_mode_cls_token": true,
            "pooling_mode_mean_tokens": false, "include_prompt": false}"#,
        ),
        ("sentence_bert_config.json", r#"{"max_seq_length": 256, "do_lower_case": true}"#),
        ("tokenizer_config.json", r#"{"model_max_length": 512}"#),
        (
            "config_sentence_transformers.json",
            r#"{"prompts": {"query": "query: ", "passage": "passage: "},
            "default_prompt_name": "passage"}"#,
        ),
        ("config.json", r#"{"model_type": "bert"}"#),
    ]);
    let found = ModelFolder::open(folder.path()).unwrap();
    assert_eq!(found.pooling, Some(Pooling::Cls));
    assert_eq!(found.normalize, Some(true));
    assert!(!found.include_prompt && found.lower_case);
    assert_eq!(found.max_length, Some(256));
    assert_eq!((found.query_prompt(), found.document_prompt()), ("query: ", "passage: "));
    assert_eq!(found.text_prompt(), "passage: ");
    assert_eq!(found.config["model_type"], "bert");
}

#[test]
fn compact_schema_is_read_and_the_tokenizer_gives_the_length() {
    let folder = folder(&[
        ("modules.json", COMPACT),
        (
            "1_Pooling/config.json",
            r#"{"embedding_dimension": 8, "pooling_mode": "lasttoken", "include_prompt": true}"#,
        ),
        (
            "sentence_bert_config.json",
            r#"{"transformer_task": "feature-extraction", "module_output_name": "x"}"#,
        ),
        ("tokenizer_config.json", r#"{"model_max_length": 77}"#),
        ("config.json", "{}"),
    ]);
    let found = ModelFolder::open(folder.path()).unwrap();
    assert_eq!(found.pooling, Some(Pooling::LastToken));
    assert_eq!(found.normalize, Some(false));
    assert_eq!(found.max_length, Some(77));
    assert_eq!(found.document_prompt(), "");
}

#[test]
fn bare_transformer_leaves_pooling_open() {
    let folder = folder(&[("config.json", "{}"), ("tokenizer_config.json", r#"{"model_max_length": 1e30}"#)]);
    let found = ModelFolder::open(folder.path()).unwrap();
    assert_eq!((found.pooling, found.normalize, found.max_length), (None, None, None));
    assert!(found.include_prompt);
}

#[test]
fn null_is_the_default() {
    let folder = folder(&[
        ("modules.json", LEGACY),
        ("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true, "include_prompt": null}"#),
        ("sentence_bert_config.json", r#"{"max_seq_length": null, "do_lower_case": null}"#),
        ("config_sentence_transformers.json", r#"{"prompts": null, "default_prompt_name": null}"#),
        ("config.json", "{}"),
    ]);
    let found = ModelFolder::open(folder.path()).unwrap();
    assert!(found.include_prompt && !found.lower_case && found.prompts.is_empty());
    assert_eq!((found.max_length, found.text_prompt()), (None, ""));
}

#[test]
fn lower_case_is_asked_for_under_any_name_of_the_settings() {
    for name in
        ["sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json"]
    {
        let folder = folder(&[(name, r#"{"do_lower_case": true}"#), ("config.json", "{}")]);
        assert!(ModelFolder::open(folder.path()).unwrap().lower_case, "{name}");
    }
}

#[test]
fn transformer_may_have_a_folder_of_its_own() {
    let modules = LEGACY.replacen(r#""path": """#, r#""path": "0_Transformer""#, 1);
    let folder = folder(&[
        ("modules.json", &modules),
        ("1_Pooling/config.json", "{}"),
        ("0_Transformer/config.json", r#"{"model_type": "bert"}"#),
    ]);
    let found = ModelFolder::open(folder.path()).unwrap();
    assert_eq!(found.path, folder.path().join("0_Transformer"));
    assert_eq!(found.pooling, Some(Pooling::Mean));
}

#[test]
fn what_is_not_supported_is_named() {
    let lstm = LEGACY.replace("models.Normalize", "models.LSTM");
    let dense = LEGACY.replace("models.Normalize", "models.Dense").replace("2_Normalize", "2_Dense");
    let late = LEGACY.replace("models.Pooling", "models.Dense").replace("models.Normalize", "models.Pooling");
    let own = LEGACY.replace("sentence_transformers.models.Pooling", "own_code.Pooling");
    let alone = r#"[{"path": "", "type": "sentence_transformers.models.Transformer"}]"#;
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("modules.json", &lstm)], "module LSTM is not supported"),
        (&[("modules.json", &late)], "found Transformer, Dense, Pooling, expected"),
        (
            &[
                ("modules.json", &dense),
                ("1_Pooling/config.json", "{}"),
                (
                    "2_Dense/config.json",
                    r#"{"in_features": 8, "out_features": 4, "activation_function": "own.Cube"}"#,
                ),
            ],
            "activation_function own.Cube is not supported",
        ),
        (&[("modules.json", &own)], "module own_code.Pooling is not supported"),
        (&[("modules.json", alone)], "found Transformer, expected"),
        (
            &[
                ("modules.json", LEGACY),
                ("1_Pooling/config.json", r#"{"pooling_mode_weightedmean_tokens": true}"#),
            ],
            "pooling by weightedmean_tokens is not supported",
        ),
        (
            &[("modules.json", LEGACY), ("1_Pooling/config.json", r#"{"pooling_mode": ["cls", "mean"]}"#)],
            "pooling by cls + mean is not supported",
        ),
        (&[("modules.json", LEGACY)], "1_Pooling/config.json: no such file"),
        (&[("modules.json", "[{")], "modules.json: malformed"),
        (&[("adapter_config.json", "{}")], "lacks `base_model_name_or_path`"),
        (
            &[("adapter_config.json", r#"{"base_model_name_or_path": "/no/such"}"#)],
            "adapter_config.json: its base model: /no/such: no such model folder",
        ),
        (&[], "has no config.json"),
        (
            &[("config.json", "{}"), ("config_sentence_transformers.json", r#"{"truncate_dim": 64}"#)],
            "truncate_dim: 64 is not supported",
        ),
        (
            &[("config.json", "{}"), ("sentence_bert_config.json", r#"{"transformer_task": "fill-mask"}"#)],
            "transformer_task \"fill-mask\" is not supported",
        ),
    ];
    for (files, expected) in cases {
        let folder = folder(files);
        let error = ModelFolder::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
    assert!(
        ModelFolder::open(Path::new("/no/such")).unwrap_err().to_string().contains("no such model folder")
    );
}
