//! The tensors of a model: how they are stored, what they are called outside, their gradients.

use std::collections::HashMap;
use std::ops::{Index, Range};
use std::sync::Arc;

use burn::tensor::{Device, FloatDType, Gradients, Tensor, TensorData};

use crate::error::EngineError;
use crate::ops::bf16::to_bf16;
use crate::ops::linear::Weight;
use crate::ops::quantized::QuantizedMatrix;
use crate::ops::row_linear::RowWeight;

/// A tensor as files and checkpoints know it: Hugging Face's or PEFT's name, f32 values, row major.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// For example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[out, in]` for a projection, `[n]` for a norm.
    pub shape: Vec<usize>,
    /// Values, the last dimension fastest.
    pub data: Vec<f32>,
}

/// Position of a parameter in [`Parameters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ParameterId(usize);

/// One public tensor inside a stored one: a range of its rows.
///
/// The weights of q, k and v are stored as one matrix, so that one GEMM computes all three; as
/// every weight is `[out, in]`, each is a range of rows and keeps its name, values and layout.
#[derive(Debug, Clone)]
pub(crate) struct NamedRows {
    pub(crate) name: String,
    pub(crate) rows: Range<usize>,
    /// The public shape; its product is `rows.len() · columns`.
    pub(crate) shape: Vec<usize>,
}

/// A stored tensor `[rows, columns]`; a vector is stored as one row, so all have one rank.
#[derive(Debug)]
pub(crate) struct Parameter {
    /// With autodiff; a leaf that requires its gradient exactly when `trainable`.
    value: Tensor<2>,
    /// Σ of the gradients since the last update, without autodiff.
    gradient: Option<Tensor<2>>,
    trainable: bool,
    /// Multiplies the learning rate of this parameter's updates.
    learning_rate_factor: f64,
    names: Vec<NamedRows>,
}

/// All tensors of a model, in a fixed order: what every sum over parameters follows.
#[derive(Debug, Default)]
pub(crate) struct Parameters {
    entries: Vec<Parameter>,
    /// Frozen matrices that are kept otherwise than row by row. Their entries hold no values, and no
    /// checkpoint has them: they are made anew from the base model.
    packed: HashMap<ParameterId, Packed>,
    /// Whether products multiply bf16.
    bf16: bool,
}

/// A matrix in a form of its own.
#[derive(Debug, Clone)]
enum Packed {
    /// Quantised.
    Blocks(Arc<QuantizedMatrix>),
    /// Only answers.
    Rows(RowWeight),
}

impl Index<ParameterId> for Parameters {
    type Output = Tensor<2>;

    fn index(&self, id: ParameterId) -> &Tensor<2> {
        &self.entries[id.0].value
    }
}

impl Parameters {
    /// None yet; products will multiply bf16, or else f32.
    pub(crate) fn new(bf16: bool) -> Self {
        Self { entries: Vec::new(), packed: HashMap::new(), bf16 }
    }

    /// Whether products multiply bf16, and what backward passes read is kept in it.
    pub(crate) fn bf16(&self) -> bool {
        self.bf16
    }

    /// A matrix as it is stored. One in a form of its own is made as a whole, where
    /// [`Parameters::projection_weight`] and [`Parameters::row_weight`] leave it as it is.
    pub(crate) fn stored(&self, id: ParameterId) -> Tensor<2> {
        match self.packed.get(&id) {
            Some(Packed::Blocks(blocks)) => {
                let values = TensorData::new(blocks.to_dense(), blocks.dims());
                Tensor::from_data(values, &self[id].device())
            }
            Some(Packed::Rows(weight)) => weight.dense(),
            None => self[id].clone(),
        }
    }

    /// A base model's matrix as products take it: in bf16 where they multiply that. One that trains
    /// is rounded from its f32 values, to which the gradient passes.
    pub(crate) fn weight(&self, id: ParameterId) -> Tensor<2> {
        let value = self.stored(id);
        if self.bf16 { to_bf16(value) } else { value }
    }

    /// The same as a projection takes it.
    pub(crate) fn projection_weight(&self, id: ParameterId) -> Weight {
        match self.packed.get(&id) {
            Some(Packed::Blocks(blocks)) => {
                Weight::Quantized { matrix: Arc::clone(blocks), bf16: self.bf16 }
            }
            _ => self.weight(id).into(),
        }
    }

    /// The same for rows that are generated.
    pub(crate) fn row_weight(&self, id: ParameterId) -> RowWeight {
        match self.packed.get(&id) {
            Some(Packed::Rows(weight)) => weight.clone(),
            _ => self.weight(id).into(),
        }
    }

    /// Keeps a frozen matrix as products of rows read it, and no longer as a tensor.
    pub(crate) fn keep_for_rows(&mut self, id: ParameterId) {
        let placeholder = Tensor::zeros([1, 1], &self[id].device());
        let value = std::mem::replace(&mut self.entries[id.0].value, placeholder);
        self.packed.insert(id, Packed::Rows(RowWeight::kept(value)));
    }

    /// Stores a frozen matrix in blocks, for a model on `device`.
    pub(crate) fn push_blocks(&mut self, blocks: QuantizedMatrix, device: &Device) -> ParameterId {
        let id = self.push(Tensor::zeros([1, 1], device), false, Vec::new());
        self.packed.insert(id, Packed::Blocks(Arc::new(blocks)));
        id
    }

    /// Stores a tensor that carries no autodiff.
    pub(crate) fn push(
        &mut self,
        value: Tensor<2>,
        trainable: bool,
        names: Vec<NamedRows>,
    ) -> ParameterId {
        let value = value.autodiff().set_require_grad(trainable);
        self.entries.push(Parameter {
            value,
            gradient: None,
            trainable,
            learning_rate_factor: 1.0,
            names,
        });
        ParameterId(self.entries.len() - 1)
    }

    /// The public tensors inside a parameter, in the order of their rows.
    pub(crate) fn names(&self, id: ParameterId) -> &[NamedRows] {
        self.entries[id.0].names()
    }

    /// Makes a parameter learn at `factor` times the learning rate of the others.
    pub(crate) fn set_learning_rate_factor(&mut self, id: ParameterId, factor: f64) {
        self.entries[id.0].learning_rate_factor = factor;
    }

    /// The same values as constants: what evaluation and generation run on.
    pub(crate) fn frozen(&self) -> Self {
        let freeze = |entry: &Parameter| Parameter {
            value: entry.value.clone().inner().autodiff(),
            gradient: None,
            trainable: false,
            learning_rate_factor: 1.0,
            names: Vec::new(),
        };
        let entries = self.entries.iter().map(freeze).collect();
        Self { entries, packed: self.packed.clone(), bf16: self.bf16 }
    }

    /// The same parameters on `device`, for a replica of the model: apart in the autodiff graph,
    /// without gradients, and on the same device in the same memory.
    pub(crate) fn replica(&self, device: &Device) -> Self {
        let copy = |entry: &Parameter| Parameter {
            value: entry.leaf_on(device),
            gradient: None,
            trainable: entry.trainable,
            learning_rate_factor: entry.learning_rate_factor,
            names: entry.names.clone(),
        };
        let entries = self.entries.iter().map(copy).collect();
        Self { entries, packed: self.packed.clone(), bf16: self.bf16 }
    }

    /// Adds the gradients of a replica to these, and clears them there.
    pub(crate) fn take_gradients_of(&mut self, replica: &mut Self) {
        for (entry, other) in self.trainable_mut().zip(replica.trainable_mut()) {
            if let Some(new) = other.take_gradient() {
                let new = new.to_device(&entry.value.device().inner());
                entry.add_gradient(new);
            }
        }
    }

    /// Replaces the values of all parameters that train by those of a replica.
    pub(crate) fn take_values_of(&mut self, replica: &Self) {
        for (entry, other) in self.trainable_mut().zip(replica.trainable()) {
            entry.value = other.leaf_on(&entry.value.device().inner());
        }
    }

    /// Every parameter's position.
    #[cfg(test)]
    pub(crate) fn ids(&self) -> impl Iterator<Item = ParameterId> + use<> {
        (0..self.entries.len()).map(ParameterId)
    }

    /// How many numbers are kept.
    #[cfg(test)]
    pub(crate) fn elements(&self) -> usize {
        let kept = self.ids().filter(|id| !self.packed.contains_key(id));
        kept.map(|id| self[id].dims().iter().product::<usize>()).sum()
    }

    /// The parameters that train.
    pub(crate) fn trainable(&self) -> impl Iterator<Item = &Parameter> {
        self.entries.iter().filter(|entry| entry.trainable)
    }

    /// The parameters that train, to be changed.
    pub(crate) fn trainable_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        self.entries.iter_mut().filter(|entry| entry.trainable)
    }

    /// Moves the gradients of a backward pass into the accumulated ones.
    pub(crate) fn accumulate(&mut self, gradients: &mut Gradients) {
        self.accumulate_parts(&mut [gradients]);
    }

    /// As [`Parameters::accumulate`] for one backward pass that was made in parts.
    pub(crate) fn accumulate_parts(&mut self, parts: &mut [&mut Gradients]) {
        for entry in self.trainable_mut() {
            let value = &entry.value;
            let new = parts.iter_mut().filter_map(|part| value.grad_remove(part));
            if let Some(new) = new.reduce(|sum, part| sum + part) {
                entry.add_gradient(new);
            }
        }
    }

    /// The public tensors of all parameters that train.
    pub(crate) fn named(&self) -> Result<Vec<NamedTensor>, EngineError> {
        named(self.trainable())
    }

    /// The public tensors of all parameters, frozen ones among them.
    pub(crate) fn named_all(&self) -> Result<Vec<NamedTensor>, EngineError> {
        named(self.entries.iter())
    }

    /// Whether the public tensor `name` is one of a frozen parameter.
    pub(crate) fn is_frozen(&self, name: &str) -> bool {
        let mut frozen = self.entries.iter().filter(|entry| !entry.trainable);
        frozen.any(|entry| entry.names.iter().any(|named| named.name == name))
    }

    /// Replaces the values of all parameters that train; nothing changes when `tensors` does not
    /// fit.
    pub(crate) fn assign(&mut self, tensors: Vec<NamedTensor>) -> Result<(), EngineError> {
        let mut source = NamedSource::new(tensors)?;
        let values = self
            .trainable()
            .map(|entry| entry.join("", &mut |name, shape| source.take(name, shape)))
            .collect::<Result<Vec<_>, _>>()?;
        source.finish()?;
        for (entry, value) in self.trainable_mut().zip(values) {
            entry.update(|_| value);
        }
        Ok(())
    }
}

impl Parameter {
    /// Rows and columns as stored.
    pub(crate) fn dims(&self) -> [usize; 2] {
        self.value.dims()
    }

    /// The public tensors inside, in the order of their rows.
    pub(crate) fn names(&self) -> &[NamedRows] {
        &self.names
    }

    /// What the learning rate of an update is multiplied by.
    pub(crate) fn learning_rate_factor(&self) -> f64 {
        self.learning_rate_factor
    }

    pub(crate) fn value(&self) -> &Tensor<2> {
        &self.value
    }

    pub(crate) fn gradient(&self) -> Option<&Tensor<2>> {
        self.gradient.as_ref()
    }

    fn add_gradient(&mut self, new: Tensor<2>) {
        self.gradient = Some(match self.gradient.take() {
            Some(sum) => sum + new,
            None => new,
        });
    }

    /// The value on `device`, as a leaf of its own.
    fn leaf_on(&self, device: &Device) -> Tensor<2> {
        let value = self.value.clone().inner().to_device(device);
        value.autodiff().set_require_grad(self.trainable)
    }

    /// Takes the accumulated gradient, leaving none.
    pub(crate) fn take_gradient(&mut self) -> Option<Tensor<2>> {
        self.gradient.take()
    }

    /// Replaces the value by what `update` makes of it. `update` receives it without autodiff and,
    /// as nothing else holds it then, may work in place.
    pub(crate) fn update(&mut self, update: impl FnOnce(Tensor<2>) -> Tensor<2>) {
        // A placeholder of one element stands in while the value is away.
        let placeholder = Tensor::zeros([1, 1], &self.value.device());
        let value = std::mem::replace(&mut self.value, placeholder).inner();
        self.value = update(value).autodiff().set_require_grad(self.trainable);
    }

    /// Appends the public tensors inside `stored`, a tensor of this parameter's shape, each name
    /// behind `prefix`.
    pub(crate) fn split(
        &self,
        stored: &Tensor<2>,
        prefix: &str,
        tensors: &mut Vec<NamedTensor>,
    ) -> Result<(), EngineError> {
        let values = read(stored.clone())?;
        let columns = self.dims()[1];
        tensors.extend(self.names.iter().map(|named| NamedTensor {
            name: format!("{prefix}{}", named.name),
            shape: named.shape.clone(),
            data: values[named.rows.start * columns..named.rows.end * columns].to_vec(),
        }));
        Ok(())
    }

    /// Rebuilds a stored tensor from its public ones, taking each from `source` by name.
    pub(crate) fn join(
        &self,
        prefix: &str,
        source: &mut impl FnMut(&str, &[usize]) -> Result<Vec<f32>, EngineError>,
    ) -> Result<Tensor<2>, EngineError> {
        let mut values = Vec::with_capacity(self.dims().iter().product());
        for named in &self.names {
            values.extend(source(&format!("{prefix}{}", named.name), &named.shape)?);
        }
        let device = self.value.device().inner();
        Ok(Tensor::from_data(TensorData::new(values, self.dims()), &device))
    }
}

fn named<'a>(
    entries: impl Iterator<Item = &'a Parameter>,
) -> Result<Vec<NamedTensor>, EngineError> {
    let mut tensors = Vec::new();
    for entry in entries {
        entry.split(&entry.value, "", &mut tensors)?;
    }
    Ok(tensors)
}

/// Copies a tensor's values to the host, in f32.
pub(crate) fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, EngineError> {
    tensor
        .inner()
        .cast(FloatDType::F32)
        .try_into_data()
        .map_err(|error| EngineError::Device(format!("reading a tensor failed: {error:?}")))?
        .try_into_vec::<f32>()
        .map_err(|error| EngineError::Device(format!("reading a tensor failed: {error:?}")))
}

/// Tensors looked up by name, each exactly once.
pub(crate) struct NamedSource {
    tensors: HashMap<String, NamedTensor>,
}

impl NamedSource {
    /// # Errors
    /// [`EngineError::Checkpoint`] when two tensors share a name.
    pub(crate) fn new(tensors: Vec<NamedTensor>) -> Result<Self, EngineError> {
        let mut by_name = HashMap::with_capacity(tensors.len());
        for tensor in tensors {
            if let Some(first) = by_name.insert(tensor.name.clone(), tensor) {
                return Err(EngineError::Checkpoint(format!(
                    "tensor {} is there twice",
                    first.name
                )));
            }
        }
        Ok(Self { tensors: by_name })
    }

    /// The values of the tensor `name`, which must have `shape`.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let tensor = self
            .tensors
            .remove(name)
            .ok_or_else(|| EngineError::Checkpoint(format!("tensor {name} is missing")))?;
        if tensor.shape != shape || tensor.data.len() != shape.iter().product::<usize>() {
            return Err(EngineError::Checkpoint(format!(
                "tensor {name} has shape {:?} with {} values, but the model needs {shape:?}",
                tensor.shape,
                tensor.data.len()
            )));
        }
        Ok(tensor.data)
    }

    /// # Errors
    /// [`EngineError::Checkpoint`] naming a tensor that nothing asked for.
    pub(crate) fn finish(self) -> Result<(), EngineError> {
        match self.tensors.into_keys().min() {
            Some(name) => Err(EngineError::Checkpoint(format!(
                "tensor {name} belongs to no trainable tensor of the model"
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;
    use crate::ops::linear::linear;
    use crate::optim::adamw::AdamWParams;
    use crate::optim::optimizer::Optimizer;

    /// Where a tensor's values lie in memory.
    fn address(tensor: &Tensor<2>) -> *const f32 {
        let tensor = tensor.clone().inner().try_into_primitive::<Flex>().expect("on the CPU");
        tensor.as_slice::<f32>().expect("f32").as_ptr()
    }

    #[test]
    fn replica_on_the_cpu_holds_no_second_copy_of_frozen_weights() {
        let mut parameters = Parameters::default();
        let device = Device::flex();
        let frozen = parameters.push(Tensor::ones([3, 4], &device), false, Vec::new());
        let trained = parameters.push(Tensor::ones([2, 4], &device), true, Vec::new());
        let replica = parameters.replica(&device);
        assert_eq!(address(&replica[frozen]), address(&parameters[frozen]));
        // What trains is shared until it changes, and a change is seen on one side only.
        let entry = parameters.trainable_mut().next().expect("one trains");
        entry.update(|value| value.mul_scalar(2.0));
        assert_eq!(read(replica[trained].clone()).expect("read"), [1.0; 8]);
        assert_eq!(read(parameters[trained].clone()).expect("read"), [2.0; 8]);
    }

    #[test]
    fn weight_of_one_moves_in_bf16_by_steps_that_bf16_would_round_away() {
        let mut parameters = Parameters::new(true);
        let id = parameters.push(Tensor::ones([2, 1], &Device::flex()), true, Vec::new());
        let mut optimizer = Optimizer::default();
        let params = AdamWParams { learning_rate: 6e-4, ..AdamWParams::default() };
        for _ in 0..100 {
            let x = Tensor::ones([1, 1], &Device::flex()).autodiff();
            let mut gradients = linear(x, parameters.weight(id), None, None).sum().backward();
            parameters.accumulate(&mut gradients);
            optimizer.update(&mut parameters, &params, 1.0);
        }
        // A constant gradient moves Adam by the learning rate each step; below 1 the numbers of
        // bf16 are 0.0039 apart.
        for value in read(parameters[id].clone()).unwrap() {
            assert!((value - 0.94).abs() < 1e-4, "{value}");
        }
        let used = read(parameters.weight(id)).unwrap();
        assert_eq!(used, vec![half::bf16::from_f32(0.94).to_f32(); 2]);
    }
}
