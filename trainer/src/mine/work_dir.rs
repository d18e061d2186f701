//! Folder of intermediate results, from which an interrupted run resumes: embeddings and finished blocks of
//! rows.
//!
//! ```text
//! WORK/embeddings-DIGEST/queries-00000.npy …  documents-00000.npy …
//! WORK/rows-DIGEST-SETTINGS/00000.jsonl 00000.json …
//! ```
//!
//! Files are written atomically, so those that exist are complete. `DIGEST` is a hash of the model, the
//! prompts and the texts, `SETTINGS` one of the filters: runs that differ in them use different folders.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::stats::MiningStats;
use crate::comm::World;
use crate::system::atomic::{self, AtomicFile};
use crate::system::heartbeat;
use crate::{Error, Result};

/// Folder of the intermediate results of one run.
pub(super) struct WorkDir {
    folder: PathBuf,
    embeddings: PathBuf,
    rows: PathBuf,
}

impl WorkDir {
    /// Creates the folders; rank 0 does.
    pub(super) fn open(folder: &Path, texts: u64, settings: u64, world: &World) -> Result<Self> {
        let embeddings = folder.join(format!("embeddings-{texts:016x}"));
        let rows = folder.join(format!("rows-{texts:016x}-{settings:016x}"));
        for path in [&embeddings, &rows].into_iter().filter(|_| world.is_rank_zero()) {
            fs::create_dir_all(path).map_err(Error::write("create", path))?;
        }
        world.barrier()?;
        if !rows.is_dir() {
            let message =
                "does not exist on all nodes\nhint: give a folder that all nodes share with --work DIR";
            return Err(Error::file(folder, message));
        }
        Ok(Self { folder: folder.to_owned(), embeddings, rows })
    }

    /// Path of a file of embeddings.
    pub(super) fn shard(&self, what: &str, number: usize) -> PathBuf {
        self.embeddings.join(format!("{what}-{number:05}.npy"))
    }

    /// Path of the rows of a block of queries.
    pub(super) fn block(&self, number: usize) -> PathBuf {
        self.rows.join(format!("{number:05}.jsonl"))
    }

    /// Tells which of these files exist on rank 0.
    pub(super) fn present(&self, files: impl Iterator<Item = PathBuf>, world: &World) -> Result<Vec<bool>> {
        let exists = files.map(|path| u8::from(path.is_file())).collect();
        Ok(world.broadcast_bytes(exists)?.into_iter().map(|present| present != 0).collect())
    }

    /// Writes the rows of a block of queries. The statistics are written first, so that they exist if the
    /// rows do.
    pub(super) fn write_block(&self, number: usize, rows: &[u8], stats: &MiningStats) -> Result<()> {
        let path = self.block(number);
        let stats = serde_json::to_vec(stats)
            .map_err(|error| Error::Bug(format!("statistics cannot be written as JSON: {error}")))?;
        atomic::write(&path.with_extension("json"), stats)?;
        atomic::write(&path, rows)
    }

    /// Concatenates the rows of all blocks into `output`. Returns the sum of their statistics.
    pub(super) fn join(&self, blocks: usize, output: &Path) -> Result<MiningStats> {
        let mut file = AtomicFile::create(output)?;
        let mut all = MiningStats::default();
        for path in (0..blocks).map(|block| self.block(block)) {
            let stats = path.with_extension("json");
            let text = fs::read(&stats).map_err(Error::read("read", &stats))?;
            let stats: MiningStats =
                serde_json::from_slice(&text).map_err(|error| Error::file(&stats, error.to_string()))?;
            all.add(&stats);
            let mut rows = File::open(&path).map_err(Error::read("open", &path))?;
            std::io::copy(&mut rows, &mut file).map_err(Error::write("write", output))?;
            heartbeat::record_work();
        }
        file.commit()?;
        Ok(all)
    }

    /// Removes the finished blocks, and the embeddings unless `keep_embeddings`.
    pub(super) fn remove(&self, keep_embeddings: bool) -> Result<()> {
        let path = if keep_embeddings { &self.rows } else { &self.folder };
        fs::remove_dir_all(path).map_err(Error::write("remove", path))
    }
}
