//! Where this process computes: on one GPU, or on the CPU. A rank is a process, so this is decided once.
//!
//! `LODESTONE_DEVICE` is `cpu` or `cuda`; without it a GPU is taken where this program was built for one and finds one. Of
//! several GPUs the rank's number on its host says which.

use candle_core::Device;

use crate::{Error, Result};

/// Set by `launch` for its ranks: `cuda` or `cpu`. Without launch it is the user's to set.
pub const VARIABLE: &str = "LODESTONE_DEVICE";

/// CUDA's version that this program was built with, major and minor; none if it was built without the feature `cuda`.
pub fn cuda() -> Option<(u32, u32)> {
    #[cfg(feature = "cuda")]
    return Some(kernels::toolkit());
    #[cfg(not(feature = "cuda"))]
    None
}

/// The device of this process.
///
/// # Errors
/// If [`VARIABLE`] asks for a GPU that cannot be had, or is not a device's name.
pub fn current() -> Result<Device> {
    static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    if let Some(device) = DEVICE.get() {
        return Ok(device.clone());
    }
    let device = match std::env::var(VARIABLE).ok().as_deref() {
        Some("cpu") => Device::Cpu,
        Some("cuda") => gpu().map_err(|error| {
            Error::Usage(format!("{VARIABLE} is `cuda`, but no GPU can be used: {}", plain(&error)))
        })?,
        #[cfg(feature = "emulator")]
        Some("emulator") => {
            kernels::emulate();
            Device::Cpu
        }
        None | Some("") if cuda().is_none() => Device::Cpu,
        None | Some("") => gpu().unwrap_or_else(|error| {
            tracing::warn!("no GPU can be used, so the CPU computes: {}", plain(&error));
            Device::Cpu
        }),
        Some(other) => {
            return Err(Error::Usage(format!("{VARIABLE} is `{other}`, expected cpu or cuda")));
        }
    };
    Ok(DEVICE.get_or_init(|| device).clone())
}

/// What candle says without its backtrace: that is the machine's fault, and no bug.
pub(crate) fn plain(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => plain(inner),
        other => other.to_string(),
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> candle_core::Result<Device> {
    kernels::open(ordinal()?)
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> candle_core::Result<Device> {
    candle_core::bail!("this program was built without the feature `cuda`")
}

/// Which of the GPUs that can be seen is this process's. `launch` shows each rank its own; torchrun, srun and mpirun may show
/// all of them to all.
#[cfg(feature = "cuda")]
pub(crate) fn ordinal() -> candle_core::Result<usize> {
    let names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];
    let local: Option<usize> = names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok());
    Ok(local.unwrap_or(0) % kernels::devices()?.max(1))
}
