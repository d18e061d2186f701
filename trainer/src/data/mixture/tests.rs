//! Tests of the order: every row in its epoch, no text twice, the same from any cursor.

use std::collections::{BTreeMap, BTreeSet};

use std::path::PathBuf;

use super::super::fixtures::Files;
use super::super::set::Classes;
use super::*;
use crate::config::{LossKind, RowKind};

/// Data sets of so many rows, all texts different, three negatives and two positives each.
fn files(rows: &[usize]) -> Files {
    let mut files = Files::new(&[]);
    for (set, rows) in rows.iter().enumerate() {
        let line = |row: usize| {
            let text = |part: &str| format!("\"{part}{set}.{row}\"");
            let (p, r) = (text("p"), text("r"));
            let negatives = [text("x"), text("y"), text("z")].join(",");
            format!("{{\"query\":{},\"positive\":[{p},{r}],\"negatives\":[{negatives}]}}\n", text("q"))
        };
        files.add(&(0..*rows).map(line).collect::<String>());
    }
    files
}

fn open(files: &Files) -> Mixture {
    Mixture::open(&files.config).unwrap()
}

fn epoch(sampler: &mut BatchSampler<'_>) -> Vec<SampledRows> {
    (0..sampler.mixture.batches()).map(|_| sampler.next_rows().unwrap()).collect()
}

fn ids(picked: &[SampledRows]) -> Vec<(u32, u64)> {
    picked.iter().flat_map(|p| &p.examples).map(|e| (e.row.dataset, e.row.row)).collect()
}

#[test]
fn without_shuffling_rows_come_in_file_order() {
    let mut files = files(&[5, 4]);
    files.config.data.shuffle = false;
    for batching in [Batching::Mixed, Batching::PerDataset] {
        files.config.data.batching = batching;
        let mixture = open(&files);
        let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
        for _ in 0..2 {
            let picked = epoch(&mut sampler);
            let expected: Vec<_> = (0..5).map(|row| (0, row)).chain((0..4).map(|row| (1, row))).collect();
            assert_eq!(ids(&picked), expected);
            let sizes: Vec<usize> = picked.iter().map(|p| p.examples.len()).collect();
            assert_eq!(sizes, if batching == Batching::Mixed { [4, 4, 1] } else { [4, 1, 4] });
        }
    }
}

#[test]
fn data_sets_of_one_file_name_are_told_apart() {
    let mut files = files(&[4, 4, 4, 4]);
    let path = files.config.data.train[1].path.clone();
    files.config.data.train[2].path.clone_from(&path);
    files.config.data.train[3].path = path;
    files.config.data.train[0].name = "set1-2".to_owned();
    let mixture = open(&files);
    let names: Vec<&str> = mixture.sets().iter().map(|set| set.name.as_str()).collect();
    assert_eq!(names, ["set1-2", "set1", "set1-3", "set1-4"]);
}

#[test]
fn every_row_comes_once_an_epoch_in_another_order_each() {
    for seed in 0..20 {
        for batching in [Batching::Mixed, Batching::PerDataset] {
            let mut files = files(&[7, 1, 30]);
            files.config.seed = seed;
            files.config.data.batching = batching;
            let mixture = open(&files);
            assert_eq!(mixture.rows(), 38);
            assert_eq!(mixture.batches(), if batching == Batching::Mixed { 10 } else { 2 + 1 + 8 });
            let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
            let mut orders = BTreeSet::new();
            for number in 1..4 {
                let picked = epoch(&mut sampler);
                let last = picked.last().unwrap();
                assert_eq!(last.cursor, Cursor { epoch: number, ..Cursor::default() });
                assert_eq!(last.epoch, number as f64);
                for batch in &picked {
                    let sets: BTreeSet<_> = batch.examples.iter().map(|e| e.row.dataset).collect();
                    assert!(batching == Batching::Mixed || sets.len() == 1);
                }
                let order = ids(&picked);
                let mut sorted = order.clone();
                sorted.sort_unstable();
                let all: Vec<_> =
                    [7, 1, 30].iter().zip(0..).flat_map(|(n, set)| (0..*n).map(move |r| (set, r))).collect();
                assert_eq!(sorted, all);
                orders.insert(order);
            }
            assert_eq!(orders.len(), 3);
        }
    }
}

#[test]
fn batches_of_single_data_sets_take_turns() {
    let mut files = files(&[400, 400]);
    files.config.data.batching = Batching::PerDataset;
    let mixture = open(&files);
    let picked = epoch(&mut mixture.sampler(&Cursor::default()).unwrap());
    let early = picked[..100].iter().filter(|p| p.examples[0].row.dataset == 0).count();
    assert!((30..70).contains(&early), "{early}");
}

/// Rows whose texts collide: few different positives, some queries that are others' positives.
fn colliding() -> Files {
    let mut files = Files::new(&[]);
    let line = |set: usize, row: usize| {
        let positive =
            if row.is_multiple_of(5) { format!("q{set}.{}", row / 2) } else { format!("p{}", row % 9) };
        format!("{{\"query\":\"q{set}.{row}\",\"positive\":\"{positive}\",\"negative\":\"n{}\"}}\n", row % 11)
    };
    files.add(&(0..41).map(|row| line(0, row)).collect::<String>());
    files.add(&(0..18).map(|row| line(1, row)).collect::<String>());
    files.config.training.batch_size = 4;
    files
}

fn twice(picked: &SampledRows) -> bool {
    let mut seen = HashSet::new();
    picked.examples.iter().any(|example| {
        let own: HashSet<&str> = example.texts().collect();
        let again = own.iter().any(|text| seen.contains(*text));
        seen.extend(own.into_iter().map(str::to_owned));
        again
    })
}

#[test]
fn no_text_stands_twice_in_a_batch_while_another_row_is_left() {
    let mut without = 0;
    for seed in 0..30 {
        for batching in [Batching::Mixed, Batching::PerDataset] {
            let mut files = colliding();
            files.config.seed = seed;
            files.config.data.batching = batching;
            let mixture = open(&files);
            let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
            for _ in 0..2 {
                let picked = epoch(&mut sampler);
                // A stream's last rows may have to meet; there are at most two such batches of four a stream
                // here.
                let bad = picked.iter().filter(|p| twice(p)).count();
                assert!(bad <= 4, "{bad}");
                without += usize::from(bad == 0);
                let mut all = ids(&picked);
                all.sort_unstable();
                all.dedup();
                assert_eq!(all.len(), 59);
            }
        }
    }
    assert!(without > 20, "{without}");
    let mut files = colliding();
    files.config.data.no_duplicates = false;
    assert!(
        epoch(&mut open(&files).sampler(&Cursor::default()).unwrap()).iter().filter(|p| twice(p)).count() > 8
    );
}

#[test]
fn a_text_twice_in_one_row_is_one_item() {
    let mut files = Files::new(&[]);
    files.add(
        "{\"query\":\"a\",\"positive\":\"a\",\"negative\":\"a\"}\n{\"query\":\"b\",\"positive\":\"c\"}\n",
    );
    files.config.training.batch_size = 2;
    let picked = open(&files).sampler(&Cursor::default()).unwrap().next_rows().unwrap();
    assert_eq!(picked.examples.len(), 2);
}

#[test]
fn rows_that_all_collide_still_come_all() {
    let mut files = Files::new(&[]);
    files.add(
        &(0..10).map(|row| format!("{{\"query\":\"q{row}\",\"positive\":\"yes\"}}\n")).collect::<String>(),
    );
    files.config.training.batch_size = 4;
    let mixture = open(&files);
    let picked = epoch(&mut mixture.sampler(&Cursor::default()).unwrap());
    assert_eq!(picked.iter().map(|p| p.examples.len()).collect::<Vec<_>>(), [4, 4, 2]);
    let mut all = ids(&picked);
    all.sort_unstable();
    assert_eq!(all, (0..10).map(|row| (0, row)).collect::<Vec<_>>());
}

#[test]
fn going_on_from_any_cursor_gives_the_batches_that_would_have_followed() {
    for seed in 0..6 {
        for (batching, shuffle) in
            [(Batching::Mixed, true), (Batching::PerDataset, true), (Batching::PerDataset, false)]
        {
            let mut files = colliding();
            files.config.seed = seed;
            files.config.data.batching = batching;
            files.config.data.shuffle = shuffle;
            let mixture = open(&files);
            let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
            let mut cursors = vec![sampler.cursor()];
            let picked: Vec<SampledRows> =
                (0..2 * mixture.batches() + 3).map(|_| sampler.next_rows().unwrap()).collect();
            cursors.extend(picked.iter().map(|p| p.cursor.clone()));
            for (i, cursor) in cursors.iter().enumerate() {
                let json = serde_json::to_string(cursor).unwrap();
                let cursor: Cursor = serde_json::from_str(&json).unwrap();
                let mut again = mixture.sampler(&cursor).unwrap();
                assert_eq!(again.cursor(), cursor);
                for expected in &picked[i..(i + 8).min(picked.len())] {
                    assert_eq!(&again.next_rows().unwrap(), expected);
                }
            }
        }
    }
}

#[test]
fn a_cursor_of_other_data_is_refused() {
    let mixture = open(&files(&[10]));
    for (position, deferred) in [(3, vec![]), (11, vec![]), (1, vec![0, 1]), (5, vec![99]), (400, vec![])] {
        let error = mixture.sampler(&Cursor { epoch: 0, position, deferred }).err().unwrap().to_string();
        assert!(error.contains("the data or the batch size have changed"), "{error}");
    }
}

#[test]
fn samples_are_a_fixed_subset_that_follows_from_the_seed() {
    let mut files = files(&[100]);
    files.config.data.train[0].samples = Some(10);
    let subset = |files: &Files| -> BTreeSet<u64> {
        let mixture = open(files);
        let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
        let first: BTreeSet<u64> = ids(&epoch(&mut sampler)).into_iter().map(|(_, row)| row).collect();
        let second: BTreeSet<u64> = ids(&epoch(&mut sampler)).into_iter().map(|(_, row)| row).collect();
        assert_eq!((first.len(), &first), (10, &second));
        first
    };
    let one = subset(&files);
    files.config.seed = 1;
    assert_ne!(subset(&files), one);
    files.config.data.shuffle = false;
    let picked = epoch(&mut open(&files).sampler(&Cursor::default()).unwrap());
    let order = ids(&picked);
    assert!(order.is_sorted());
    files.config.data.train[0].samples = Some(1000);
    assert_eq!(open(&files).rows(), 100);
}

#[test]
fn weights_repeat_rows_or_take_a_part_of_them() {
    let mut files = files(&[10, 20]);
    files.config.data.train[0].weight = 2.5;
    files.config.data.train[1].weight = 0.25;
    let mixture = open(&files);
    assert_eq!((mixture.sets()[0].rows, mixture.sets()[1].rows, mixture.rows()), (25, 5, 30));
    let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
    let mut counts: BTreeMap<(u32, u64), usize> = BTreeMap::new();
    for number in 0..4 {
        for id in ids(&epoch(&mut sampler)) {
            *counts.entry(id).or_default() += 1;
        }
        if number == 0 {
            let small: Vec<u64> = counts.keys().filter(|id| id.0 == 1).map(|id| id.1).collect();
            assert_eq!(small.len(), 5);
            assert!(small[4] - small[0] > 4, "scattered over the file: {small:?}");
            assert!(counts.iter().filter(|(id, _)| id.0 == 0).all(|(_, count)| (2..=3).contains(count)));
        }
    }
    assert!(counts.iter().all(|(id, count)| *count == if id.0 == 0 { 10 } else { 1 }));
    files.config.data.train[1].weight = 0.01;
    let error = Mixture::open(&files.config).err().unwrap().to_string();
    assert!(error.contains("data.train.1.weight: 0.01 × 20 rows rounds to 0 rows per epoch"), "{error}");
}

#[test]
fn positives_and_negatives_take_turns() {
    let mut files = files(&[4]);
    files.config.data.negatives = 2;
    let second = |mixture: &Mixture| -> Vec<Example> {
        let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
        let row =
            |picked: SampledRows| picked.examples.into_iter().find(|example| example.row.row == 1).unwrap();
        (0..4).map(|_| row(sampler.next_rows().unwrap())).collect()
    };
    let turns = [("p", ["x", "y"]), ("r", ["z", "x"]), ("p", ["y", "z"]), ("r", ["x", "y"])];
    for (example, (positive, negatives)) in second(&open(&files)).into_iter().zip(turns) {
        assert_eq!(example.positives, ["p0.1", "r0.1"]);
        assert_eq!(example.positives[example.positive], format!("{positive}0.1"));
        assert_eq!(example.negatives, negatives.map(|n| format!("{n}0.1")));
    }
    // In the order of the file every epoch is alike.
    files.config.data.shuffle = false;
    for example in second(&open(&files)) {
        assert_eq!((example.positive, example.negatives), (0, vec!["x0.1".to_owned(), "y0.1".to_owned()]));
    }
    files.config.data.negatives = 5;
    let picked = open(&files).sampler(&Cursor::default()).unwrap().next_rows().unwrap();
    assert_eq!(picked.examples[0].negatives, ["x0.0", "y0.0", "z0.0"]);
    files.config.data.negatives = 0;
    let picked = open(&files).sampler(&Cursor::default()).unwrap().next_rows().unwrap();
    assert!(picked.examples[0].negatives.is_empty());
}

#[test]
fn the_digest_follows_the_rows_and_their_order() {
    let mut files = files(&[10]);
    let one = open(&files).digest();
    assert_eq!(open(&files).digest(), one);
    files.config.seed = 3;
    assert_ne!(open(&files).digest(), one);
    files.config.seed = 42;
    let path = files.config.data.train[0].path.clone();
    let text = std::fs::read_to_string(&path).unwrap().replace("q0.3", "q0.x");
    std::fs::write(&path, text).unwrap();
    assert_ne!(open(&files).digest(), one);
}

#[test]
fn too_few_rows_and_missing_files_are_errors_with_their_field() {
    let mut files = files(&[3]);
    let error = Mixture::open(&files.config).err().unwrap().to_string();
    assert_eq!(
        error,
        "configuration: training.batch_size: 4 rows per step, but an epoch of the data sets has only 3 rows"
    );
    files.config.data.train[0].path = PathBuf::from("no/such.jsonl");
    let error = Mixture::open(&files.config).err().unwrap().to_string();
    assert!(error.starts_with("configuration: data.train.0.path: cannot open no/such.jsonl: "), "{error}");
}

/// Labelled rows, the class of row n being n mod 3, and scored pairs.
fn kinds() -> Files {
    let mut files = Files::new(&[]);
    let labelled = |row: usize| format!("{{\"text\":\"t{row}\",\"label\":\"c{}\"}}\n", row % 3);
    let scored =
        |row: usize| format!("{{\"sentence1\":\"a{row}\",\"sentence2\":\"b{row}\",\"score\":{}}}\n", row % 5);
    let triplet =
        |row: usize| format!("{{\"query\":\"q{row}\",\"positive\":\"p{row}\",\"negative\":\"n{row}\"}}\n");
    files.add(&(0..30).map(labelled).collect::<String>());
    files.add(&(0..20).map(scored).collect::<String>());
    files.add(&(0..10).map(triplet).collect::<String>()).loss = Some(LossKind::Triplet);
    files.config.data.negatives = 2;
    files
}

#[test]
fn labelled_rows_get_others_of_their_class_and_of_other_classes() {
    let class = |text: &str| text[1..].parse::<usize>().unwrap() % 3;
    let mixture = open(&kinds());
    assert_eq!((mixture.sets()[0].kind, mixture.sets()[0].loss), (RowKind::Labelled, LossKind::InfoNce));
    let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
    let mut partners: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for _ in 0..3 {
        let picked = epoch(&mut sampler);
        let labelled = picked.iter().flat_map(|p| &p.examples).filter(|e| e.row.dataset == 0);
        for example in labelled {
            let (own, positive) = (class(&example.query), &example.positives[0]);
            assert!(class(positive) == own && *positive != example.query);
            assert_eq!(example.negatives.len(), 2);
            assert!(example.negatives.iter().all(|negative| class(negative) != own));
            let of_negatives = example.negatives.iter().map(|text| class(text) as u32).collect();
            assert_eq!(example.classes, Some(Classes { own: own as u32, negatives: of_negatives }));
            partners.entry(example.query.clone()).or_default().insert(positive.clone());
        }
    }
    assert_eq!(partners.len(), 30);
    // Other texts each time that a row is seen: of nine, three draws are seldom the same.
    assert!(partners.values().filter(|partners| partners.len() > 1).count() > 25);
}

#[test]
fn a_text_that_stands_twice_is_neither_its_own_answer_nor_its_negative() {
    let mut files = Files::new(&[]);
    let row = |text: &str, label: &str| format!("{{\"text\":\"{text}\",\"label\":\"{label}\"}}\n");
    let rows = row("a", "x").repeat(3) + &row("b", "x") + &row("a", "y") + &row("c", "y") + &row("b", "y");
    files.add(&rows);
    files.config.data.negatives = 3;
    let mixture = open(&files);
    let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
    for _ in 0..20 {
        for example in sampler.next_rows().unwrap().examples {
            assert!(example.positives[0] != example.query, "{example:?}");
            assert!(!example.negatives.contains(&example.query), "{example:?}");
            assert!(!example.negatives.contains(&example.positives[0]), "{example:?}");
        }
    }
}

#[test]
fn samples_of_labelled_rows_are_stratified() {
    let mut files = Files::new(&[]);
    let label = |row: usize| {
        if row < 80 {
            "often"
        } else if row < 100 {
            "seldom"
        } else {
            "once"
        }
    };
    files.add(
        &(0..101)
            .map(|row| format!("{{\"text\":\"t{row}\",\"label\":\"{}\"}}\n", label(row)))
            .collect::<String>(),
    );
    files.config.data.train[0].samples = Some(20);
    let mixture = open(&files);
    let seen: BTreeSet<u64> = ids(&epoch(&mut mixture.sampler(&Cursor::default()).unwrap()))
        .into_iter()
        .map(|(_, row)| row)
        .collect();
    assert_eq!((seen.len(), seen.range(..80).count(), seen.range(80..).count()), (20, 16, 4));
    files.config.data.train[0].samples = None;
    // A row that is alone in its class has no answer.
    assert_eq!(open(&files).rows(), 100);
}

#[test]
fn rows_of_every_kind_go_on_from_any_cursor() {
    for batching in [Batching::Mixed, Batching::PerDataset] {
        let mut files = kinds();
        files.config.data.batching = batching;
        files.config.data.train[0].weight = 1.5;
        let mixture = open(&files);
        let losses: Vec<LossKind> = mixture.sets().iter().map(|set| set.loss).collect();
        assert_eq!(losses, [LossKind::InfoNce, LossKind::CoSent, LossKind::Triplet]);
        let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
        let picked: Vec<SampledRows> =
            (0..2 * mixture.batches()).map(|_| sampler.next_rows().unwrap()).collect();
        assert_eq!(picked.iter().map(|p| p.examples.len() as u64).sum::<u64>(), 2 * (45 + 20 + 10));
        for (i, one) in picked.iter().enumerate() {
            let sets: BTreeSet<u32> = one.examples.iter().map(|e| e.row.dataset).collect();
            assert!(batching == Batching::Mixed || sets.len() == 1);
            for example in one.examples.iter().filter(|e| e.row.dataset == 1) {
                assert_eq!(example.scores, [(example.row.row % 5) as f32]);
            }
            let mut again = mixture.sampler(&one.cursor).unwrap();
            for expected in picked[i + 1..].iter().take(4) {
                assert_eq!(&again.next_rows().unwrap(), expected);
            }
        }
    }
}

#[test]
fn losses_and_kinds_that_do_not_go_together_are_named() {
    let mut files = kinds();
    let message = |files: &Files| Mixture::open(&files.config).err().unwrap().to_string();
    files.config.data.train[1].loss = Some(LossKind::InfoNce);
    let error = message(&files);
    assert!(
        error.contains("data.train.1.loss: data set set1: `info_nce` is not defined for similarity rows"),
        "{error}"
    );
    files.config.data.train[1].loss = None;
    files.config.loss.kind = LossKind::Triplet;
    files.config.data.negatives = 0;
    let error = message(&files);
    assert!(error.contains("data.negatives: expected at least 1 for the loss `triplet`, found 0"), "{error}");
    files.config.data.negatives = 1;
    assert_eq!(open(&files).sets()[0].loss, LossKind::Triplet);
    files.config.loss.kind = LossKind::MarginMse;
    let error = message(&files);
    assert!(error.contains("set0.jsonl:1: has no column for the query"), "{error}");
}

#[test]
fn a_teachers_scores_turn_with_their_negatives() {
    let mut files = Files::new(&[]);
    let row =
        "{\"query\":\"q\",\"positive\":\"p\",\"negatives\":[\"x1\",\"x2\",\"x3\"],\"scores\":[9,1,2,3]}\n";
    files.add(&row.repeat(4)).loss = Some(LossKind::Kl);
    files.config.data.negatives = 2;
    let mixture = open(&files);
    let mut sampler = mixture.sampler(&Cursor::default()).unwrap();
    for expected in [["x1", "x2"], ["x3", "x1"], ["x2", "x3"]] {
        let example = &sampler.next_rows().unwrap().examples[0];
        assert_eq!(example.negatives, expected);
        let scores: Vec<f32> = expected.iter().map(|text| text[1..].parse().unwrap()).collect();
        assert_eq!(example.scores, [vec![9.0], scores].concat());
    }
}
