//! Tests of the readers: files as users have them, and the messages they get.

use std::io::Write;

use super::*;

fn set(path: &Path) -> DataSet {
    DataSet { path: path.to_owned(), ..DataSet::default() }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn open(name: &str, text: impl AsRef<[u8]>) -> Result<Source> {
    let folder = Folder::new();
    Source::open(&set(&folder.write(name, text.as_ref())))
}

/// The message from the file's name on.
fn message(name: &str, text: impl AsRef<[u8]>) -> String {
    let error = open(name, text).err().expect("an error").to_string();
    error[error.find(name).unwrap()..].to_owned()
}

fn rows(source: &Source) -> Vec<Row> {
    (0..source.len()).map(|row| source.row(row).unwrap()).collect()
}

fn row(query: &str, positives: &[&str], negatives: &[&str]) -> Row {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    Row {
        query: query.to_owned(),
        positives: owned(positives),
        negatives: owned(negatives),
        ..Row::default()
    }
}

#[test]
fn jsonl_rows_come_in_all_their_forms() {
    let text = "\u{feff}{\"query\": \"a\", \"positive\": \"b\"}\r\n\n  \n\
        {\"query\": \"c\", \"positive\": [\"d\", \"e\"], \"negatives\": [\"f\", \"g\"], \"other\": 3}\n\
        {\"anchor\": \"é\", \"document\": \"😀\\n\", \"negative\": \"h\"}\n\
        {\"query\": \"i\", \"positive\": \"j\", \"negatives\": null}";
    let source = open("a.jsonl", text).unwrap();
    let expected = vec![
        row("a", &["b"], &[]),
        row("c", &["d", "e"], &["f", "g"]),
        row("é", &["😀\n"], &["h"]),
        row("i", &["j"], &[]),
    ];
    assert_eq!(rows(&source), expected);
    assert!(source.error(1, "wrong").to_string().ends_with("a.jsonl:4: wrong"));
}

#[test]
fn csv_rows_come_in_all_their_forms() {
    let text = "\u{feff}id,Question,Answer,negatives\r\n1,\"a, \"\"b\"\"\",\"c\nd\",\r\n\r\n2, e ,f,\"[\"\"g\"\", \"\"h\"\"]\"\r\n3,i,j,k";
    let source = open("a.csv", text).unwrap();
    let expected =
        vec![row("a, \"b\"", &["c\nd"], &[]), row(" e ", &["f"], &["g", "h"]), row("i", &["j"], &["k"])];
    assert_eq!(rows(&source), expected);
    assert!(source.error(1, "wrong").to_string().ends_with("a.csv:5: wrong"));
    let source = open("a.tsv", "query\tpositive\tnegative\na, b\tc\t\n\nd\te\tf \n").unwrap();
    assert_eq!(rows(&source), [row("a, b", &["c"], &[]), row("d", &["e"], &["f "])]);
}

#[test]
fn numbered_negatives_are_taken_in_their_order() {
    let source = open("a.csv", "anchor,positive,negative_2,negative_1\na,b,c,d\ne,f,,g\n").unwrap();
    assert_eq!(rows(&source), [row("a", &["b"], &["d", "c"]), row("e", &["f"], &["g"])]);
}

#[test]
fn packed_files_read_like_plain_ones() {
    let folder = Folder::new();
    let text = b"{\"query\": \"a\", \"positive\": \"b\"}\n{\"query\": \"c\", \"positive\": \"d\"}\n";
    let plain = Source::open(&set(&folder.write("plain.jsonl", text))).unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&text[..30]).unwrap();
    let mut gz = gz.finish().unwrap();
    // Two members end to end, as `cat a.gz b.gz` makes them.
    let mut rest = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    rest.write_all(&text[30..]).unwrap();
    gz.extend(rest.finish().unwrap());
    let zst = zstd::encode_all(&text[..], 1).unwrap();
    for (name, bytes) in [("a.jsonl.gz", &gz), ("a.jsonl.zst", &zst)] {
        let path = folder.write(name, bytes);
        let source = Source::open(&set(&path)).unwrap();
        assert_eq!(rows(&source), rows(&plain));
        assert_eq!(source.digest(), plain.digest());
        let cut = folder.write(name, &bytes[..bytes.len() / 2]);
        let error = Source::open(&set(&cut)).err().unwrap().to_string();
        assert!(error.contains(&format!("{name}: cannot unpack: ")), "{error}");
    }
}

#[test]
fn a_wrong_json_row_is_named_by_its_line() {
    let good = "{\"query\": \"a\", \"positive\": \"b\"}\n";
    for (bad, expected) in [
        ("{\"query\": \"a\", \"positive\"}", "this is not JSON: expected `:` at column 26"),
        ("{\"query\": \"a\"", "this is not JSON: EOF while parsing an object at column 13"),
        ("[1]", "expected a JSON object, found a list"),
        ("{\"query\": \"a\", \"positive\": \" \\n\"}", "`positive` has an empty text"),
        ("{\"query\": \"\", \"positive\": \"b\"}", "`query` has an empty text"),
        ("{\"query\": null, \"positive\": \"b\"}", "`query` is missing"),
        ("{\"query\": [\"a\"], \"positive\": \"b\"}", "`query` is a list, expected one text"),
        ("{\"query\": \"a\", \"positive\": null}", "has no positive: `positive` is missing or empty"),
        ("{\"query\": \"a\", \"positive\": []}", "has no positive: `positive` is missing or empty"),
        (
            "{\"query\": \"a\", \"positive\": 3}",
            "`positive` has the number 3 where text was expected\nhint: put it in quotes",
        ),
        (
            "{\"query\": \"a\", \"positive\": [\"b\", {}]}",
            "`positive` has an object where text was expected\nhint: put it in quotes",
        ),
        (
            "{\"query\": \"a\", \"positive\": \"b\", \"negatives\": [\"c\", \"\"]}",
            "`negatives` has an empty text",
        ),
    ] {
        let text = format!("{good}\n{good}{bad}\n{good}");
        assert_eq!(message("a.jsonl", text), format!("a.jsonl:4: {expected}"));
    }
    let error = message("a.jsonl", format!("{good}{{\"query\": \"a\"}}\n"));
    assert!(
        error.starts_with("a.jsonl:2: has no column for the positive, expected one of positive, "),
        "{error}"
    );
    let error = message("a.jsonl", b"{\"query\": \"a\", \"positive\": \"b\xff\"}\n");
    assert!(error.starts_with("a.jsonl:1: is not UTF-8 at byte 30 of the row\nhint: iconv"), "{error}");
}

#[test]
fn a_wrong_csv_row_is_named_by_the_line_it_begins_in() {
    for line_end in ["\n", "\r\n"] {
        let good = "query,positive\n\"a\nb\",c\nd,e\n";
        for (bad, expected) in [
            ("f", "has 1 fields where the header has 2"),
            ("f,g,h", "has 3 fields where the header has 2"),
            ("\" \n\",g", "`query` has an empty text"),
            ("f,", "`positive` has an empty text"),
            ("f,\"g", "a quote that opens in this row is never closed"),
        ] {
            let text = format!("{good}{bad}").replace('\n', line_end);
            assert_eq!(message("a.csv", text), format!("a.csv:5: {expected}"));
        }
    }
    assert!(message("a.csv", b"query,positive\na,\xe9\n").starts_with("a.csv:2: is not UTF-8 at byte 3"));
}

#[test]
fn a_header_that_does_not_fit_is_listed() {
    let error = message("a.csv", "q,answer\na,b\n");
    assert!(
        error.starts_with("a.csv:1: has no column for the query") && error.contains("found q, answer"),
        "{error}"
    );
    assert_eq!(
        message("a.csv", "query,query\na,b\n"),
        "a.csv:1: the header names column 1 and column 2 `query`"
    );
    assert_eq!(message("a.csv", ""), "a.csv: is empty, expected a header and rows");
    assert_eq!(message("a.csv", "query,positive\n"), "a.csv: has no rows");
    assert_eq!(message("a.jsonl", "\n\n"), "a.jsonl: has no rows");
}

#[test]
fn what_is_no_data_file_is_refused() {
    assert!(message("a.txt", "x").starts_with("a.txt: expected a data file (.jsonl, .csv, .tsv or .parquet"));
    let missing = Source::open(&set(Path::new("no/such.jsonl"))).err().unwrap().to_string();
    assert!(missing.starts_with("no/such.jsonl: cannot open: "), "{missing}");
    let empty = tempfile::tempdir().unwrap();
    let error = Source::open(&set(empty.path())).err().unwrap().to_string();
    assert!(error.contains("expected a BEIR folder") && error.ends_with("found no qrels/*.tsv"), "{error}");
}

#[test]
fn a_file_that_changes_later_is_an_error_not_a_crash() {
    let folder = Folder::new();
    let text = b"{\"query\": \"a\", \"positive\": \"b\"}\n{\"query\": \"c\", \"positive\": \"d\"}\n";
    let path = folder.write("a.jsonl", text);
    let source = Source::open(&set(&path)).unwrap();
    std::fs::write(&path, b"{\"query\": \"a\"}").unwrap();
    assert!(source.row(1).unwrap_err().to_string().contains("a.jsonl: cannot read"));
    std::fs::write(&path, [b' '; 70]).unwrap();
    assert!(source.row(0).unwrap_err().to_string().contains("(the file was correct when the run began"));
}

#[test]
fn a_beir_folder_gives_a_row_for_each_query_with_answers() {
    let folder = Folder::new();
    folder.write(
        "queries.jsonl",
        b"{\"_id\": \"q1\", \"text\": \"one\"}\n{\"_id\": \"q2\", \"text\": \"two\"}\n{\"_id\": \"q3\", \"text\": \"\"}\n",
    );
    folder.write(
        "corpus.jsonl",
        b"{\"_id\": \"d1\", \"title\": \"T\", \"text\": \"x\"}\n{\"_id\": \"d2\", \"title\": \"\", \"text\": \" y\"}\n{\"_id\": 3, \"text\": \"z\"}\n",
    );
    let qrels = "query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td1\t1\nq2\td1\t2\nq2\t3\t0\nq2\td2\t1\n";
    folder.write("qrels/test.tsv", qrels.as_bytes());
    let source = Source::open(&set(folder.0.path())).unwrap();
    assert_eq!(rows(&source), [row("two", &[" y", "T x"], &[]), row("one", &["T x"], &[])]);
    assert!(source.error(0, "wrong").to_string().ends_with("queries.jsonl:2: wrong"));

    let message = || {
        let error = Source::open(&set(folder.0.path())).err().unwrap().to_string();
        error.replace(folder.0.path().to_str().unwrap(), "")
    };
    folder.write("qrels/dev.tsv", qrels.as_bytes());
    assert_eq!(message(), "/qrels: has no train.tsv, only dev, test");
    folder.write("qrels/train.tsv", b"query-id\tcorpus-id\tscore\nq9\td2\t1\n");
    assert_eq!(message(), "/qrels/train.tsv:2: `q9` is not in queries.jsonl");
    folder.write("qrels/train.tsv", b"q1\td2\t1\nq1\td2\thigh\n");
    assert_eq!(message(), "/qrels/train.tsv:2: the score is `high`, expected a finite number");
    folder.write("qrels/train.tsv", b"q1\td2\tinf\n");
    assert_eq!(message(), "/qrels/train.tsv:1: the score is `inf`, expected a finite number");
    folder.write("qrels/train.tsv", b"q1\td2\t0\n");
    assert_eq!(message(), "/qrels/train.tsv: has no relevant document, expected scores above 0");
    folder.write("qrels/train.tsv", b"q3\td2\t1\n");
    assert_eq!(message(), "/queries.jsonl:3: `text` is empty");
    folder.write("qrels/train.tsv", b"q1 d2 1\n");
    assert!(message().starts_with("/qrels/train.tsv:1: expected query-id, corpus-id and score"));
}

#[test]
fn negatives_that_the_configuration_names_must_be_somewhere() {
    let folder = Folder::new();
    let mut named = set(&folder.write(
        "a.jsonl",
        b"{\"query\":\"a\",\"positive\":\"b\"}\n{\"query\":\"a\",\"positive\":\"b\",\"bad\":\"c\"}\n",
    ));
    named.columns.negatives = Some(crate::config::ColumnNames(vec!["bad".to_owned()]));
    assert_eq!(Source::open(&named).unwrap().row(1).unwrap().negatives, ["c"]);
    named.columns.negatives = Some(crate::config::ColumnNames(vec!["bda".to_owned()]));
    let error = Source::open(&named).err().unwrap().to_string();
    assert!(
        error
            .ends_with("a.jsonl: no row has a column `bda`, which the configuration names for the negatives"),
        "{error}"
    );
    named.path = folder.write("a.csv", b"query,positive,bad\na,b,c\n");
    let error = Source::open(&named).err().unwrap().to_string();
    assert!(error.contains("a.csv:1: has no column `bda`"), "{error}");
}

#[test]
fn labelled_rows_have_a_text_and_a_class() {
    let source = open(
        "a.jsonl",
        "{\"text\": \"a\", \"label\": 3}\n{\"text\": \"b\", \"label\": \"x\"}\n{\"label\": true, \"text\": \"c\"}\n\
         {\"text\": \"d\", \"label\": 3}\n",
    )
    .unwrap();
    assert_eq!((source.kind(), source.labels().unwrap().classes()), (RowKind::Labelled, 3));
    assert_eq!(source.row(3).unwrap(), Row { label: Some("3".to_owned()), ..row("d", &[], &[]) });
    let source = open("a.csv", "label,sentence\nno,a\nyes,b\nno,c\n").unwrap();
    assert_eq!(source.row(1).unwrap(), Row { label: Some("yes".to_owned()), ..row("b", &[], &[]) });

    for (text, expected) in [
        (
            "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\"}\n",
            "a.jsonl:2: has no column for the label, expected one of",
        ),
        (
            "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\", \"label\": null}\n",
            "a.jsonl:2: `label` is missing",
        ),
        (
            "{\"text\": \"a\", \"label\": 1}\n{\"text\": \" \", \"label\": 1}\n",
            "a.jsonl:2: `text` has an empty text",
        ),
        (
            "{\"text\": \"a\", \"label\": 1}\n{\"text\": 5, \"label\": 1}\n",
            "a.jsonl:2: `text` has the number 5 where",
        ),
        (
            "{\"text\": \"a\", \"label\": 1}\n{\"query\": \"a\", \"positive\": \"b\"}\n",
            "a.jsonl:2: has no column for the text",
        ),
        (
            "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\", \"label\": 1}\n",
            "a.jsonl: has only one class, `1` in all 2 rows",
        ),
    ] {
        let error = message("a.jsonl", text);
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn similarity_rows_have_two_texts_and_a_number() {
    for (name, text) in [
        (
            "a.jsonl",
            "{\"s1\": \"a\", \"s2\": \"b\", \"score\": 4.5}\n{\"s1\": \"c\", \"s2\": \"d\", \"score\": \"-2\"}\n",
        ),
        ("a.csv", "Sentence_1,sentence2,score\na,b,4.5\nc,d, -2 \n"),
    ] {
        let source = open(name, text).unwrap();
        assert_eq!(source.kind(), RowKind::Similarity);
        let expected = [(row("a", &["b"], &[]), 4.5), (row("c", &["d"], &[]), -2.0)];
        for (found, (expected, score)) in rows(&source).into_iter().zip(expected) {
            assert_eq!(found, Row { scores: vec![score], ..expected });
        }
    }
    let good = "{\"s1\": \"a\", \"s2\": \"b\", \"score\": 1}\n";
    for (bad, expected) in [
        ("\"high\"", "`score` is `high`, expected a number"),
        ("\"nan\"", "`score` is NaN, expected a finite number"),
        ("1e999", "this is not JSON: number out of range at column"),
        ("null", "`score` is missing"),
        ("[1, 2]", "`score` has 2 numbers, expected one"),
        ("{}", "`score` has an object where text was expected"),
    ] {
        let error = message("a.jsonl", format!("{good}{{\"s1\": \"a\", \"s2\": \"b\", \"score\": {bad}}}\n"));
        assert!(error.starts_with(&format!("a.jsonl:2: {expected}")), "{error}");
    }
    let error = message("a.jsonl", format!("{good}{{\"s1\": \"a\", \"s2\": \"b\", \"score\": NaN}}\n"));
    assert!(
        error.contains("a.jsonl:2: this is not JSON") && error.ends_with("hint: NaN is not a number in JSON"),
        "{error}"
    );
    assert_eq!(
        message("a.csv", "s1,s2,score\na,b,inf\n"),
        "a.csv:2: `score` is inf, expected a finite number"
    );
}

fn with_loss(loss: crate::config::LossKind, name: &str, text: &str) -> Result<Source> {
    let folder = Folder::new();
    Source::open(&DataSet { loss: Some(loss), ..set(&folder.write(name, text.as_bytes())) })
}

#[test]
fn a_teachers_scores_belong_to_the_positive_and_each_negative() {
    use crate::config::LossKind::{Kl, MarginMse};
    let text = "{\"query\": \"a\", \"positive\": \"b\", \"negatives\": [\"c\", \"d\"], \"scores\": [3, 1.5, -1]}\n\
        {\"query\": \"a\", \"positive\": \"b\", \"negatives\": [\"c\", \"d\"], \"scores\": [1.5, 4]}\n\
        {\"query\": \"a\", \"positive\": \"b\", \"negatives\": [\"c\", \"b\", \"d\"], \"scores\": [3, 1, 3, 2]}\n\
        {\"query\": \"a\", \"positive\": \"b\", \"negatives\": \"c\", \"scores\": 0.5}\n";
    for loss in [Kl, MarginMse] {
        let source = with_loss(loss, "a.jsonl", text).unwrap();
        let scores: Vec<Vec<f32>> = rows(&source).into_iter().map(|row| row.scores).collect();
        // The second and the last give differences; of the third a negative is the positive.
        assert_eq!(
            scores,
            [vec![3.0, 1.5, -1.0], vec![0.0, -1.5, -4.0], vec![3.0, 1.0, 2.0], vec![0.0, -0.5]]
        );
        assert_eq!(source.row(2).unwrap().negatives, ["c", "d"]);
        assert_eq!(source.dropped_negatives(), DroppedNegatives { negatives: 1, first: 2 });
    }
    let csv = "query,positive,negative_1,negative_2,scores\na,b,c,d,\"[3, 1, 2]\"\n";
    assert_eq!(with_loss(Kl, "a.csv", csv).unwrap().row(0).unwrap().scores, [3.0, 1.0, 2.0]);
    for (rest, expected) in [
        (
            "\"negatives\": [\"c\", \"d\"], \"scores\": [1]",
            "`scores` has 1 numbers for a positive and 2 negatives, expected 3 scores or 2 margins",
        ),
        ("\"negatives\": [\"c\"]", "has no column for the score, expected one of scores, score,"),
        (
            "\"negatives\": [\"b\"], \"scores\": [1, 1]",
            "has no negative that differs from its positive, which the loss `kl` needs",
        ),
        ("\"scores\": [1]", "has no negative, which the loss `kl` needs"),
    ] {
        let text = format!("{{\"query\": \"a\", \"positive\": \"b\", {rest}}}\n");
        let error = with_loss(Kl, "a.jsonl", &text).err().unwrap().to_string();
        assert!(error.contains(&format!("a.jsonl:1: {expected}")), "{error}");
    }
    let text = "{\"query\": \"a\", \"positive\": [\"b\", \"e\"], \"negatives\": \"c\", \"scores\": [1, 2]}";
    let error = with_loss(Kl, "a.jsonl", text).err().unwrap().to_string();
    assert!(error.ends_with("has 2 positives, expected one with the scores in `scores`"), "{error}");
}

#[test]
fn a_negative_that_is_also_a_positive_is_left_out_and_counted() {
    let text = "{\"query\": \"a\", \"positive\": \"b\", \"negatives\": [\"c\"]}\n".repeat(1000)
        + "{\"query\": \"a\", \"positive\": [\"b\", \"d\"], \"negatives\": [\"d\", \"c\", \"b\"]}\n"
        + "{\"query\": \"a\", \"positive\": \"b\", \"negatives\": \"b\"}\n";
    let source = open("a.jsonl", &text).unwrap();
    assert_eq!(source.dropped_negatives(), DroppedNegatives { negatives: 3, first: 1000 });
    assert_eq!(source.row(1000).unwrap().negatives, ["c"]);
    assert!(source.row(1001).unwrap().negatives.is_empty());
    let error = with_loss(crate::config::LossKind::Triplet, "a.jsonl", &text).err().unwrap().to_string();
    assert!(
        error.ends_with(
            "a.jsonl:1002: has no negative that differs from its positive, which the loss `triplet` needs"
        ),
        "{error}"
    );
}

#[test]
fn rows_of_many_parts_of_a_file_are_found() {
    let line = |row: usize| {
        let long = "é".repeat(if row.is_multiple_of(50) { 9000 } else { row % 70 });
        format!("{{\"query\": \"q{row}\", \"positive\": \"p{row} {long}\"}}\n{}", "\n".repeat(row % 3))
    };
    let records = |row: usize| format!("q{row},\"p{row}\n\"\"{}\"\"\"\r\n", "x".repeat(row % 90));
    let jsonl = open("a.jsonl", (0..3000).map(line).collect::<String>()).unwrap();
    let csv =
        open("a.csv", "query,positive\n".to_owned() + &(0..3000).map(records).collect::<String>()).unwrap();
    for source in [jsonl, csv] {
        assert_eq!(source.len(), 3000);
        for row in (0..3000).rev() {
            let found = source.row(row).unwrap();
            assert_eq!(found.query, format!("q{row}"));
            assert!(found.positives[0].starts_with(&format!("p{row}")));
        }
    }
}

#[test]
fn a_wrong_row_is_the_first_of_them_whichever_thread_sees_it() {
    let good = "{\"query\": \"a\", \"positive\": \"b\"}\n";
    let text = good.repeat(5000) + "{\"query\": \"a\", \"positive\": \"\"}\n" + &good.repeat(3000) + "{}\n";
    assert_eq!(message("a.jsonl", text), "a.jsonl:5001: `positive` has an empty text");
}

#[test]
fn a_folder_that_cannot_teach_is_refused() {
    let folder = Folder::new();
    folder.write("queries.jsonl", b"{\"_id\": \"q1\", \"text\": \"one\"}\n");
    folder.write("corpus.jsonl", b"{\"_id\": \"d1\", \"text\": \"x\"}\n");
    folder.write("qrels/train.tsv", b"q1\td1\t1\n");
    let error = Source::open(&set(folder.0.path())).err().unwrap().to_string();
    assert!(
        error.ends_with("corpus.jsonl: has only one document, expected two or more to choose from"),
        "{error}"
    );
    folder.write("corpus.jsonl", b"{\"_id\": \"d1\", \"text\": \"x\"}\n{\"_id\": \"d2\", \"text\": \"y\"}\n");
    assert!(Source::open(&set(folder.0.path())).is_ok());
    let labelled = DataSet { kind: Some(RowKind::Labelled), ..set(folder.0.path()) };
    let error = Source::open(&labelled).err().unwrap().to_string();
    assert!(
        error.ends_with("`labelled` cannot use a BEIR folder, which has queries and their answers only"),
        "{error}"
    );
}
