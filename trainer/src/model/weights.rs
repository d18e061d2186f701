//! Where the weights come from: safetensors files, memory-mapped, or the seed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::distr::Uniform;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{Error, Result};

/// Named tensors for a model that is being built.
pub struct Weights {
    source: Source,
    /// What precedes every name in the file: empty, `bert.`, `model.` …
    prefix: String,
    /// Only names and shapes are looked at.
    dry: bool,
}

enum Source {
    Files { folder: PathBuf, tensors: MmapedSafetensors, names: BTreeSet<String> },
    Random { seed: u64, deviation: f64 },
}

/// How a random model fills a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Normal with the deviation of config.json (`initializer_range`).
    Normal,
    /// Biases.
    Zeros,
    /// The weights of norms.
    Ones,
}

impl Weights {
    /// Opens `model.safetensors` or the shards of its index. `anchors` are names of which one must be there; what stands
    /// before it is the prefix of all.
    pub fn open(folder: &Path, anchors: &[&str]) -> Result<Self> {
        let files = files(folder)?;
        for file in &files {
            complete(file)?;
        }
        // SAFETY: a mapped file must not change underneath us. Model files are written once and renamed into place, by this
        // program and by the hub's cache; whoever edits one in place during a run breaks every reader of it.
        #[expect(unsafe_code, reason = "reading a 14 GB file through a map spares a second copy of it")]
        let tensors = unsafe { MmapedSafetensors::multi(&files) }
            .map_err(|error| Error::file(folder, format!("not a whole safetensors file: {error}")))?;
        let names: BTreeSet<String> = tensors.tensors().into_iter().map(|(name, _)| name).collect();
        let prefix = names
            .iter()
            .find_map(|name| anchors.iter().find_map(|anchor| name.strip_suffix(anchor)))
            .ok_or_else(|| {
                let first: Vec<_> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
                Error::file(
                    folder,
                    format!(
                        "the weights hold no tensor `{}`; the first of {} are {}\nhint: config.json and the weights must be of one model",
                        anchors[0],
                        names.len(),
                        first.join(", ")
                    ),
                )
            })?
            .to_owned();
        Ok(Self { source: Source::Files { folder: folder.to_owned(), tensors, names }, prefix, dry: false })
    }

    /// Checks names and shapes and gives zeros, which take no memory as long as nobody touches them.
    pub fn dry(self) -> Self {
        Self { dry: true, ..self }
    }

    /// Draws every tensor of the model's part `part` from the seed and its own name, so that order and threads do not
    /// matter.
    pub fn random(seed: u64, deviation: f64, part: &str) -> Self {
        Self { source: Source::Random { seed, deviation }, prefix: part.to_owned(), dry: false }
    }

    /// The tensor `name`, f32, checked against `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        match &self.source {
            Source::Files { folder, tensors, .. } => {
                let full = format!("{}{name}", self.prefix);
                let tensor = tensors.get(&full).map_err(|_| {
                    Error::file(folder, format!("the weights lack the tensor `{full}` of shape {shape:?}"))
                })?;
                if tensor.shape() != shape {
                    return Err(Error::file(
                        folder,
                        format!(
                            "`{full}` has the shape {:?}, config.json makes it {shape:?}",
                            tensor.shape()
                        ),
                    ));
                }
                if self.dry {
                    return Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
                }
                Ok(tensors.load(&full, &Device::Cpu)?.to_dtype(DType::F32)?)
            }
            Source::Random { seed, deviation } => match init {
                _ if self.dry => Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
                Init::Zeros => Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
                Init::Ones => Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?),
                Init::Normal => {
                    let normal = Normal::new(0.0, *deviation as f32).map_err(|_| {
                        Error::Usage(format!("initializer_range {deviation} is not a deviation"))
                    })?;
                    draw(*seed, &format!("{}{name}", self.prefix), shape, &normal)
                }
            },
        }
    }

    /// A matrix of a linear layer or an embedding table.
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor> {
        self.tensor(name, &[rows, columns], Init::Normal)
    }

    /// Tensors of the files that the encoder does not compute with but another program may: they go through unchanged.
    pub fn carried(&self, wanted: &str) -> Result<Vec<(String, Tensor)>> {
        let (Source::Files { tensors, names, .. }, false) = (&self.source, self.dry) else {
            return Ok(Vec::new());
        };
        let start = format!("{}{wanted}", self.prefix);
        names
            .iter()
            .filter(|name| name.starts_with(&start))
            .map(|name| Ok((name[self.prefix.len()..].to_owned(), tensors.load(name, &Device::Cpu)?)))
            .collect()
    }
}

/// A tensor of U(−limit, limit), a function of the seed and the name alone.
pub fn uniform(seed: u64, name: &str, shape: &[usize], limit: f32) -> Result<Tensor> {
    let uniform = Uniform::new_inclusive(-limit, limit)
        .map_err(|_| Error::Usage(format!("`{name}` cannot be drawn from ±{limit}")))?;
    draw(seed, name, shape, &uniform)
}

fn draw(seed: u64, name: &str, shape: &[usize], from: &(impl Distribution<f32> + Sync)) -> Result<Tensor> {
    const PIECE: usize = 1 << 18; // each piece is a stream of its own, so threads can share a tensor
    let mut elements = vec![0f32; shape.iter().product()];
    let key = xxh3_64_with_seed(name.as_bytes(), seed);
    elements.par_chunks_mut(PIECE).enumerate().for_each(|(piece, part)| {
        let mut random = ChaCha8Rng::seed_from_u64(key);
        random.set_stream(piece as u64);
        part.iter_mut().for_each(|element| *element = from.sample(&mut random));
    });
    Ok(Tensor::from_vec(elements, shape, &Device::Cpu)?)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = folder.join("model.safetensors.index.json");
    if !index.is_file() {
        let pickle = folder.join("pytorch_model.bin").is_file();
        return Err(Error::file(
            folder,
            if pickle {
                "has pytorch_model.bin but no model.safetensors\nhint: pickled weights are not read; convert them with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)"
            } else {
                "has no model.safetensors\nhint: `model.init: random` (`--random-weights`) draws the weights from the seed"
            },
        ));
    }
    let text = std::fs::read_to_string(&index).map_err(Error::io("read", &index))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| Error::file(&index, format!("not JSON: {error}")))?;
    let shards: BTreeSet<&str> = json["weight_map"]
        .as_object()
        .ok_or_else(|| Error::file(&index, "has no `weight_map`"))?
        .values()
        .filter_map(|shard| shard.as_str())
        .collect();
    let shards: Vec<PathBuf> = shards.into_iter().map(|shard| folder.join(shard)).collect();
    match shards.iter().find(|shard| !shard.is_file()) {
        Some(missing) => Err(Error::file(&index, format!("names {}, which is not there", missing.display()))),
        None => Ok(shards),
    }
}

/// Refuses a file that is shorter than its header says, which is what a broken download leaves.
fn complete(path: &Path) -> Result<()> {
    use std::io::Read;
    let mut file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    let size = file.metadata().map_err(Error::io("read", path))?.len();
    let mut word = [0u8; 8];
    let whole = |needed: u64| {
        Err(Error::file(
            path,
            format!("is cut off: it has {size} bytes, its header asks for {needed}\nhint: download it again"),
        ))
    };
    if file.read_exact(&mut word).is_err() {
        return whole(8);
    }
    let header = u64::from_le_bytes(word);
    if header > size.saturating_sub(8) {
        return whole(header.saturating_add(8));
    }
    let mut json = vec![0u8; header as usize];
    file.read_exact(&mut json).map_err(Error::io("read", path))?;
    let json: serde_json::Value = serde_json::from_slice(&json)
        .map_err(|error| Error::file(path, format!("is not a safetensors file: {error}")))?;
    let end = json
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64())
        .max()
        .unwrap_or(0);
    if 8 + header + end > size {
        return whole(8 + header + end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_depend_on_seed_and_name_alone() {
        let weights = Weights::random(1, 0.02, "");
        let a = weights.matrix("a", 600, 700).unwrap();
        let again = Weights::random(1, 0.02, "").matrix("a", 600, 700).unwrap();
        let other = weights.matrix("b", 600, 700).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&a), values(&again));
        assert_ne!(values(&a), values(&other));
        let (a, n) = (values(&a), 420_000.0);
        let mean = a.iter().sum::<f32>() / n;
        let deviation = (a.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
        assert!(mean.abs() < 2e-4 && (deviation - 0.02).abs() < 2e-4, "mean {mean}, deviation {deviation}");
    }

    #[test]
    fn a_folder_without_weights_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let message = Weights::open(folder.path(), &["x"]).err().unwrap().to_string();
        assert!(
            message.contains("has no model.safetensors") && message.contains("model.init: random"),
            "{message}"
        );
    }

    #[test]
    fn a_cut_file_is_refused_with_its_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensor = Tensor::zeros((4, 4), DType::F32, &Device::Cpu).unwrap();
        tensor.save_safetensors("m.embed.weight", &path).unwrap();
        let weights = Weights::open(folder.path(), &["embed.weight"]).unwrap();
        assert!(weights.matrix("embed.weight", 4, 4).is_ok());
        let shape = weights.matrix("embed.weight", 4, 5).unwrap_err().to_string();
        assert!(
            shape.contains("`m.embed.weight` has the shape [4, 4], config.json makes it [4, 5]"),
            "{shape}"
        );
        let bytes = std::fs::read(&path).unwrap();
        for length in [0, 7, 40, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let message = Weights::open(folder.path(), &["embed.weight"]).err().unwrap().to_string();
            assert!(message.contains("is cut off"), "{length}: {message}");
        }
    }
}
