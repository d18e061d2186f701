//! Finds the visible GPUs from the files of the driver, without starting CUDA.

use std::fs;
use std::path::Path;

/// The oldest driver for each major version of CUDA (NVIDIA, CUDA Compatibility guide).
const DRIVERS: [(u32, (u32, u32)); 2] = [(12, (525, 60)), (13, (580, 65))];

/// Where the driver's files are, and which GPUs `CUDA_VISIBLE_DEVICES` leaves.
pub(crate) struct Machine<'a> {
    pub(crate) proc: &'a Path,
    pub(crate) dev: &'a Path,
    pub(crate) visible: Option<String>,
    /// Major version of CUDA of this build; `None` if it cannot use GPUs.
    pub(crate) cuda: Option<u32>,
}

impl Machine<'_> {
    /// This machine and this process's environment.
    pub(crate) fn new() -> Self {
        Self {
            proc: Path::new("/proc/driver/nvidia"),
            dev: Path::new("/dev"),
            visible: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
            cuda: trainer::system::device::cuda_version().map(|(major, _)| major),
        }
    }

    /// The GPUs for `wanted` ranks, or all; each in the notation of `CUDA_VISIBLE_DEVICES`. The error is a
    /// message for the user.
    pub(crate) fn devices(&self, wanted: Option<u32>) -> Result<Vec<String>, String> {
        let flag = wanted.map_or_else(|| "--gpus".to_owned(), |wanted| format!("--gpus {wanted}"));
        let Some(cuda) = self.cuda else {
            return Err(format!(
                "{flag}: this build has no GPU support\n\
                 hint: build with `--features cuda`, or omit the flag to train on the CPU"
            ));
        };
        let least = DRIVERS.iter().find(|(major, _)| *major == cuda).map_or((0, 0), |(_, driver)| *driver);
        if let Some(driver) = self.driver()
            && driver < least
        {
            let ((found, minor), (needed, least)) = (driver, least);
            return Err(format!(
                "{flag}: the NVIDIA driver is {found}.{minor}, CUDA {cuda} needs {needed}.{least} or newer\n\
                 hint: update the driver"
            ));
        }
        let devices = self.list();
        let enough = wanted.map_or(1, |wanted| wanted as usize);
        if devices.len() < enough {
            let hidden = match &self.visible {
                Some(visible) => format!(" (CUDA_VISIBLE_DEVICES={visible})"),
                None => String::new(),
            };
            let hint = match devices.len() {
                0 => "hint: does `nvidia-smi` show the driver? --cpus N trains on the CPU".to_owned(),
                found => format!("hint: use --gpus {found} or fewer"),
            };
            return Err(format!("{flag}: {} GPUs are visible{hidden}\n{hint}", devices.len()));
        }
        Ok(devices.into_iter().take(wanted.map_or(usize::MAX, |wanted| wanted as usize)).collect())
    }

    /// All visible GPUs.
    pub(crate) fn list(&self) -> Vec<String> {
        let count = match fs::read_dir(self.proc.join("gpus")) {
            Ok(gpus) => gpus.count(),
            // A container may hide /proc/driver; then the devices are nvidia0, nvidia1, …
            Err(_) => fs::read_dir(self.dev).map_or(0, |files| {
                let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
                names.filter_map(|name| name.strip_prefix("nvidia")?.parse::<u32>().ok()).count()
            }),
        };
        match &self.visible {
            // As in CUDA, the list ends at the first device that does not exist.
            Some(visible) => visible
                .split(',')
                .map(str::trim)
                .take_while(|name| match name.parse::<usize>() {
                    Ok(number) => number < count,
                    Err(_) => name.starts_with("GPU-") || name.starts_with("MIG-"),
                })
                .map(str::to_owned)
                .collect(),
            None => (0..count).map(|number| number.to_string()).collect(),
        }
    }

    /// Major and minor version of the driver: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  …`
    /// → (535, 104).
    fn driver(&self) -> Option<(u32, u32)> {
        let text = fs::read_to_string(self.proc.join("version")).ok()?;
        text.lines().next()?.split_whitespace().find_map(|word| {
            let (major, rest) = word.split_once('.')?;
            let minor = rest.split('.').next()?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(gpus: usize, driver: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for gpu in 0..gpus {
            fs::create_dir_all(folder.path().join(format!("gpus/0000:0{gpu}:00.0"))).unwrap();
        }
        let version = format!(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Mar  9\nGCC version:  gcc 12.2.0\n"
        );
        fs::write(folder.path().join("version"), version).unwrap();
        folder
    }

    fn devices(folder: &Path, visible: Option<&str>, wanted: Option<u32>) -> Result<Vec<String>, String> {
        let visible = visible.map(str::to_owned);
        Machine { proc: folder, dev: &folder.join("dev"), visible, cuda: Some(13) }.devices(wanted)
    }

    #[test]
    fn each_rank_gets_a_gpu() {
        let folder = machine(4, "580.95.05");
        assert_eq!(devices(folder.path(), None, None).unwrap(), ["0", "1", "2", "3"]);
        assert_eq!(devices(folder.path(), None, Some(2)).unwrap(), ["0", "1"]);
        assert_eq!(devices(folder.path(), Some("3,1"), Some(2)).unwrap(), ["3", "1"]);
        assert_eq!(devices(folder.path(), Some("GPU-5f,MIG-2"), None).unwrap(), ["GPU-5f", "MIG-2"]);
    }

    #[test]
    fn fewer_gpus_than_wanted_are_an_error() {
        let folder = machine(2, "580.95.05");
        let message = devices(folder.path(), None, Some(4)).unwrap_err();
        assert!(
            message.contains("--gpus 4: 2 GPUs are visible") && message.contains("--gpus 2 or fewer"),
            "{message}"
        );
        let message = devices(folder.path(), Some("1,9,0"), Some(2)).unwrap_err();
        assert!(message.contains("1 GPUs are visible (CUDA_VISIBLE_DEVICES=1,9,0)"), "{message}");
        // A container may show only files in /dev.
        let hidden = tempfile::tempdir().unwrap();
        for name in ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"] {
            fs::create_dir_all(hidden.path().join("dev").join(name)).unwrap();
        }
        assert_eq!(devices(hidden.path(), None, None).unwrap(), ["0", "1"]);
        let none = tempfile::tempdir().unwrap();
        let message = devices(none.path(), None, Some(1)).unwrap_err();
        assert!(message.contains("0 GPUs are visible") && message.contains("nvidia-smi"), "{message}");
    }

    #[test]
    fn a_driver_that_is_too_old_is_an_error() {
        let folder = machine(4, "535.104.05");
        let message = devices(folder.path(), None, Some(4)).unwrap_err();
        assert!(message.contains("driver is 535.104, CUDA 13 needs 580.65"), "{message}");
        let older = Machine { proc: folder.path(), dev: folder.path(), visible: None, cuda: Some(12) };
        assert_eq!(older.devices(Some(4)).unwrap().len(), 4);
    }

    #[test]
    fn a_build_without_gpu_support_is_an_error() {
        let folder = machine(4, "580.95.05");
        let machine = Machine { proc: folder.path(), dev: folder.path(), visible: None, cuda: None };
        assert!(machine.devices(Some(4)).unwrap_err().contains("--gpus 4: this build has no GPU support"));
    }
}
