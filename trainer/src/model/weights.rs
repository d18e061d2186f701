//! Where the weights come from: safetensors files, memory-mapped, or the seed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::distr::Uniform;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::mapped::Mapped;
use crate::system::device;
use crate::system::heartbeat;
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
    Files { folder: PathBuf, tensors: Mapped },
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
        let tensors = Mapped::open(&files(folder)?)?;
        let prefix = tensors
            .names()
            .find_map(|name| anchors.iter().find_map(|anchor| name.strip_suffix(anchor)))
            .ok_or_else(|| {
                let first: Vec<_> = tensors.names().take(3).map(|name| format!("`{name}`")).collect();
                Error::file(
                    folder,
                    format!(
                        "the weights hold no tensor `{}`; the first of {} are {}\nhint: config.json and the weights must be of one model",
                        anchors[0],
                        tensors.names().count(),
                        first.join(", ")
                    ),
                )
            })?
            .to_owned();
        Ok(Self { source: Source::Files { folder: folder.to_owned(), tensors }, prefix, dry: false })
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

    /// The tensor `name`, f32, checked against `shape`, where this process computes.
    pub fn tensor(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let tensor = self.on_cpu(name, shape, init)?;
        heartbeat::record_work();
        if self.dry { Ok(tensor) } else { Ok(tensor.to_device(&device::current()?)?) }
    }

    fn on_cpu(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        match &self.source {
            Source::Files { folder, tensors } => {
                let full = format!("{}{name}", self.prefix);
                let older = legacy(&full).filter(|older| tensors.shape(older).is_some());
                let full = older.unwrap_or(full);
                let Some(found) = tensors.shape(&full) else {
                    let message = format!("the weights lack the tensor `{full}` of shape {shape:?}");
                    return Err(Error::file(folder, message));
                };
                if found != shape {
                    let message = format!("`{full}` has the shape {found:?}, config.json makes it {shape:?}");
                    return Err(Error::file(folder, message));
                }
                if self.dry {
                    Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
                } else {
                    tensors.load(&full)
                }
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
    pub fn passthrough(&self, wanted: &str) -> Result<Vec<(String, Tensor)>> {
        let (Source::Files { tensors, .. }, false) = (&self.source, self.dry) else {
            return Ok(Vec::new());
        };
        let start = format!("{}{wanted}", self.prefix);
        tensors
            .names()
            .filter(|name| name.starts_with(&start))
            .map(|name| Ok((name[self.prefix.len()..].to_owned(), tensors.load(name)?)))
            .collect()
    }
}

/// What BERT's first checkpoints, converted from TensorFlow, call a layer norm's parameters.
fn legacy(name: &str) -> Option<String> {
    let norm = |ending: &str| name.strip_suffix(ending).filter(|start| start.ends_with("LayerNorm"));
    norm(".weight")
        .map(|start| format!("{start}.gamma"))
        .or_else(|| norm(".bias").map(|start| format!("{start}.beta")))
}

/// A tensor of U(−limit, limit), a function of the seed and the name alone.
pub fn uniform(seed: u64, name: &str, shape: &[usize], limit: f32) -> Result<Tensor> {
    let uniform = Uniform::new_inclusive(-limit, limit)
        .map_err(|_| Error::Bug(format!("`{name}` cannot be drawn from ±{limit}")))?;
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
                "has no model.safetensors\nhint: `model.init: random` draws the weights from the seed, as `--random-weights` does (in `compare` the base's)"
            },
        ));
    }
    let text = std::fs::read_to_string(&index).map_err(Error::read("read", &index))?;
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
    fn the_first_names_of_layer_norms_are_understood() {
        let folder = tempfile::tempdir().unwrap();
        let tensor = |value: f32| Tensor::full(value, 3, &Device::Cpu).unwrap();
        let tensors =
            [("bert.x.LayerNorm.gamma", 2.0), ("bert.x.LayerNorm.beta", 3.0), ("bert.w.weight", 4.0)];
        let tensors = tensors.map(|(name, value)| (name.to_owned(), tensor(value))).into_iter().collect();
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        let weights = Weights::open(folder.path(), &["w.weight"]).unwrap();
        let first = |name: &str| weights.tensor(name, &[3], Init::Ones).unwrap().to_vec1::<f32>().unwrap()[0];
        assert_eq!(
            (first("x.LayerNorm.weight"), first("x.LayerNorm.bias"), first("w.weight")),
            (2.0, 3.0, 4.0)
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
