//! What `--version` prints.

use std::sync::LazyLock;

use crate::system::device::cuda_version;

static VERSION: LazyLock<String> = LazyLock::new(|| {
    let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("LODESTONE_COMMIT"));
    let features = env!("LODESTONE_FEATURES");
    let cuda = cuda_version().map_or("none".to_owned(), |(major, minor)| format!("{major}.{minor}"));
    format!("{version}\ncommit: {commit}\nfeatures: {features}\nCUDA: {cuda}")
});

/// Version, commit and features of this build, and the version of the CUDA toolkit that compiled its kernels, one a line.
pub fn version() -> &'static str {
    &VERSION
}
