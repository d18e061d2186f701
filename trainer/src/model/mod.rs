//! The model: texts as token ids go in, embeddings come out, and gradients go back.
//!
//! Encoders have a written backward: a layer's `forward` returns a tape and its `backward` takes it, beside each other in
//! one file. Weights that are not trained get no gradient, and nothing is computed for them.

pub mod chunk;
pub mod folder;
pub mod head;
pub mod hub;
pub mod params;
pub mod pass;

pub mod adapter;
pub mod bert;
pub mod decoder;
pub mod encoder;
mod frozen;
pub mod linear;
pub mod mapped;
pub mod modernbert;
pub mod norms;
pub mod relative;
pub mod rotary;
pub mod settings;
pub mod weights;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use kernels::precision::Precision;

use self::chunk::{Chunk, Limit};
use self::encoder::Encoder;
pub use self::folder::Folder;
use self::head::Head;
use self::params::{Flat, Gradients, Parameter};
use self::pass::{Keep, Noise, Pass};
use self::settings::Settings;
use self::weights::Weights;
use crate::config::{self, Pooling};
use crate::data::batch::Sequence;
use crate::system::device;
use crate::{Error, Result};

/// An encoder, how its hidden states become one embedding, and which of its parameters are trained.
#[derive(Debug)]
pub struct Model {
    encoder: Encoder,
    head: Head,
    folder: Folder,
    pooling: Pooling,
    normalize: bool,
    precision: Precision,
    parameters: Vec<(String, Parameter)>,
    flat: Flat,
    passthrough: Vec<(String, Tensor)>,
    lora: Option<adapter::Settings>,
}

/// What the backward pass needs of a forward pass.
#[derive(Debug)]
pub struct Tape {
    encoder: encoder::Tape,
    head: head::Tape,
}

/// How a model is opened.
#[derive(Clone, Debug, Default)]
pub struct Options<'a> {
    /// The configuration's section; all default for a model that is used as it is.
    pub model: config::Model,
    /// Adapters to train; without them, every parameter is.
    pub lora: Option<&'a config::Lora>,
    /// Whether anything is trained at all.
    pub trained: bool,
    /// Random weights and adapters follow from it.
    pub seed: u64,
    /// Whether only names and shapes are checked, and no weight is read.
    pub dry: bool,
}

impl Model {
    /// Opens the model folder that `folder` describes.
    pub fn open(folder: Folder, options: &Options) -> Result<Self> {
        #[cfg(feature = "cuda")]
        candle_core::cuda::set_gemm_reduced_precision_f32(options.model.tf32);
        let settings = Settings::new(&folder.path, folder.config.clone());
        let init = |place: &Path, part: &str, anchors: &[&str]| {
            let weights = match options.model.init {
                config::WeightInit::Pretrained => Weights::open(place, anchors)?,
                config::WeightInit::Random => {
                    let deviation = settings.number("initializer_range", 0.02)?;
                    Weights::random(options.seed, deviation, part)
                }
            };
            Ok(if options.dry { weights.dry() } else { weights })
        };
        let longest = longest(&folder, &options.model, &settings)?;
        let dropout = options.model.dropout.map(|p| p as f32);
        let open = |anchors: &[&str]| init(&adapter::base(&folder)?, "", anchors);
        let (mut encoder, passthrough) = Encoder::new(&settings, open, dropout, longest)?;
        let mut width = encoder.width();
        for dense in &folder.dense {
            if dense.inputs != width {
                let message = format!("in_features is {}, but what comes before has {width}", dense.inputs);
                return Err(Error::file(dense.path.join("config.json"), message));
            }
            width = dense.outputs;
        }
        let normalize = options.model.normalize.or(folder.normalize).unwrap_or(true);
        let mut head = Head::new(&folder.dense, normalize, |module| {
            init(&module.path, &module.name, &["linear.weight"])
        })?;
        let lora = match (adapter::Source::find(&folder, options.lora)?, options.lora) {
            (Some(source), section) => Some(source.load(&mut encoder, section)?),
            (None, Some(section)) => Some(adapter::attach(&mut encoder, section, options.seed)?),
            (None, None) => None,
        };
        let adapters_only = lora.is_some();
        if adapters_only && !options.model.freeze.is_empty() {
            let message =
                "model.freeze: the model has adapters, beside which everything is frozen: leave it out";
            return Err(Error::Usage(message.to_owned()));
        }
        let flat = Flat::adopt(
            |visit| encoder.visit(visit).and_then(|()| head.visit(visit)),
            |name| {
                let wanted = if adapters_only {
                    name.contains(".lora_")
                } else {
                    !frozen::is(name, &options.model.freeze)
                };
                options.trained && wanted
            },
        )?;
        let precision = options.model.dtype.precision();
        let mut round = |_: &str, parameter: &mut Parameter| parameter.round(precision);
        // Where the whole model is trained and will be written, what is frozen keeps its digits, too.
        let whole = options.trained && !adapters_only;
        if precision != Precision::F32 && !options.dry && !whole {
            encoder.visit(&mut round)?;
            head.visit(&mut round)?;
        }
        let mut parameters = Vec::new();
        let mut note = |name: &str, parameter: &mut Parameter| {
            parameters.push((name.to_owned(), parameter.clone()));
            Ok(())
        };
        encoder.visit(&mut note)?;
        head.visit(&mut note)?;
        let decoder = matches!(encoder, Encoder::Decoder(_));
        let by_family = if decoder { Pooling::LastToken } else { Pooling::Mean };
        Ok(Self {
            pooling: options.model.pooling.or(folder.pooling).unwrap_or(by_family),
            normalize,
            precision,
            encoder,
            head,
            folder,
            parameters,
            flat,
            passthrough,
            lora,
        })
    }

    /// A chunk → its embeddings (N, D), and the tape if it is to be kept. Without `noise` nothing is dropped.
    pub fn forward(&self, chunk: &Chunk, noise: Option<Noise>, keep: Keep) -> Result<(Tensor, Option<Tape>)> {
        let pass = self.pass(chunk, noise);
        let (x, tape) = self.encoder.forward(&self.placed(&chunk.ids)?, &pass, keep)?; // (T, D)
        let (embeddings, head) = self.head.forward(&x, &chunk.spans, &pass)?;
        Ok((embeddings, tape.map(|encoder| Tape { encoder, head })))
    }

    /// A chunk → the encoder's last hidden states (T, D), without dropout.
    pub fn hidden_states(&self, chunk: &Chunk) -> Result<Tensor> {
        let pass = self.pass(chunk, None);
        Ok(self.encoder.forward(&self.placed(&chunk.ids)?, &pass, Keep::Nothing)?.0)
    }

    /// The tape of a chunk whose embeddings are known already.
    pub fn record(&self, chunk: &Chunk, noise: Option<Noise>) -> Result<Tape> {
        match self.forward(chunk, noise, Keep::Whole)? {
            (_, Some(tape)) => Ok(tape),
            (_, None) => Err(Error::Bug("a forward pass that records a tape returned none".to_owned())),
        }
    }

    /// d(embeddings) (N, D) → the gradients of everything trained.
    pub fn backward(
        &self,
        chunk: &Chunk,
        tape: Tape,
        d: &Tensor,
        noise: Option<Noise>,
        gradients: &Gradients,
    ) -> Result<()> {
        let pass = self.pass(chunk, noise);
        let Tape { encoder, head } = tape;
        let tokens = chunk.packing.tokens();
        let dx = pass.round(self.head.backward(head, d, &chunk.spans, tokens, &pass, gradients)?)?; // (T, D)
        self.encoder.backward(&self.placed(&chunk.ids)?, encoder, dx, &pass, gradients)?;
        gradients.settle()
    }

    /// A chunk's ids where the parameters are.
    fn placed(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(match self.parameters.first().map(|(_, parameter)| parameter.value().device()) {
            Some(device) if !device.is_cpu() => kernels::upload(&ids.to_vec1::<u32>()?, device)?,
            _ => ids.clone(),
        })
    }

    /// Sequences → their embeddings (N, D) in the order given; no tape, no dropout.
    pub fn embed(&self, sequences: &[Sequence], chunk_tokens: usize) -> Result<Tensor> {
        let width = self.width();
        let mut all = vec![0f32; sequences.len() * width];
        let members: Vec<usize> = (0..sequences.len()).collect();
        for cut in chunk::cut(sequences, &members, Limit::Tokens(chunk_tokens)) {
            let chunk = Chunk::pack(sequences, cut, self.pooling)?;
            let (embeddings, _) = self.forward(&chunk, None, Keep::Nothing)?;
            for (&member, row) in chunk.members.iter().zip(embeddings.to_vec2::<f32>()?) {
                all[member * width..][..width].copy_from_slice(&row);
            }
        }
        Ok(Tensor::from_vec(all, (sequences.len(), width), &Device::Cpu)?)
    }

    /// The trained parameters.
    pub fn flat(&self) -> &Flat {
        &self.flat
    }

    /// What activations and weights are rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    fn pass<'a>(&self, chunk: &'a Chunk, noise: Option<Noise>) -> Pass<'a> {
        Pass { packing: &chunk.packing, noise, precision: self.precision }
    }

    /// What the folder said.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// How hidden states become one embedding.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Whether embeddings have the length 1.
    pub fn normalize(&self) -> bool {
        self.normalize
    }

    /// The adapters' settings, where it has adapters.
    pub fn lora(&self) -> Option<adapter::Settings> {
        self.lora
    }

    /// D of an embedding.
    pub fn width(&self) -> usize {
        self.folder.dense.last().map_or(self.encoder.width(), |dense| dense.outputs)
    }

    /// D of a hidden state.
    pub fn hidden_width(&self) -> usize {
        self.encoder.width()
    }

    /// The longest text that has positions.
    pub fn positions(&self) -> usize {
        self.encoder.positions()
    }

    /// V.
    pub fn vocabulary(&self) -> usize {
        self.encoder.vocabulary()
    }

    /// Elements of all parameters, trained or not.
    pub fn elements(&self) -> usize {
        self.parameters.iter().map(|(_, parameter)| parameter.value().elem_count()).sum()
    }

    /// L, as the names of the parameters count.
    pub fn layers(&self) -> usize {
        let number = |name: &str| {
            let mut parts = name.split('.').skip_while(|part| !matches!(*part, "layer" | "layers"));
            parts.nth(1)?.parse::<usize>().ok()
        };
        self.parameters.iter().filter_map(|(name, _)| number(name)).max().map_or(0, |last| last + 1)
    }

    /// Bytes of tape that one token leaves.
    pub fn tape_bytes_per_token(&self, keep: Keep) -> usize {
        self.encoder.tape_bytes_per_token(keep) / 4 * self.element_bytes()
    }

    /// Bytes of an activation, and of a parameter that is not trained: on a CPU halves are kept in f32.
    pub fn element_bytes(&self) -> usize {
        let on_gpu = device::current().is_ok_and(|device| kernels::on_gpu(&device));
        if on_gpu && self.precision != Precision::F32 { 2 } else { 4 }
    }

    /// The adapters' tensors by name, as PEFT names them after `base_model.model.`.
    pub fn adapters(&self) -> Vec<(String, Tensor)> {
        let adapters = self.parameters.iter().filter(|(name, _)| name.contains(".lora_"));
        adapters.map(|(name, parameter)| (name.clone(), parameter.value().clone())).collect()
    }

    /// The tensors of the dense layers after pooling, by their folders' names.
    pub fn dense(&self) -> Vec<(String, Tensor)> {
        let of_dense = |name: &str| {
            self.folder
                .dense
                .iter()
                .any(|dense| name.strip_prefix(&dense.name).is_some_and(|rest| rest.starts_with('.')))
        };
        let dense = self.parameters.iter().filter(|(name, _)| of_dense(name));
        dense.map(|(name, parameter)| (name.clone(), parameter.value().clone())).collect()
    }

    /// Every tensor of the whole model by its name in the checkpoint, adapters merged into their weights.
    pub fn tensors(&mut self) -> Result<Vec<(String, Tensor)>> {
        let merged: Vec<(String, Tensor)> = self
            .encoder
            .linears()
            .into_iter()
            .filter(|(_, linear)| linear.adapter().is_some())
            .map(|(name, linear)| Ok((format!("{name}.weight"), linear.merged()?)))
            .collect::<Result<_>>()?;
        let own = self.parameters.iter().filter(|(name, _)| !name.contains(".lora_"));
        let mut all: Vec<(String, Tensor)> = own
            .map(|(name, parameter)| {
                let merged = merged.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor);
                (name.clone(), merged.unwrap_or(parameter.value()).clone())
            })
            .collect();
        for (name, tensor) in &self.passthrough {
            all.push((name.clone(), tensor.to_dtype(DType::F32)?));
        }
        Ok(all)
    }

    /// Replaces the trained parameters by those of a checkpoint's parameters.safetensors.
    pub fn load_parameters(&self, path: &Path) -> Result<()> {
        self.flat.read(self.flat.values(), path, "")
    }
}

/// The longest text, in tokens, that a run with this configuration encodes.
fn longest(folder: &Folder, model: &config::Model, settings: &Settings) -> Result<usize> {
    let positions = settings.size("max_position_embeddings")?;
    let default = folder.max_length.unwrap_or(positions).min(positions);
    let query = model.max_query_length.unwrap_or(default);
    Ok(query.max(model.max_document_length.unwrap_or(default)))
}
