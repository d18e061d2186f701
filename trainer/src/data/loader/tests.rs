//! Tests of the whole way: files to batches, in the background.

use super::super::batch::Batch;
use super::super::fixtures::{Files, tokenizer};
use super::*;

const OPTIONS: BatchOptions = BatchOptions {
    max_query_length: 16,
    max_document_length: 16,
    include_prompt: true,
    mask_known_positives: true,
};

fn files(rows: usize) -> Files {
    let line = |row: usize| {
        format!("{{\"query\":\"q{row}\",\"positive\":\"p{}\",\"negative\":\"n{}\"}}\n", row % 30, row % 13)
    };
    Files::new(&[&(0..rows).map(line).collect::<String>()])
}

fn start(files: &Files, cursor: Cursor, batches: u64) -> Result<Loader> {
    let mixture = Arc::new(Mixture::open(&files.config).unwrap());
    Loader::start(mixture, Arc::new(tokenizer()), OPTIONS, cursor, batches, Shard::default())
}

fn all(files: &Files, cursor: Cursor, batches: u64) -> Vec<Batch> {
    let partials: Vec<PartialBatch> = start(files, cursor, batches).unwrap().collect::<Result<_>>().unwrap();
    partials.into_iter().map(whole).collect()
}

fn whole(mut partial: PartialBatch) -> Batch {
    let sequences = partial.take_sequences();
    partial.finish(sequences)
}

/// What a batch is, but for its type's missing `==`.
fn same(a: &[Batch], b: &[Batch]) -> bool {
    let parts = |batch: &Batch| {
        (batch.sequences.clone(), batch.tables.clone(), batch.rows.clone(), batch.cursor.clone(), batch.epoch)
    };
    a.iter().map(parts).eq(b.iter().map(parts))
}

#[test]
fn as_many_batches_come_as_were_asked_for_the_same_every_time() {
    let files = files(50);
    let batches = all(&files, Cursor::default(), 30);
    assert_eq!(batches.len(), 30);
    assert!(same(&batches, &all(&files, Cursor::default(), 30)));
    assert_eq!(batches[12].rows.len(), 2);
    assert_eq!(batches[12].epoch, 1.0);
    assert!(all(&files, Cursor::default(), 0).is_empty());
}

#[test]
fn going_on_from_a_batch_gives_the_batches_that_would_have_followed() {
    let files = files(50);
    let batches = all(&files, Cursor::default(), 20);
    for done in [1, 5, 12, 13, 14] {
        let rest = all(&files, batches[done - 1].cursor.clone(), 20 - done as u64);
        assert!(same(&rest, &batches[done..]), "{done}");
    }
}

#[test]
fn a_loader_that_is_dropped_early_ends() {
    let files = files(50);
    let mut loader = start(&files, Cursor::default(), u64::MAX).unwrap();
    loader.next().unwrap().unwrap();
    drop(loader);
    drop(start(&files, Cursor::default(), 1).unwrap());
}

#[test]
fn an_error_in_the_background_comes_through_and_ends_it() {
    let files = files(50);
    let mixture = Arc::new(Mixture::open(&files.config).unwrap());
    std::fs::write(&files.config.data.train[0].path, "").unwrap();
    let mut loader =
        Loader::start(mixture, Arc::new(tokenizer()), OPTIONS, Cursor::default(), 10, Shard::default())
            .unwrap();
    let error = loader.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("set0.jsonl: cannot read"), "{error}");
    assert!(loader.next().is_none());
}

#[test]
fn what_cannot_work_is_refused_at_the_start() {
    let files = files(50);
    let cursor = Cursor { epoch: 0, position: 3, deferred: Vec::new() };
    assert!(
        start(&files, cursor, 1)
            .err()
            .unwrap()
            .to_string()
            .contains("the checkpoint does not fit the training data")
    );
    let mixture = Arc::new(Mixture::open(&files.config).unwrap());
    let options = BatchOptions { max_query_length: 2, ..OPTIONS };
    let shard = Shard::default();
    let error =
        Loader::start(mixture, Arc::new(tokenizer()), options, Cursor::default(), 1, shard).err().unwrap();
    assert!(error.to_string().contains("leaves no room"), "{error}");
}
