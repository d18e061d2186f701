//! `trainer init` on tables as their owners have them, and the commands that it prints.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tests::{golden, program, stderr};

/// Rows of the golden model's texts.
fn rows() -> Vec<Value> {
    let text = fs::read_to_string(golden("bert").join("rows.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A field of a CSV file.
fn field(text: &Value) -> String {
    format!("\"{}\"", text.as_str().unwrap().replace('"', "\"\""))
}

fn init(place: &Path, arguments: &[&str]) -> Output {
    let mut command = program("trainer");
    command.arg("init").args(arguments).current_dir(place).output().unwrap()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A command as `init` prints it.
fn printed(line: &str, place: &Path) -> Command {
    let mut words = line.split(' ');
    let mut command = program(words.next().unwrap());
    command.args(words).current_dir(place);
    command
}

#[test]
fn a_table_becomes_a_trained_model_by_the_commands_that_are_printed() {
    let place = tempfile::tempdir().unwrap();
    let table: String = rows()
        .iter()
        .map(|row| format!("1,{},{}\n", field(&row["query"]), field(&row["positive"])))
        .collect();
    fs::write(place.path().join("faq.csv"), format!("Nr,Frage,Antwort\n{table}")).unwrap();
    let model = golden("bert");
    let output = init(place.path(), &["faq.csv", "--model", model.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("40 rows of query and positive: columns `Frage` and `Antwort`"), "{said}");
    assert!(said.contains("held out 4 of 40 rows"), "{said}");
    let config = fs::read_to_string(place.path().join("faq.yaml")).unwrap();
    assert!(config.contains("columns: {query: Frage, positive: Antwort}"), "{config}");

    let lines = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines[..2], ["faq.yaml", "launch faq.yaml"]);
    // What is held out is not trained on.
    let train = fs::read_to_string(place.path().join("data/faq/train.csv")).unwrap();
    let test = fs::read_to_string(place.path().join("data/faq/test.jsonl")).unwrap();
    assert_eq!((train.lines().count(), test.lines().count()), (1 + 36, 4));
    for row in test.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        assert!(!train.contains(&field(&row["query"])), "{row}");
    }
    run(printed(lines[1], place.path()).arg("training.max_steps=2"));
    let compared = run(&mut printed(lines[2], place.path()));
    assert!(compared.contains("test, 4 queries") && compared.contains("cosine_ndcg@10"), "{compared}");

    let again = init(place.path(), &["faq.csv"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(stderr(&again).contains("faq.yaml: already exists"), "{}", stderr(&again));
}

#[test]
fn every_kind_of_rows_has_a_set_to_evaluate_on() {
    let place = tempfile::tempdir().unwrap();
    let model = golden("bert");
    let rows = rows();
    let jsonl = |row: &dyn Fn(usize, &Value) -> Value| -> String {
        rows.iter().enumerate().map(|(number, value)| format!("{}\n", row(number, value))).collect()
    };
    let triplets = jsonl(&|_, row| row.clone());
    let labelled: String = (0..3)
        .map(|copy| {
            jsonl(&|number, row| {
                let text = format!("{} {copy}", row["query"].as_str().unwrap());
                serde_json::json!({"text": text, "label": format!("c{}", number % 2)})
            })
        })
        .collect();
    let scored = jsonl(
        &|number, row| serde_json::json!({"text_a": row["query"], "text_b": row["positive"], "Bewertung": number as f64 / 40.0}),
    );
    for (name, text, kind) in [
        ("triplets", triplets, "kind: triplet"),
        ("labelled", labelled, "kind: triplet"),
        ("scored", scored, "kind: similarity"),
    ] {
        fs::write(place.path().join(format!("{name}.jsonl")), text).unwrap();
        let output = init(place.path(), &[&format!("{name}.jsonl"), "--model", model.to_str().unwrap()]);
        assert!(output.status.success(), "{}", stderr(&output));
        let config = fs::read_to_string(place.path().join(format!("{name}.yaml"))).unwrap();
        assert!(config.contains(kind), "{config}");
        run(program("trainer").args(["plan", &format!("{name}.yaml")]).current_dir(place.path()));
        let lines = String::from_utf8(output.stdout).unwrap();
        let compare =
            lines.lines().nth(2).unwrap().replace(&format!("runs/{name}/model"), model.to_str().unwrap());
        run(&mut printed(&compare, place.path()));
    }
}

#[test]
fn a_file_that_is_not_understood_is_shown() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("odd.csv"), "u,v,w\nein Satz,noch ein Satz,und noch einer\n").unwrap();
    fs::write(place.path().join("odd.txt"), "a\n").unwrap();
    for (arguments, words) in [
        (
            &["odd.csv"][..],
            &["odd.csv: cannot tell what the rows are", "  u  (text", "u: ein Satz", "needed: "][..],
        ),
        (&["odd.csv", "--columns", "query=u,positive=x"], &["has no column `x`", "u: ein Satz"]),
        (&["odd.csv", "--columns", "frage=u"], &["--columns: found `frage=u`, expected PART=NAME"]),
        (&["odd.txt"], &["odd.txt: expected a data file"]),
        (&["none.csv"], &["none.csv", "cannot open"]),
    ] {
        let output = init(place.path(), arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
        assert!(output.stdout.is_empty());
    }
    assert!(!place.path().join("odd.yaml").exists() && !place.path().join("data").exists());
    let named =
        init(place.path(), &["odd.csv", "--columns", "query=u,positive=v", "--output", "a/named.yaml"]);
    assert!(named.status.success(), "{}", stderr(&named));
    assert!(stderr(&named).contains("too few to hold some out"), "{}", stderr(&named));
    assert!(place.path().join("a/named.yaml").is_file());
}
