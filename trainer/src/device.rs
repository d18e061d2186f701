//! Where this process computes: on one GPU, or on the CPU. A rank is a process, so this is decided once.
//!
//! `LODESTONE_DEVICE` is `cpu` or `cuda`; without it a GPU is taken where this program was built for one and finds one, the
//! one of number `LOCAL_RANK`.

use candle_core::Device;

use crate::Result;

/// The device of this process.
///
/// # Errors
/// If `LODESTONE_DEVICE` asks for a GPU that cannot be had.
#[cfg(not(feature = "cuda"))]
pub fn current() -> Result<Device> {
    match std::env::var("LODESTONE_DEVICE").as_deref() {
        Ok("cuda") => Err(crate::Error::Usage(
            "LODESTONE_DEVICE is `cuda`, but this program was built without the feature `cuda`".to_owned(),
        )),
        _ => Ok(Device::Cpu),
    }
}

/// The device of this process.
///
/// # Errors
/// If `LODESTONE_DEVICE` asks for a GPU that cannot be had.
#[cfg(feature = "cuda")]
pub fn current() -> Result<Device> {
    static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    if let Some(device) = DEVICE.get() {
        return Ok(device.clone());
    }
    let wish = std::env::var("LODESTONE_DEVICE").ok();
    let rank = std::env::var("LOCAL_RANK").ok().and_then(|rank| rank.parse().ok()).unwrap_or(0);
    let device = match wish.as_deref() {
        Some("cpu") => Device::Cpu,
        None => kernels::open(rank).unwrap_or_else(|error| {
            tracing::warn!("no GPU of number {rank} can be used, so the CPU computes: {error}");
            Device::Cpu
        }),
        Some("cuda") => kernels::open(rank).map_err(|error| {
            crate::Error::Usage(format!("LODESTONE_DEVICE is `cuda`, but GPU {rank} cannot be used: {error}"))
        })?,
        Some(other) => {
            return Err(crate::Error::Usage(format!("LODESTONE_DEVICE is `{other}`, expected cpu or cuda")));
        }
    };
    Ok(DEVICE.get_or_init(|| device).clone())
}
