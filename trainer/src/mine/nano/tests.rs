use std::fs;

use candle_core::Device;

use super::*;

/// Writes a BEIR folder `set` with these files into a temporary folder.
fn set(files: &[(&str, String)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join("set").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

const WORDS: [&str; 12] =
    ["iron", "tin", "zinc", "gold", "mars", "venus", "river", "sea", "lake", "song", "opera", "choir"];

/// 300 documents of a few words, and 30 queries, of which 24 have one to three relevant documents.
fn words() -> Vec<(&'static str, String)> {
    let word = |i: usize| WORDS[(i * i + i / 7) % 12];
    let text = |i: usize| (0..4 + i % 5).map(|k| word(i * 3 + k * 5)).collect::<Vec<_>>().join(" ");
    let corpus = (0..300).map(|i| match i % 50 {
        49 => format!("{{\"_id\": \"d{i}\", \"title\": \"\", \"text\": \" \"}}\n"),
        _ => format!("{{\"text\": \"{}\", \"title\": \"{}\",  \"_id\": \"d{i}\"}}\n", text(i), word(i)),
    });
    let queries = (0..30)
        .map(|i| format!("{{\"_id\": \"q{i}\", \"text\": \"{} {}?\", \"n\": {i}}}\n", word(i), word(i + 4)));
    let answers = (0..24)
        .rev()
        .flat_map(|i| (0..1 + i % 3).map(move |k| format!("q{i}\td{}\t{}\n", i * 7 + k, 2 - k % 2)));
    vec![
        ("corpus.jsonl", corpus.collect()),
        ("queries.jsonl", queries.collect()),
        (
            "qrels/test.tsv",
            format!("query-id\tcorpus-id\tscore\nq25\td1\t0\n{}", answers.collect::<String>()),
        ),
    ]
}

fn nano(folder: &tempfile::TempDir, name: &str) -> NanoBuilder {
    NanoBuilder {
        set: folder.path().join("set"),
        split: None,
        output: folder.path().join(name),
        queries: 10,
        negatives: 6,
        seed: 42,
    }
}

fn lines(folder: &tempfile::TempDir, name: &str) -> Vec<String> {
    fs::read_to_string(folder.path().join(name)).unwrap().lines().map(str::to_owned).collect()
}

/// Embeds a text as the counts of its words.
fn embed(texts: &[String], _: Role) -> Result<Tensor> {
    let count = |text: &String, word: &str| text.split([' ', '?']).filter(|other| *other == word).count();
    let rows: Vec<f32> =
        texts.iter().flat_map(|text| WORDS.map(|word| count(text, word) as f32 + 0.01)).collect();
    Ok(Tensor::from_vec(rows, (texts.len(), 12), &Device::Cpu)?)
}

#[test]
fn a_nano_set_has_the_relevant_documents_and_the_best_ranked_others() {
    let folder = set(&words());
    let whole = nano(&folder, "small");
    let counts = whole.sample().unwrap().write(Some(&mut embed)).unwrap();
    let (corpus, queries) = (lines(&folder, "small/corpus.jsonl"), lines(&folder, "small/queries.jsonl"));
    let qrels = lines(&folder, "small/qrels/test.tsv");
    assert_eq!((counts.queries, queries.len(), counts.documents), (10, 10, corpus.len()));
    assert!(counts.documents <= counts.positives + 60 && counts.bm25 + counts.dense == 60, "{counts:?}");
    assert!(counts.bm25 >= 30 && counts.dense >= 10, "{counts:?}");

    // Rows are copied byte for byte, in their order.
    for (small, name) in [(&corpus, "set/corpus.jsonl"), (&queries, "set/queries.jsonl")] {
        let large = lines(&folder, name);
        let places: Vec<_> =
            small.iter().map(|row| large.iter().position(|other| other == row).unwrap()).collect();
        assert!(places.is_sorted_by(|a, b| a < b), "{name}");
    }
    // The qrels are those of the drawn queries.
    let id = |row: &String| serde_json::from_str::<Value>(row).unwrap()["_id"].as_str().unwrap().to_owned();
    let drawn: Vec<String> = queries.iter().map(id).collect();
    let mut expected: Vec<String> = lines(&folder, "set/qrels/test.tsv")
        .into_iter()
        .filter(|line| drawn.iter().any(|id| line.starts_with(&format!("{id}\t"))))
        .collect();
    let mut found = qrels[1..].to_vec();
    assert_eq!(qrels[0], "query-id\tcorpus-id\tscore");
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    let present: HashSet<String> = corpus.iter().map(id).collect();
    assert!(found.iter().all(|line| present.contains(line.split('\t').nth(1).unwrap())));
    let answers: HashSet<&str> = found.iter().map(|line| line.split('\t').nth(1).unwrap()).collect();
    let blank = |id: &&String| id.ends_with("49") || id.ends_with("99");
    assert!(
        present.iter().filter(blank).all(|id| answers.contains(id.as_str())),
        "blank documents are added only if they are relevant"
    );

    // `trainer evaluate` opens it.
    let set = crate::config::EvaluationSet {
        path: whole.output.clone(),
        kind: Some(crate::config::EvaluationKind::Retrieval),
        ..Default::default()
    };
    assert_eq!(crate::eval::EvalSet::open(&set, &crate::config::Config::default()).unwrap().name(), "small");
}

#[test]
fn the_seed_decides_which_queries_are_drawn() {
    let folder = set(&words());
    let drawn = |seed, name: &str| {
        let nano = NanoBuilder { seed, ..nano(&folder, name) };
        nano.sample().unwrap().write(None).unwrap();
        ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"]
            .map(|file| lines(&folder, &format!("{name}/{file}")))
    };
    let one = drawn(1, "a");
    assert_eq!(one, drawn(1, "b"));
    assert!(one[1] != drawn(2, "c")[1]);
    // More queries than have a relevant document.
    let all = NanoBuilder { queries: 99, negatives: 0, ..nano(&folder, "all") };
    let counts = all.sample().unwrap().write(None).unwrap();
    assert_eq!((counts.queries, counts.documents, counts.bm25), (24, counts.positives, 0));
}

#[test]
fn rankings_are_interleaved() {
    let answers = HashSet::from([3]);
    assert_eq!(interleave(&[1, 2, 3, 4], &[1, 5, 6], &answers, 4), (vec![1, 5, 2, 6], 2));
    assert_eq!(interleave(&[1, 2, 3, 4], &[1, 5, 6], &answers, 9), (vec![1, 5, 2, 6, 4], 3));
    assert_eq!(interleave(&[], &[3, 9], &answers, 5), (vec![9], 0));
    assert_eq!(interleave(&[1], &[2], &answers, 0), (vec![], 0));
}

#[test]
fn errors_name_file_and_line_and_nothing_is_written() {
    let put = |name: &str, text: &str| {
        let mut files: Vec<(&str, String)> = words();
        files.retain(|(other, _)| *other != name);
        files.push((name, text.to_owned()));
        set(&files)
    };
    for (name, text, expected) in [
        ("qrels/test.tsv", "q1\td1\t1\nq1\tx9\t1\n", "test.tsv:2: `x9` is not in corpus.jsonl"),
        ("qrels/test.tsv", "q99\td1\t1\n", "test.tsv:1: `q99` is not in queries.jsonl"),
        ("qrels/test.tsv", "q1\td1\t0\n", "test.tsv: has no relevant document"),
        ("qrels/test.tsv", "q1 d1 1\n", "test.tsv:1: expected query-id"),
        (
            "corpus.jsonl",
            "{\"_id\": \"d1\", \"text\": \"one\"}\n",
            "corpus.jsonl: has 1 documents, expected at least 2",
        ),
        (
            "corpus.jsonl",
            "{\"_id\": \"d1\", \"text\": \"a\"}\n{\"_id\": \"d1\", \"text\": \"b\"}\n",
            "corpus.jsonl:2: has the `_id` `d1` of another",
        ),
        ("corpus.jsonl", "{\"_id\": \"d1\", \"txt\": \"a\"}\n", "corpus.jsonl:1: has no `text`"),
        (
            "queries.jsonl",
            "{\"_id\": \"q1\", \"text\": \"a\"}\n{\"_id\": \"q1\", \"text\": \"b\"}\n",
            "queries.jsonl:2: has the `_id` `q1`",
        ),
        ("queries.jsonl", "{\"text\": \"a\"}\n", "queries.jsonl:1: has no `_id`"),
    ] {
        let folder = put(name, text);
        let error = nano(&folder, "small").sample().err().unwrap().to_string();
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
    let folder = set(&words());
    let again = nano(&folder, "set");
    assert!(again.sample().err().unwrap().to_string().contains("set: already exists"));
    let empty = tempfile::tempdir().unwrap();
    let error =
        NanoBuilder { set: empty.path().to_owned(), ..nano(&empty, "x") }.sample().err().unwrap().to_string();
    assert!(error.contains("expected a BEIR folder"), "{error}");
}
