//! Opens NVIDIA's libraries on first use, so that a program with the feature `cuda` also runs on machines
//! without a GPU.

use candle_core::{Result, bail};
use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

unsafe extern "C" {
    fn lodestone_open(number: i32) -> *const c_char;
}

/// The libraries, in the order of `LIBRARIES` in build.rs.
#[derive(Clone, Copy)]
enum Library {
    Driver,
    Cublas,
    CublasLt,
    Curand,
    Nvrtc,
    Nccl,
}

/// The version (major, minor) of the CUDA toolkit that this program was built with.
pub fn cuda_version() -> (u32, u32) {
    let (major, minor) = env!("LODESTONE_CUDA").split_once('.').unwrap_or_default();
    (major.parse().unwrap_or(0), minor.parse().unwrap_or(0))
}

/// Opens the library of the driver.
pub(super) fn driver() -> Result<()> {
    open(Library::Driver, "hint: the NVIDIA driver contains it")
}

/// Opens the other libraries that a device needs.
pub(super) fn device() -> Result<()> {
    let hint = format!("hint: CUDA {} contains it; add its folder to LD_LIBRARY_PATH", cuda_version().0);
    [Library::CublasLt, Library::Cublas, Library::Curand, Library::Nvrtc]
        .into_iter()
        .try_for_each(|library| open(library, &hint))
}

/// Opens NCCL, before its first use.
///
/// # Errors
/// If libnccl.so.2 or the library of the driver cannot be found.
pub fn open_nccl() -> Result<()> {
    driver()?;
    open(
        Library::Nccl,
        "hint: install NCCL (Debian: libnccl2; PyPI: nvidia-nccl-cu13), or add its folder to LD_LIBRARY_PATH",
    )
}

fn open(library: Library, hint: &str) -> Result<()> {
    static OPENED: [OnceLock<Option<String>>; 6] = [const { OnceLock::new() }; 6];
    let failed = OPENED[library as usize].get_or_init(|| {
        // SAFETY: build.rs lists the same libraries, and the error message of the loader is valid until its
        // next call.
        unsafe {
            let words = lodestone_open(library as i32);
            (!words.is_null()).then(|| CStr::from_ptr(words).to_string_lossy().into_owned())
        }
    });
    match failed {
        Some(words) => bail!("{words}\n{hint}"),
        None => Ok(()),
    }
}
