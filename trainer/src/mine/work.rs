//! What is kept on disk while negatives are mined: embeddings, and the finished rows of blocks of queries.
//!
//! ```text
//! WORK/embeddings-DIGEST/queries-00000.npy …  documents-00000.npy …     of the model, the prompts and the texts
//! WORK/rows-DIGEST/00000.jsonl 00000.json …                             of these and of what a negative must be
//! ```
//!
//! A file is there whole or not at all, so whoever starts again goes on with what is missing. Another model, other texts or other
//! settings have folders of other names.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::report::Counts;
use crate::comm::World;
use crate::system::heartbeat;
use crate::{Error, Result};

pub(super) struct Work {
    folder: PathBuf,
    embeddings: PathBuf,
    rows: PathBuf,
}

impl Work {
    /// Makes the folders, on the first rank.
    pub(super) fn open(folder: &Path, texts: u64, settings: u64, world: &World) -> Result<Self> {
        let embeddings = folder.join(format!("embeddings-{texts:016x}"));
        let rows = folder.join(format!("rows-{texts:016x}-{settings:016x}"));
        for path in [&embeddings, &rows].into_iter().filter(|_| world.first()) {
            fs::create_dir_all(path).map_err(Error::io("create", path))?;
        }
        world.barrier()?;
        if !rows.is_dir() {
            let message = "is not seen by all ranks\nhint: --work DIR names a folder that all nodes share";
            return Err(Error::file(folder, message));
        }
        Ok(Self { folder: folder.to_owned(), embeddings, rows })
    }

    pub(super) fn shard(&self, what: &str, number: usize) -> PathBuf {
        self.embeddings.join(format!("{what}-{number:05}.npy"))
    }

    pub(super) fn block(&self, number: usize) -> PathBuf {
        self.rows.join(format!("{number:05}.jsonl"))
    }

    /// Which of these files are there, as the first rank sees it.
    pub(super) fn present(&self, files: impl Iterator<Item = PathBuf>, world: &World) -> Result<Vec<bool>> {
        let mine = files.map(|path| u8::from(path.is_file())).collect();
        Ok(world.of_first(mine)?.into_iter().map(|present| present != 0).collect())
    }

    /// Writes the rows of a block of queries; what they count goes first, so that it is there when they are.
    pub(super) fn write_block(&self, number: usize, rows: &[u8], counts: &Counts) -> Result<()> {
        let path = self.block(number);
        let counts = serde_json::to_vec(counts).map_err(|error| Error::Usage(error.to_string()))?;
        write_whole(&path.with_extension("json"), &counts)?;
        write_whole(&path, rows)
    }

    /// Joins the blocks to `output`, and returns what all of them count.
    pub(super) fn join(&self, blocks: usize, output: &Path) -> Result<Counts> {
        let Some(name) = output.file_name() else {
            return Err(Error::Usage(format!("--output: {} is no name for a file", output.display())));
        };
        let draft = output.with_file_name(format!(".{}.tmp", name.display()));
        let mut file = BufWriter::new(File::create(&draft).map_err(Error::io("create", &draft))?);
        let mut all = Counts::default();
        for path in (0..blocks).map(|block| self.block(block)) {
            let counts = path.with_extension("json");
            let text = fs::read(&counts).map_err(Error::io("read", &counts))?;
            let counts: Counts =
                serde_json::from_slice(&text).map_err(|error| Error::file(&counts, error.to_string()))?;
            all.add(&counts);
            let mut rows = File::open(&path).map_err(Error::io("open", &path))?;
            std::io::copy(&mut rows, &mut file).map_err(Error::io("write", &draft))?;
            heartbeat::beat();
        }
        file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io("write", &draft))?;
        fs::rename(&draft, output).map_err(Error::io("rename", &draft))?;
        Ok(all)
    }

    /// Removes the finished rows, and the embeddings unless they are to be used again.
    pub(super) fn remove(&self, keep_embeddings: bool) -> Result<()> {
        let path = if keep_embeddings { &self.rows } else { &self.folder };
        fs::remove_dir_all(path).map_err(Error::io("remove", path))
    }
}

/// Whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let draft = path.with_extension("tmp");
    let done = File::create(&draft).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    done.and_then(|()| fs::rename(&draft, path)).map_err(Error::io("write", path))
}
