//! Source of the weights: memory-mapped safetensors files, or a random initialisation.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::distr::Uniform;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::mapped_safetensors::MappedSafetensors;
use crate::system::device;
use crate::system::heartbeat;
use crate::{Error, Result};

/// Named tensors for a model that is being built: from a checkpoint, or random.
pub struct Weights {
    source: WeightSource,
    /// Prefix of all names in the file: empty, `bert.`, `model.` …
    prefix: String,
    /// Whether only names and shapes are checked, and all values are zero.
    shapes_only: bool,
}

enum WeightSource {
    Files { folder: PathBuf, tensors: MappedSafetensors },
    Random { seed: u64, deviation: f64 },
}

/// Random initialisation of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Normal distribution with the standard deviation `initializer_range` of config.json.
    Normal,
    /// Zeros, as for biases.
    Zeros,
    /// Ones, as for the weights of norms.
    Ones,
}

impl Weights {
    /// Opens `model.safetensors` or the shards of its index. One name ends with `anchor`; what precedes it is
    /// the prefix of all names.
    ///
    /// # Errors
    /// The folder has no safetensors, a file is cut off or malformed, or no name ends with `anchor`.
    pub fn open(folder: &Path, anchor: &str) -> Result<Self> {
        let tensors = MappedSafetensors::open(&files(folder)?)?;
        let prefix = tensors
            .names()
            .find_map(|name| name.strip_suffix(anchor))
            .ok_or_else(|| {
                let first: Vec<_> = tensors.names().take(3).map(|name| format!("`{name}`")).collect();
                Error::file(
                    folder,
                    format!(
                        "the weights have no tensor `{anchor}`; the first of {} are {}\n\
                         hint: config.json and the weights must belong to the same model",
                        tensors.names().count(),
                        first.join(", ")
                    ),
                )
            })?
            .to_owned();
        Ok(Self {
            source: WeightSource::Files { folder: folder.to_owned(), tensors },
            prefix,
            shapes_only: false,
        })
    }

    /// Makes [`Self::tensor`] check names and shapes only, and return zeros, which take no memory until they
    /// are touched. This is torch's `meta` device.
    pub fn shapes_only(self) -> Self {
        Self { shapes_only: true, ..self }
    }

    /// Initialises each tensor at random. The values depend on `seed` and on the tensor's name after
    /// `prefix`, and not on the order of the calls or the number of threads. `deviation` is that of
    /// [`Init::Normal`].
    pub fn random(seed: u64, deviation: f64, prefix: &str) -> Self {
        Self {
            source: WeightSource::Random { seed, deviation },
            prefix: prefix.to_owned(),
            shapes_only: false,
        }
    }

    /// Returns the tensor `name`, f32, on the device of this process.
    ///
    /// # Errors
    /// The checkpoint lacks the tensor, or it has another shape than `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let tensor = self.on_cpu(name, shape, init)?;
        heartbeat::record_work();
        if self.shapes_only { Ok(tensor) } else { Ok(tensor.to_device(&device::current()?)?) }
    }

    fn on_cpu(&self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        match &self.source {
            WeightSource::Files { folder, tensors } => {
                let full = format!("{}{name}", self.prefix);
                let older = legacy_name(&full).filter(|older| tensors.shape(older).is_some());
                let full = older.unwrap_or(full);
                let Some(found) = tensors.shape(&full) else {
                    let message = format!("the weights lack the tensor `{full}` of shape {shape:?}");
                    return Err(Error::file(folder, message));
                };
                if found != shape {
                    let message = format!("`{full}` has the shape {found:?}, config.json makes it {shape:?}");
                    return Err(Error::file(folder, message));
                }
                if self.shapes_only {
                    Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
                } else {
                    tensors.load(&full)
                }
            }
            WeightSource::Random { seed, deviation } => match init {
                _ if self.shapes_only => Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
                Init::Zeros => Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
                Init::Ones => Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?),
                Init::Normal => {
                    let normal = Normal::new(0.0, *deviation as f32).map_err(|_| {
                        Error::Bug(format!("initializer_range {deviation} is not a standard deviation"))
                    })?;
                    draw(*seed, &format!("{}{name}", self.prefix), shape, &normal)
                }
            },
        }
    }

    /// Returns the tensor `name` of shape (`rows`, `columns`), as [`Self::tensor`] with [`Init::Normal`].
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor> {
        self.tensor(name, &[rows, columns], Init::Normal)
    }

    /// Returns the tensors whose names begin with `wanted`, which the encoder does not use but an export
    /// keeps.
    pub fn passthrough(&self, wanted: &str) -> Result<Vec<(String, Tensor)>> {
        let (WeightSource::Files { tensors, .. }, false) = (&self.source, self.shapes_only) else {
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

/// Name of a layer norm's parameter in the first BERT checkpoints, which were converted from TensorFlow.
fn legacy_name(name: &str) -> Option<String> {
    let norm = |ending: &str| name.strip_suffix(ending).filter(|start| start.ends_with("LayerNorm"));
    norm(".weight")
        .map(|start| format!("{start}.gamma"))
        .or_else(|| norm(".bias").map(|start| format!("{start}.beta")))
}

/// Draws a tensor from U(−limit, limit). The values depend only on the seed and the name.
pub fn uniform(seed: u64, name: &str, shape: &[usize], limit: f32) -> Result<Tensor> {
    let uniform = Uniform::new_inclusive(-limit, limit)
        .map_err(|_| Error::Bug(format!("`{name}` cannot be drawn from ±{limit}")))?;
    draw(seed, name, shape, &uniform)
}

fn draw(seed: u64, name: &str, shape: &[usize], from: &(impl Distribution<f32> + Sync)) -> Result<Tensor> {
    // Each piece has a random stream, so that threads can share the work.
    const PIECE: usize = 1 << 18;
    let mut elements = vec![0f32; shape.iter().product()];
    let key = xxh3_64_with_seed(name.as_bytes(), seed);
    elements.par_chunks_mut(PIECE).enumerate().for_each(|(piece, part)| {
        let mut random = ChaCha8Rng::seed_from_u64(key);
        random.set_stream(piece as u64);
        part.iter_mut().for_each(|element| *element = from.sample(&mut random));
    });
    Ok(Tensor::from_vec(elements, shape, &Device::Cpu)?)
}

/// The safetensors files of a model folder.
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
                "has pytorch_model.bin but no model.safetensors\n\
                 hint: pickled weights are not supported; convert them with transformers: \
                 AutoModel.from_pretrained(folder).save_pretrained(folder)"
            } else {
                "has no model.safetensors\n\
                 hint: `model.init: random` or `--random-weights` initialises the weights at random"
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
        Some(missing) => {
            Err(Error::file(&index, format!("names {}, which does not exist", missing.display())))
        }
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
        let message = Weights::open(folder.path(), "x").err().unwrap().to_string();
        assert!(
            message.contains("has no model.safetensors") && message.contains("model.init: random"),
            "{message}"
        );
    }

    #[test]
    fn layer_norms_of_the_first_checkpoints_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let tensor = |value: f32| Tensor::full(value, 3, &Device::Cpu).unwrap();
        let tensors =
            [("bert.x.LayerNorm.gamma", 2.0), ("bert.x.LayerNorm.beta", 3.0), ("bert.w.weight", 4.0)];
        let tensors = tensors.map(|(name, value)| (name.to_owned(), tensor(value))).into_iter().collect();
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        let weights = Weights::open(folder.path(), "w.weight").unwrap();
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
        let weights = Weights::open(folder.path(), "embed.weight").unwrap();
        assert!(weights.matrix("embed.weight", 4, 4).is_ok());
        let shape = weights.matrix("embed.weight", 4, 5).unwrap_err().to_string();
        assert!(
            shape.contains("`m.embed.weight` has the shape [4, 4], config.json makes it [4, 5]"),
            "{shape}"
        );
        let bytes = std::fs::read(&path).unwrap();
        for length in [0, 7, 40, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let message = Weights::open(folder.path(), "embed.weight").err().unwrap().to_string();
            assert!(message.contains("is cut off"), "{length}: {message}");
        }
    }
}
