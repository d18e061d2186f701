//! What the tests of the ops share: random tensors, the measure of error, finite differences.

use candle_core::{DType, Device, Shape, Tensor};

/// About standard normal elements, the same for the same seed.
pub(crate) fn random(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    // SplitMix64 (Steele, Lea, Flood 2014); the sum of twelve uniforms has variance 1.
    // Seeds must not start a few steps from each other: their tensors would be correlated.
    let mut state = seed.wrapping_mul(0xd134_2543_de82_ef95);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    let elements: Vec<f32> =
        (0..shape.elem_count()).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    Tensor::from_vec(elements, shape, &Device::Cpu).unwrap()
}

/// The element types of a GPU's kernels, and the relative error of what a few roundings leave: f32 by some 6e-8 each, bf16 by
/// half of 2⁻⁸ in the result, f16 by half of 2⁻¹¹.
pub(crate) const TYPES: [(DType, f64); 3] = [(DType::F32, 2e-6), (DType::BF16, 4e-3), (DType::F16, 5e-4)];

/// Where the tests of kernels run: on a GPU if `LODESTONE_GPU` is set, which needs the feature `cuda`; else on the emulator,
/// whose memory is the CPU's.
pub(crate) fn place() -> &'static Device {
    static PLACE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    PLACE.get_or_init(|| match std::env::var_os("LODESTONE_GPU") {
        #[cfg(feature = "cuda")]
        Some(_) => crate::open(0).expect("LODESTONE_GPU asks for a GPU"),
        #[cfg(not(feature = "cuda"))]
        Some(_) => panic!("LODESTONE_GPU asks for a GPU, which needs the feature `cuda`"),
        None => Device::Cpu,
    })
}

/// [`random`] elements where the tests of kernels run.
pub(crate) fn placed(seed: u64, shape: impl Into<Shape>) -> Tensor {
    moved(&random(seed, shape))
}

/// `tensor` where the tests of kernels run.
pub(crate) fn moved(tensor: &Tensor) -> Tensor {
    match tensor.elem_count() {
        0 => crate::gpu::zeros(tensor.shape(), tensor.dtype(), place()).unwrap(),
        _ => tensor.to_device(place()).unwrap(),
    }
}

/// `tensor`, rounded to `dtype`.
pub(crate) fn each_type(tensor: &Tensor, dtype: DType) -> Tensor {
    match tensor.elem_count() {
        0 => crate::gpu::zeros(tensor.shape(), dtype, tensor.device()).unwrap(),
        _ => tensor.to_dtype(dtype).unwrap(),
    }
}

/// The elements of a tensor, row by row.
pub(crate) fn numbers(tensor: &Tensor) -> Vec<f64> {
    if tensor.elem_count() == 0 {
        return Vec::new();
    }
    let tensor = tensor.to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
}

/// ‖got − want‖ / ‖want‖; ‖got‖ when `want` is all zeros.
pub(crate) fn relative_error(got: &Tensor, want: &[f64]) -> f64 {
    relative_error_f64(&numbers(got), want)
}

/// As [`relative_error`], between two references.
pub(crate) fn relative_error_f64(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "as many elements as expected");
    let norm = |squares: f64| squares.sqrt();
    let difference = norm(got.iter().zip(want).map(|(a, b)| (a - b) * (a - b)).sum());
    let size = norm(want.iter().map(|b| b * b).sum());
    if size == 0.0 { difference } else { difference / size }
}

/// The gradient of `f` at `x` by central differences; good to about 1e-9 for functions of size and curvature 1.
pub(crate) fn finite_difference(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + STEP;
            let above = f(&x);
            x[i] = at - STEP;
            let below = f(&x);
            x[i] = at;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

/// Σ aᵢbᵢ: with `b` the gradient of a loss, this loss as a function of `a`.
pub(crate) fn inner(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "as many elements on both sides");
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
