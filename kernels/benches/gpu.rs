//! Measures each kernel at the shapes of Mistral-7B and compares it with its roofline on this GPU.
//!
//! The roofline of a kernel is the bandwidth of a large copy or the FLOP/s of a large matrix product. The
//! benchmark needs no files. It does not check results: the tests do, on a GPU with `LODESTONE_GPU=1`.
//! `scripts/gpu.sh` runs both.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark reports")]

use candle_core::{DType, Device, Result, Tensor};
use kernels::activation::{self, Activation};
use kernels::adamw::{self, AdamW};
use kernels::attention::{self, Attention};
use kernels::dropout::{self, Dropout};
use kernels::embedding::{self, Tables};
use kernels::infonce::{self, Candidates, InfoNce};
use kernels::lora::{self, Adapter};
use kernels::precision::{self, Precision};
use kernels::{Packing, linear, norm, pool, rope};
use std::process::ExitCode;
use std::time::Instant;

/// The FLOPs of the largest matrix product of a layer.
const PRODUCT: f64 = 2.0 * (TOKENS * WIDTH * INTERMEDIATE_SIZE) as f64;
/// The tokens of a chunk.
const TOKENS: usize = 16_384;
const WIDTH: usize = 4096;
const INTERMEDIATE_SIZE: usize = 14_336;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_WIDTH: usize = 128;
const RANK: usize = 8;

fn main() -> ExitCode {
    let run = |device| Bench { bandwidth: 0.0, flops: 0.0, device }.run();
    match kernels::open_device(0).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without candle's backtrace, which says nothing about this machine.
            let error = match error {
                candle_core::Error::WithBacktrace { inner, .. } => *inner,
                other => other,
            };
            eprintln!("error: cannot measure the kernels: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Bench {
    device: Device,
    /// The bandwidth of a large copy in bytes per second.
    bandwidth: f64,
    /// The speed of a large matrix product in FLOP per second.
    flops: f64,
}

impl Bench {
    fn run(mut self) -> Result<()> {
        let big = self.random((1 << 15, 1 << 13), DType::BF16)?;
        let seconds = self.seconds(|| big.copy().map(drop))?;
        self.bandwidth = 2.0 * bytes(&[&big]) / seconds;
        drop(big);
        println!("copy {:.0} GB/s; {TOKENS} tokens", self.bandwidth / 1e9);
        candle_core::cuda::set_gemm_reduced_precision_f32(true);
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let (x, w) =
                (self.random((TOKENS, WIDTH), dtype)?, self.random((INTERMEDIATE_SIZE, WIDTH), dtype)?);
            self.flops = PRODUCT / self.seconds(|| linear::forward(&x, &w, None).map(drop))?;
            drop((x, w));
            let name = format!("{dtype:?}").to_lowercase();
            println!("\nproduct {:.0} TFLOP/s in {name}", self.flops / 1e12);
            println!("{:<38}{:>10}{:>12}{:>12}", "kernel", "µs", "of copy", "of product");
            self.layer(dtype)?;
        }
        // The loss is computed in f32 without TF32.
        candle_core::cuda::set_gemm_reduced_precision_f32(false);
        let (x, w) =
            (self.random((TOKENS, WIDTH), DType::F32)?, self.random((INTERMEDIATE_SIZE, WIDTH), DType::F32)?);
        self.flops = PRODUCT / self.seconds(|| linear::forward(&x, &w, None).map(drop))?;
        drop((x, w));
        println!("\nproduct {:.0} TFLOP/s in f32 without TF32", self.flops / 1e12);
        self.head()
    }

    fn layer(&self, dtype: DType) -> Result<()> {
        let packing = packing();
        let [x, residual, dy] = [(); 3].map(|()| self.random((TOKENS, WIDTH), dtype));
        let (x, residual, dy) = (x?, residual?, dy?);
        let w = self.random(WIDTH, DType::F32)?;
        let stream = bytes(&[&x]);
        self.moves("rms norm + residual", 4.0 * stream, || {
            norm::rms_norm(&x, Some(&residual), &w, 1e-5).map(drop)
        })?;
        let (_, tape) = norm::rms_norm(&x, Some(&residual), &w, 1e-5)?;
        self.moves("rms norm, backward", 4.0 * stream, || {
            norm::rms_norm_backward(&tape, &w, &dy, Some(&residual), None).map(drop)
        })?;
        self.moves("layer norm + residual", 4.0 * stream, || {
            norm::layer_norm(&x, Some(&residual), &w, Some(&w), 1e-5).map(drop)
        })?;
        let dw = self.random(WIDTH, DType::F32)?;
        // The time does not depend on the values of the mean.
        let tape = norm::Tape { mean: Some(tape.rstd.clone()), ..tape };
        self.moves("layer norm, backward with dw", 3.0 * stream, || {
            norm::layer_norm_backward(&tape, &w, &dy, None, Some(&dw), Some(&w)).map(drop)
        })?;

        let (q, k, v) = (
            self.random((TOKENS, HEADS * HEAD_WIDTH), dtype)?,
            self.random((TOKENS, KV_HEADS * HEAD_WIDTH), dtype)?,
            self.random((TOKENS, KV_HEADS * HEAD_WIDTH), dtype)?,
        );
        let table = rope::Table::new(512, HEAD_WIDTH, 10_000.0);
        self.moves("rope, q and k", 2.0 * bytes(&[&q, &k]), || {
            rope::forward_both(&q, &k, &packing, &table).map(drop)
        })?;

        // The distances of MPNet's bias, at Mistral's width.
        let bias = self.random((HEADS, 2 * 128 + 1), DType::F32)?;
        let whole = usize::MAX;
        for (what, left, right, bias) in [
            ("causal", whole, 0, None),
            ("both ways", whole, whole, None),
            ("window of 129", 64, 64, None),
            ("both ways, biased", whole, whole, Some(&bias)),
        ] {
            let bound = |distance| (distance < whole).then_some(distance);
            let attention = Attention {
                heads: HEADS,
                kv_heads: KV_HEADS,
                head_width: HEAD_WIDTH,
                scale: 1.0 / (HEAD_WIDTH as f32).sqrt(),
                left: bound(left),
                right: bound(right),
                dropout: None,
            };
            let of_row = |i: usize, n: usize| 1 + i.min(left) + (n - 1 - i).min(right);
            let of_text = |n: usize| (0..n).map(|i| of_row(i, n)).sum::<usize>();
            let pairs: usize = packing.ranges().map(|range| of_text(range.len())).sum();
            let product = 2.0 * (pairs * HEADS * HEAD_WIDTH) as f64;
            let forward = || match bias {
                Some(bias) => attention::forward_biased(&q, &k, &v, bias, &packing, &attention),
                None => attention::forward(&q, &k, &v, &packing, &attention),
            };
            self.computes(&format!("attention, {what}"), 2.0 * product, || forward().map(drop))?;
            let (o, lse) = forward()?;
            self.computes(&format!("attention, {what}, backward"), 5.0 * product, || match bias {
                Some(bias) => {
                    attention::backward_biased(&q, &k, &v, bias, &o, &lse, &o, &packing, &attention).map(drop)
                }
                None => attention::backward(&q, &k, &v, &o, &lse, &o, &packing, &attention).map(drop),
            })?;
        }

        let (gate, up) = (
            self.random((TOKENS, INTERMEDIATE_SIZE), dtype)?,
            self.random((TOKENS, INTERMEDIATE_SIZE), dtype)?,
        );
        let gate_bytes = bytes(&[&gate]);
        self.moves("swiglu", 3.0 * gate_bytes, || activation::gated(&gate, &up, Activation::Silu).map(drop))?;
        self.moves("swiglu, backward", 5.0 * gate_bytes, || {
            activation::gated_backward(&gate, &up, &up, Activation::Silu).map(drop)
        })?;
        self.moves("gelu", 2.0 * gate_bytes, || activation::forward(&gate, Activation::Gelu).map(drop))?;
        self.moves("gelu, backward", 3.0 * gate_bytes, || {
            activation::backward(&gate, &up, Activation::Gelu).map(drop)
        })?;

        let d = Dropout { p: 0.1, seed: 1, step: 1, site: 1 };
        self.moves("dropout", 2.0 * stream, || dropout::apply(&x, &packing, &d).map(drop))?;

        let word = self.random((32_000, WIDTH), dtype)?;
        let ids: Vec<u32> = (0..TOKENS as u32).map(|t| t * 7919 % 32_000).collect();
        let ids = Tensor::new(ids, &self.device)?;
        let tables = Tables {
            word_embeddings: &word,
            position_embeddings: None,
            position_offset: 0,
            token_type_embeddings: None,
        };
        self.moves("embedding", 2.0 * stream, || embedding::forward(&ids, &packing, &tables).map(drop))?;
        let d_word = Tensor::zeros((32_000, WIDTH), DType::F32, &self.device)?;
        self.moves("embedding, backward", 5.0 * stream, || {
            embedding::backward(&x, &ids, &packing, 0, Some(&d_word), None, None)
        })?;

        let frozen = self.random((INTERMEDIATE_SIZE, WIDTH), dtype)?;
        let bias = self.random(INTERMEDIATE_SIZE, DType::F32)?;
        self.computes("linear", PRODUCT, || linear::forward(&x, &frozen, None).map(drop))?;
        self.computes("linear with bias", PRODUCT, || linear::forward(&x, &frozen, Some(&bias)).map(drop))?;
        self.computes("linear, dx only", PRODUCT, || linear::backward_input(&gate, &frozen).map(drop))?;
        let dw = Tensor::zeros((INTERMEDIATE_SIZE, WIDTH), DType::F32, &self.device)?;
        self.computes("linear, dw", PRODUCT, || linear::backward_weight(&x, &gate, &dw))?;
        self.moves("linear, db", gate_bytes, || linear::backward_bias(&gate, &bias))?;
        drop(dw);
        let precision = match dtype {
            DType::BF16 => Precision::Bf16,
            DType::F16 => Precision::F16,
            _ => Precision::F32,
        };
        if precision != Precision::F32 {
            let weight = self.random((INTERMEDIATE_SIZE, WIDTH), DType::F32)?;
            self.moves("convert from f32", bytes(&[&weight, &frozen]), || {
                precision::round(weight.clone(), precision).map(drop)
            })?;
        }
        let (a, b) =
            (self.random((RANK, WIDTH), DType::F32)?, self.random((INTERMEDIATE_SIZE, RANK), DType::F32)?);
        let (da, db) = (a.zeros_like()?, b.zeros_like()?);
        // Dropout does not store a mask, so the bytes are the same with and without it.
        for (what, dropout) in [("lora", None), ("lora with dropout", Some(d))] {
            let adapter = Adapter { a: &a, b: &b, scale: 4.0, dropout };
            self.moves(what, stream + 2.0 * gate_bytes, || {
                lora::forward(&x, &up, &adapter, &packing).map(drop)
            })?;
            let xa = lora::forward(&x, &up, &adapter, &packing)?;
            self.moves(&format!("{what}, backward"), 3.0 * stream + 2.0 * gate_bytes, || {
                lora::backward(&x, &xa, &gate, &adapter, &packing, Some(&residual), &da, &db)
            })?;
        }

        let spans: Vec<_> = packing.ranges().collect();
        self.moves("masked mean", stream, || pool::forward(&x, &spans, true).map(drop))?;
        let (e, norms) = pool::forward(&x, &spans, true)?;
        self.moves("masked mean, backward", 4.0 * (TOKENS * WIDTH) as f64, || {
            pool::backward(&e, &norms, &spans, &e, TOKENS, true).map(drop)
        })
    }

    fn head(&self) -> Result<()> {
        let (rows, candidates) = (1024, 6144);
        let unit = |x: Tensor| x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.sqrt()?);
        let q = unit(self.random((rows, WIDTH), DType::F32)?)?;
        let c = unit(self.random((candidates, WIDTH), DType::F32)?)?;
        let positives: Vec<u32> = (0..rows as u32).collect();
        let infonce =
            InfoNce { positives: &positives, candidates: Candidates::All, scale: 50.0, margin: None };
        let product = 2.0 * (rows * candidates * WIDTH) as f64;
        self.computes("infonce 1024 × 6144", product, || infonce::forward(&q, &c, &infonce).map(drop))?;
        let tape = infonce::forward(&q, &c, &infonce)?;
        self.computes("infonce 1024 × 6144, backward", 3.0 * product, || {
            infonce::backward(&q, &c, &infonce, &tape, 1.0).map(drop)
        })?;

        let count = 21 << 20;
        let [p, g, m, v] = [(); 4].map(|()| self.random(count, DType::F32));
        let (p, g, m, v) = (p?, g?, m?, v?.abs()?);
        let adamw =
            AdamW { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let losses = self.random(rows, DType::F32)?;
        let scale = adamw::clip_grad_norm(&g, &losses, Some(1.0))?.scale;
        self.moves("adamw", 7.0 * bytes(&[&p]), || adamw::step(&p, &g, &m, &v, count, 1, &scale, &adamw))?;
        self.moves("norm of gradients", bytes(&[&g]), || {
            adamw::clip_grad_norm(&g, &losses, Some(1.0)).map(drop)
        })
    }

    fn moves(&self, name: &str, bytes: f64, f: impl FnMut() -> Result<()>) -> Result<()> {
        let seconds = self.seconds(f)?;
        let percent = 100.0 * bytes / seconds / self.bandwidth;
        println!("{name:<38}{:>10.1}{percent:>10.0} %", seconds * 1e6);
        Ok(())
    }

    fn computes(&self, name: &str, flops: f64, f: impl FnMut() -> Result<()>) -> Result<()> {
        let seconds = self.seconds(f)?;
        let percent = 100.0 * flops / seconds / self.flops;
        println!("{name:<38}{:>10.1}{:>12}{percent:>10.0} %", seconds * 1e6, "");
        Ok(())
    }

    /// The seconds of one call: the median of five batches of ten calls, which are queued without waiting in
    /// between.
    fn seconds(&self, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
        let mut batch = |calls: usize| -> Result<f64> {
            let start = Instant::now();
            for _ in 0..calls {
                f()?;
            }
            self.device.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / calls as f64)
        };
        batch(3)?;
        let mut all = [batch(10)?, batch(10)?, batch(10)?, batch(10)?, batch(10)?];
        all.sort_by(f64::total_cmp);
        Ok(all[2])
    }

    fn random(&self, shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Tensor> {
        Tensor::randn(0f32, 1f32, shape.into(), &self.device)?.to_dtype(dtype)
    }
}

fn bytes(tensors: &[&Tensor]) -> f64 {
    tensors.iter().map(|x| (x.elem_count() * x.dtype().size_in_bytes()) as f64).sum()
}

/// A chunk of documents with the lengths of the zeta recipe.
fn packing() -> Packing {
    let text = include_str!("lengths.json");
    let documents = text.split("\"documents\":").nth(1).unwrap_or_default();
    let mut lengths = Vec::new();
    let mut left = TOKENS;
    for number in documents.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<usize>().ok()) {
        if left == 0 {
            break;
        }
        lengths.push(number.min(left));
        left -= number.min(left);
    }
    let numbers = (0..lengths.len() as u32).collect();
    Packing::new(&lengths, numbers)
}
