use super::*;

const WORDS: [&str; 13] =
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "query", ":", "the", "cat", "sat", "##s", "İ"];

/// A folder with a WordPiece tokenizer over [`WORDS`], and `files` beside it.
fn folder(processor: &str, normalizer: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
    let vocabulary: Vec<String> =
        WORDS.iter().enumerate().map(|(id, word)| format!("\"{word}\":{id}")).collect();
    let special = |id: usize| {
        format!(
            r#"{{"id":{id},"content":"{}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#,
            WORDS[id]
        )
    };
    let json = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{}],"normalizer":{normalizer},
        "pre_tokenizer":{{"type":"BertPreTokenizer"}},"post_processor":{processor},"decoder":null,
        "model":{{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"{}","max_input_chars_per_word":100,"vocab":{{{}}}}}}}"#,
        (0..6).map(special).collect::<Vec<_>>().join(","),
        "##",
        vocabulary.join(",")
    );
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

const BERT: &str = r#"{"type":"BertProcessing","sep":["[SEP]",3],"cls":["[CLS]",2]}"#;
const UNCASED: &str = r#"{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true}"#;
const CASED: &str = r#"{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":false,"lowercase":false}"#;

fn bert() -> Tokenizer {
    Tokenizer::open(folder(BERT, UNCASED, &[]).path(), false).unwrap()
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(&[text], "", 64, true).unwrap().remove(0).ids
}

#[test]
fn special_tokens_count_towards_the_length() {
    let tokenizer = bert();
    let text = "the cats sat the cat";
    assert_eq!(ids(&tokenizer, text), [2, 8, 9, 11, 10, 8, 9, 3]);
    for (length, expected) in [(3, &[2, 8, 3][..]), (5, &[2, 8, 9, 11, 3]), (8, &[2, 8, 9, 11, 10, 8, 9, 3])]
    {
        assert_eq!(tokenizer.encode(&[text], "", length, true).unwrap()[0].ids, expected);
    }
}

#[test]
fn cutting_equals_the_tokenizers_own_truncation() {
    for side in ["left", "right"] {
        let settings = format!(r#"{{"truncation_side":"{side}"}}"#);
        let folder = folder(BERT, UNCASED, &[("tokenizer_config.json", &settings)]);
        let ours = Tokenizer::open(folder.path(), false).unwrap();
        let text = "the cat sat : the cats sat query the cat ".repeat(5);
        for length in 3..60 {
            let mut theirs = tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
            let direction =
                if side == "left" { TruncationDirection::Left } else { TruncationDirection::Right };
            let cut = tokenizers::TruncationParams { max_length: length, direction, ..Default::default() };
            theirs.with_truncation(Some(cut)).unwrap();
            let expected = theirs.encode(text.as_str(), true).unwrap().get_ids().to_vec();
            assert_eq!(ours.encode(&[&text], "", length, true).unwrap()[0].ids, expected, "{side} {length}");
        }
    }
}

#[test]
fn a_prompt_stands_before_the_text_and_may_be_left_out_of_the_pooling() {
    let tokenizer = bert();
    let with = tokenizer.encode(&["the cat", "sat"], "query: ", 64, true).unwrap();
    assert_eq!(with[0], Sequence { ids: vec![2, 6, 7, 8, 9, 3], skip: 0 });
    let without = tokenizer.encode(&["the cat", "sat"], "query: ", 64, false).unwrap();
    assert_eq!(without[1], Sequence { ids: vec![2, 6, 7, 10, 3], skip: 3 });
    let none = tokenizer.encode(&["sat"], "", 64, false).unwrap();
    assert_eq!(none[0].skip, 0);
    let cut = tokenizer.encode(&["sat"], "query: query: query: ", 3, false).unwrap();
    assert_eq!(cut[0], Sequence { ids: vec![2, 6, 3], skip: 2 });
}

#[test]
fn any_text_has_at_least_its_special_tokens() {
    let tokenizer = bert();
    for text in ["", " ", "\u{0}", "\u{200b}\u{feff}", "\n\t"] {
        assert_eq!(ids(&tokenizer, text), [2, 3], "{text:?}");
    }
    for text in
        ["𝕏😀é\u{301}", "漢字かな", "שלום עולם", "\u{10ffff}", &"x".repeat(100_000), &"the ".repeat(50_000)]
    {
        let ids = ids(&tokenizer, text);
        assert!((3..=64).contains(&ids.len()) && ids[0] == 2 && ids.last() == Some(&3));
    }
}

#[test]
fn a_text_without_any_token_is_an_error() {
    let tokenizer = Tokenizer::open(folder("null", UNCASED, &[]).path(), false).unwrap();
    assert_eq!(ids(&tokenizer, "the"), [8]);
    let error = tokenizer.encode(&["the", " \n"], "", 8, true).unwrap_err().to_string();
    assert!(error.ends_with("tokenizer.json: has no token for the text ` \\n`"), "{error}");
}

#[test]
fn a_length_without_room_for_text_is_an_error() {
    let error = bert().encode(&["the"], "", 2, true).unwrap_err().to_string();
    assert!(error.contains("adds 2 special tokens") && error.contains("to 3 or more"), "{error}");
}

#[test]
fn weights_that_are_drawn_need_no_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Tokenizer::open_for(folder.path(), false, WeightInit::Pretrained).is_err());
    let tokenizer = Tokenizer::open_for(folder.path(), false, WeightInit::Random).unwrap();
    assert_eq!(tokenizer.vocabulary(), 256);
    let (two, three) = (ids(&tokenizer, "ab"), ids(&tokenizer, "aé"));
    assert_eq!((two.len(), three.len(), two[0]), (2, 3, three[0]), "a token is a byte");
    assert_eq!(tokenizer.encode(&["abc"], "q ", 4, true).unwrap()[0].ids.len(), 4);
}

#[test]
fn the_settings_beside_it_may_ask_for_lower_case() {
    let ids = |normalizer: &str, lower_case: bool| {
        ids(&Tokenizer::open(folder(BERT, normalizer, &[]).path(), lower_case).unwrap(), "The cat")
    };
    assert_eq!(ids(CASED, false), [2, 1, 9, 3]);
    assert_eq!(ids(CASED, true), [2, 8, 9, 3]);
    assert_eq!(ids("null", true), [2, 8, 9, 3]);
}

#[test]
fn the_end_is_appended_where_the_settings_of_llamas_kin_ask_for_it() {
    let settings = |class: &str| {
        format!(r#"{{"tokenizer_class": "{class}", "add_eos_token": true, "eos_token": "</s>"}}"#)
    };
    let first = r#"{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
        "pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
        "special_tokens":{"<s>":{"id":"<s>","ids":[4],"tokens":["<s>"]}}}"#;
    let asked = |class: &str, processor: &str| {
        folder(processor, UNCASED, &[("tokenizer_config.json", &settings(class))])
    };
    let other = asked("PreTrainedTokenizerFast", first);
    assert_eq!(ids(&Tokenizer::open(other.path(), false).unwrap(), "the cat"), [4, 8, 9]);
    assert_eq!(with_end_token(other.path()).unwrap(), None);
    for (processor, expected) in [(first, &[4, 8, 9, 5][..]), ("null", &[8, 9, 5])] {
        let folder = asked("LlamaTokenizer", processor);
        let tokenizer = Tokenizer::open(folder.path(), false).unwrap();
        assert_eq!(ids(&tokenizer, "the cat"), expected);
        // One token less of the text, as e5-mistral cuts: to one below the length, and then the end.
        let length = expected.len() - 1;
        let cut = tokenizer.encode(&["the cat"], "", length, true).unwrap().remove(0).ids;
        assert_eq!((cut.len(), cut.last()), (length, Some(&5)));
        // What is written appends it for every reader, and nothing twice.
        let written = with_end_token(folder.path()).unwrap().unwrap();
        let alone = tokenizers::Tokenizer::from_bytes(&written).unwrap();
        assert_eq!(alone.encode("the cat", true).unwrap().get_ids(), expected);
        std::fs::write(folder.path().join("tokenizer.json"), written).unwrap();
        assert_eq!(ids(&Tokenizer::open(folder.path(), false).unwrap(), "the cat"), expected);
        assert_eq!(with_end_token(folder.path()).unwrap(), None);
    }
}

#[test]
fn many_texts_come_back_in_their_order() {
    let tokenizer = bert();
    let texts: Vec<String> = (0..1023).map(|i| ["the", "cat", "sat"][i % 3].to_owned()).collect();
    let all = tokenizer.encode(&texts, "", 8, true).unwrap();
    assert!(all.iter().enumerate().all(|(i, s)| s.ids == [2, 8 + (i % 3) as u32, 3]));
    assert!(tokenizer.encode(&[] as &[&str], "", 8, true).unwrap().is_empty());
}

#[test]
fn the_vocabulary_reaches_to_the_highest_id() {
    assert_eq!(bert().vocabulary(), WORDS.len());
}

#[test]
fn a_folder_without_tokenizer_json_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let message = |folder: &Path| Tokenizer::open(folder, false).err().unwrap().to_string();
    assert!(message(folder.path()).contains("has no tokenizer.json"));
    std::fs::write(folder.path().join("vocab.txt"), "").unwrap();
    let text = message(folder.path());
    assert!(text.contains("has vocab.txt but no tokenizer.json\nhint: ") && text.contains("save_pretrained"));
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert!(message(folder.path()).contains("this is not a tokenizer"));
}
