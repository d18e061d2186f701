//! Compares attention with softmax(scale·q kᵀ) v in f64, one query at a time.

use super::*;
use crate::testing::{finite_difference, inner, numbers, random, relative_error, relative_error_f64};
use candle_core::Device;

/// Sums of up to 128 products, then of up to 1023: each has an error of about √n half ulps (6e-8).
const TOLERANCE: f64 = 1e-6;

fn attention(heads: usize, kv_heads: usize, head_width: usize) -> Attention {
    let scale = 1.0 / (head_width as f32).sqrt();
    Attention { heads, kv_heads, head_width, scale, left: None, right: None, dropout: None }
}

fn packing(lengths: &[usize]) -> Packing {
    Packing::new(lengths, (0..lengths.len() as u32).map(|n| 40 + n).collect())
}

/// q, k, v and dL/do.
fn inputs(a: &Attention, tokens: usize) -> [Tensor; 4] {
    let (wide, narrow) = (a.heads * a.head_width, a.kv_heads * a.head_width);
    [(1, wide), (2, narrow), (3, narrow), (4, wide)].map(|(seed, width)| random(seed, (tokens, width)))
}

/// The dropout factor of a probability, 0 or 1/(1 − p), by sequence, its tokens, head, query and key.
type Factor<'a> = &'a dyn Fn(usize, usize, usize, usize, usize) -> f64;

/// The bias of a score, by head, query and key.
type Bias<'a> = &'a dyn Fn(usize, usize, usize) -> f64;

struct Reference {
    o: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    /// (head, key − query, dL/d(score)) of each pair.
    pairs: Vec<(usize, isize, f64)>,
}

fn reference(x: [&[f64]; 4], packing: &Packing, a: &Attention, factor: Factor) -> Reference {
    reference_biased(x, packing, a, factor, &|_, _, _| 0.0)
}

fn reference_biased(
    [q, k, v, d_o]: [&[f64]; 4],
    packing: &Packing,
    a: &Attention,
    factor: Factor,
    bias: Bias,
) -> Reference {
    let (h_count, g_count, width) = (a.heads, a.kv_heads, a.head_width);
    let total = packing.tokens();
    let mut r = Reference {
        o: vec![0.0; q.len()],
        lse: vec![0.0; h_count * total],
        dq: vec![0.0; q.len()],
        dk: vec![0.0; k.len()],
        dv: vec![0.0; k.len()],
        pairs: Vec::new(),
    };
    for (n, rows) in packing.ranges().enumerate() {
        let tokens = rows.len();
        for (h, i) in (0..h_count).flat_map(|h| (0..tokens).map(move |i| (h, i))) {
            let at = ((rows.start + i) * h_count + h) * width;
            let key = |j: usize| ((rows.start + j) * g_count + h / (h_count / g_count)) * width;
            let seen: Vec<usize> = (0..tokens)
                .filter(|&j| {
                    let far = (i.saturating_sub(j), j.saturating_sub(i));
                    a.left.is_none_or(|left| far.0 <= left) && a.right.is_none_or(|right| far.1 <= right)
                })
                .collect();
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
            let (query, gradient) = (&q[at..at + width], &d_o[at..at + width]);
            let scale = f64::from(a.scale);
            let scores: Vec<f64> = seen
                .iter()
                .map(|&j| scale * dot(query, &k[key(j)..key(j) + width]) + bias(h, i, j))
                .collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let lse = top + scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln();
            r.lse[h * total + rows.start + i] = lse;
            let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
            let kept: Vec<f64> = seen.iter().map(|&j| factor(n, tokens, h, i, j)).collect();
            let dp: Vec<f64> =
                seen.iter().zip(&kept).map(|(&j, f)| f * dot(gradient, &v[key(j)..key(j) + width])).collect();
            let delta = dot(&p, &dp);
            for (x, &j) in seen.iter().enumerate() {
                r.pairs.push((h, j as isize - i as isize, p[x] * (dp[x] - delta)));
                let ds = p[x] * (dp[x] - delta) * scale;
                for d in 0..width {
                    r.o[at + d] += p[x] * kept[x] * v[key(j) + d];
                    r.dv[key(j) + d] += p[x] * kept[x] * gradient[d];
                    r.dq[at + d] += ds * k[key(j) + d];
                    r.dk[key(j) + d] += ds * query[d];
                }
            }
        }
    }
    r
}

fn compare(lengths: &[usize], a: &Attention, tiles: Tiles, factor: Factor) {
    let packing = packing(lengths);
    let [q, k, v, d_o] = inputs(a, packing.tokens());
    let (o, lse) = forward_in(tiles, &q, &k, &v, None, &packing, a).unwrap();
    let (dq, dk, dv, _) = backward_in(tiles, [&q, &k, &v, &o, &lse, &d_o], None, &packing, a).unwrap();
    let wide = [&q, &k, &v, &d_o].map(numbers);
    let want = reference(wide.each_ref().map(Vec::as_slice), &packing, a, factor);
    for (name, got, want) in [
        ("o", &o, &want.o),
        ("lse", &lse, &want.lse),
        ("dq", &dq, &want.dq),
        ("dk", &dk, &want.dk),
        ("dv", &dv, &want.dv),
    ] {
        let error = relative_error(got, want);
        assert!(error < TOLERANCE, "{name} of {lengths:?}, {a:?}: {error:.1e}");
    }
}

fn everything(_: usize, _: usize, _: usize, _: usize, _: usize) -> f64 {
    1.0
}

#[test]
fn the_reference_backward_is_the_derivative_of_its_forward() {
    let a = Attention { left: Some(2), right: Some(1), ..attention(4, 2, 3) };
    let packing = packing(&[5, 0, 1, 3]);
    let factor = |_, _, h, i, j| [0.0, 1.25, 1.25][(h + 2 * i + j) % 3];
    let [q, k, v, d_o] = inputs(&a, 9).map(|x| numbers(&x));
    let loss =
        |q: &[f64], k: &[f64], v: &[f64]| inner(&reference([q, k, v, &d_o], &packing, &a, &factor).o, &d_o);
    let want = reference([&q, &k, &v, &d_o], &packing, &a, &factor);
    for (name, got, want) in [
        ("dq", want.dq, finite_difference(&q, |q| loss(q, &k, &v))),
        ("dk", want.dk, finite_difference(&k, |k| loss(&q, k, &v))),
        ("dv", want.dv, finite_difference(&v, |v| loss(&q, &k, v))),
    ] {
        assert!(relative_error_f64(&got, &want) < 1e-8, "{name}");
    }
}

#[test]
fn texts_of_every_length_equal_the_reference() {
    for width in [1, 7, 8, 32, 64, 128] {
        compare(&[1, 3, 0, 7, 33, 16, 31, 32], &attention(2, 2, width), TILES, &everything);
    }
    compare(&[1023, 5], &attention(2, 1, 32), TILES, &everything);
}

#[test]
fn grouped_heads_causal_and_windowed_texts_equal_the_reference() {
    for (left, right) in
        [(None, Some(0)), (Some(3), Some(0)), (Some(4), Some(4)), (Some(0), None), (Some(200), Some(1))]
    {
        for (heads, kv_heads) in [(4, 4), (4, 1), (6, 2), (12, 4)] {
            let a = Attention { left, right, ..attention(heads, kv_heads, 8) };
            compare(&[1, 0, 10, 47, 300], &a, TILES, &everything);
        }
    }
    let unlimited = Attention { left: Some(usize::MAX), right: Some(usize::MAX), ..attention(2, 1, 8) };
    compare(&[3, 40], &unlimited, TILES, &everything);
}

#[test]
fn a_bias_by_distance_and_its_gradient_equal_the_reference() {
    for (max_distance, right, width) in [(0, None, 8), (3, None, 16), (40, None, 7), (3, Some(0), 8)] {
        let a = Attention { right, ..attention(3, 3, width) };
        let packing = packing(&[1, 3, 0, 7, 47, 300, 32]);
        let [q, k, v, d_o] = inputs(&a, packing.tokens());
        let columns = 2 * max_distance + 1;
        let bias = random(5, (3, columns));
        let numbers_of_bias = numbers(&bias);
        let column = |distance: isize| {
            let max_distance = max_distance as isize;
            (distance.clamp(-max_distance, max_distance) + max_distance) as usize
        };
        let added =
            |h: usize, i: usize, j: usize| numbers_of_bias[h * columns + column(j as isize - i as isize)];
        let (o, lse) = forward_biased(&q, &k, &v, &bias, &packing, &a).unwrap();
        let (dq, dk, dv, dbias) = backward_biased(&q, &k, &v, &bias, &o, &lse, &d_o, &packing, &a).unwrap();
        let wide = [&q, &k, &v, &d_o].map(numbers);
        let want = reference_biased(wide.each_ref().map(Vec::as_slice), &packing, &a, &everything, &added);
        let mut want_bias = vec![0.0; 3 * columns];
        for (h, distance, ds) in &want.pairs {
            want_bias[h * columns + column(*distance)] += ds;
        }
        for (name, got, want) in [
            ("o", &o, &want.o),
            ("lse", &lse, &want.lse),
            ("dq", &dq, &want.dq),
            ("dk", &dk, &want.dk),
            ("dv", &dv, &want.dv),
            ("dbias", &dbias, &want_bias),
        ] {
            // A bias of one column does not change the softmax: its gradient is 0 up to rounding.
            let error = if name == "dbias" && max_distance == 0 {
                numbers(got).iter().fold(0.0, |most: f64, x| most.max(x.abs())) / 1e2
            } else {
                relative_error(got, want)
            };
            assert!(error < TOLERANCE, "{name}, max_distance {max_distance}, {right:?}: {error:.1e}");
        }
    }
    let (a, packing) = (attention(4, 2, 8), packing(&[5]));
    let [q, k, v, _] = inputs(&a, 5);
    let error =
        |bias: &Tensor, a: &Attention| forward_biased(&q, &k, &v, bias, &packing, a).unwrap_err().to_string();
    assert!(
        error(&random(1, (4, 3)), &a)
            .contains("a relative position bias needs as many key-value heads as heads")
    );
    assert!(error(&random(1, (4, 4)), &a).contains("expected an odd number"));
    assert!(error(&random(1, (3, 3)), &a).contains("`bias` has the shape [3, 3], expected [4, 3]"));
}

#[test]
fn the_size_of_the_tiles_does_not_matter() {
    let a = Attention { left: Some(20), right: Some(5), ..attention(4, 2, 16) };
    for (queries, keys) in [(16, 1), (16, 7), (64, 16), (128, 512)] {
        compare(&[90, 3, 40], &a, Tiles { queries, keys }, &everything);
    }
}

#[test]
fn a_text_alone_and_in_any_packing_gives_the_same_bits() {
    let a = Attention { right: Some(0), ..attention(4, 2, 32) };
    let packing = packing(&[37, 5, 0, 150, 1]);
    let [q, k, v, d_o] = inputs(&a, packing.tokens());
    let run = |q: &Tensor, k: &Tensor, v: &Tensor, d_o: &Tensor, packing: &Packing| {
        let (o, lse) = forward(q, k, v, packing, &a).unwrap();
        let (dq, dk, dv) = backward(q, k, v, &o, &lse, d_o, packing, &a).unwrap();
        [o, dq, dk, dv]
    };
    let together = run(&q, &k, &v, &d_o, &packing);
    for range in packing.ranges() {
        let part = |x: &Tensor| x.narrow(0, range.start, range.len()).unwrap().force_contiguous().unwrap();
        let alone =
            run(&part(&q), &part(&k), &part(&v), &part(&d_o), &super::Packing::new(&[range.len()], vec![9]));
        for (alone, together) in alone.iter().zip(&together) {
            assert_eq!(numbers(alone), numbers(&part(together)));
        }
    }
}

#[test]
fn nothing_comes_from_another_text_not_even_nan() {
    let a = attention(2, 1, 8);
    let [q, k, v, d_o] = inputs(&a, 9);
    let spoil = |x: &Tensor| {
        let mut all = x.to_vec2::<f32>().unwrap();
        all[3..5].iter_mut().for_each(|row| row.fill(f32::NAN));
        Tensor::new(all, &Device::Cpu).unwrap()
    };
    let (q, k, v, d_o) = (spoil(&q), spoil(&k), spoil(&v), spoil(&d_o));
    let packing = packing(&[3, 2, 4]);
    let (o, lse) = forward(&q, &k, &v, &packing, &a).unwrap();
    let (dq, dk, dv) = backward(&q, &k, &v, &o, &lse, &d_o, &packing, &a).unwrap();
    for x in [o, dq, dk, dv] {
        for (t, row) in x.to_vec2::<f32>().unwrap().iter().enumerate() {
            assert_eq!(row.iter().all(|x| x.is_nan()), (3..5).contains(&t), "token {t}");
            assert_eq!(row.iter().any(|x| x.is_nan()), (3..5).contains(&t), "token {t}");
        }
    }
}

#[test]
fn scores_of_any_size_do_not_overflow() {
    for scale in [1e4, 1e-8] {
        let a = Attention { scale, ..attention(2, 2, 8) };
        compare_loosely(&[200, 3], &a);
    }
}

/// At a scale of 1e4 scores are near 1e5, where an ulp is 8e-3; the logarithm of a probability has that
/// error.
fn compare_loosely(lengths: &[usize], a: &Attention) {
    let packing = packing(lengths);
    let [q, k, v, d_o] = inputs(a, packing.tokens());
    let (o, lse) = forward(&q, &k, &v, &packing, a).unwrap();
    let (dq, dk, dv) = backward(&q, &k, &v, &o, &lse, &d_o, &packing, a).unwrap();
    let wide = [&q, &k, &v, &d_o].map(numbers);
    let want = reference(wide.each_ref().map(Vec::as_slice), &packing, a, &everything);
    assert!(relative_error(&o, &want.o) < 2e-2);
    for x in [&dq, &dk, &dv] {
        assert!(numbers(x).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn dropout_is_a_function_of_the_text_the_head_the_query_and_the_key() {
    let dropout = Dropout { p: 0.3, seed: 1 << 40 | 5, step: 7, site: 3 };
    let factor = |n: usize, tokens: usize, h: usize, i: usize, j: usize| {
        let mut one = f64::NAN;
        let element = ((h * tokens + i) * tokens + j) as u64;
        dropout.factors(40 + n as u32, element, 1, |_, factors| one = f64::from(factors[0]));
        one
    };
    for (left, right, kv_heads) in [(None, None, 6), (None, Some(0), 2), (Some(9), Some(3), 1)] {
        let a = Attention { left, right, dropout: Some(dropout), ..attention(6, kv_heads, 8) };
        compare(&[1, 10, 0, 47, 300], &a, TILES, &factor);
        compare(&[10, 47], &a, Tiles { queries: 16, keys: 7 }, &factor);
    }
    let a = Attention { dropout: Some(Dropout { p: 1.0, ..dropout }), ..attention(1, 1, 8) };
    let [q, k, v, _] = inputs(&a, 5);
    assert!(forward(&q, &k, &v, &packing(&[5]), &a).unwrap_err().to_string().contains("dropout is 1"));
}

#[test]
fn no_tokens_are_no_work() {
    for lengths in [&[][..], &[0, 0]] {
        let a = attention(2, 1, 8);
        let [q, k, v, d_o] = inputs(&a, 0);
        let packing = packing(lengths);
        let (o, lse) = forward(&q, &k, &v, &packing, &a).unwrap();
        assert_eq!((o.dims(), lse.dims()), (&[0, 16][..], &[2, 0][..]));
        let (dq, dk, _) = backward(&q, &k, &v, &o, &lse, &d_o, &packing, &a).unwrap();
        assert_eq!((dq.dims(), dk.dims()), (&[0, 16][..], &[0, 8][..]));
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused_by_name() {
    let a = attention(4, 2, 8);
    let [q, k, v, _] = inputs(&a, 5);
    let error = |q: &Tensor, k: &Tensor, lengths: &[usize], a: &Attention| {
        forward(q, k, &v, &packing(lengths), a).unwrap_err().to_string()
    };
    assert!(error(&q, &k, &[4], &a).contains("`q` has the shape [5, 32], expected [4, 32]"));
    assert!(error(&q, &q, &[5], &a).contains("`k` has the shape [5, 32], expected [5, 16]"));
    assert!(
        error(&q, &k, &[5], &attention(4, 3, 8)).contains("4 heads of size 8 cannot share 3 key-value heads")
    );
    assert!(error(&q, &k, &[5], &attention(0, 0, 8)).contains("0 heads"));
    assert!(
        error(&q.t().unwrap(), &k, &[32], &Attention { heads: 5, kv_heads: 5, ..attention(5, 5, 1) })
            .contains("`k`")
    );
}
