//! The embedding model: token ids go in, embeddings come out, and gradients go back.
//!
//! The backward pass of the encoders is written by hand: a layer's `forward` returns a tape, which its
//! `backward`, in the same file, takes. Frozen parameters get no gradient, and nothing is computed for them.

// Files of a model.
pub mod config_json;
pub mod mapped_safetensors;
pub mod weights;
pub mod peft;
pub mod folder;
// What all layers share.
pub mod params;
pub mod pass;
pub mod rope;
// Layers.
pub mod linear;
pub mod norms;
pub mod relative_bias;
pub mod head;
// Encoder stacks.
pub mod encoder;
pub mod bert;
pub mod modernbert;
pub mod decoder;
pub mod architecture;
// Models on the hub, and adapters.
pub mod locate;
pub mod lora;
// Parts of a batch.
pub mod chunk;
mod digest;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use kernels::precision::Precision;

use self::chunk::{Chunk, Limit};
use self::config_json::ConfigJson;
use self::encoder::Encoder;
pub use self::folder::ModelFolder;
use self::head::Head;
use self::params::{FlatParameters, Gradients, Parameter, ParameterKind};
use self::pass::{DropoutKey, Pass, Saved};
use self::peft::LoraConfig;
use self::weights::Weights;
use crate::config::{self, Freeze, Pooling};
use crate::data::batch::Sequence;
use crate::data::tokenize::Tokenizer;
use crate::system::device;
use crate::{Error, Result};

/// Embedding model: an encoder, pooling, optional dense layers and adapters.
#[derive(Debug)]
pub struct Model {
    encoder: Box<dyn Encoder>,
    head: Head,
    folder: ModelFolder,
    pooling: Pooling,
    normalize: bool,
    precision: Precision,
    encoder_parameters: NamedParameters,
    head_parameters: NamedParameters,
    flat: FlatParameters,
    /// Tensors that the encoder does not use but an export keeps, such as BERT's pooler.
    passthrough: Vec<(String, Tensor)>,
    lora: Option<LoraConfig>,
}

type NamedParameters = Vec<(String, Parameter)>;

/// Activations of one chunk that the backward pass needs.
#[derive(Debug)]
pub struct Tape {
    encoder: encoder::Tape,
    head: head::Tape,
}

/// Options of [`Model::open`]. The default opens a model for inference.
#[derive(Clone, Debug, Default)]
pub struct Options<'a> {
    /// Section `model` of the configuration.
    pub model: config::Model,
    /// Section `lora` of the configuration: adapters to train. Without it, the whole model is trained.
    pub lora: Option<&'a config::Lora>,
    /// Whether any parameter is trained.
    pub trained: bool,
    /// Seed of random weights and of new adapters.
    pub seed: u64,
    /// Whether only names and shapes are checked, and no weight is read.
    pub shapes_only: bool,
}

impl Model {
    /// Opens the model of a parsed folder.
    ///
    /// # Errors
    /// The architecture or a setting is not supported; weights are missing or of the wrong shape; the
    /// adapters do not fit.
    pub fn open(folder: ModelFolder, options: &Options) -> Result<Self> {
        #[cfg(feature = "cuda")]
        candle_core::cuda::set_gemm_reduced_precision_f32(options.model.tf32);
        let json = ConfigJson::new(&folder.path, folder.config.clone());
        let config = architecture::read_config(&json, options.model.dropout.map(|p| p as f32))?;
        let open_weights = |place: &Path, name: &str, anchor: &str| {
            let weights = match options.model.init {
                config::WeightInit::Pretrained => Weights::open(place, anchor)?,
                config::WeightInit::Random => {
                    Weights::random(options.seed, json.number("initializer_range", 0.02)?, name)
                }
            };
            Ok(if options.shapes_only { weights.shapes_only() } else { weights })
        };
        let weights = open_weights(&folder.weights, "", config.anchor())?;
        let passthrough = config.passthrough().map(|prefix| weights.passthrough(prefix)).transpose()?;
        let default_pooling = config.default_pooling();
        let max_length = max_length(&options.model, folder.max_length_within(config.sizes().max_positions));
        let mut encoder = config.build(&weights, max_length)?;
        drop(weights);
        check_dense(&folder, encoder.config().sizes().hidden_size)?;
        let normalize = options.model.normalize.or(folder.normalize).unwrap_or(true);
        let mut head = Head::new(&folder.dense, normalize, |module| {
            open_weights(&module.path, &module.name, "linear.weight")
        })?;

        let lora = lora::add(encoder.as_mut(), &folder, options.lora, options.seed)?;
        if lora.is_some() && !options.model.freeze.is_empty() {
            let message =
                "model.freeze: the model has adapters, so all other parameters are frozen: leave it out";
            return Err(Error::Usage(message.to_owned()));
        }
        let is_trained = |kind| {
            options.trained
                && match lora {
                    Some(_) => kind == ParameterKind::Lora,
                    None => !options.model.freeze.iter().any(|&freeze| freezes(freeze, kind)),
                }
        };
        let flat = FlatParameters::flatten(
            |visitor| encoder.visit(visitor).and_then(|()| head.visit(visitor)),
            is_trained,
        )?;

        let precision = options.model.dtype.precision();
        // If the whole model is trained and exported, frozen parameters keep all their digits.
        let exported_whole = options.trained && lora.is_none();
        if precision != Precision::F32 && !options.shapes_only && !exported_whole {
            let mut round = |_: &str, parameter: &mut Parameter| parameter.round(precision);
            encoder.visit(&mut round)?;
            head.visit(&mut round)?;
        }
        let (mut encoder_parameters, mut head_parameters) = (Vec::new(), Vec::new());
        encoder.visit(&mut collect(&mut encoder_parameters))?;
        head.visit(&mut collect(&mut head_parameters))?;
        Ok(Self {
            pooling: options.model.pooling.or(folder.pooling).unwrap_or(default_pooling),
            normalize,
            precision,
            encoder,
            head,
            folder,
            encoder_parameters,
            head_parameters,
            flat,
            passthrough: passthrough.unwrap_or_default(),
            lora,
        })
    }

    /// Maps a chunk to its embeddings, f32 (N, D), and to the tape that `save` asks for. Without
    /// `dropout_key` nothing is dropped.
    pub fn forward(
        &self,
        chunk: &Chunk,
        dropout_key: Option<DropoutKey>,
        save: Saved,
    ) -> Result<(Tensor, Option<Tape>)> {
        let pass = self.pass(chunk, dropout_key);
        let (x, tape) = self.encoder.forward(&self.to_model_device(&chunk.ids)?, &pass, save)?; // (T, D)
        let (embeddings, head) = self.head.forward(&x, &chunk.spans, &pass)?;
        Ok((embeddings, tape.map(|encoder| Tape { encoder, head })))
    }

    /// Maps a chunk to the encoder's last hidden states (T, D), without dropout.
    pub fn hidden_states(&self, chunk: &Chunk) -> Result<Tensor> {
        let pass = self.pass(chunk, None);
        Ok(self.encoder.forward(&self.to_model_device(&chunk.ids)?, &pass, Saved::None)?.0)
    }

    /// Recomputes the tape of a chunk that was encoded without one.
    pub fn recompute(&self, chunk: &Chunk, dropout_key: Option<DropoutKey>) -> Result<Tape> {
        match self.forward(chunk, dropout_key, Saved::All)? {
            (_, Some(tape)) => Ok(tape),
            (_, None) => {
                Err(Error::Bug("a forward pass that saves all activations returned no tape".to_owned()))
            }
        }
    }

    /// Adds the gradients of all trained parameters, given those of the embeddings: d (N, D).
    pub fn backward(
        &self,
        chunk: &Chunk,
        tape: Tape,
        d: &Tensor,
        dropout_key: Option<DropoutKey>,
        gradients: &Gradients,
    ) -> Result<()> {
        let pass = self.pass(chunk, dropout_key);
        let Tape { encoder, head } = tape;
        let tokens = chunk.packing.tokens();
        let dx = pass.round(self.head.backward(head, d, &chunk.spans, tokens, &pass, gradients)?)?; // (T, D)
        self.encoder.backward(&self.to_model_device(&chunk.ids)?, encoder, dx, &pass, gradients)?;
        gradients.flush()
    }

    /// Copies ids to the device of the parameters.
    fn to_model_device(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(match self.parameters().next().map(|(_, parameter)| parameter.value().device()) {
            Some(device) if !device.is_cpu() => kernels::upload(&ids.to_vec1::<u32>()?, device)?,
            _ => ids.clone(),
        })
    }

    /// Maps sequences to their embeddings, f32 (N, D), in the given order and without dropout.
    pub fn embed(&self, sequences: &[Sequence], chunk_tokens: usize) -> Result<Tensor> {
        let dim = self.embedding_dim();
        let mut all = vec![0f32; sequences.len() * dim];
        let members: Vec<usize> = (0..sequences.len()).collect();
        for cut in chunk::cut(sequences, &members, Limit::Tokens(chunk_tokens)) {
            let chunk = Chunk::pack(sequences, cut, self.pooling)?;
            let (embeddings, _) = self.forward(&chunk, None, Saved::None)?;
            for (&member, row) in chunk.members.iter().zip(embeddings.to_vec2::<f32>()?) {
                all[member * dim..][..dim].copy_from_slice(&row);
            }
        }
        Ok(Tensor::from_vec(all, (sequences.len(), dim), &Device::Cpu)?)
    }

    /// Refuses a tokenizer that does not belong to the model.
    ///
    /// # Errors
    /// The tokenizer has more tokens than the table of token embeddings has rows.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        let (tokens, rows) = (tokenizer.vocabulary(), self.encoder.config().sizes().vocab_size);
        if tokens <= rows {
            return Ok(());
        }
        let message = format!(
            "the tokenizer has {tokens} tokens, but the table of token embeddings has {rows} rows\n\
             hint: tokenizer and weights \
             must belong to the same model"
        );
        Err(Error::file(&self.folder.path, message))
    }

    /// Trained parameters.
    pub fn flat(&self) -> &FlatParameters {
        &self.flat
    }

    /// Precision of activations and weights.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    fn pass<'a>(&self, chunk: &'a Chunk, dropout_key: Option<DropoutKey>) -> Pass<'a> {
        Pass { packing: &chunk.packing, dropout_key, precision: self.precision }
    }

    /// The folder that the model was opened from.
    pub fn folder(&self) -> &ModelFolder {
        &self.folder
    }

    /// Pooling of hidden states to one embedding.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Whether embeddings are normalised to length 1.
    pub fn normalize(&self) -> bool {
        self.normalize
    }

    /// LoRA settings, if the model has adapters.
    pub fn lora(&self) -> Option<LoraConfig> {
        self.lora
    }

    /// Number of elements of an embedding: D, unless a dense layer after pooling changes it.
    pub fn embedding_dim(&self) -> usize {
        self.folder.dense.last().map_or(self.hidden_size(), |dense| dense.outputs)
    }

    /// D: number of elements of a hidden state.
    pub fn hidden_size(&self) -> usize {
        self.encoder.config().sizes().hidden_size
    }

    /// Maximum number of tokens of a text: the number of positions of the model.
    pub fn max_positions(&self) -> usize {
        self.encoder.config().sizes().max_positions
    }

    /// Number of tokens at which texts are truncated unless the configuration says otherwise.
    pub fn max_length(&self) -> usize {
        self.folder.max_length_within(self.max_positions())
    }

    /// L: number of layers.
    pub fn layers(&self) -> usize {
        self.encoder.config().sizes().layers
    }

    /// Number of elements of all parameters, trained or frozen.
    pub fn parameter_count(&self) -> usize {
        self.parameters().map(|(_, parameter)| parameter.value().elem_count()).sum()
    }

    /// Bytes that one token takes on a tape.
    pub fn tape_bytes_per_token(&self, save: Saved) -> usize {
        self.encoder.config().saved_floats().total(save) * self.element_bytes()
    }

    /// Bytes of one element of an activation or of a frozen parameter. On a CPU, half precision is stored as
    /// f32.
    pub fn element_bytes(&self) -> usize {
        let on_gpu = device::current().is_ok_and(|device| kernels::on_gpu(&device));
        if on_gpu && self.precision != Precision::F32 { 2 } else { 4 }
    }

    /// Names and tensors of the adapters. The names are PEFT's without the prefix `base_model.model.`.
    pub fn adapter_tensors(&self) -> Vec<(String, Tensor)> {
        let adapters = self.parameters().filter(|(_, parameter)| parameter.kind() == ParameterKind::Lora);
        adapters.map(|(name, parameter)| (name.clone(), parameter.value().clone())).collect()
    }

    /// Names and tensors of the dense layers after pooling. The names begin with that of the module's folder.
    pub fn dense_tensors(&self) -> Vec<(String, Tensor)> {
        let dense = self.head_parameters.iter();
        dense.map(|(name, parameter)| (name.clone(), parameter.value().clone())).collect()
    }

    /// Names and tensors of the whole model, as in the checkpoint, with the adapters merged into their
    /// weights.
    pub fn merged_tensors(&mut self) -> Result<Vec<(String, Tensor)>> {
        let merged: Vec<(String, Tensor)> = self
            .encoder
            .linears()
            .into_iter()
            .filter(|(_, linear)| linear.adapter().is_some())
            .map(|(name, linear)| Ok((format!("{name}.weight"), linear.merged()?)))
            .collect::<Result<_>>()?;
        let weights = self.parameters().filter(|(_, parameter)| parameter.kind() != ParameterKind::Lora);
        let mut all: Vec<(String, Tensor)> = weights
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
    ///
    /// # Errors
    /// The file cannot be read, lacks a parameter, or has one of another shape.
    pub fn load_parameters(&self, path: &Path) -> Result<()> {
        self.flat.read(self.flat.values(), path, "")
    }

    fn parameters(&self) -> impl Iterator<Item = &(String, Parameter)> {
        self.encoder_parameters.iter().chain(&self.head_parameters)
    }
}

/// Maximum number of tokens of a text in a run: the greater of the configured lengths of queries and
/// documents. `default` replaces a length that the configuration omits.
fn max_length(model: &config::Model, default: usize) -> usize {
    model.max_query_length.unwrap_or(default).max(model.max_document_length.unwrap_or(default))
}

/// Whether a value of `model.freeze` freezes parameters of this kind.
fn freezes(freeze: Freeze, kind: ParameterKind) -> bool {
    match freeze {
        Freeze::Embeddings => kind == ParameterKind::Embedding,
        Freeze::Norms => kind == ParameterKind::Norm,
    }
}

/// Refuses a dense layer whose input does not fit the output of what precedes it.
fn check_dense(folder: &ModelFolder, hidden_size: usize) -> Result<()> {
    let mut width = hidden_size;
    for dense in &folder.dense {
        if dense.inputs != width {
            let message = format!("in_features is {}, expected {width}", dense.inputs);
            return Err(Error::file(dense.path.join("config.json"), message));
        }
        width = dense.outputs;
    }
    Ok(())
}

/// Visitor that collects names and parameters.
fn collect(all: &mut NamedParameters) -> impl FnMut(&str, &mut Parameter) -> Result<()> + '_ {
    |name, parameter| {
        all.push((name.to_owned(), parameter.clone()));
        Ok(())
    }
}
