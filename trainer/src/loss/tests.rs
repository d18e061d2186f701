//! Every loss against its formula in f64, that formula's finite differences, and what sentence-transformers computed.

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::*;
use crate::config::Distance;
use crate::data::batch::CsrIndices;

type Vectors = Vec<Vec<f64>>;

/// The loss of a row with these own columns and scores.
type OfRow<'a> = dyn Fn(usize, &[u32], &[f32]) -> f64 + 'a;

fn tensor(e: &Vectors) -> Tensor {
    let values: Vec<f32> = e.iter().flatten().map(|&value| value as f32).collect();
    Tensor::from_vec(values, (e.len(), e[0].len()), &Device::Cpu).unwrap()
}

fn evaluate(losses: &Losses, e: &Tensor, tables: &[LossTable], rows: Range<usize>) -> (Vec<f32>, Tensor) {
    let (of_rows, d) = losses.evaluate(e, tables, rows).unwrap();
    (of_rows.to_vec1().unwrap(), d)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn unit(a: &[f64]) -> Vec<f64> {
    a.iter().map(|x| x / dot(a, a).sqrt()).collect()
}

/// −log of the share that the first of `logits` has in Σ exp.
fn cross_entropy(logits: &[f64]) -> f64 {
    logits.iter().map(|z| (z - logits[0]).exp()).sum::<f64>().ln()
}

/// The formulas as they are written, each row's sum for itself: the mean loss of a batch.
fn naive(losses: &Losses, e: &Vectors, tables: &[LossTable]) -> f64 {
    if let Some(Matryoshka { dims }) = &losses.matryoshka {
        let plain = Losses { matryoshka: None, ..losses.clone() };
        let cut = |dim: usize| e.iter().map(|e| unit(&e[..dim])).collect();
        return dims.iter().map(|&(dim, weight)| weight * naive(&plain, &cut(dim), tables)).sum();
    }
    let all: usize = tables.iter().map(|table| table.rows.len()).sum();
    tables.iter().map(|table| naive_sum(losses, e, table)).sum::<f64>() / all as f64
}

fn naive_sum(losses: &Losses, e: &Vectors, table: &LossTable) -> f64 {
    if table.loss == LossKind::InfoNce && !losses.normalized {
        let e = e.iter().map(|e| unit(e)).collect();
        return naive_sum(&Losses { normalized: true, ..losses.clone() }, &e, table);
    }
    let rows = table.queries.len();
    let q = |row: usize| &e[table.queries[row] as usize];
    let c = |column: u32| &e[table.candidates[column as usize] as usize];
    let own = |row: usize| {
        let range = table.own.offsets[row] as usize..table.own.offsets[row + 1] as usize;
        (&table.own.columns[range.clone()], &table.scores[range])
    };
    let each = |of: &OfRow| -> f64 { (0..rows).map(|row| of(row, own(row).0, own(row).1)).sum() };
    match table.loss {
        LossKind::InfoNce => each(&|row, _, _| {
            let excluded = &table.excluded.columns
                [table.excluded.offsets[row] as usize..table.excluded.offsets[row + 1] as usize];
            let others = (0..table.candidates.len() as u32)
                .filter(|column| *column != row as u32 && !excluded.contains(column));
            let scores = [row as u32].into_iter().chain(others);
            cross_entropy(
                &scores
                    .map(|column| dot(q(row), c(column)) / losses.info_nce.temperature)
                    .collect::<Vec<_>>(),
            )
        }),
        LossKind::Triplet => each(&|row, own, _| {
            let distance = |column: u32| {
                let (a, b) = (q(row), c(column));
                let apart = a.iter().zip(b).map(|(a, b)| a - b);
                match losses.triplet.distance {
                    Distance::Cosine => 1.0 - dot(&unit(a), &unit(b)),
                    Distance::Euclidean => apart.map(|x| x * x).sum::<f64>().sqrt(),
                    Distance::Manhattan => apart.map(f64::abs).sum(),
                }
            };
            let excess =
                |negative: &u32| (distance(own[0]) - distance(*negative) + losses.triplet.margin).max(0.0);
            own[1..].iter().map(excess).sum::<f64>() / (own.len() - 1).max(1) as f64
        }),
        LossKind::CoSent => {
            let z = |row: usize| losses.cosent.scale * dot(&unit(q(row)), &unit(c(own(row).0[0])));
            let pairs = (0..rows).flat_map(|i| (0..rows).map(move |j| (i, j)));
            let sum: f64 =
                pairs.filter(|&(i, j)| own(i).1[0] > own(j).1[0]).map(|(i, j)| (z(j) - z(i)).exp()).sum();
            rows as f64 * sum.ln_1p()
        }
        LossKind::MarginMse => each(&|row, own, scores| {
            let error = |column: usize| {
                let margin = dot(q(row), c(own[0])) - dot(q(row), c(own[column]));
                margin - f64::from(scores[0] - scores[column])
            };
            (1..own.len()).map(|column| error(column).powi(2)).sum::<f64>() / (own.len() - 1).max(1) as f64
        }),
        LossKind::Kl => each(&|row, own, scores| {
            let softmax = |z: Vec<f64>| -> Vec<f64> {
                let sum: f64 = z.iter().map(|z| z.exp()).sum();
                z.iter().map(|z| z.exp() / sum).collect()
            };
            let kl = losses.kl;
            let student =
                softmax(own.iter().map(|&column| dot(q(row), c(column)) / kl.temperature).collect());
            let teacher = softmax(scores.iter().map(|&t| f64::from(t) / kl.teacher_temperature).collect());
            let divergence: f64 = teacher.iter().zip(&student).map(|(t, s)| t * (t / s).ln()).sum();
            kl.temperature.powi(2) * divergence
        }),
    }
}

fn random(count: usize, width: usize, unit_length: bool, seed: u64) -> Vectors {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut draw = || (0..width).map(|_| random.random_range(-1.0..1.0)).collect::<Vec<f64>>();
    // What f32 can hold, so that both see the same.
    let narrow = |e: Vec<f64>| e.into_iter().map(|x| f64::from(x as f32)).collect();
    (0..count).map(|_| narrow(if unit_length { unit(&draw()) } else { draw() })).collect()
}

/// Rows whose texts meet again in other rows, with one to three negatives, some columns excluded, few different scores.
fn table(rows: Vec<u32>, loss: LossKind, texts: usize, seed: u64) -> LossTable {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let count = rows.len();
    let mut text = || random.random_range(0..texts) as u32;
    let queries: Vec<u32> = (0..count).map(|_| text()).collect();
    let mut candidates: Vec<u32> = (0..count).map(|_| text()).collect();
    let mut own: Vec<Vec<u32>> = (0..count as u32).map(|row| vec![row]).collect();
    for own in own.iter_mut().filter(|_| loss != LossKind::CoSent) {
        for _ in 0..1 + text() % 3 {
            own.push(candidates.len() as u32);
            candidates.push(text());
        }
    }
    let excluded: Vec<Vec<u32>> = (0..count as u32)
        .map(|row| (0..candidates.len() as u32).filter(|&column| column != row && text() % 7 == 0).collect())
        .collect();
    let lists = |rows: Vec<Vec<u32>>| {
        let offsets = std::iter::once(0).chain(rows.iter().scan(0, |end, row| {
            *end += row.len() as u32;
            Some(*end)
        }));
        CsrIndices { offsets: offsets.collect(), columns: rows.concat() }
    };
    let own = lists(own);
    let scores = own.columns.iter().map(|_| (text() % 4) as f32 / 2.0).collect();
    let positives = (0..count as u32).collect();
    LossTable { loss, rows, queries, candidates, positives, excluded: lists(excluded), own, scores }
}

fn options() -> Losses {
    Losses {
        info_nce: InfoNce {
            temperature: 0.3,
            in_batch_negatives: true,
            symmetric: false,
            false_negative_margin: None,
        },
        triplet: Triplet { distance: Distance::Cosine, margin: 0.5 },
        cosent: CoSent { scale: 5.0 },
        margin_mse: MarginMse,
        kl: Kl { temperature: 0.4, teacher_temperature: 0.7 },
        matryoshka: None,
        normalized: true,
    }
}

const ALL: [LossKind; 5] =
    [LossKind::InfoNce, LossKind::Triplet, LossKind::CoSent, LossKind::MarginMse, LossKind::Kl];

/// Losses with their options, and the tables of a batch of eleven rows.
fn cases() -> Vec<(String, Losses, Vec<LossTable>)> {
    let mut cases = Vec::new();
    for (n, loss) in ALL.into_iter().enumerate() {
        let tables = vec![table((0..11).collect(), loss, 14, n as u64)];
        for distance in [Distance::Cosine, Distance::Euclidean, Distance::Manhattan] {
            if loss == LossKind::Triplet || distance == Distance::Cosine {
                let losses = Losses { triplet: Triplet { distance, margin: 0.5 }, ..options() };
                cases.push((format!("{loss} {distance}"), losses, tables.clone()));
            }
        }
        let matryoshka = Some(Matryoshka { dims: vec![(3, 0.5), (7, 1.0), (5, 2.0)] });
        cases.push((format!("{loss} in parts"), Losses { matryoshka, ..options() }, tables.clone()));
        cases.push((format!("{loss} of any length"), Losses { normalized: false, ..options() }, tables));
    }
    let parts = [vec![0, 4, 5], vec![1], vec![2, 8, 9, 10], vec![3], vec![6, 7]];
    let tables = ALL.into_iter().zip(parts).map(|(loss, rows)| table(rows, loss, 14, 40)).collect();
    cases.push(("all together".to_owned(), options(), tables));
    cases
}

#[test]
fn losses_are_their_formulas_and_gradients_their_differences() {
    for (name, losses, tables) in cases() {
        for unit_length in [false, true] {
            let mut e = random(14, 7, unit_length, 5);
            let (of_rows, d) = evaluate(&losses, &tensor(&e), &tables, 0..11);
            let mean = of_rows.iter().map(|&loss| f64::from(loss)).sum::<f64>() / 11.0;
            let expected = naive(&losses, &e, &tables);
            assert!((mean - expected).abs() < 1e-5 * expected.max(0.1), "{name}: {mean} and {expected}");
            let d = d.to_vec2::<f32>().unwrap();
            for n in 0..e.len() {
                for i in 0..7 {
                    const STEP: f64 = 1e-6;
                    let at = e[n][i];
                    let mut shifted = |to: f64| {
                        e[n][i] = to;
                        naive(&losses, &e, &tables)
                    };
                    let difference = (shifted(at + STEP) - shifted(at - STEP)) / (2.0 * STEP);
                    e[n][i] = at;
                    let got = f64::from(d[n][i]);
                    // f32 in the measures, and the differences' own error.
                    assert!(
                        (got - difference).abs() < 2e-5 * (1.0 + difference.abs()),
                        "{name}: d[{n}][{i}] is {got}, differences say {difference}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_ranks_parts_add_up_to_the_gradient() {
    for (name, losses, tables) in cases() {
        let e = tensor(&random(14, 7, true, 6));
        let (whole, d) = evaluate(&losses, &e, &tables, 0..11);
        for bounds in [&[0, 6, 11][..], &[0, 3, 7, 11], &[0, 0, 1, 10, 11]] {
            let parts: Vec<_> =
                bounds.windows(2).map(|two| evaluate(&losses, &e, &tables, two[0]..two[1])).collect();
            let together: Vec<f32> = parts.iter().flat_map(|(of_rows, _)| of_rows.clone()).collect();
            for (part, whole) in together.iter().zip(&whole) {
                assert!((part - whole).abs() < 1e-6 * whole.max(1.0), "{name}: {together:?} and {whole:?}");
            }
            assert_eq!(together.len(), whole.len());
            let sum = parts.into_iter().map(|(_, d)| d).reduce(|a, b| (a + b).unwrap()).unwrap();
            let apart = (sum - &d).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(apart < 1e-6, "{name}: {apart}");
        }
    }
}

/// The table of rows that stand column by column, as a trainer of that kind has them.
fn by_column(loss: LossKind, rows: usize, columns: usize, labels: &Value) -> LossTable {
    let texts = |range: std::ops::Range<usize>| range.map(|text| text as u32).collect::<Vec<_>>();
    let (rows, columns) = (rows as u32, columns as u32);
    let scores = labels.as_array().map_or_else(Vec::new, |labels| {
        let number = |value: &Value| value.as_f64().unwrap() as f32;
        let of_row = |label: &Value| match label.as_array() {
            Some(several) => several.iter().map(number).collect(),
            None if loss == LossKind::CoSent => vec![number(label)],
            // A difference between the positive's score and the negative's.
            None => vec![0.0, -number(label)],
        };
        labels.iter().flat_map(of_row).collect()
    });
    LossTable {
        loss,
        rows: (0..rows).collect(),
        queries: (0..rows).collect(),
        candidates: texts(rows as usize..(rows * columns) as usize),
        positives: (0..rows).collect(),
        excluded: CsrIndices { offsets: vec![0; rows as usize + 1], columns: vec![] },
        own: CsrIndices {
            offsets: (0..=rows).map(|row| row * (columns - 1)).collect(),
            columns: (0..rows).flat_map(|row| (0..columns - 1).map(move |c| c * rows + row)).collect(),
        },
        scores,
    }
}

#[test]
fn losses_and_gradients_are_those_of_sentence_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/losses.json");
    let golden: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(golden.len(), 14);
    for case in golden {
        let name = case["name"].as_str().unwrap();
        let columns: Vec<Vectors> = serde_json::from_value(case["columns"].clone()).unwrap();
        let gradients: Vec<Vectors> = serde_json::from_value(case["gradients"].clone()).unwrap();
        let kind = ALL.into_iter().find(|kind| name.contains(kind.name())).unwrap();
        let distances = [Distance::Cosine, Distance::Euclidean, Distance::Manhattan];
        let distance = distances.into_iter().find(|distance| name.contains(distance.name()));
        let scaled = name.contains("temperatures");
        let losses = Losses {
            info_nce: InfoNce { temperature: 0.05, ..options().info_nce },
            triplet: Triplet { distance: distance.unwrap_or(Distance::Cosine), margin: 0.75 },
            cosent: CoSent { scale: 20.0 },
            margin_mse: MarginMse,
            kl: if scaled {
                Kl { temperature: 0.25, teacher_temperature: 2.0 }
            } else {
                Kl { temperature: 1.0, teacher_temperature: 1.0 }
            },
            matryoshka: name
                .starts_with("matryoshka")
                .then(|| Matryoshka { dims: vec![(8, 1.0), (4, 0.5), (3, 0.25)] }),
            normalized: !name.contains("any length"),
        };
        let rows = columns[0].len();
        let tables = [by_column(kind, rows, columns.len(), &case["labels"])];
        let (of_rows, d) = evaluate(&losses, &tensor(&columns.concat()), &tables, 0..rows);
        let mean = of_rows.iter().map(|&loss| f64::from(loss)).sum::<f64>() / rows as f64;
        let expected = case["loss"].as_f64().unwrap();
        assert!((mean - expected).abs() < 1e-5 * expected.max(0.1), "{name}: {mean}, expected {expected}");
        for (got, want) in d.to_vec2::<f32>().unwrap().iter().flatten().zip(gradients.concat().concat()) {
            assert!(
                (f64::from(*got) - want).abs() < 1e-5 * (1.0 + want.abs()),
                "{name}: {got}, expected {want}"
            );
        }
    }
}

#[test]
fn equal_texts_and_equal_scores_are_no_trouble() {
    // Query, positive and negative are one text: no distance has a direction there.
    let one = LossTable {
        rows: vec![0, 1],
        queries: vec![0, 0],
        candidates: vec![0, 0, 0, 0],
        positives: vec![0, 1],
        excluded: CsrIndices { offsets: vec![0; 3], columns: vec![] },
        own: CsrIndices { offsets: vec![0, 2, 4], columns: vec![0, 2, 1, 3] },
        scores: vec![1.0; 4],
        ..LossTable::default()
    };
    for loss in ALL {
        let mut table = LossTable { loss, ..one.clone() };
        if loss == LossKind::CoSent {
            table.own = CsrIndices { offsets: vec![0, 1, 2], columns: vec![0, 1] };
            table.scores.truncate(2);
        }
        for distance in [Distance::Cosine, Distance::Euclidean, Distance::Manhattan] {
            let losses = Losses { triplet: Triplet { distance, margin: 0.5 }, ..options() };
            let e = tensor(&vec![vec![0.6, 0.8]]);
            let (of_rows, d) = evaluate(&losses, &e, std::slice::from_ref(&table), 0..2);
            let expected = match loss {
                LossKind::InfoNce => 4f32.ln(),
                LossKind::Triplet => 0.5,
                _ => 0.0,
            };
            assert!(of_rows.iter().all(|got| (got - expected).abs() < 1e-6), "{loss}: {of_rows:?}");
            let d = d.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(d.iter().all(|d| d.abs() < 1e-6), "{loss} {distance}: {d:?}");
        }
    }
}

#[test]
fn what_is_not_a_number_is_seen() {
    for loss in ALL {
        let tables = [table((0..4).collect(), loss, 5, 3)];
        let mut e = random(5, 7, true, 5);
        e[tables[0].queries[0] as usize][0] = f64::NAN;
        let (of_rows, _) = evaluate(&options(), &tensor(&e), &tables, 0..4);
        assert!(of_rows[0].is_nan(), "{loss}: {of_rows:?}");
    }
}
