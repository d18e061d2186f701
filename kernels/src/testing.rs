//! Helpers of the tests of the ops: random tensors, errors relative to a reference, finite differences.

use candle_core::{DType, Device, Shape, Tensor};

/// A tensor of approximately standard normal elements, which depend only on `seed` and `shape`.
pub(crate) fn random(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    // SplitMix64 (Steele, Lea, Flood 2014). The sum of twelve uniform numbers has the variance 1. The
    // multiplication keeps the sequences of consecutive seeds from overlapping, which would make their
    // tensors correlated.
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

/// The element types of the GPU kernels, with the tolerated relative error: a few roundings of 6e-8 for f32,
/// and one rounding of the result for bf16 (2⁻⁹) and f16 (2⁻¹²).
pub(crate) const TYPES: [(DType, f64); 3] = [(DType::F32, 2e-6), (DType::BF16, 4e-3), (DType::F16, 5e-4)];

/// The device for the tests of kernels: a GPU if `LODESTONE_GPU` is set, which needs the feature `cuda`;
/// otherwise the CPU, where the emulator runs the kernels.
pub(crate) fn test_device() -> &'static Device {
    static PLACE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    PLACE.get_or_init(|| match std::env::var_os("LODESTONE_GPU") {
        #[cfg(feature = "cuda")]
        Some(_) => crate::open_device(0).expect("LODESTONE_GPU needs a GPU"),
        #[cfg(not(feature = "cuda"))]
        Some(_) => panic!("LODESTONE_GPU needs the feature `cuda`"),
        None => Device::Cpu,
    })
}

/// [`random`] on [`test_device`].
pub(crate) fn random_on_device(seed: u64, shape: impl Into<Shape>) -> Tensor {
    to_test_device(&random(seed, shape))
}

/// Copies `tensor` to [`test_device`].
pub(crate) fn to_test_device(tensor: &Tensor) -> Tensor {
    match tensor.elem_count() {
        0 => crate::gpu::zeros(tensor.shape(), tensor.dtype(), test_device()).unwrap(),
        _ => tensor.to_device(test_device()).unwrap(),
    }
}

/// Converts `tensor` to `dtype`.
pub(crate) fn cast(tensor: &Tensor, dtype: DType) -> Tensor {
    match tensor.elem_count() {
        0 => crate::gpu::zeros(tensor.shape(), dtype, tensor.device()).unwrap(),
        _ => tensor.to_dtype(dtype).unwrap(),
    }
}

/// The elements of a tensor in row-major order.
pub(crate) fn numbers(tensor: &Tensor) -> Vec<f64> {
    if tensor.elem_count() == 0 {
        return Vec::new();
    }
    let tensor = tensor.to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
}

/// ‖got − want‖ / ‖want‖, or ‖got‖ if `want` is all zeros.
pub(crate) fn relative_error(got: &Tensor, want: &[f64]) -> f64 {
    relative_error_f64(&numbers(got), want)
}

/// [`relative_error`] of f64 elements.
pub(crate) fn relative_error_f64(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "the tensors have the same number of elements");
    let norm = |squares: f64| squares.sqrt();
    let difference = norm(got.iter().zip(want).map(|(a, b)| (a - b) * (a - b)).sum());
    let size = norm(want.iter().map(|b| b * b).sum());
    if size == 0.0 { difference } else { difference / size }
}

/// The gradient of `f` at `x` by central differences, accurate to about 1e-9 for functions with values and
/// derivatives near 1.
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

/// The inner product Σ aᵢbᵢ: a loss as a function of `a` whose gradient is `b`.
pub(crate) fn inner(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "both vectors have the same length");
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
