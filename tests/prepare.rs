//! Data are prepared by `trainer split`, `mine` and `nano`, as their users meet them.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::{golden, golden_json, program, stderr};

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

fn stdout(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// `mine` on rows of the golden model, with the golden's settings.
fn mine(program: &mut Command, pairs: &Path, output: &Path, settings: &Value) {
    let number = |name: &str| settings[name].as_f64();
    program
        .arg("mine")
        .arg("--model")
        .arg(golden("bert"))
        .arg("--pairs")
        .arg(pairs)
        .arg("--output")
        .arg(output);
    program.arg("--negatives").arg(settings["num_negatives"].to_string());
    let relative = number("relative_margin").map_or("none".to_owned(), |margin| margin.to_string());
    program.arg("--relative-margin").arg(relative);
    for (flag, name) in
        [("--absolute-margin", "absolute_margin"), ("--max-score", "max_score"), ("--min-score", "min_score")]
    {
        number(name).map(|value| program.arg(flag).arg(value.to_string()));
    }
    let last = settings["range_max"].as_u64().map_or(String::new(), |last| last.to_string());
    program.arg("--range").arg(format!("{}..{last}", settings["range_min"].as_u64().unwrap_or(0)));
    if settings["include_positives"] == true {
        program.arg("--include-positives");
    }
}

#[test]
fn negatives_are_those_of_sentence_transformers_on_one_rank_and_on_two() {
    let place = tempfile::tempdir().unwrap();
    let golden_rows = golden_json("", "mining.json")["folder"].take();
    let texts = golden_rows["corpus"].as_array().unwrap().iter();
    let corpus = place.path().join("corpus.jsonl");
    fs::write(&corpus, texts.map(|text| format!("{}\n", json!({"text": text}))).collect::<String>()).unwrap();
    let pairs = place.path().join("pairs.jsonl");
    let row = |pair: &Value| format!("{}\n", json!({"query": pair[0], "positive": pair[1]}));
    fs::write(&pairs, golden_rows["pairs"].as_array().unwrap().iter().map(row).collect::<String>()).unwrap();
    for (number, case) in golden_rows["cases"].as_array().unwrap().iter().enumerate() {
        for ranks in [1, 2] {
            let output = place.path().join(format!("{number}-{ranks}.jsonl"));
            let mut command = program(if ranks == 1 { "trainer" } else { "launch" });
            if ranks == 2 {
                command.args(["--cpus", "2", "--"]);
            }
            mine(&mut command, &pairs, &output, &case["settings"]);
            command.arg("--output-scores").arg("--corpus").arg(&corpus).current_dir(place.path());
            let counts = stdout(&run(&mut command));
            let rows = lines(&output);
            let expected = case["rows"].as_array().unwrap();
            assert_eq!((rows.len(), &counts["rows"]), (expected.len(), &json!(rows.len())));
            for (row, expected) in rows.iter().zip(expected) {
                let found = json!([row["query"], row["positive"], row["negatives"]]);
                assert_eq!(
                    found.as_array().unwrap()[..],
                    expected.as_array().unwrap()[..3],
                    "on {ranks} ranks"
                );
                let scores = row["scores"].as_array().unwrap().iter().zip(expected[3].as_array().unwrap());
                for (score, expected) in scores {
                    assert!((score.as_f64().unwrap() - expected.as_f64().unwrap()).abs() < 1e-5, "{row}");
                }
                assert_eq!(
                    row["scores"].as_array().unwrap().len(),
                    1 + row["negatives"].as_array().unwrap().len()
                );
            }
            let dropped = counts["dropped"]["positive"].as_u64().unwrap();
            assert_eq!(dropped == 0, case["settings"]["include_positives"] == true, "{counts}");
        }
    }
}

#[test]
fn mining_that_was_killed_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let pairs = place.path().join("pairs.jsonl");
    let row = |i| {
        format!("{}\n", json!({"query": format!("{i}: who found radon?"), "positive": format!("radon: {i}")}))
    };
    fs::write(&pairs, (0..24_000).map(row).collect::<String>()).unwrap();
    let (whole, output) = (place.path().join("whole.jsonl"), place.path().join("mined.jsonl"));
    let command = |output: &Path| {
        let mut command = program("trainer");
        mine(&mut command, &pairs, output, &json!({"num_negatives": 2, "range_min": 1}));
        command
    };
    run(&mut command(&whole));

    // The first of two files of queries is there, the second and all of the documents are not.
    let mut child = command(&output).spawn().unwrap();
    let work = place.path().join(".mined.jsonl.work");
    let began = Instant::now();
    let first = || {
        let folder = fs::read_dir(&work).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
        folder.map(|path| path.join("queries-00000.npy")).find(|path| path.is_file())
    };
    while first().is_none() {
        assert!(began.elapsed() < Duration::from_secs(240), "nothing was embedded");
        sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!output.exists());

    let resumed = run(&mut command(&output));
    assert!(stderr(&resumed).contains("16384 of 24000 queries are already embedded"), "{}", stderr(&resumed));
    assert_eq!(fs::read(&output).unwrap(), fs::read(&whole).unwrap());
    assert!(!work.exists(), "nothing stays but the rows");
    assert_eq!(lines(&output).len(), 24_000);
}

#[test]
fn rows_that_were_mined_and_split_train() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let mut split = program("trainer");
    split.arg("split").arg("--input").arg(golden("bert").join("rows.jsonl")).arg("--output").arg(at("parts"));
    let counts = stdout(&run(split.args(["--fractions", "0.75,0.25"])));
    assert_eq!(counts["train"].as_u64().unwrap() + counts["test"].as_u64().unwrap(), 40);
    let (train, test) = (lines(&at("parts/train.jsonl")), lines(&at("parts/test.jsonl")));
    assert_eq!((json!(train.len()), json!(test.len())), (counts["train"].clone(), counts["test"].clone()));

    let mut command = program("trainer");
    mine(&mut command, &at("parts/train.jsonl"), &at("mined.jsonl"), &json!({"num_negatives": 2}));
    run(command.arg("--output-scores"));
    for (loss, output) in [("info_nce", "out"), ("margin_mse", "taught")] {
        let mut config = tests::config(&golden("bert"), &at("mined.jsonl"), &at(output));
        // Texts as long as they were when they were mined.
        config["model"] = json!({"path": golden("bert"), "dropout": 0.0});
        config["data"]["negatives"] = json!(2);
        config["loss"]["kind"] = json!(loss);
        let config = tests::write_config(place.path(), &config);
        run(program("trainer").arg("train").arg(config));
        assert!(at(output).join("model/model.safetensors").is_file());
    }
    // The model is its own teacher: there is nothing to learn yet.
    let first = tests::metrics(&at("taught"))[0]["loss"].as_f64().unwrap();
    assert!(first < 1e-9, "{first}");
    let again = split.output().unwrap();
    assert_eq!(again.status.code(), Some(2));
    assert!(stderr(&again).contains("parts: already exists"), "{}", stderr(&again));
}

/// A BEIR folder of the golden's rows, every passage and every negative a document.
fn beir(folder: &Path) {
    fs::create_dir_all(folder.join("qrels")).unwrap();
    let rows = lines(&golden("bert").join("rows.jsonl"));
    let (mut corpus, mut queries, mut qrels) = (String::new(), String::new(), String::new());
    for (i, row) in rows.iter().enumerate() {
        corpus.push_str(&format!(
            "{}\n",
            json!({"_id": format!("p{i}"), "title": "", "text": row["positive"]})
        ));
        corpus.push_str(&format!("{}\n", json!({"_id": format!("n{i}"), "text": row["negatives"][0]})));
        queries.push_str(&format!("{}\n", json!({"_id": format!("q{i}"), "text": row["query"]})));
        qrels.push_str(&format!("q{i}\tp{i}\t1\n"));
    }
    for (name, text) in [("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels/test.tsv", qrels)] {
        fs::write(folder.join(name), text).unwrap();
    }
}

#[test]
fn a_nano_set_is_opened_by_evaluate() {
    let place = tempfile::tempdir().unwrap();
    beir(&place.path().join("large"));
    fs::create_dir(place.path().join("shape")).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(golden("bert").join(name), place.path().join("shape").join(name)).unwrap();
    }
    let model = golden("bert");
    let nano = |name: &str, model: &[&str]| {
        let mut command = program("trainer");
        command.args(["nano", "--queries", "8", "--negatives", "3", "--set", "large", "--output", name]);
        stdout(&run(command.args(model).current_dir(place.path())))
    };
    let (words, both) = (nano("NanoWords", &[]), nano("NanoBoth", &["--model", model.to_str().unwrap()]));
    let drawn = nano("NanoDrawn", &["--model", "shape", "--random-weights"]);
    assert!(drawn["dense"].as_u64().unwrap() >= 8, "{drawn}");
    assert_eq!((&words["queries"], &words["dense"]), (&json!(8), &json!(0)));
    assert!(both["dense"].as_u64().unwrap() >= 8 && both["bm25"].as_u64().unwrap() >= 8, "{both}");
    let mut evaluate = program("trainer");
    evaluate.arg("evaluate").arg("--model").arg(golden("bert")).args(["--set", "NanoWords", "NanoBoth"]);
    let scores = stdout(&run(evaluate.current_dir(place.path())));
    for name in ["NanoWords", "NanoBoth"] {
        let score = scores[format!("{name}_cosine_ndcg@10")].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&score), "{scores}");
    }
}

#[test]
fn a_nano_set_that_is_stopped_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    beir(&place.path().join("large"));
    let document = |i| format!("{}\n", json!({"_id": format!("more{i}"), "text": format!("radon: {i}")}));
    let corpus = place.path().join("large/corpus.jsonl");
    let answers = fs::read_to_string(&corpus).unwrap();
    fs::write(&corpus, answers + &(0..24_000).map(document).collect::<String>()).unwrap();
    let mut command = program("trainer");
    command.args(["nano", "--set", "large", "--output", "small", "--model"]).arg(golden("bert"));
    let mut child = command.current_dir(place.path()).spawn().unwrap();
    let names = || {
        let entries = fs::read_dir(place.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    let began = Instant::now();
    while !names().iter().any(|name| place.path().join(name).join("folder").is_dir()) {
        assert!(began.elapsed() < Duration::from_secs(240), "nothing was begun");
        sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().signal(), Some(15));
    assert_eq!(names(), ["large"]);
}

#[test]
fn bad_input_is_named_and_nothing_is_written() {
    let place = tempfile::tempdir().unwrap();
    beir(&place.path().join("large"));
    beir(&place.path().join("one"));
    beir(&place.path().join("unknown"));
    let write = |name: &str, text: &str| fs::write(place.path().join(name), text).unwrap();
    write("one/corpus.jsonl", "{\"_id\": \"p0\", \"text\": \"a\"}\n");
    write("one/qrels/test.tsv", "q0\tp0\t1\n");
    write("unknown/qrels/test.tsv", "q0\tp0\t1\nq1\tnowhere\t1\n");
    write("good.jsonl", "{\"query\": \"a\", \"positive\": \"x\"}\n{\"query\": \"b\", \"positive\": \"y\"}\n");
    write("bad.jsonl", "{\"query\": \"a\", \"positive\": \"x\"}\n{\"query\": \"b\", \"positive\": 7}\n");
    write(
        "single.jsonl",
        "{\"query\": \"a\", \"positive\": \"x\"}\n{\"query\": \"b\", \"positive\": \"x\"}\n",
    );
    let model = golden("bert");
    let mine = ["mine", "--model", model.to_str().unwrap(), "--output", "out", "--pairs"];
    let split = ["split", "--output", "out", "--input"];
    let nano = ["nano", "--output", "out", "--set"];
    for (command, rest, words) in [
        (&mine[..], &["bad.jsonl"][..], &["bad.jsonl:2", "`positive`", "expected"][..]),
        (&mine, &["none.jsonl"], &["none.jsonl", "cannot open"]),
        (&mine, &["single.jsonl"], &["single.jsonl", "one document", "--corpus"]),
        (&mine, &["good.jsonl", "--corpus", "bad.jsonl"], &["bad.jsonl:1", "has no `text`"]),
        (&mine, &["good.jsonl", "--range", "5..5"], &["--range 5..5 is empty"]),
        (&mine, &["good.jsonl", "--range", "0..3"], &["has 3 ranks", "fewer than --negatives 5"]),
        (&mine, &["good.jsonl", "--range", "3"], &["--range", "expected A..B"]),
        (&mine, &["good.jsonl", "--min-score", "x"], &["--min-score", "expected a number"]),
        (&mine, &["good.jsonl", "--relative-margin", "nan"], &["--relative-margin", "expected a number"]),
        (&mine, &["good.jsonl", "--negatives", "0"], &["--negatives", "above 0"]),
        (&split, &["bad.jsonl", "--fractions", "0.5,0.6"], &["--fractions: 0.5,0.6 do not add up to 1"]),
        (&split, &["good.jsonl"], &["would be empty"]),
        (&split, &["large"], &["large"]),
        (&nano, &["one"], &["corpus.jsonl", "1 documents"]),
        (&nano, &["unknown"], &["test.tsv:2", "`nowhere` is not in corpus.jsonl"]),
        (&nano, &["large", "--query-prompt", "q: "], &["--model is missing"]),
        (&nano, &["large", "--random-weights"], &["--model is missing"]),
        (&nano, &["none"], &["none", "BEIR folder"]),
    ] {
        let output = program("trainer").args(command).args(rest).current_dir(place.path()).output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{command:?} {rest:?}: {message}");
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
        assert!(!place.path().join("out").exists() && output.stdout.is_empty(), "{message}");
    }
    for (model, output, words) in [
        (model.to_str().unwrap(), "good.jsonl", "--output: good.jsonl is an input"),
        ("no/such/place/model", "out", "no/such/place/model"),
    ] {
        let mut command = program("trainer");
        command.args(["mine", "--pairs", "good.jsonl", "--model", model, "--output", output]);
        let output = command.current_dir(place.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    assert_eq!(lines(&place.path().join("good.jsonl")).len(), 2);
}
