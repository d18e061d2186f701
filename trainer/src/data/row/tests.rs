use super::*;
use crate::config::ColumnNames;

fn roles(names: &[&str]) -> Result<Roles, String> {
    Schema::default().roles(names)
}

fn of(kind: RowKind) -> Schema {
    Schema { kind: Some(kind), ..Schema::default() }
}

fn made(query: usize, positives: &[usize], negatives: &[usize]) -> Roles {
    Roles {
        kind: RowKind::Pairs,
        loss: None,
        query,
        positives: positives.to_vec(),
        negatives: negatives.to_vec(),
        value: None,
    }
}

#[test]
fn the_usual_names_are_understood() {
    for (names, expected) in [
        (&["query", "positive", "negatives"][..], made(0, &[1], &[2])),
        (&["id", "Question", "Answer"], made(1, &[2], &[])),
        (&["anchor", "positive", "negative"], made(0, &[1], &[2])),
        (&["premise", "hypothesis"], made(0, &[1], &[])),
        (&["sentence1", "sentence2"], made(0, &[1], &[])),
        (&["sentence_1", "sentence_2"], made(0, &[1], &[])),
        (&["passage", "query"], made(1, &[0], &[])),
        (&["question", "document"], made(0, &[1], &[])),
        (&["query", "pos", "neg"], made(0, &[1], &[2])),
        (&["anchor", "positive", "negative_2", "negative_10", "negative_1"], made(0, &[1], &[4, 2, 3])),
        (&["query", "question", "positive", "document"], made(0, &[2], &[])),
    ] {
        assert_eq!(roles(names), Ok(expected), "{names:?}");
    }
}

#[test]
fn texts_are_what_a_model_may_see() {
    for (names, expected) in [
        (&["id", "query", "positive", "answer"][..], &[1, 2][..]),
        (&["premise", "hypothesis", "label"], &[0, 1]),
        (&["negative_1", "query", "positive"], &[1, 2, 0]),
        (&["label", "text"], &[1]),
        (&["s1", "s2", "score"], &[0, 1]),
    ] {
        assert_eq!(text_columns(names), Ok(expected.to_vec()), "{names:?}");
    }
    assert!(text_columns(&["a", "b"]).unwrap_err().contains("found a, b"));
}

#[test]
fn what_is_missing_or_ambiguous_is_listed() {
    let error = roles(&["text", "answer"]).unwrap_err();
    assert!(error.starts_with("has no column for the query, expected one of query, anchor,"), "{error}");
    assert!(error.contains("found text, answer\nhint: `columns: {query: NAME}`"), "{error}");
    let error = roles(&["query", "answer", "document"]).unwrap_err();
    assert!(
        error.starts_with("has several columns that could be the positive: answer, document\n"),
        "{error}"
    );
    assert!(roles(&[]).unwrap_err().contains("found no columns"));
    assert!(
        of(RowKind::Triplets)
            .roles(&["query", "positive"])
            .unwrap_err()
            .contains("needs a column of negatives")
    );
}

#[test]
fn columns_say_what_a_row_is() {
    for (names, kind) in [
        (&["text", "label"][..], RowKind::Labelled),
        (&["id", "Sentence", "Label"], RowKind::Labelled),
        (&["sentence1", "sentence2", "score"], RowKind::Similarity),
        (&["s1", "s2", "similarity_score"], RowKind::Similarity),
        (&["query", "positive", "negative", "score"], RowKind::Pairs),
        (&["query", "positive", "text"], RowKind::Pairs),
    ] {
        assert_eq!(roles(names).map(|roles| roles.kind), Ok(kind), "{names:?}");
    }
    for names in [
        &["premise", "hypothesis", "label"][..],
        &["query", "passage", "label"],
        &["query", "positive", "score"],
        &["query", "positive", "negative", "label"],
    ] {
        let error = roles(names).unwrap_err();
        assert!(error.contains("beside two texts, which is ambiguous\nhint: `kind: similarity`"), "{error}");
    }
    let labelled = of(RowKind::Pairs).roles(&["premise", "hypothesis", "label"]);
    assert_eq!(labelled, Ok(made(0, &[1], &[])));
    let scored = of(RowKind::Similarity).roles(&["sentence1", "sentence2", "label"]).unwrap();
    assert_eq!((scored.query, scored.positives, scored.value), (0, vec![1], Some(2)));
    let taught = Schema { loss: Some(LossKind::Kl), ..Schema::default() };
    let taught = taught.roles(&["query", "positive", "negatives", "scores", "label"]).unwrap();
    assert_eq!((taught.kind, taught.value), (RowKind::Pairs, Some(3)));
}

#[test]
fn the_configuration_settles_the_rest() {
    let columns = Columns {
        query: Some("Title".into()),
        positive: Some(ColumnNames(vec!["a".into(), "b".into()])),
        negatives: Some(ColumnNames(vec!["n".into()])),
        ..Columns::default()
    };
    let schema = Schema { columns, ..Schema::default() };
    assert_eq!(schema.roles(&["n", "b", "a", "Title", "label"]), Ok(made(3, &[2, 1], &[0])));
    assert_eq!(schema.roles(&["b", "Title"]), Ok(made(1, &[0], &[])));
    assert!(schema.header(&["n", "b", "a", "Title"]).is_ok());
    let error = schema.header(&["b", "a", "Title"]).unwrap_err();
    assert!(
        error.starts_with("has no column `n`, which the configuration names for the negatives"),
        "{error}"
    );
    let error = schema.roles(&["title", "a"]).unwrap_err();
    assert!(error.starts_with("has no column `Title`") && error.ends_with("found title, a"), "{error}");
}
