//! A folder that is there whole or not at all: written under another name beside its place, then renamed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::system::signals::Begun;
use crate::{Error, Result};

/// A folder that is being written. Dropped or stopped before it is finished, it leaves nothing.
#[derive(Debug)]
pub(crate) struct Draft {
    target: PathBuf,
    place: TempDir,
    _begun: Begun,
}

impl Draft {
    /// # Errors
    /// Something has that name, other than an empty folder.
    pub(crate) fn free(target: &Path) -> Result<()> {
        match target.symlink_metadata() {
            Ok(_) if is_empty(target) => Ok(()),
            Ok(_) => Err(Error::file(target, "is already there, expected the name of a folder to be made")),
            Err(_) => Ok(()),
        }
    }

    /// For the folder `target`, which must not be there.
    pub(crate) fn new(target: &Path) -> Result<Self> {
        Self::free(target)?;
        let parent =
            target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let place = tempfile::Builder::new().prefix(".draft-").tempdir_in(parent);
        let place = place.map_err(Error::io("write to", parent))?;
        let draft = Self { target: target.to_owned(), _begun: Begun::new(place.path())?, place };
        fs::create_dir(draft.folder()).map_err(Error::io("create", draft.folder()))?;
        Ok(draft)
    }

    fn folder(&self) -> PathBuf {
        self.place.path().join("folder")
    }

    /// A file of the folder.
    pub(crate) fn file(&self, name: &str) -> Result<Lines> {
        let path = self.folder().join(name);
        // Not `create_dir_all`: it would bring back a draft that a signal has taken away.
        if let Some(parent) = path.parent()
            && !parent.is_dir()
        {
            fs::create_dir(parent).map_err(Error::io("create", parent))?;
        }
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(Lines { file: BufWriter::new(file), path })
    }

    /// Puts the folder in its place.
    pub(crate) fn finish(self) -> Result<()> {
        fs::rename(self.folder(), &self.target).map_err(Error::io("create", &self.target))
    }
}

/// Whether this is a folder with nothing in it.
pub(crate) fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// A file of lines in a draft.
pub(crate) struct Lines {
    file: BufWriter<File>,
    path: PathBuf,
}

impl Lines {
    pub(crate) fn write(&mut self, line: &[u8]) -> Result<()> {
        let done = self.file.write_all(line).and_then(|()| self.file.write_all(b"\n"));
        done.map_err(Error::io("write", &self.path))
    }

    pub(crate) fn finish(mut self) -> Result<()> {
        let done = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        done.map_err(Error::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_whole_or_not_there() {
        let place = tempfile::tempdir().unwrap();
        let target = place.path().join("a/b");
        let entries = |path: &Path| fs::read_dir(path).unwrap().count();
        let write = || {
            let draft = Draft::new(&target)?;
            for (name, line) in [("x.txt", "one"), ("deep/y.txt", "two")] {
                let mut file = draft.file(name)?;
                file.write(line.as_bytes())?;
                file.finish()?;
            }
            Ok::<_, Error>(draft)
        };
        drop(write().unwrap());
        assert_eq!(entries(&place.path().join("a")), 0);
        write().unwrap().finish().unwrap();
        assert_eq!((entries(&place.path().join("a")), entries(&target)), (1, 2));
        assert_eq!(fs::read_to_string(target.join("deep/y.txt")).unwrap(), "two\n");
        assert!(write().unwrap_err().to_string().contains("a/b: is already there"));
    }
}
