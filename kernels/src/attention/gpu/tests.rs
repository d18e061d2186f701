//! Compares the kernels with softmax(scale·q kᵀ + bias) v in f64, one query at a time.

use super::*;
use crate::dropout::{self, Dropout};
use crate::testing::{TYPES, cast, inner, numbers, random_on_device, relative_error};
use candle_core::Device;

fn attention(heads: usize, kv_heads: usize, head_width: usize) -> Attention {
    let scale = 1.0 / (head_width as f32).sqrt();
    Attention { heads, kv_heads, head_width, scale, left: None, right: None, dropout: None }
}

fn packing(lengths: &[usize]) -> crate::Packing {
    crate::Packing::new(lengths, (0..lengths.len() as u32).map(|n| 40 + n).collect())
}

/// q, k, v and dL/do.
fn inputs(a: &Attention, tokens: usize) -> [Tensor; 4] {
    let (wide, narrow) = (a.heads * a.head_width, a.kv_heads * a.head_width);
    [(1, wide), (2, narrow), (3, narrow), (4, wide)]
        .map(|(seed, width)| random_on_device(seed, (tokens, width)))
}

/// Calls `f` with the arguments of a forward and of a backward pass over two sequences.
pub(crate) fn with_arguments(f: impl FnOnce(VoidPointer, VoidPointer)) {
    let a = attention(1, 1, 16);
    let packing = packing(&[150, 5]);
    // Always in the emulator, also where the other tests run on a GPU.
    let of = |x: Tensor| Memory::of(&cast(&x.to_device(&Device::Cpu).unwrap(), DType::BF16)).unwrap();
    let [q, k, v, d_o] = inputs(&a, 155).map(of);
    let packing = DevicePacking::of(&packing, &Device::Cpu).unwrap();
    let new = |dtype| Memory::new(&Device::Cpu, dtype, 155 * 16).unwrap();
    let [o, dq, dk, dv] = [DType::BF16; 4].map(new);
    let (lse, delta) = (new(DType::F32), new(DType::F32));
    let inputs = [q, k, v];
    let mut arguments = arguments(&a, &inputs, None, None, &packing, 1);
    (arguments.o, arguments.lse, arguments.d_o) = (o.pointer(), lse.pointer(), d_o.pointer());
    (arguments.dq, arguments.dk, arguments.dv) = (dq.pointer(), dk.pointer(), dv.pointer());
    arguments.delta = delta.pointer();
    let arguments = &raw const arguments;
    f(arguments.cast(), arguments.cast());
}

struct Reference {
    o: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    dbias: Vec<f64>,
}

fn reference(
    [q, k, v, d_o]: [&[f64]; 4],
    bias: &[f64],
    masks: &[Vec<f64>],
    packing: &crate::Packing,
    a: &Attention,
) -> Reference {
    let (width, total) = (a.head_width, packing.tokens());
    let columns = bias.len() / a.heads;
    let [o, dq] = [(); 2].map(|()| vec![0.0; q.len()]);
    let [dk, dv] = [(); 2].map(|()| vec![0.0; k.len()]);
    let mut r = Reference { o, lse: vec![0.0; a.heads * total], dq, dk, dv, dbias: vec![0.0; bias.len()] };
    for (n, rows) in packing.ranges().enumerate() {
        let tokens = rows.len();
        for (h, i) in (0..a.heads).flat_map(|h| (0..tokens).map(move |i| (h, i))) {
            let row = |t: usize, heads: usize, head: usize| ((rows.start + t) * heads + head) * width;
            let at = row(i, a.heads, h);
            let key = |j: usize| row(j, a.kv_heads, h / (a.heads / a.kv_heads));
            let column = |j: usize| {
                let max_distance = columns as isize / 2;
                h * columns
                    + (max_distance + (j as isize - i as isize).clamp(-max_distance, max_distance)) as usize
            };
            let seen: Vec<usize> = a.visible(i, tokens).collect();
            let of = |x: &[f64], j: usize, y: &[f64]| inner(&x[at..at + width], &y[key(j)..key(j) + width]);
            let score = |&j: &usize| {
                f64::from(a.scale) * of(q, j, k) + if columns == 0 { 0.0 } else { bias[column(j)] }
            };
            let scores: Vec<f64> = seen.iter().map(score).collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let lse = top + scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln();
            r.lse[h * total + rows.start + i] = lse;
            let factor = |j: usize| masks.get(n).map_or(1.0, |mask| mask[(h * tokens + i) * tokens + j]);
            let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
            let dp: Vec<f64> = seen.iter().map(|&j| factor(j) * of(d_o, j, v)).collect();
            let delta = inner(&p, &dp);
            for (x, &j) in seen.iter().enumerate() {
                let ds = p[x] * (dp[x] - delta);
                if columns > 0 {
                    r.dbias[column(j)] += ds;
                }
                for d in 0..width {
                    r.o[at + d] += p[x] * factor(j) * v[key(j) + d];
                    r.dv[key(j) + d] += p[x] * factor(j) * d_o[at + d];
                    r.dq[at + d] += ds * f64::from(a.scale) * k[key(j) + d];
                    r.dk[key(j) + d] += ds * f64::from(a.scale) * q[at + d];
                }
            }
        }
    }
    r
}

/// Compares all results for one type, with a bias of `columns` columns, or without one if that is 0.
fn compare(lengths: &[usize], a: &Attention, columns: usize, dtype: DType, rounding: f64) {
    let packing = packing(lengths);
    let [q, k, v, d_o] = inputs(a, packing.tokens()).map(|x| cast(&x, dtype));
    let bias = (columns > 0).then(|| random_on_device(9, (a.heads, columns)));
    let (o, lse) = forward(&q, &k, &v, bias.as_ref(), &packing, a).unwrap();
    let (dq, dk, dv, dbias) = backward([&q, &k, &v, &o, &lse, &d_o], bias.as_ref(), &packing, a).unwrap();

    let mask =
        |(n, tokens): (usize, &usize)| a.dropout.map(|d| mask(&d, packing.number(n), *tokens, a.heads));
    let masks: Vec<Vec<f64>> = lengths.iter().enumerate().filter_map(mask).collect();
    let wide = [&q, &k, &v, &d_o].map(numbers);
    let bias = bias.as_ref().map(numbers).unwrap_or_default();
    let want = reference(wide.each_ref().map(Vec::as_slice), &bias, &masks, &packing, a);
    let dbias = dbias.as_ref().map(|dbias| ("dbias", dbias, &want.dbias));
    let all = [("o", &o, &want.o), ("dq", &dq, &want.dq), ("dk", &dk, &want.dk), ("dv", &dv, &want.dv)];
    for (name, got, want) in all.into_iter().chain(dbias) {
        let error = relative_error(got, want);
        // Probabilities and their gradients are rounded before they are multiplied, and so are o and the
        // results.
        assert!(error < 2.0 * rounding, "{name} of {dtype:?} {lengths:?}, {a:?}: {error:.1e}");
    }
    // The log-sum-exp is computed in f32 for every type.
    assert!(relative_error(&lse, &want.lse) < 2e-6, "lse of {dtype:?} {lengths:?}, {a:?}");
}

/// The dropout factors of the probabilities of a sequence, by head, query and key.
fn mask(d: &Dropout, number: u32, tokens: usize, heads: usize) -> Vec<f64> {
    let ones = Tensor::ones((1, heads * tokens * tokens), DType::F32, &Device::Cpu).unwrap();
    numbers(&dropout::apply(&ones, &crate::Packing::new(&[1], vec![number]), d).unwrap())
}

#[test]
fn kernels_equal_the_reference_in_both_directions() {
    for (dtype, rounding) in TYPES {
        // Odd lengths and sizes, several tiles of queries and of keys, empty sequences, no sequence.
        for (lengths, heads, kv_heads, head_width) in [
            (vec![], 2, 1, 8),
            (vec![1], 1, 1, 1),
            (vec![3, 0, 7], 4, 2, 7),
            (vec![65, 1], 2, 2, 32),
            (vec![130, 33], 2, 1, 24),
            (vec![70], 1, 1, 64),
            (vec![67], 2, 1, 128),
        ] {
            compare(&lengths, &attention(heads, kv_heads, head_width), 0, dtype, rounding);
        }
    }
}

#[test]
fn causal_and_windows() {
    for (dtype, rounding) in TYPES {
        for (left, right) in [(None, Some(0)), (Some(10), Some(0)), (Some(3), Some(70)), (Some(0), None)] {
            compare(&[140, 9], &Attention { left, right, ..attention(4, 2, 16) }, 0, dtype, rounding);
        }
    }
}

#[test]
fn dropout_and_bias() {
    let dropout = Some(Dropout { p: 0.3, seed: 7, step: 2, site: 5 });
    for (dtype, rounding) in TYPES {
        compare(&[67, 6], &Attention { dropout, ..attention(2, 1, 16) }, 0, dtype, rounding);
        compare(&[67, 6], &attention(2, 2, 16), 21, dtype, rounding);
        compare(&[3, 35], &Attention { dropout, ..attention(2, 2, 16) }, 5, dtype, rounding);
    }
}

#[test]
fn heads_wider_than_the_tiles() {
    for (dtype, rounding) in TYPES {
        compare(&[19], &attention(1, 1, 200), 0, dtype, rounding);
    }
}

#[test]
fn other_types_and_heads_that_are_too_large_are_an_error() {
    let (packing, a) = (packing(&[2]), attention(1, 1, 300));
    let [q, k, v, _] = inputs(&a, 2);
    assert!(forward(&q, &k, &v, None, &packing, &a).unwrap_err().to_string().contains("300"));
    let a = attention(1, 1, 4);
    let [q, k, v, _] = inputs(&a, 2);
    assert!(forward(&q, &cast(&k, DType::F16), &v, None, &packing, &a).is_err());
    let bias = cast(&random_on_device(1, (1, 3)), DType::F16);
    assert!(forward(&q, &k, &v, Some(&bias), &packing, &a).is_err());
}
