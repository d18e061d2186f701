//! The model's parameters, and the one flat buffer in which the trained ones live.
//!
//! Trained parameters are views of a single f32 tensor, their gradients of a second one at the same places, the
//! optimizer's moments of a third and a fourth: one all-reduce, one norm, one AdamW kernel, one file each in a checkpoint.

use std::fmt;
use std::mem;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use kernels::adamw;
use kernels::precision::{self, Precision};

use crate::{Error, Result};

/// One named tensor of the model. Cloning shares the storage.
#[derive(Clone, Debug)]
pub struct Parameter {
    value: Tensor,
    slot: Option<Range<usize>>,
    rounded: bool,
}

impl Parameter {
    /// A parameter that is not trained, until [`Flat::adopt`] says otherwise.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, slot: None, rounded: false }
    }

    /// Rounds a parameter that is not trained, whose values nobody changes.
    pub fn round(&mut self, precision: Precision) -> Result<()> {
        if self.slot.is_none() {
            self.value = precision::round(self.value.clone(), precision)?;
            self.rounded = true;
        }
        Ok(())
    }

    /// Whether its elements are in the precision that the model computes in.
    pub fn is_rounded(&self) -> bool {
        self.rounded
    }

    /// Its elements; of a trained parameter, a view of [`Flat::values`].
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Some of its rows, as a parameter of their own: the same memory.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let width = self.value.elem_count() / self.value.dim(0)?.max(1);
        let slot =
            self.slot.as_ref().map(|slot| slot.start + rows.start * width..slot.start + rows.end * width);
        Ok(Self { value: self.value.narrow(0, rows.start, rows.len())?, slot, rounded: self.rounded })
    }

    /// Its place in the flat buffer, if it is trained.
    pub fn slot(&self) -> Option<&Range<usize>> {
        self.slot.as_ref()
    }
}

/// Walks over the parameters of a module in a fixed order, by their names in the checkpoint.
pub trait Visit {
    /// Called with the full name of each parameter.
    fn parameter(&mut self, name: &str, parameter: &mut Parameter) -> Result<()>;
}

impl<F: FnMut(&str, &mut Parameter) -> Result<()>> Visit for F {
    fn parameter(&mut self, name: &str, parameter: &mut Parameter) -> Result<()> {
        self(name, parameter)
    }
}

/// One trained parameter's name and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements in the flat buffer.
    pub slot: Range<usize>,
}

/// All trained parameters, end to end: first those that weight decay applies to, then the others.
#[derive(Clone, Debug)]
pub struct Flat {
    values: Tensor, // (P)
    entries: Vec<Entry>,
    decayed: usize,
}

impl Flat {
    /// Moves the parameters for which `trained` answers true into one buffer. `walk` must visit the same parameters in
    /// the same order each time it is called.
    ///
    /// Weight decay applies to matrices and not to vectors, which are the biases and the norms.
    pub fn adopt(
        mut walk: impl FnMut(&mut dyn Visit) -> Result<()>,
        trained: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let (mut matrices, mut vectors) = (Vec::new(), Vec::new());
        let mut device = None;
        walk(&mut |name: &str, parameter: &mut Parameter| {
            // Adapters come after weights, from the CPU.
            let device = device.get_or_insert_with(|| parameter.value.device().clone());
            parameter.value = parameter.value.to_device(device)?;
            if trained(name) {
                let shape = parameter.value.dims().to_vec();
                if shape.len() > 1 { &mut matrices } else { &mut vectors }.push((name.to_owned(), shape));
            }
            Ok(())
        })?;
        let decayed = matrices.len();
        let mut end = 0;
        let entries: Vec<Entry> = matrices
            .into_iter()
            .chain(vectors)
            .map(|(name, shape)| {
                let start = end;
                end += shape.iter().product::<usize>();
                Entry { name, shape, slot: start..end }
            })
            .collect();
        let decayed = entries[..decayed].last().map_or(0, |entry| entry.slot.end);
        let device = device.filter(|_| end > 0).unwrap_or(Device::Cpu);
        let values = Tensor::zeros(end, DType::F32, &device)?;
        walk(&mut |name: &str, parameter: &mut Parameter| {
            if let Some(entry) = entries.iter().find(|entry| entry.name == name) {
                let view = view(&values, &entry.slot)?;
                view.slice_set(&parameter.value.flatten_all()?, 0, 0)?;
                // The original is dropped here, one at a time, so that no second copy of the model builds up.
                *parameter = Parameter {
                    value: view.reshape(entry.shape.as_slice())?,
                    slot: Some(entry.slot.clone()),
                    rounded: false,
                };
            }
            Ok(())
        })?;
        Ok(Self { values, entries, decayed })
    }

    /// (P) every trained element.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// P.
    pub fn len(&self) -> usize {
        self.values.elem_count()
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first so many elements are subject to weight decay.
    pub fn decayed(&self) -> usize {
        self.decayed
    }

    /// Names, shapes and places, in the order of the buffer.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// A zeroed buffer of the same layout: gradients, or a moment of the optimizer.
    pub fn zeros(&self) -> Result<Tensor> {
        Ok(self.values.zeros_like()?)
    }

    /// The parts of a buffer of this layout, by name.
    pub fn named<'a>(&'a self, buffer: &'a Tensor) -> impl Iterator<Item = Result<(String, Tensor)>> + 'a {
        self.entries.iter().map(move |entry| {
            Ok((entry.name.clone(), view(buffer, &entry.slot)?.reshape(entry.shape.as_slice())?))
        })
    }

    /// Fills a buffer of this layout from the tensors `{prefix}{name}` of a safetensors file, which must have them all.
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

/// Where the backward pass adds the gradients of trained parameters.
///
/// Nothing waits for the gradient of a weight, so on a CPU its product is put off and runs beside the next layer's backward pass:
/// threads that would wait for one another in the chain of dx have it to do.
pub struct Gradients {
    flat: Tensor, // (P)
    pending: Mutex<Vec<Task>>,
}

type Task = Box<dyn FnOnce() -> Result<()> + Send>;

impl Gradients {
    /// All zero.
    pub fn zeros(flat: &Flat) -> Result<Self> {
        Ok(Self::of_values(flat.zeros()?))
    }

    /// Of these values (P).
    pub(crate) fn of_values(flat: Tensor) -> Self {
        Self { flat, pending: Mutex::default() }
    }

    /// (P), in the order of [`Flat`].
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Forgets the last step's.
    pub fn clear(&self) -> Result<()> {
        Ok(adamw::clear(&self.flat)?)
    }

    /// Multiplies all by `factor` (1).
    pub fn scale(&self, factor: &Tensor) -> Result<()> {
        Ok(self.flat.slice_set(&self.flat.broadcast_mul(factor)?, 0, 0)?)
    }

    /// The place for one parameter's gradient, in its shape; none if it is frozen.
    pub fn of(&self, parameter: &Parameter) -> Result<Option<Tensor>> {
        match &parameter.slot {
            Some(slot) => Ok(Some(view(&self.flat, slot)?.reshape(parameter.value.shape())?)),
            None => Ok(None),
        }
    }

    /// As [`Self::of`], for an op in the chain of dx: on a CPU zeros of its own, added later, because who adds to the buffer keeps
    /// it from all others meanwhile.
    pub fn aside(&self, parameter: &Parameter) -> Result<Option<Tensor>> {
        let Some(place) = self.of(parameter)? else { return Ok(None) };
        if kernels::on_gpu(place.device()) {
            return Ok(Some(place));
        }
        let values = place.zeros_like()?;
        let added = values.clone();
        self.later(move || Ok(place.slice_set(&(&place + added)?, 0, 0)?))?;
        Ok(Some(values))
    }

    /// Runs `task`, which adds to some of these places, at the latest in [`Self::settle`]; what it reads must not change until
    /// then. A GPU has a queue of its own.
    pub fn later(&self, task: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        if kernels::on_gpu(self.flat.device()) {
            return task();
        }
        self.tasks().push(Box::new(task));
        Ok(())
    }

    /// Runs `work`, and beside it what was put off before.
    pub fn beside<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let tasks = mem::take(&mut *self.tasks());
        if tasks.is_empty() {
            return work();
        }
        let (result, done) = rayon::join(work, || tasks.into_iter().try_for_each(|task| task()));
        done?;
        result
    }

    /// Runs what was put off.
    pub fn settle(&self) -> Result<()> {
        self.beside(|| Ok(()))
    }

    fn tasks(&self) -> MutexGuard<'_, Vec<Task>> {
        // A list is whole whatever happened to who held it.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
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
    use super::*;

    fn parameters() -> Vec<(&'static str, Parameter)> {
        let tensor = |values: &[f32], shape: &[usize]| {
            Parameter::frozen(Tensor::from_slice(values, shape, &Device::Cpu).unwrap())
        };
        vec![
            ("a.bias", tensor(&[1.0, 2.0], &[2])),
            ("a.weight", tensor(&[3.0, 4.0, 5.0, 6.0], &[2, 2])),
            ("b.weight", tensor(&[7.0, 8.0], &[1, 2])),
        ]
    }

    fn adopt(all: &mut [(&'static str, Parameter)], trained: &[&str]) -> Flat {
        let walk = |visit: &mut dyn Visit| all.iter_mut().try_for_each(|(name, p)| visit.parameter(name, p));
        Flat::adopt(walk, |name| trained.contains(&name)).unwrap()
    }

    #[test]
    fn matrices_come_first_and_only_they_decay() {
        let mut all = parameters();
        let flat = adopt(&mut all, &["a.bias", "a.weight"]);
        assert_eq!(flat.values().to_vec1::<f32>().unwrap(), [3.0, 4.0, 5.0, 6.0, 1.0, 2.0]);
        assert_eq!(flat.decayed(), 4);
        assert_eq!(all[0].1.slot(), Some(&(4..6)));
        assert_eq!(all[2].1.slot(), None);
    }

    #[test]
    fn a_trained_parameter_sees_what_happens_to_the_flat_buffer() {
        let mut all = parameters();
        let flat = adopt(&mut all, &["a.weight", "b.weight"]);
        flat.values().one_set().unwrap();
        assert_eq!(all[1].1.value().to_vec2::<f32>().unwrap(), [[1.0, 1.0], [1.0, 1.0]]);
        assert_eq!(all[0].1.value().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        let gradients = Gradients::zeros(&flat).unwrap();
        gradients.of(&all[2].1).unwrap().unwrap().one_set().unwrap();
        assert_eq!(gradients.flat().to_vec1::<f32>().unwrap(), [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
        assert!(gradients.of(&all[0].1).unwrap().is_none());
    }

    #[test]
    fn reading_refuses_another_shape_and_a_missing_name() {
        let mut all = parameters();
        let flat = adopt(&mut all, &["b.weight"]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let wrong = Tensor::zeros((2, 1), DType::F32, &Device::Cpu).unwrap();
        wrong.save_safetensors("m.b.weight", &path).unwrap();
        let message = |prefix| flat.read(flat.values(), &path, prefix).unwrap_err().to_string();
        assert!(message("m.").contains("`m.b.weight` has the shape [2, 1], the model's is [1, 2]"));
        assert!(message("").contains("lacks the tensor `b.weight`"));
    }
}
