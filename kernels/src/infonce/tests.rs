use super::*;
use crate::testing::{finite_difference, numbers, random, relative_error, relative_error_f64};
use candle_core::{DType, Device};

/// The error of similarities, which are sums of up to 384 terms in f32, is multiplied by a scale of 20.
const TOLERANCE: f64 = 1e-5;

pub(super) fn unit(seed: u64, rows: usize, width: usize) -> Tensor {
    let x = random(seed, (rows, width));
    let norm = x.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
    x.broadcast_div(&norm).unwrap()
}

fn counts(infonce: &InfoNce, i: usize, j: usize, scores: &[f64]) -> bool {
    let p = infonce.positives[i] as usize;
    let listed = |lists: &CsrIndices| {
        lists.columns[lists.offsets[i] as usize..lists.offsets[i + 1] as usize].contains(&(j as u32))
    };
    let candidate = match &infonce.candidates {
        Candidates::All => true,
        Candidates::AllBut(lists) => !listed(lists),
        Candidates::Only(lists) => listed(lists),
    };
    let near = infonce.margin.is_none_or(|margin| scores[j] <= scores[p] + f64::from(margin));
    j == p || candidate && near
}

/// The loss of each row, and its gradient for every similarity.
pub(super) fn reference(q: &[f64], c: &[f64], width: usize, infonce: &InfoNce) -> (Vec<f64>, Vec<f64>) {
    let scale = f64::from(infonce.scale);
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (i, q) in q.chunks(width).enumerate() {
        let scores: Vec<f64> =
            c.chunks(width).map(|c| q.iter().zip(c).map(|(q, c)| q * c).sum::<f64>()).collect();
        let counted: Vec<f64> =
            (0..scores.len()).map(|j| f64::from(u8::from(counts(infonce, i, j, &scores)))).collect();
        let p = infonce.positives[i] as usize;
        let z: Vec<f64> = scores.iter().map(|s| scale * (s - scores[p])).collect();
        let top = z.iter().zip(&counted).map(|(z, c)| z * c).fold(0.0, f64::max);
        let loss = top + z.iter().zip(&counted).map(|(z, c)| c * (z - top).exp()).sum::<f64>().ln();
        losses.push(loss);
        gradient.extend(
            (0..z.len()).map(|j| scale * (counted[j] * (z[j] - loss).exp() - f64::from(u8::from(j == p)))),
        );
    }
    (losses, gradient)
}

/// dq and dc of weight · Σ loss.
pub(super) fn reference_backward(
    q: &[f64],
    c: &[f64],
    width: usize,
    infonce: &InfoNce,
    weight: f64,
) -> [Vec<f64>; 2] {
    let (_, gradient) = reference(q, c, width, infonce);
    let (mut dq, mut dc) = (vec![0.0; q.len()], vec![0.0; c.len()]);
    let columns = c.len() / width;
    for (at, g) in gradient.iter().enumerate() {
        for d in 0..width {
            let (qd, cd) = (at / columns * width + d, at % columns * width + d);
            dq[qd] += weight * g * c[cd];
            dc[cd] += weight * g * q[qd];
        }
    }
    [dq, dc]
}

fn compare(tile: Tile, q: &Tensor, c: &Tensor, infonce: &InfoNce, tolerance: f64) {
    let (b, width) = q.dims2().unwrap();
    let tape = forward_in(tile, q, c, infonce).unwrap();
    let weight = 1.0 / b as f32;
    let (dq, dc) = backward_in(tile, q, c, infonce, &tape, weight).unwrap();
    let (q, c) = (numbers(q), numbers(c));
    let (losses, _) = reference(&q, &c, width, infonce);
    let got = numbers(&tape.losses);
    let [want_dq, want_dc] = reference_backward(&q, &c, width, infonce, f64::from(weight));
    for (name, error) in [
        ("losses", relative_error_f64(&got, &losses)),
        ("dq", relative_error(&dq, &want_dq)),
        ("dc", relative_error(&dc, &want_dc)),
    ] {
        assert!(error < tolerance, "{name} of {b} rows, {infonce:?}: {error:.1e}");
    }
}

fn plain(positives: &[u32]) -> InfoNce<'_> {
    InfoNce { positives, candidates: Candidates::All, scale: 20.0, margin: None }
}

/// Lists that are not sorted and have repetitions. Two are empty, and one has the positive of its row (the
/// row's index).
const LISTS: CsrIndices = CsrIndices { offsets: &[0, 3, 3, 5, 9], columns: &[6, 0, 4, 5, 5, 3, 8, 1, 8] };

#[test]
fn the_reference_gradient_is_the_derivative_of_its_loss() {
    let (q, c) = (numbers(&unit(1, 4, 3)), numbers(&unit(2, 9, 3)));
    for candidates in [Candidates::All, Candidates::AllBut(LISTS), Candidates::Only(LISTS)] {
        let infonce = InfoNce { candidates, margin: Some(0.1), ..plain(&[0, 1, 2, 3]) };
        let loss = |q: &[f64], c: &[f64]| reference(q, c, 3, &infonce).0.iter().sum::<f64>();
        let [dq, dc] = reference_backward(&q, &c, 3, &infonce, 1.0);
        assert!(relative_error_f64(&dq, &finite_difference(&q, |q| loss(q, &c))) < 1e-7);
        assert!(relative_error_f64(&dc, &finite_difference(&c, |c| loss(&q, c))) < 1e-7);
    }
}

#[test]
fn losses_and_gradients_equal_the_reference() {
    for (b, m, width) in [(1, 1, 1), (1, 2, 3), (3, 7, 2), (7, 1023, 33), (33, 64, 384)] {
        let positives: Vec<u32> = (0..b as u32).map(|i| i * 5 % m as u32).collect();
        compare(TILE, &unit(1, b, width), &unit(2, m, width), &plain(&positives), TOLERANCE);
    }
}

#[test]
fn lists_and_margins_choose_the_candidates() {
    let (q, c) = (unit(1, 4, 5), unit(2, 9, 5));
    for candidates in [Candidates::All, Candidates::AllBut(LISTS), Candidates::Only(LISTS)] {
        for margin in [None, Some(0.3), Some(-0.1)] {
            let infonce = InfoNce { candidates, margin, ..plain(&[0, 1, 2, 3]) };
            compare(TILE, &q, &c, &infonce, TOLERANCE);
        }
    }
}

#[test]
fn the_size_of_the_tiles_does_not_matter() {
    let (q, c) = (unit(1, 4, 5), unit(2, 9, 5));
    for (rows, columns) in [(1, 1), (3, 2), (2, 9), (4, 4)] {
        for candidates in [Candidates::All, Candidates::AllBut(LISTS)] {
            let infonce = InfoNce { candidates, margin: Some(0.5), ..plain(&[0, 1, 2, 3]) };
            compare(Tile { rows, columns }, &q, &c, &infonce, TOLERANCE);
        }
    }
}

#[test]
fn a_positive_counts_even_if_it_is_excluded_or_alone() {
    let (q, c) = (unit(1, 1, 4), unit(2, 3, 4));
    let all = CsrIndices { offsets: &[0, 3], columns: &[0, 1, 2] };
    let none = CsrIndices { offsets: &[0, 0], columns: &[] };
    for candidates in [Candidates::AllBut(all), Candidates::Only(none)] {
        let infonce = InfoNce { candidates, ..plain(&[1]) };
        let tape = forward(&q, &c, &infonce).unwrap();
        assert_eq!(numbers(&tape.losses), [0.0]);
        let (dq, dc) = backward(&q, &c, &infonce, &tape, 1.0).unwrap();
        assert_eq!((numbers(&dq), numbers(&dc)), (vec![0.0; 4], vec![0.0; 12]));
    }
}

#[test]
fn high_scales_do_not_overflow_and_small_losses_keep_their_digits() {
    let x = unit(1, 6, 32);
    let positives = [0, 1, 2, 3, 4, 5];
    // Each text is its own positive: losses down to e^-30, far below an ulp of the logits.
    for scale in [10.0, 30.0] {
        compare(TILE, &x, &x, &InfoNce { scale, ..plain(&positives) }, TOLERANCE);
    }
    let tape = forward(&x, &x, &InfoNce { scale: 1e5, ..plain(&positives) }).unwrap();
    assert_eq!(numbers(&tape.losses), [0.0; 6]);
    // Another text as the positive, and vectors of length 50: logits up to 5e5.
    let long = (x * 50.0).unwrap();
    let infonce = InfoNce { scale: 100.0, ..plain(&[1, 2, 3, 4, 5, 0]) };
    compare(TILE, &long, &long, &infonce, TOLERANCE);
}

#[test]
fn nan_stays_in_its_row() {
    let mut rows = unit(1, 3, 4).to_vec2::<f32>().unwrap();
    rows[1][2] = f32::NAN;
    let q = Tensor::new(rows, &Device::Cpu).unwrap();
    let c = unit(2, 40, 4);
    let infonce = plain(&[0, 1, 2]);
    let tape = forward(&q, &c, &infonce).unwrap();
    assert_eq!(numbers(&tape.losses).iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, true, false]);
    let (dq, dc) = backward(&q, &c, &infonce, &tape, 1.0).unwrap();
    let dq = numbers(&dq);
    assert!(dq[..4].iter().chain(&dq[8..]).all(|x| x.is_finite()) && dq[4..8].iter().all(|x| x.is_nan()));
    assert!(numbers(&dc).iter().all(|x| x.is_nan()));
}

#[test]
fn no_rows_are_no_work() {
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    for (c, m) in [(unit(2, 3, 4), 3), (empty.clone(), 0)] {
        let infonce = plain(&[]);
        let tape = forward(&empty, &c, &infonce).unwrap();
        let (dq, dc) = backward(&empty, &c, &infonce, &tape, 1.0).unwrap();
        assert_eq!((dq.dims(), numbers(&dc)), (&[0, 4][..], vec![0.0; 4 * m]));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (q, c) = (unit(1, 2, 4), unit(2, 3, 4));
    let error = |infonce: InfoNce| forward(&q, &c, &infonce).unwrap_err().to_string();
    assert!(error(plain(&[0])).contains("1 positives for 2 queries"));
    assert!(error(plain(&[0, 3])).contains("row 1: the positive is column 3, but there are 3 columns"));
    let lists = |offsets, columns| InfoNce {
        candidates: Candidates::AllBut(CsrIndices { offsets, columns }),
        ..plain(&[0, 1])
    };
    assert!(
        error(lists(&[0, 1, 2], &[0, 7])).contains("row 1: its list has column 7, but there are 3 columns")
    );
    for offsets in [&[0, 1][..], &[0, 2, 1], &[1, 1, 1], &[0, 1, 2]] {
        assert!(error(lists(offsets, &[0])).contains("3 ascending offsets from 0 to 1"), "{offsets:?}");
    }
    assert!(
        forward(&q, &unit(1, 3, 5), &plain(&[0, 1])).unwrap_err().to_string().contains("the candidates 5")
    );
    let tape = forward(&q, &c, &plain(&[0, 1])).unwrap();
    assert!(backward(&unit(1, 3, 4), &c, &plain(&[0, 1, 2]), &tape, 1.0).is_err());
}
