//! The device of this process: one GPU, or the CPU. A rank is a process, so it is chosen once.
//!
//! `LODESTONE_DEVICE` is `cpu` or `cuda`. Without it a GPU is used if this build supports one and finds one.
//! Of several GPUs, the local rank selects one.

use candle_core::Device;

use crate::{Error, Result};

/// The environment variable that selects the device, `cuda` or `cpu`. `launch` sets it for its ranks.
pub const VARIABLE: &str = "LODESTONE_DEVICE";

/// Major and minor version of CUDA of this build; `None` without the feature `cuda`.
pub fn cuda_version() -> Option<(u32, u32)> {
    #[cfg(feature = "cuda")]
    return Some(kernels::cuda_version());
    #[cfg(not(feature = "cuda"))]
    None
}

/// The device of this process.
///
/// # Errors
/// [`VARIABLE`] names a GPU that cannot be used, or no device at all.
pub fn current() -> Result<Device> {
    static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    if let Some(device) = DEVICE.get() {
        return Ok(device.clone());
    }
    let device = match std::env::var(VARIABLE).ok().as_deref() {
        Some("cpu") => Device::Cpu,
        Some("cuda") => gpu().map_err(|error| {
            Error::Usage(format!(
                "{VARIABLE} is `cuda`, but no GPU can be used: {}",
                without_backtrace(&error)
            ))
        })?,
        #[cfg(feature = "emulator")]
        Some("emulator") => {
            kernels::use_emulator();
            Device::Cpu
        }
        None | Some("") if cuda_version().is_none() => Device::Cpu,
        None | Some("") => gpu().unwrap_or_else(|error| {
            tracing::warn!("no GPU can be used, so this runs on the CPU: {}", without_backtrace(&error));
            Device::Cpu
        }),
        Some(other) => {
            return Err(Error::Usage(format!("{VARIABLE} is `{other}`, expected cpu or cuda")));
        }
    };
    Ok(DEVICE.get_or_init(|| device).clone())
}

/// The message of a candle error without its backtrace, for errors of the machine.
pub(crate) fn without_backtrace(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => without_backtrace(inner),
        other => other.to_string(),
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> candle_core::Result<Device> {
    kernels::open_device(ordinal()?)
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> candle_core::Result<Device> {
    candle_core::bail!("this program was built without the feature `cuda`")
}

/// The number of this process's GPU among the visible ones. `launch` makes one GPU visible to each rank;
/// torchrun, srun and mpirun may make all GPUs visible to all ranks.
#[cfg(feature = "cuda")]
pub(crate) fn ordinal() -> candle_core::Result<usize> {
    let names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];
    let local: Option<usize> = names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok());
    Ok(local.unwrap_or(0) % kernels::device_count()?.max(1))
}
