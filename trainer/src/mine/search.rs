//! Exact search in embeddings on disk: the k documents with the highest inner products for each query of a
//! block.
//!
//! Documents are read in batches; [`TopK`] scores them and keeps the best. Memory holds the queries of the
//! block, one batch of documents, and 2k values per query, for any number of documents.

use std::ops::Range;
use std::path::Path;

use kernels::topk::{Hit, TopK};

use crate::system::heartbeat;
use crate::system::npy::Reader;
use crate::{Error, Result};

/// Rows of documents that are read at once.
const BATCH: usize = 4096;

/// Embeddings (N, D) in one or more .npy files. All files but the last have the same number of rows.
#[derive(Debug)]
pub struct Embeddings {
    shards: Vec<Reader>,
    rows: usize,
    width: usize,
}

impl Embeddings {
    /// Opens the files, in the order of their rows.
    ///
    /// # Errors
    /// What [`Reader::open`] refuses; the files differ in width; a file other than the last has another
    /// number of rows.
    pub fn open<P: AsRef<Path>>(shards: impl IntoIterator<Item = P>) -> Result<Self> {
        let mut open: Vec<Reader> = Vec::new();
        for path in shards {
            let (path, shard) = (path.as_ref(), Reader::open(path.as_ref())?);
            if shard.width() == 0 || open.first().is_some_and(|first| first.width() != shard.width()) {
                return Err(Error::file(path, format!("has {} columns, other shards differ", shard.width())));
            }
            if open.len() > 1 && open[open.len() - 1].rows() != open[0].rows() {
                return Err(Error::file(path, "follows a shard with another number of rows"));
            }
            open.push(shard);
        }
        let rows = open.iter().map(Reader::rows).sum();
        let width = open.first().map_or(0, Reader::width);
        Ok(Self { shards: open, rows, width })
    }

    /// N, the number of embeddings.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// D, the width of an embedding.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Reads rows (n, D) into `values`, which is resized to n·D.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read(&self, range: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        values.resize(range.len() * self.width, 0.0);
        let length = self.shards.first().map_or(1, Reader::rows).max(1);
        let mut row = range.start;
        while row < range.end {
            let (shard, first) = (row / length, row % length);
            let count = (range.end - row).min(length - first);
            let place = (row - range.start) * self.width;
            self.shards[shard].read(first..first + count, &mut values[place..][..count * self.width])?;
            row += count;
        }
        Ok(())
    }

    /// Inner products of `query` (D) with these rows.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn scores(&self, query: &[f32], rows: &[u32]) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        rows.iter()
            .map(|&row| {
                self.read(row as usize..row as usize + 1, &mut values)?;
                Ok(query.iter().zip(&values).map(|(a, b)| a * b).sum())
            })
            .collect()
    }
}

/// Finds the k documents with the highest inner products for each of `queries` (Q, D), best first. Of
/// documents with equal scores the first is taken.
///
/// # Errors
/// A file cannot be read; queries and documents differ in width.
pub fn search(queries: &[f32], documents: &Embeddings, k: usize) -> Result<Vec<Vec<Hit>>> {
    let width = documents.width();
    if width == 0 || !queries.len().is_multiple_of(width) {
        return Err(Error::Bug(format!("the queries do not have the width of the documents, {width}")));
    }
    let mut best = TopK::new(queries.len() / width, k);
    let mut batch = Vec::new();
    for first in (0..documents.rows()).step_by(BATCH) {
        documents.read(first..documents.rows().min(first + BATCH), &mut batch)?;
        best.push(queries, &batch, width, first as u32);
        heartbeat::record_work();
    }
    Ok(best.finish())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::system::npy::Writer;

    fn write(folder: &Path, name: &str, rows: &[f32], width: usize) -> std::path::PathBuf {
        let path = folder.join(name);
        let tensor = Tensor::from_slice(rows, (rows.len() / width, width), &Device::Cpu).unwrap();
        let mut npy = Writer::create(&path, rows.len() / width, width).unwrap();
        npy.write(&tensor).unwrap();
        npy.finish().unwrap();
        path
    }

    #[test]
    fn shards_are_one_matrix() {
        let folder = tempfile::tempdir().unwrap();
        let numbers: Vec<f32> = (0..9000).map(|i| ((i * 7919) % 1013) as f32).collect();
        let whole = Embeddings::open([write(folder.path(), "all.npy", &numbers, 2)]).unwrap();
        let parts = numbers.chunks(2 * 700).enumerate();
        let parts = parts.map(|(i, part)| write(folder.path(), &format!("{i}.npy"), part, 2));
        let parts = Embeddings::open(parts.collect::<Vec<_>>()).unwrap();
        assert_eq!((parts.rows(), parts.width()), (4500, 2));
        let mut read = Vec::new();
        for range in [0..4500, 0..0, 699..701, 1399..2800, 4499..4500] {
            parts.read(range.clone(), &mut read).unwrap();
            assert_eq!(read, numbers[range.start * 2..range.end * 2]);
        }
        // More documents than a batch.
        let queries = [1.0, 0.0, 0.5, 1.0];
        let found = search(&queries, &parts, 3).unwrap();
        assert_eq!(found, search(&queries, &whole, 3).unwrap());
        let mut order: Vec<usize> = (0..4500).collect();
        order.sort_by(|&a, &b| numbers[2 * b].total_cmp(&numbers[2 * a]).then(a.cmp(&b)));
        assert!(found[0].iter().map(|hit| hit.document as usize).eq(order[..3].iter().copied()));
        let scores = parts.scores(&queries[..2], &[4499, 3]).unwrap();
        assert_eq!(scores, [numbers[8998], numbers[6]]);
    }

    #[test]
    fn shards_of_other_shapes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let shard = |name: &str, rows: usize, width: usize| {
            write(folder.path(), name, &vec![0.5; rows * width], width)
        };
        let (a, short, wide) = (shard("a.npy", 4, 2), shard("short.npy", 3, 2), shard("wide.npy", 4, 3));
        let error = Embeddings::open([&a, &wide]).unwrap_err().to_string();
        assert!(error.contains("wide.npy: has 3 columns"), "{error}");
        let error = Embeddings::open([&a, &short, &a]).unwrap_err().to_string();
        assert!(error.contains("a.npy: follows a shard"), "{error}");
        assert!(search(&[1.0; 3], &Embeddings::open([&a]).unwrap(), 1).is_err());
        assert_eq!(Embeddings::open(Vec::<&Path>::new()).unwrap().rows(), 0);
    }
}
