//! The model's parameters, and the one flat buffer that holds the trained ones.
//!
//! Trained parameters are views of one f32 tensor. Their gradients lie at the same places of a second one,
//! the moments of the optimizer in a third and a fourth. So there is one all-reduce, one gradient norm, one
//! AdamW kernel, and one file of each in a checkpoint.

use std::fmt;
use std::mem;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use kernels::adamw;
use kernels::precision::{self, Precision};

use crate::{Error, Result};

/// What a parameter is to the model. Weight decay, `model.freeze` and LoRA choose parameters by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// Table of embeddings of tokens, positions or token types.
    Embedding,
    /// Weight of a linear layer, or MPNet's table of attention biases.
    Weight,
    /// Bias of a linear layer.
    Bias,
    /// Weight or bias of a layer norm or an RMS norm.
    Norm,
    /// A or B of a LoRA adapter.
    Lora,
}

impl ParameterKind {
    /// Whether weight decay applies: to all parameters but biases and norms.
    pub fn decays(self) -> bool {
        !matches!(self, Self::Bias | Self::Norm)
    }
}

/// One tensor of the model. Cloning shares the storage.
#[derive(Clone, Debug)]
pub struct Parameter {
    value: Tensor,
    kind: ParameterKind,
    slot: Option<Range<usize>>,
    rounded: bool,
}

impl Parameter {
    /// Makes a parameter, which is frozen until [`FlatParameters::flatten`] takes it.
    pub fn new(value: Tensor, kind: ParameterKind) -> Self {
        Self { value, kind, slot: None, rounded: false }
    }

    /// Rounds the value of a frozen parameter, once for all passes.
    pub fn round(&mut self, precision: Precision) -> Result<()> {
        if self.slot.is_none() {
            self.value = precision::round(self.value.clone(), precision)?;
            self.rounded = true;
        }
        Ok(())
    }

    /// Whether [`Self::round`] has rounded the value.
    pub fn is_rounded(&self) -> bool {
        self.rounded
    }

    /// The value; of a trained parameter, a view of [`FlatParameters::values`].
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// What the parameter is to the model.
    pub fn kind(&self) -> ParameterKind {
        self.kind
    }

    /// Some of the rows as a parameter that shares the memory.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let width = self.value.elem_count() / self.value.dim(0)?.max(1);
        let slot =
            self.slot.as_ref().map(|slot| slot.start + rows.start * width..slot.start + rows.end * width);
        Ok(Self { value: self.value.narrow(0, rows.start, rows.len())?, slot, ..self.clone() })
    }

    /// Elements of the flat buffer that a trained parameter takes; `None` if it is frozen.
    pub fn slot(&self) -> Option<&Range<usize>> {
        self.slot.as_ref()
    }

    /// Whether the parameter is trained.
    pub fn is_trained(&self) -> bool {
        self.slot.is_some()
    }
}

/// Function that visits the parameters of a module in a fixed order, with their names in the checkpoint.
pub trait ParameterVisitor {
    /// Visits one parameter.
    fn parameter(&mut self, name: &str, parameter: &mut Parameter) -> Result<()>;
}

impl<F: FnMut(&str, &mut Parameter) -> Result<()>> ParameterVisitor for F {
    fn parameter(&mut self, name: &str, parameter: &mut Parameter) -> Result<()> {
        self(name, parameter)
    }
}

/// Name, shape and slot of one trained parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape of the parameter.
    pub shape: Vec<usize>,
    /// Elements of the flat buffer that it takes.
    pub slot: Range<usize>,
}

/// All trained parameters in one buffer: first those that weight decay applies to, then the others.
///
/// ```
/// use trainer::eval::embed::LoadedModel;
/// use trainer::model::Options;
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert");
/// let loaded = LoadedModel::open(folder, &Options { trained: true, ..Options::default() })?;
/// let parameters = loaded.model.flat();
/// let elements: usize = parameters.entries().iter().map(|entry| entry.slot.len()).sum();
/// assert_eq!(elements, parameters.len());
/// # Ok::<(), trainer::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FlatParameters {
    values: Tensor, // (P)
    entries: Vec<Entry>,
    decayed: usize,
}

impl FlatParameters {
    /// Moves the parameters whose kind `trained` accepts into one buffer, on the device of the first
    /// parameter. `walk` visits all parameters, in the same order each time.
    pub fn flatten(
        mut walk: impl FnMut(&mut dyn ParameterVisitor) -> Result<()>,
        trained: impl Fn(ParameterKind) -> bool,
    ) -> Result<Self> {
        let (mut decayed, mut others) = (Vec::new(), Vec::new());
        let mut device = None;
        walk(&mut |name: &str, parameter: &mut Parameter| {
            // Adapters are made on the CPU, after the weights.
            let device = device.get_or_insert_with(|| parameter.value.device().clone());
            parameter.value = parameter.value.to_device(device)?;
            if trained(parameter.kind) {
                let group = if parameter.kind.decays() { &mut decayed } else { &mut others };
                group.push((name.to_owned(), parameter.value.dims().to_vec()));
            }
            Ok(())
        })?;
        let decayed_entries = decayed.len();
        let mut end = 0;
        let entries: Vec<Entry> = decayed
            .into_iter()
            .chain(others)
            .map(|(name, shape)| {
                let start = end;
                end += shape.iter().product::<usize>();
                Entry { name, shape, slot: start..end }
            })
            .collect();
        let decayed = entries[..decayed_entries].last().map_or(0, |entry| entry.slot.end);
        let device = device.filter(|_| end > 0).unwrap_or(Device::Cpu);
        let values = Tensor::zeros(end, DType::F32, &device)?;
        walk(&mut |name: &str, parameter: &mut Parameter| {
            if let Some(entry) = entries.iter().find(|entry| entry.name == name) {
                let view = view(&values, &entry.slot)?;
                view.slice_set(&parameter.value.flatten_all()?, 0, 0)?;
                // Each original is dropped at once, so that there is never a second copy of the whole model.
                *parameter = Parameter {
                    value: view.reshape(entry.shape.as_slice())?,
                    kind: parameter.kind,
                    slot: Some(entry.slot.clone()),
                    rounded: false,
                };
            }
            Ok(())
        })?;
        Ok(Self { values, entries, decayed })
    }

    /// The buffer, f32 (P).
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// P: number of trained elements.
    pub fn len(&self) -> usize {
        self.values.elem_count()
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of elements that weight decay applies to. They are the first ones of the buffer.
    pub fn decayed(&self) -> usize {
        self.decayed
    }

    /// Names, shapes and slots, in the order of the buffer.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Makes a zeroed buffer of the same layout, for gradients or for a moment of the optimizer.
    pub fn zeros(&self) -> Result<Tensor> {
        Ok(self.values.zeros_like()?)
    }

    /// Names and views of the parameters in a buffer of this layout.
    pub fn named<'a>(&'a self, buffer: &'a Tensor) -> impl Iterator<Item = Result<(String, Tensor)>> + 'a {
        self.entries.iter().map(move |entry| {
            Ok((entry.name.clone(), view(buffer, &entry.slot)?.reshape(entry.shape.as_slice())?))
        })
    }

    /// Fills a buffer of this layout from the tensors `{prefix}{name}` of the safetensors file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, lacks a tensor, or has one of another shape.
    pub fn read(&self, buffer: &Tensor, path: &Path, prefix: &str) -> Result<()> {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)
            .map_err(|error| Error::file(path, format!("cannot be read as safetensors: {error}")))?;
        for entry in &self.entries {
            let name = format!("{prefix}{}", entry.name);
            let tensor =
                tensors.get(&name).ok_or_else(|| Error::file(path, format!("lacks the tensor `{name}`")))?;
            if tensor.dims() != entry.shape {
                return Err(Error::file(
                    path,
                    format!("`{name}` has the shape {:?}, the model's is {:?}", tensor.dims(), entry.shape),
                ));
            }
            view(buffer, &entry.slot)?.slice_set(
                &tensor.to_dtype(DType::F32)?.flatten_all()?.to_device(buffer.device())?,
                0,
                0,
            )?;
        }
        Ok(())
    }
}

/// Gradients of the trained parameters, in one buffer, and the tasks that still add to it.
///
/// No op waits for the gradient of a weight. On a CPU its matrix product is therefore deferred and runs in
/// parallel with the backward pass of the next layer ([`Self::defer`], [`Self::run_with_deferred`]): threads
/// that are idle at the end of an op work on it. Tasks that add to one parameter run in the order in which
/// they were deferred, so the result has the same bits in each run.
pub struct Gradients {
    flat: Tensor, // (P)
    deferred: Mutex<Vec<Task>>,
}

type Task = Box<dyn FnOnce() -> Result<()> + Send>;

impl Gradients {
    /// Makes gradients that are zero.
    pub fn zeros(flat: &FlatParameters) -> Result<Self> {
        Ok(Self::from_values(flat.zeros()?))
    }

    /// Makes gradients with these values (P).
    pub(crate) fn from_values(flat: Tensor) -> Self {
        Self { flat, deferred: Mutex::default() }
    }

    /// The buffer (P), in the order of [`FlatParameters`].
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Sets all gradients to zero.
    pub fn clear(&self) -> Result<()> {
        Ok(adamw::zero(&self.flat)?)
    }

    /// Multiplies all gradients by `factor` (1).
    pub fn scale(&self, factor: &Tensor) -> Result<()> {
        Ok(self.flat.slice_set(&self.flat.broadcast_mul(factor)?, 0, 0)?)
    }

    /// View of the buffer that one parameter's gradient is added to, in the parameter's shape; `None` if it
    /// is frozen.
    pub fn grad_slot(&self, parameter: &Parameter) -> Result<Option<Tensor>> {
        match &parameter.slot {
            Some(slot) => Ok(Some(view(&self.flat, slot)?.reshape(parameter.value.shape())?)),
            None => Ok(None),
        }
    }

    /// Like [`Self::grad_slot`], but on a CPU returns a scratch tensor of zeros that is added to the buffer
    /// later, so that the op does not hold the buffer's lock.
    pub fn scratch_grad(&self, parameter: &Parameter) -> Result<Option<Tensor>> {
        let Some(slot) = self.grad_slot(parameter)? else { return Ok(None) };
        if kernels::on_gpu(slot.device()) {
            return Ok(Some(slot));
        }
        let scratch = slot.zeros_like()?;
        let added = scratch.clone();
        self.defer(move || Ok(slot.slice_set(&(&slot + added)?, 0, 0)?))?;
        Ok(Some(scratch))
    }

    /// Defers `task`, which adds to some slots of the buffer, until [`Self::run_with_deferred`] or
    /// [`Self::flush`]. The tensors that it reads must not change until then. On a GPU the task runs at once,
    /// because the device queues work itself.
    pub fn defer(&self, task: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        if kernels::on_gpu(self.flat.device()) {
            return task();
        }
        self.tasks().push(Box::new(task));
        Ok(())
    }

    /// Runs `work` in parallel with the tasks that were deferred before.
    pub fn run_with_deferred<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let tasks = mem::take(&mut *self.tasks());
        if tasks.is_empty() {
            return work();
        }
        let (result, done) = rayon::join(work, || tasks.into_iter().try_for_each(|task| task()));
        done?;
        result
    }

    /// Runs all deferred tasks. The gradients are complete afterwards.
    pub fn flush(&self) -> Result<()> {
        self.run_with_deferred(|| Ok(()))
    }

    fn tasks(&self) -> MutexGuard<'_, Vec<Task>> {
        // A list of tasks stays valid when a thread panics while it holds the lock.
        self.deferred.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Gradients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gradients").field("flat", &self.flat).finish_non_exhaustive()
    }
}

fn view(buffer: &Tensor, slot: &Range<usize>) -> Result<Tensor> {
    Ok(buffer.narrow(0, slot.start, slot.len())?)
}

#[cfg(test)]
mod tests {
    use super::ParameterKind::{Bias, Embedding, Weight};
    use super::*;

    fn parameters() -> Vec<(&'static str, Parameter)> {
        let parameter = |kind, values: &[f32], shape: &[usize]| {
            Parameter::new(Tensor::from_slice(values, shape, &Device::Cpu).unwrap(), kind)
        };
        vec![
            ("a.bias", parameter(Bias, &[1.0, 2.0], &[2])),
            ("a.weight", parameter(Weight, &[3.0, 4.0, 5.0, 6.0], &[2, 2])),
            ("b.weight", parameter(Embedding, &[7.0, 8.0], &[1, 2])),
        ]
    }

    fn flatten(all: &mut [(&'static str, Parameter)], trained: &[ParameterKind]) -> FlatParameters {
        let walk = |visit: &mut dyn ParameterVisitor| {
            all.iter_mut().try_for_each(|(name, p)| visit.parameter(name, p))
        };
        FlatParameters::flatten(walk, |kind| trained.contains(&kind)).unwrap()
    }

    #[test]
    fn parameters_that_decay_come_first() {
        let mut all = parameters();
        let flat = flatten(&mut all, &[Bias, Weight]);
        assert_eq!(flat.values().to_vec1::<f32>().unwrap(), [3.0, 4.0, 5.0, 6.0, 1.0, 2.0]);
        assert_eq!(flat.decayed(), 4);
        assert_eq!(all[0].1.slot(), Some(&(4..6)));
        assert_eq!(all[2].1.slot(), None);
    }

    #[test]
    fn a_trained_parameter_sees_what_happens_to_the_flat_buffer() {
        let mut all = parameters();
        let flat = flatten(&mut all, &[Weight, Embedding]);
        flat.values().one_set().unwrap();
        assert_eq!(all[1].1.value().to_vec2::<f32>().unwrap(), [[1.0, 1.0], [1.0, 1.0]]);
        assert_eq!(all[0].1.value().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        let gradients = Gradients::zeros(&flat).unwrap();
        gradients.grad_slot(&all[2].1).unwrap().unwrap().one_set().unwrap();
        assert_eq!(gradients.flat().to_vec1::<f32>().unwrap(), [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
        assert!(gradients.grad_slot(&all[0].1).unwrap().is_none());
    }

    #[test]
    fn reading_refuses_another_shape_and_a_missing_name() {
        let mut all = parameters();
        let flat = flatten(&mut all, &[Embedding]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let wrong = Tensor::zeros((2, 1), DType::F32, &Device::Cpu).unwrap();
        wrong.save_safetensors("m.b.weight", &path).unwrap();
        let message = |prefix| flat.read(flat.values(), &path, prefix).unwrap_err().to_string();
        assert!(message("m.").contains("`m.b.weight` has the shape [2, 1], the model's is [1, 2]"));
        assert!(message("").contains("lacks the tensor `b.weight`"));
    }
}
