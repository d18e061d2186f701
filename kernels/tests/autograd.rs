//! Compares the written backward passes with candle's autograd in f64.
//!
//! The reference forward passes are composed of elementary ops of candle and of `candle_nn::ops::softmax`.
//! The fused ops of candle-nn cannot be used: they do not propagate gradients.

use candle_core::{D, DType, Device, Result, Shape, Tensor, Var};
use candle_nn::{Embedding, Linear, Module, ops};
use kernels::attention::{self, Attention};
use kernels::embedding::{self, Tables};
use kernels::{Packing, linear, norm};

/// The tolerated relative error of f32 sums of up to some hundred terms against f64.
const TOLERANCE: f64 = 2e-6;
const EPSILON: f64 = 1e-5;

/// Uniform elements between −2 and 2, from the linear congruential generator of Knuth's MMIX.
fn random(seed: u64, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    let elements: Vec<f32> = (0..shape.elem_count()).map(|_| uniform()).collect();
    Tensor::from_vec(elements, shape, &Device::Cpu)
}

fn zeros(like: &Tensor) -> Result<Tensor> {
    like.zeros_like()
}

/// `x` as an f64 variable of autograd.
fn variable(x: &Tensor) -> Result<Var> {
    Var::from_tensor(&x.to_dtype(DType::F64)?)
}

/// The gradients by `variables` of the sum of y ∘ dy over the pairs (y, dy).
#[expect(clippy::disallowed_methods, reason = "autograd is the reference of these tests")]
fn gradients(pairs: &[(&Tensor, &Tensor)], variables: &[&Var]) -> Result<Vec<Tensor>> {
    let mut loss = Tensor::new(0f64, &Device::Cpu)?;
    for (y, dy) in pairs {
        loss = (loss + (*y * dy.to_dtype(DType::F64)?)?.sum_all()?)?;
    }
    let store = loss.backward()?;
    let gradient = |variable: &&Var| match store.get(variable.as_tensor()) {
        Some(gradient) => Ok(gradient.clone()),
        None => candle_core::bail!("autograd has no gradient of a variable"),
    };
    variables.iter().map(gradient).collect()
}

/// Fails unless ‖got − want‖ ≤ TOLERANCE · ‖want‖.
fn assert_close(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let norm = |x: &Tensor| x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>();
    let error = norm(&(got.to_dtype(DType::F64)? - want)?)? / norm(want)?.max(f64::MIN_POSITIVE);
    assert!(error < TOLERANCE, "{what}: the relative error is {error:.1e}");
    Ok(())
}

#[test]
fn linear_equals_autograd() -> Result<()> {
    for (tokens, inputs, outputs) in [(1, 1, 1), (7, 5, 3), (65, 48, 33)] {
        let (x, w) = (random(1, (tokens, inputs))?, random(2, (outputs, inputs))?);
        let (b, dy) = (random(3, outputs)?, random(4, (tokens, outputs))?);
        let (xv, wv, bv) = (variable(&x)?, variable(&w)?, variable(&b)?);
        let layer = Linear::new(wv.as_tensor().clone(), Some(bv.as_tensor().clone()));
        let y = layer.forward(xv.as_tensor())?;
        let want = gradients(&[(&y, &dy)], &[&xv, &wv, &bv])?;

        let (dw, db) = (zeros(&w)?, zeros(&b)?);
        linear::backward_weight(&x, &dy, &dw)?;
        linear::backward_bias(&dy, &db)?;
        assert_close("y", &linear::forward(&x, &w, Some(&b))?, &y)?;
        assert_close("dx", &linear::backward_input(&dy, &w)?, &want[0])?;
        assert_close("dw", &dw, &want[1])?;
        assert_close("db", &db, &want[2])?;
    }
    Ok(())
}

/// LayerNorm (`centred`) or RMSNorm without the bias, of elementary ops.
fn norm_of(sum: &Tensor, w: &Tensor, centred: bool) -> Result<Tensor> {
    let deviations = if centred { sum.broadcast_sub(&sum.mean_keepdim(D::Minus1)?)? } else { sum.clone() };
    let variance = deviations.sqr()?.mean_keepdim(D::Minus1)?;
    deviations.broadcast_div(&(variance + EPSILON)?.sqrt()?)?.broadcast_mul(w)
}

#[test]
fn norms_with_a_residual_equal_autograd() -> Result<()> {
    for (tokens, width) in [(3, 4), (7, 33), (66, 48)] {
        let [x, residual, dy, dsum] = [1, 2, 3, 4].map(|seed| random(seed, (tokens, width)));
        let (x, residual, dy, dsum) = (x?, residual?, dy?, dsum?);
        let (w, b) = (random(5, width)?, random(6, width)?);
        for centred in [true, false] {
            let (xv, rv, wv, bv) = (variable(&x)?, variable(&residual)?, variable(&w)?, variable(&b)?);
            let sum = (xv.as_tensor() + rv.as_tensor())?;
            let y = norm_of(&sum, wv.as_tensor(), centred)?;
            let (dw, db) = (zeros(&w)?, zeros(&b)?);
            let dx = if centred {
                let y = y.broadcast_add(bv.as_tensor())?;
                let want = gradients(&[(&y, &dy), (&sum, &dsum)], &[&xv, &rv, &wv, &bv])?;
                let (got, tape) = norm::layer_norm(&x, Some(&residual), &w, Some(&b), EPSILON)?;
                let dx = norm::layer_norm_backward(&tape, &w, &dy, Some(&dsum), Some(&dw), Some(&db))?;
                assert_close("y", &got, &y)?;
                assert_close("db", &db, &want[3])?;
                (dx, want)
            } else {
                let want = gradients(&[(&y, &dy), (&sum, &dsum)], &[&xv, &rv, &wv])?;
                let (got, tape) = norm::rms_norm(&x, Some(&residual), &w, EPSILON)?;
                let dx = norm::rms_norm_backward(&tape, &w, &dy, Some(&dsum), Some(&dw))?;
                assert_close("y", &got, &y)?;
                (dx, want)
            };
            let (dx, want) = dx;
            assert_close("dx", &dx, &want[0])?;
            assert_close("the gradient of the residual", &dx, &want[1])?;
            assert_close("dw", &dw, &want[2])?;
        }
    }
    Ok(())
}

#[test]
fn embeddings_equal_autograd() -> Result<()> {
    let (packing, width, offset) = (Packing::new(&[3, 0, 9, 1], vec![0; 4]), 17, 2);
    let tokens = packing.tokens();
    let ids: Vec<u32> = (0..tokens).map(|t| (t * t % 11) as u32).collect();
    let positions: Vec<u32> = (0..tokens).map(|t| (packing.locate(t).1 + offset) as u32).collect();
    let (ids, positions) = (Tensor::new(ids, &Device::Cpu)?, Tensor::new(positions, &Device::Cpu)?);
    let (word, position) = (random(1, (11, width))?, random(2, (12, width))?);
    let (token_type, dx) = (random(3, (2, width))?, random(4, (tokens, width))?);

    let (wv, pv, tv) = (variable(&word)?, variable(&position)?, variable(&token_type)?);
    let x = Embedding::new(wv.as_tensor().clone(), width).forward(&ids)?;
    let x = (x + Embedding::new(pv.as_tensor().clone(), width).forward(&positions)?)?;
    let x = x.broadcast_add(&tv.narrow(0, 0, 1)?)?;
    let want = gradients(&[(&x, &dx)], &[&wv, &pv, &tv])?;

    let tables = Tables {
        word_embeddings: &word,
        position_embeddings: Some(&position),
        position_offset: offset,
        token_type_embeddings: Some(&token_type),
    };
    assert_close("x", &embedding::forward(&ids, &packing, &tables)?, &x)?;
    let (dw, dp, dt) = (zeros(&word)?, zeros(&position)?, zeros(&token_type)?);
    embedding::backward(&dx, &ids, &packing, offset, Some(&dw), Some(&dp), Some(&dt))?;
    assert_close("the gradient of the words", &dw, &want[0])?;
    assert_close("the gradient of the positions", &dp, &want[1])?;
    assert_close("the gradient of the token types", &dt, &want[2])
}

/// Attention sequence by sequence and head by head, of elementary ops and the softmax of candle-nn.
fn attention_of(
    [q, k, v]: [&Tensor; 3],
    bias: Option<&Tensor>,
    packing: &Packing,
    a: &Attention,
) -> Result<Tensor> {
    let width = a.head_width;
    let mut rows = Vec::new();
    for range in packing.ranges().filter(|range| !range.is_empty()) {
        let tokens = range.len();
        let of = |x: &Tensor, head: usize| {
            x.narrow(0, range.start, tokens)?.narrow(1, head * width, width)?.contiguous()
        };
        let pairs = || (0..tokens).flat_map(|i| (0..tokens).map(move |j| (i, j)));
        let visible = |(i, j): (usize, usize)| {
            a.left.is_none_or(|left| i <= j + left) && a.right.is_none_or(|right| j <= i + right)
        };
        let mask = pairs().map(|pair| if visible(pair) { 0.0 } else { f64::NEG_INFINITY });
        let mask = Tensor::from_vec(mask.collect(), (tokens, tokens), &Device::Cpu)?;
        let mut heads = Vec::new();
        for head in 0..a.heads {
            let kv_head = head / (a.heads / a.kv_heads);
            let scores = of(q, head)?.matmul(&of(k, kv_head)?.t()?)?;
            let mut scores = ((scores * f64::from(a.scale))? + &mask)?;
            if let Some(bias) = bias {
                let most = bias.dims()[1] / 2;
                let column = |(i, j): (usize, usize)| (j + most).saturating_sub(i).min(2 * most) as u32;
                let columns = Tensor::from_iter(pairs().map(column), &Device::Cpu)?;
                let bias = bias.narrow(0, head, 1)?.squeeze(0)?.index_select(&columns, 0)?;
                scores = (scores + bias.reshape((tokens, tokens))?)?;
            }
            heads.push(ops::softmax(&scores, D::Minus1)?.matmul(&of(v, kv_head)?)?);
        }
        rows.push(Tensor::cat(&heads, 1)?);
    }
    Tensor::cat(&rows, 0)
}

fn compare_attention(a: &Attention, lengths: &[usize], columns: usize) -> Result<()> {
    let packing = Packing::new(lengths, vec![0; lengths.len()]);
    let (tokens, q_width, kv_width) = (packing.tokens(), a.heads * a.head_width, a.kv_heads * a.head_width);
    let (q, k) = (random(1, (tokens, q_width))?, random(2, (tokens, kv_width))?);
    let (v, d_o) = (random(3, (tokens, kv_width))?, random(4, (tokens, q_width))?);
    let bias = random(5, (a.heads, columns))?;
    let (qv, kv, vv, bv) = (variable(&q)?, variable(&k)?, variable(&v)?, variable(&bias)?);
    let inputs = [qv.as_tensor(), kv.as_tensor(), vv.as_tensor()];
    let biased = (columns > 0).then_some(bv.as_tensor());
    let o = attention_of(inputs, biased, &packing, a)?;
    let name = format!("{lengths:?}, {a:?}, {columns} columns of bias");

    let (got, dq, dk, dv) = if columns > 0 {
        let (got, lse) = attention::forward_biased(&q, &k, &v, &bias, &packing, a)?;
        let (dq, dk, dv, dbias) =
            attention::backward_biased(&q, &k, &v, &bias, &got, &lse, &d_o, &packing, a)?;
        let want = gradients(&[(&o, &d_o)], &[&bv])?;
        assert_close(&format!("dbias of {name}"), &dbias, &want[0])?;
        (got, dq, dk, dv)
    } else {
        let (got, lse) = attention::forward(&q, &k, &v, &packing, a)?;
        let (dq, dk, dv) = attention::backward(&q, &k, &v, &got, &lse, &d_o, &packing, a)?;
        (got, dq, dk, dv)
    };
    let want = gradients(&[(&o, &d_o)], &[&qv, &kv, &vv])?;
    assert_close(&format!("o of {name}"), &got, &o)?;
    assert_close(&format!("dq of {name}"), &dq, &want[0])?;
    assert_close(&format!("dk of {name}"), &dk, &want[1])?;
    assert_close(&format!("dv of {name}"), &dv, &want[2])
}

#[test]
fn attention_equals_autograd() -> Result<()> {
    let attention = |heads, kv_heads, head_width: usize, left, right| {
        let scale = 1.0 / (head_width as f32).sqrt();
        Attention { heads, kv_heads, head_width, scale, left, right, dropout: None }
    };
    let lengths = [1, 5, 0, 33, 17];
    compare_attention(&attention(2, 2, 8, None, None), &lengths, 0)?;
    compare_attention(&attention(4, 2, 7, None, Some(0)), &lengths, 0)?;
    compare_attention(&attention(6, 2, 16, Some(4), Some(4)), &lengths, 0)?;
    compare_attention(&attention(3, 3, 8, None, None), &lengths, 2 * 5 + 1)
}
