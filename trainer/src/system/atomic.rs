//! Files and folders that are complete or absent: they are written under a temporary name beside their place,
//! flushed to the disk, and renamed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::system::signals::CleanupGuard;
use crate::{Error, Result};

/// Writes `bytes` to a file atomically.
///
/// # Errors
/// The file cannot be written; then the old one, if any, is unchanged.
pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes.as_ref()).map_err(Error::write("write", path))?;
    file.commit()
}

/// A file that is being written. It appears under its name with [`AtomicFile::commit`]; dropped before, it
/// leaves nothing.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl AtomicFile {
    /// Begins the file `target`, and creates its folder if necessary.
    ///
    /// # Errors
    /// The path names no file, or it cannot be created.
    pub(crate) fn create(target: &Path) -> Result<Self> {
        fs::create_dir_all(parent(target)).map_err(Error::write("create", parent(target)))?;
        let temporary = temporary(target)?;
        let file = File::create(&temporary).map_err(Error::write("create", &temporary))?;
        Ok(Self { target: target.to_owned(), temporary, file: BufWriter::new(file) })
    }

    /// Flushes the file to the disk and puts it in its place.
    ///
    /// # Errors
    /// The disk is full, or the file cannot be renamed.
    pub(crate) fn commit(mut self) -> Result<()> {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        flushed.map_err(Error::write("write", &self.temporary))?;
        rename(&self.temporary, &self.target)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // After `commit` the temporary file no longer exists.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Writes a folder atomically: `fill` gets a temporary folder, which then replaces `target`.
///
/// # Errors
/// Those of `fill`; the folder cannot be created or renamed.
pub(crate) fn write_dir(target: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let (new, old) = (temporary(target)?, beside(target, "old")?);
    // A process that was killed may have left them.
    remove_all(&new)?;
    remove_all(&old)?;
    fs::create_dir_all(&new).map_err(Error::write("create", &new))?;
    let written = fill(&new).and_then(|()| match fs::rename(target, &old) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::write("replace", target)(error)),
        _ => rename(&new, target).inspect_err(|_| {
            // The old folder takes its place again.
            let _ = fs::rename(&old, target);
        }),
    });
    if written.is_err() {
        // Leave no part of it on a disk that may be full.
        let _ = fs::remove_dir_all(&new);
    }
    written.and_then(|()| remove_all(&old))
}

/// Removes a folder so that no part of it is left under its name: it is renamed, then deleted.
///
/// # Errors
/// It exists and cannot be removed.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    let old = beside(path, "old")?;
    remove_all(&old)?;
    match fs::rename(path, &old) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::write("remove", path)(error)),
        Ok(()) => {
            sync_dir(parent(path))?;
            remove_all(&old)
        }
    }
}

/// Makes `link` a symbolic link to `target`, replacing an old link atomically.
///
/// # Errors
/// The link cannot be created.
pub(crate) fn symlink(target: &Path, link: &Path) -> Result<()> {
    let temporary = temporary(link)?;
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary).map_err(Error::write("create", &temporary))?;
    rename(&temporary, link)
}

/// Renames a complete file or folder to its place, and flushes the folder that holds it.
///
/// # Errors
/// It cannot be renamed.
pub(crate) fn rename(temporary: &Path, target: &Path) -> Result<()> {
    fs::rename(temporary, target).map_err(Error::write("create", target))?;
    sync_dir(parent(target))
}

/// Flushes the entries of a folder to the disk.
///
/// # Errors
/// The folder cannot be opened or flushed.
pub(crate) fn sync_dir(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::write("sync", folder))
}

/// Writes a file of a temporary folder and flushes it to the disk. Not atomic itself.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn write_flushed(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes.as_ref()).and_then(|()| file.sync_all()))
        .map_err(Error::write("write", path))
}

/// Whether a path is a folder without entries.
pub(crate) fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Whether a name is that of an unfinished or deleted file or folder, which a process that was killed may
/// have left.
pub(crate) fn is_temporary(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with('.') && (name.ends_with(".tmp") || name.ends_with(".old"))
}

fn temporary(target: &Path) -> Result<PathBuf> {
    beside(target, "tmp")
}

/// `a/b` → `a/.b.ENDING`.
fn beside(target: &Path, ending: &str) -> Result<PathBuf> {
    match target.file_name() {
        Some(name) => Ok(target.with_file_name(format!(".{}.{ending}", name.display()))),
        None => Err(Error::file(target, "expected a path that ends with the name of a file or folder")),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Deletes a folder; it may be absent.
pub(crate) fn remove_all(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::write("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// A new folder that a command writes. It appears under its name with [`StagedDir::commit`]; dropped before,
/// or interrupted by TERM or INT, it leaves nothing.
#[derive(Debug)]
pub(crate) struct StagedDir {
    target: PathBuf,
    temporary: TempDir,
    _guard: CleanupGuard,
}

impl StagedDir {
    /// Checks that `target` can be created.
    ///
    /// # Errors
    /// It exists and is not an empty folder.
    pub(crate) fn check_free(target: &Path) -> Result<()> {
        match target.symlink_metadata() {
            Ok(_) if is_empty(target) => Ok(()),
            Ok(_) => Err(Error::file(target, "already exists\nhint: give another --output or delete it")),
            Err(_) => Ok(()),
        }
    }

    /// Begins the folder `target`.
    ///
    /// # Errors
    /// It exists and is not an empty folder, or cannot be created.
    pub(crate) fn new(target: &Path) -> Result<Self> {
        Self::check_free(target)?;
        let parent = parent(target);
        fs::create_dir_all(parent).map_err(Error::write("create", parent))?;
        let temporary = tempfile::Builder::new().prefix(".staged-").tempdir_in(parent);
        let temporary = temporary.map_err(Error::write("write to", parent))?;
        let guard = CleanupGuard::new(temporary.path())?;
        let staged = Self { target: target.to_owned(), temporary, _guard: guard };
        fs::create_dir(staged.folder()).map_err(Error::write("create", staged.folder()))?;
        Ok(staged)
    }

    fn folder(&self) -> PathBuf {
        self.temporary.path().join("folder")
    }

    /// Begins a file of the folder.
    pub(crate) fn file(&self, name: &str) -> Result<LineWriter> {
        let path = self.folder().join(name);
        // Not `create_dir_all`, which would restore a folder that a signal handler has removed.
        if let Some(parent) = path.parent()
            && !parent.is_dir()
        {
            fs::create_dir(parent).map_err(Error::write("create", parent))?;
        }
        let file = File::create(&path).map_err(Error::write("create", &path))?;
        Ok(LineWriter { file: BufWriter::new(file), path })
    }

    /// Puts the folder in its place.
    pub(crate) fn commit(self) -> Result<()> {
        sync_dir(&self.folder())?;
        rename(&self.folder(), &self.target)
    }
}

/// Writes the lines of a file of a [`StagedDir`].
pub(crate) struct LineWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl LineWriter {
    /// Writes a line; its end is added.
    pub(crate) fn write(&mut self, line: &[u8]) -> Result<()> {
        let done = self.file.write_all(line).and_then(|()| self.file.write_all(b"\n"));
        done.map_err(Error::write("write", &self.path))
    }

    /// Flushes the file to the disk.
    pub(crate) fn finish(mut self) -> Result<()> {
        let done = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        done.map_err(Error::write("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/x.txt");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"one").unwrap();
        assert!(!path.exists());
        drop(file);
        assert!(names(path.parent().unwrap()).is_empty(), "an abandoned file leaves nothing");
        write(&path, "two").unwrap();
        write(&path, "three").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "three");
        assert_eq!(names(path.parent().unwrap()), ["x.txt"]);
        assert!(write(Path::new("/"), "x").unwrap_err().to_string().contains("name of a file"));
    }

    #[test]
    fn a_folder_is_replaced_when_the_new_one_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let fill = |text: &'static str| move |new: &Path| write_flushed(&new.join("x.txt"), text);
        write_dir(&path, fill("one")).unwrap();
        let failing =
            |new: &Path| write_flushed(&new.join("x.txt"), "two").and(Err(Error::Failed("no".to_owned())));
        assert!(write_dir(&path, failing).is_err());
        assert_eq!(fs::read_to_string(path.join("x.txt")).unwrap(), "one");
        // What a process that was killed left is removed.
        fs::create_dir(folder.path().join(".model.tmp")).unwrap();
        fs::create_dir(folder.path().join(".model.old")).unwrap();
        write_dir(&path, fill("three")).unwrap();
        assert_eq!(fs::read_to_string(path.join("x.txt")).unwrap(), "three");
        assert_eq!(names(folder.path()), ["model"]);
        remove_dir(&path).unwrap();
        remove_dir(&path).unwrap();
        assert!(names(folder.path()).is_empty());
        assert!(is_temporary(OsStr::new(".model.tmp")) && !is_temporary(OsStr::new("model.tmp")));
    }

    #[test]
    fn a_link_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("best");
        symlink(Path::new("a"), &link).unwrap();
        symlink(Path::new("b"), &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("b"));
        assert_eq!(names(folder.path()), ["best"]);
    }

    #[test]
    fn a_staged_folder_appears_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/b");
        let entries = |path: &Path| names(path).len();
        let write = || {
            let staged = StagedDir::new(&target)?;
            for (name, line) in [("x.txt", "one"), ("deep/y.txt", "two")] {
                let mut file = staged.file(name)?;
                file.write(line.as_bytes())?;
                file.finish()?;
            }
            Ok::<_, Error>(staged)
        };
        drop(write().unwrap());
        assert_eq!(entries(&folder.path().join("a")), 0);
        write().unwrap().commit().unwrap();
        assert_eq!((entries(&folder.path().join("a")), entries(&target)), (1, 2));
        assert_eq!(fs::read_to_string(target.join("deep/y.txt")).unwrap(), "two\n");
        assert!(write().unwrap_err().to_string().contains("a/b: already exists"));
    }
}
