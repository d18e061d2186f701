//! NVIDIA's libraries, opened when a GPU is: a program that was built for GPUs runs also where there are none.

use candle_core::{Result, bail};
use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

unsafe extern "C" {
    fn lodestone_open(number: i32) -> *const c_char;
}

/// In the order of build.rs.
#[derive(Clone, Copy)]
enum Library {
    Driver,
    Cublas,
    CublasLt,
    Curand,
    Nvrtc,
    Nccl,
}

/// CUDA's version as this program was built: major, minor.
pub fn toolkit() -> (u32, u32) {
    let (major, minor) = env!("LODESTONE_CUDA").split_once('.').unwrap_or_default();
    (major.parse().unwrap_or(0), minor.parse().unwrap_or(0))
}

/// Opens the driver's library.
pub(super) fn driver() -> Result<()> {
    open(Library::Driver, "hint: it comes with the NVIDIA driver")
}

/// Opens what a device needs besides.
pub(super) fn device() -> Result<()> {
    let hint = format!("hint: it is part of CUDA {}; LD_LIBRARY_PATH says where", toolkit().0);
    [Library::CublasLt, Library::Cublas, Library::Curand, Library::Nvrtc]
        .into_iter()
        .try_for_each(|library| open(library, &hint))
}

/// Opens NCCL, before its first use.
///
/// # Errors
/// If libnccl.so.2 cannot be found, or the driver's library.
pub fn open_nccl() -> Result<()> {
    driver()?;
    open(
        Library::Nccl,
        "hint: it comes with NCCL (Debian: libnccl2; PyPI: nvidia-nccl-cu13); LD_LIBRARY_PATH says where",
    )
}

fn open(library: Library, hint: &str) -> Result<()> {
    static OPENED: [OnceLock<Option<String>>; 6] = [const { OnceLock::new() }; 6];
    let failed = OPENED[library as usize].get_or_init(|| {
        // SAFETY: build.rs lists as many libraries; the loader's words stay until it is called again.
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
