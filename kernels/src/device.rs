//! Tensors on a CPU or a GPU, for the callers of the ops.

use candle_core::{DType, Device, Result, Shape, Tensor};

/// Whether ops on tensors of `device` run as GPU kernels, which also accept and return bf16 and f16 tensors.
pub fn on_gpu(device: &Device) -> bool {
    #[cfg(gpu)]
    return crate::gpu::runs(device);
    #[cfg(not(gpu))]
    device.is_cuda()
}

/// A tensor of zeros on `device`. Unlike `Tensor::zeros` it can also create an empty tensor on a GPU.
pub fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    #[cfg(gpu)]
    if !device.is_cpu() {
        return crate::gpu::zeros(shape, dtype, device);
    }
    Tensor::zeros(shape, dtype, device)
}

/// Copies integers to a new tensor `(elements.len())` on `device`.
///
/// The call does not wait until a GPU has finished its queued work: CUDA queues host-to-device copies of up
/// to 64 KiB, so longer lists are copied in pieces of that size.
pub fn upload(elements: &[u32], device: &Device) -> Result<Tensor> {
    #[cfg(gpu)]
    if !device.is_cpu() {
        return crate::gpu::upload(elements, device);
    }
    Tensor::from_slice(elements, elements.len(), device)
}
