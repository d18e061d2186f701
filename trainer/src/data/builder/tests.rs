//! Tests of the table, against its definition over texts.

use std::collections::BTreeSet;

use super::super::batch::Cursor;
use super::super::fixtures::{Files, tokenizer};
use super::*;

const OPTIONS: BatchOptions = BatchOptions {
    max_query_length: 32,
    max_document_length: 32,
    include_prompt: true,
    mask_known_positives: true,
};

fn first(files: &mut Files, options: BatchOptions) -> Batch {
    files.config.data.shuffle = false;
    files.config.data.no_duplicates = false;
    let mixture = Mixture::open(&files.config).unwrap();
    let tokenizer = tokenizer();
    let picked = mixture.sampler(&Cursor::default()).unwrap().next_rows().unwrap();
    Builder::new(&mixture, &tokenizer, options).unwrap().build(picked).unwrap()
}

fn row(lists: &CsrIndices, row: usize) -> &[u32] {
    &lists.columns[lists.offsets[row] as usize..lists.offsets[row + 1] as usize]
}

const ROWS: &str = r#"{"query": "a", "positive": ["p", "r"], "negatives": ["n", "m"]}
{"query": "b", "positive": "r", "negatives": []}
{"query": "a", "positive": "s", "negatives": ["P"]}
{"query": "c", "positive": "a", "negatives": ["n", "r", "c"]}
"#;

#[test]
fn each_text_is_one_sequence_however_often_it_is_a_column() {
    let batch = first(&mut Files::new(&[ROWS]), OPTIONS);
    // a b c, p r s, n, m: `P` is p to the tokenizer, and the answer `a` is the query `a`.
    assert_eq!(batch.sequences.len(), 8);
    assert_eq!(batch.tables[0].queries, [0, 1, 0, 2]);
    // Columns: p r s a | n P n | m r | c
    assert_eq!(batch.tables[0].candidates, [3, 4, 5, 0, 6, 3, 6, 7, 4, 2]);
    assert_eq!(batch.tables[0].positives, [0, 1, 2, 3]);
    assert_eq!(batch.tokens(), 8 * 3);
    let letters: Vec<u32> = batch.sequences.iter().map(|s| s.ids[1]).collect();
    assert_eq!(letters, "abcprsnm".bytes().map(|letter| u32::from(letter - b'a') + 3).collect::<Vec<_>>());
}

#[test]
fn known_positives_of_a_query_are_left_out_of_its_negatives() {
    let batch = first(&mut Files::new(&[ROWS]), OPTIONS);
    let excluded = |i| row(&batch.tables[0].excluded, i);
    // The query `a` knows p, r and s, wherever they stand; b knows r; c knows a.
    assert_eq!(excluded(0), [1, 2, 5, 8]);
    assert_eq!(excluded(1), [8]);
    assert_eq!(excluded(2), [0, 1, 5, 8]);
    assert_eq!(excluded(3), [0_u32; 0]);
    // Without in-batch negatives: the row's own, less what it leaves out.
    let own = |i| row(&batch.tables[0].own, i);
    assert_eq!((own(0), own(1), own(2), own(3)), (&[0, 4, 7][..], &[1][..], &[2][..], &[3, 6, 8, 9][..]));
}

#[test]
fn nothing_is_left_out_where_nothing_is_masked() {
    let batch = first(&mut Files::new(&[ROWS]), BatchOptions { mask_known_positives: false, ..OPTIONS });
    assert_eq!(batch.tables[0].excluded, CsrIndices { offsets: vec![0; 5], columns: vec![] });
    assert_eq!(row(&batch.tables[0].own, 2), [2, 5]);
}

#[test]
fn prompts_and_lengths_are_those_of_the_data_set_and_role() {
    let mut files = Files::new(&[]);
    files.add("{\"query\": \"same\", \"positive\": \"same\"}\n").query_prompt = "q: ".to_owned();
    files.add(
        "{\"query\": \"same\", \"positive\": \"same\"}\n{\"query\": \"same\", \"positive\": \"abcdefgh\"}\n",
    );
    files.config.training.batch_size = 3;
    let options = BatchOptions { max_document_length: 5, include_prompt: false, ..OPTIONS };
    let batch = first(&mut files, options);
    // `q: same`, `same` as a query, `sam` as a document, `abc`.
    assert_eq!(batch.tables[0].queries, [0, 1, 1]);
    assert_eq!(batch.tables[0].candidates, [2, 2, 3]);
    let shape: Vec<(usize, u32)> = batch.sequences.iter().map(|s| (s.ids.len(), s.skip)).collect();
    // The fixture's closing token is not marked special, so the prompt alone counts all of its four.
    assert_eq!(shape, [(8, 4), (6, 0), (5, 0), (5, 0)]);
}

#[test]
fn a_text_without_tokens_names_its_row() {
    let folder = tempfile::tempdir().unwrap();
    super::super::fixtures::write_tokenizer(folder.path());
    let path = folder.path().join("tokenizer.json");
    let bert = r#"{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true}"#;
    let bare = std::fs::read_to_string(&path)
        .unwrap()
        .replace(r#"{"type":"BertProcessing","sep":["[SEP]",2],"cls":["[CLS]",1]}"#, "null")
        .replace(r#"{"type":"Lowercase"}"#, bert);
    std::fs::write(&path, bare).unwrap();
    let tokenizer = Tokenizer::open(folder.path(), false).unwrap();
    let mut files = Files::new(&["{\"query\": \"a\", \"positive\": \"b\"}\n"]);
    // Not blank, so the reader takes it, but this tokenizer drops what has no width.
    files.add("{\"query\": \"a\", \"positive\": \"\u{200b}\"}\n");
    files.config.training.batch_size = 2;
    files.config.data.shuffle = false;
    let mixture = Mixture::open(&files.config).unwrap();
    let picked = mixture.sampler(&Cursor::default()).unwrap().next_rows().unwrap();
    let error = Builder::new(&mixture, &tokenizer, OPTIONS).unwrap().build(picked).unwrap_err().to_string();
    assert!(error.contains("set1.jsonl:1: ") && error.contains("has no token for the text"), "{error}");
}

#[test]
fn the_table_follows_its_definition_on_random_rows() {
    for seed in 0..40_u64 {
        // Few letters, so that everything meets everything.
        let mut state = seed;
        let mut letter = |count: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + ((state >> 33) % count) as u8)
        };
        let mut text = String::new();
        for _ in 0..12 {
            let (query, p, r) = (letter(5), letter(9), letter(9));
            let negatives: Vec<String> =
                (0..letter(4) as u8 - b'a').map(|_| format!("\"{}\"", letter(9))).collect();
            text += &format!(
                "{{\"query\":\"{query}\",\"positive\":[\"{p}\",\"{r}\"],\"negatives\":[{}]}}\n",
                negatives.join(",")
            );
        }
        let mut files = Files::new(&[&text]);
        files.config.training.batch_size = 12;
        let batch = first(&mut files, OPTIONS);
        let rows: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let word = |sequence: u32| {
            char::from((batch.sequences[sequence as usize].ids[1] - 3) as u8 + b'a').to_string()
        };
        let table = &batch.tables[0];
        let unique: BTreeSet<_> = batch.sequences.iter().map(|s| s.ids.clone()).collect();
        assert_eq!(unique.len(), batch.sequences.len());
        for (i, this) in rows.iter().enumerate() {
            assert_eq!(word(table.queries[i]), this["query"]);
            assert_eq!(word(table.candidates[table.positives[i] as usize]), this["positive"][0]);
            let known: BTreeSet<&str> = rows
                .iter()
                .filter(|other| other["query"] == this["query"])
                .flat_map(|other| other["positive"].as_array().unwrap())
                .map(|text| text.as_str().unwrap())
                .collect();
            let expected: Vec<u32> = (0..table.candidates.len() as u32)
                .filter(|j| {
                    *j != table.positives[i] && known.contains(word(table.candidates[*j as usize]).as_str())
                })
                .collect();
            assert_eq!(row(&table.excluded, i), expected, "seed {seed} row {i}");
            let own: Vec<String> =
                row(&table.own, i).iter().map(|j| word(table.candidates[*j as usize])).collect();
            let negatives = this["negatives"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
            let expected: Vec<&str> = std::iter::once(this["positive"][0].as_str().unwrap())
                .chain(negatives.filter(|n| !known.contains(n)))
                .collect();
            assert_eq!(own, expected);
        }
    }
}

#[test]
fn drafts_of_several_ranks_make_the_same_batch() {
    let mut files = Files::new(&[ROWS]);
    files.config.training.batch_size = 4;
    let alone = first(&mut files, OPTIONS);
    let (mixture, tokenizer) = (Mixture::open(&files.config).unwrap(), tokenizer());
    let builder = Builder::new(&mixture, &tokenizer, OPTIONS).unwrap();
    for ranks in [2, 3, 40] {
        let picked = || mixture.sampler(&Cursor::default()).unwrap().next_rows().unwrap();
        let mut partials: Vec<PartialBatch> =
            (0..ranks).map(|rank| builder.partial(picked(), Shard { rank, ranks }).unwrap()).collect();
        let partition = partials[0].partition().clone();
        let mut sequences: Vec<Option<Sequence>> = vec![None; partition.count()];
        for (rank, partial) in partials.iter_mut().enumerate() {
            assert_eq!(partial.partition(), &partition);
            for (&text, sequence) in partition.of(rank).iter().zip(partial.take_sequences()) {
                sequences[text] = Some(sequence);
            }
        }
        let sequences = sequences.into_iter().map(Option::unwrap).collect();
        let batch = partials.remove(0).finish(sequences);
        assert_eq!((batch.sequences, batch.tables), (alone.sequences.clone(), alone.tables.clone()));
    }
}

#[test]
fn texts_of_a_labelled_rows_class_are_left_out_of_its_negatives() {
    let mut files = Files::new(&[]);
    let line =
        |row: usize| format!("{{\"text\":\"{}\",\"label\":{}}}\n", char::from(b'a' + row as u8), row % 2);
    files.add(&(0..20).map(line).collect::<String>());
    files.config.data.negatives = 2;
    files.config.training.batch_size = 20;
    let batch = first(&mut files, OPTIONS);
    let table = &batch.tables[0];
    let class = |sequence: u32| batch.sequences[sequence as usize].ids[1] % 2;
    assert_eq!(table.candidates.len(), 60);
    for i in 0..20 {
        let own = class(table.queries[i]);
        let expected: Vec<u32> = (0..60)
            .filter(|&column| column != i as u32 && class(table.candidates[column as usize]) == own)
            .collect();
        assert_eq!(row(&table.excluded, i), expected);
        assert_eq!(row(&table.own, i).len(), 3);
    }
    let batch = first(&mut files, BatchOptions { mask_known_positives: false, ..OPTIONS });
    assert!(batch.tables[0].excluded.columns.is_empty());
}

#[test]
fn rows_with_another_loss_have_a_table_of_their_own() {
    let mut files = Files::new(&["{\"query\": \"a\", \"positive\": \"b\", \"negative\": \"c\"}\n"]);
    files.add(
        "{\"s1\": \"a\", \"s2\": \"d\", \"score\": 2}\n{\"s1\": \"e\", \"s2\": \"b\", \"score\": 4.5}\n",
    );
    let taught = "{\"query\": \"a\", \"positive\": \"f\", \"negatives\": [\"g\", \"b\", \"h\"], \"scores\": [4, 3, 2, 1]}\n";
    files.add(taught).loss = Some(LossKind::Kl);
    files.add("{\"query\": \"i\", \"positive\": \"a\"}\n");
    files.config.training.batch_size = 5;
    let batch = first(&mut files, OPTIONS);
    let letters = |sequences: &[u32]| -> String {
        sequences.iter().map(|s| char::from((batch.sequences[*s as usize].ids[1] - 3) as u8 + b'a')).collect()
    };
    let [info_nce, cosent, kl] = batch.tables.as_slice() else { panic!("{:?}", batch.tables) };
    assert_eq!((info_nce.loss, &info_nce.rows[..]), (LossKind::InfoNce, &[0, 4][..]));
    assert_eq!((letters(&info_nce.queries), letters(&info_nce.candidates)), ("ai".into(), "bac".into()));
    assert_eq!(
        (cosent.loss, &cosent.rows[..], &cosent.scores[..]),
        (LossKind::CoSent, &[1, 2][..], &[2.0, 4.5][..])
    );
    assert_eq!((letters(&cosent.queries), letters(&cosent.candidates)), ("ae".into(), "db".into()));
    assert_eq!((kl.loss, &kl.rows[..], &kl.scores[..]), (LossKind::Kl, &[3][..], &[4.0, 3.0, 2.0, 1.0][..]));
    assert_eq!(letters(&kl.candidates), "fgbh");
    // Each text is encoded once, whichever tables it stands in.
    assert_eq!(batch.sequences.len(), 9);
    // What is masked takes its score along: `f` again, in other letters.
    let mut files = Files::new(&[]);
    files.add(&taught.replace("\"g\"", "\"F\"")).loss = Some(LossKind::Kl);
    files.config.training.batch_size = 1;
    assert_eq!(first(&mut files, OPTIONS).tables[0].scores, [4.0, 2.0, 1.0]);
}
