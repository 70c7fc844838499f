//! The optimiser of a run: which one it is, and what it remembers of each parameter.

use burn::tensor::Tensor;
use tunesmith_core::hyperparameters::{MuonLearningRate, Optimizer as Kind};

use super::adafactor::SecondMoments;
use super::adamw::{AdamWParams, Moments};
use super::muon::{Momentum, is_hidden_matrix};
use crate::error::EngineError;
use crate::model::OptimizerState;
use crate::parameter::{NamedSource, NamedTensor, Parameter, Parameters};

/// An optimiser with its memory of every trainable parameter, in the order of [`Parameters`].
///
/// The memory is empty until the first update, so that evaluation and generation never pay for it.
#[derive(Debug, Default)]
pub(crate) struct Optimizer {
    kind: Kind,
    muon_learning_rate: MuonLearningRate,
    /// Updates done.
    step: u64,
    memories: Vec<Memory>,
}

/// What is remembered of one parameter.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each parameter, whose values lie elsewhere and are far more"
)]
#[derive(Debug)]
enum Memory {
    AdamW(Moments),
    Adafactor(SecondMoments),
    Muon(Momentum),
}

impl Optimizer {
    /// An optimiser that has seen nothing yet.
    pub(crate) fn new(kind: Kind, muon_learning_rate: MuonLearningRate) -> Self {
        Self { kind, muon_learning_rate, step: 0, memories: Vec::new() }
    }

    /// Updates every trainable parameter from its accumulated gradient times `gradient_scale`
    /// (the clipping factor), and clears the gradients.
    pub(crate) fn update(
        &mut self,
        parameters: &mut Parameters,
        params: &AdamWParams,
        gradient_scale: f64,
    ) {
        if self.memories.is_empty() {
            self.memories =
                parameters.trainable().map(|entry| Memory::new(self.kind, entry)).collect();
        }
        self.step += 1;
        for (parameter, memory) in parameters.trainable_mut().zip(&mut self.memories) {
            let Some(gradient) = parameter.take_gradient() else { continue };
            let learning_rate = params.learning_rate * parameter.learning_rate_factor();
            let params = AdamWParams { learning_rate, ..*params };
            match memory {
                Memory::AdamW(moments) => {
                    moments.update(parameter, gradient, &params, self.step, gradient_scale);
                }
                Memory::Adafactor(moments) => {
                    moments.update(parameter, gradient, &params, self.step, gradient_scale);
                }
                Memory::Muon(momentum) => momentum.update(
                    parameter,
                    gradient,
                    &params,
                    self.muon_learning_rate,
                    gradient_scale,
                ),
            }
        }
    }

    /// Step count and memory, named after the public tensors they belong to.
    pub(crate) fn export(&self, parameters: &Parameters) -> Result<OptimizerState, EngineError> {
        let mut tensors = Vec::new();
        for (parameter, memory) in parameters.trainable().zip(&self.memories) {
            memory.export(parameter, &mut tensors)?;
        }
        Ok(OptimizerState { step: self.step, tensors })
    }

    /// Replaces step count and memory by what [`Optimizer::export`] gave; nothing changes when it
    /// does not fit.
    pub(crate) fn import(
        &mut self,
        parameters: &Parameters,
        state: OptimizerState,
    ) -> Result<(), EngineError> {
        // Before the first update there is no memory to write down.
        let memories = if state.step == 0 && state.tensors.is_empty() {
            Vec::new()
        } else {
            let mut source = NamedSource::new(state.tensors)?;
            let memories = parameters
                .trainable()
                .map(|parameter| Memory::import(self.kind, parameter, &mut source))
                .collect::<Result<_, EngineError>>()?;
            source.finish()?;
            memories
        };
        (self.step, self.memories) = (state.step, memories);
        Ok(())
    }
}

impl Memory {
    fn new(kind: Kind, parameter: &Parameter) -> Self {
        match kind {
            Kind::Muon if is_hidden_matrix(parameter) => Self::Muon(Momentum::new(parameter)),
            Kind::Adamw | Kind::Muon => Self::AdamW(Moments::new(parameter)),
            Kind::Adafactor => Self::Adafactor(SecondMoments::new(parameter)),
        }
    }

    fn export(
        &self,
        parameter: &Parameter,
        tensors: &mut Vec<NamedTensor>,
    ) -> Result<(), EngineError> {
        match self {
            Self::AdamW(moments) => moments.export(parameter, tensors),
            Self::Adafactor(moments) => moments.export(parameter, tensors),
            Self::Muon(momentum) => momentum.export(parameter, tensors),
        }
    }

    fn import(
        kind: Kind,
        parameter: &Parameter,
        source: &mut NamedSource,
    ) -> Result<Self, EngineError> {
        Ok(match kind {
            Kind::Muon if is_hidden_matrix(parameter) => {
                Self::Muon(Momentum::import(parameter, source)?)
            }
            Kind::Adamw | Kind::Muon => Self::AdamW(Moments::import(parameter, source)?),
            Kind::Adafactor => Self::Adafactor(SecondMoments::import(parameter, source)?),
        })
    }
}

/// Zeros of a parameter's shape, on its device, without autodiff.
pub(super) fn zeros_like(parameter: &Parameter) -> Tensor<2> {
    Tensor::zeros(parameter.dims(), &parameter.value().device().inner())
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use serde_json::Value;

    use super::*;
    use crate::parameter::NamedRows;

    fn reference() -> Value {
        let text = include_str!("../../tests/reference/optimizers.json");
        serde_json::from_str(text).expect("JSON")
    }

    /// The reference's tensors as a model stores them: q, k and v as one matrix.
    const STORED: [&[&str]; 4] = [
        &["model.embed_tokens.weight"],
        &[
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
        ],
        &["model.layers.0.self_attn.o_proj.weight"],
        &["model.norm.weight"],
    ];

    fn values(tensors: &Value, names: &[&str]) -> Vec<f32> {
        let values = names.iter().flat_map(|name| tensors[name].as_array().expect("values"));
        values.map(|value| value.as_f64().expect("a number") as f32).collect()
    }

    fn stored(reference: &Value, tensors: &Value, names: &[&str]) -> Tensor<2> {
        let values = values(tensors, names);
        let columns = shape(reference, names[0]).pop().expect("a shape");
        let shape = [values.len() / columns, columns];
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    fn shape(reference: &Value, name: &str) -> Vec<usize> {
        let shape = reference["shapes"][name].as_array().expect("a shape");
        shape.iter().map(|size| size.as_u64().expect("a size") as usize).collect()
    }

    fn parameters(reference: &Value) -> Parameters {
        let mut parameters = Parameters::default();
        for names in STORED {
            let mut end = 0;
            let rows = names.iter().map(|&name| {
                let shape = shape(reference, name);
                let rows = if shape.len() == 2 { shape[0] } else { 1 };
                end += rows;
                NamedRows { name: name.to_owned(), rows: end - rows..end, shape }
            });
            let rows = rows.collect();
            parameters.push(stored(reference, &reference["start"], names), true, rows);
        }
        parameters
    }

    /// Gives every parameter its gradient, as that of Σ w∘g.
    fn add_gradients(reference: &Value, step: usize, parameters: &mut Parameters) {
        let values: Vec<Tensor<2>> =
            parameters.trainable().map(|entry| entry.value().clone()).collect();
        let products = values.into_iter().zip(STORED).map(|(value, names)| {
            let gradient = stored(reference, &reference["gradients"][step], names);
            (value * gradient.autodiff()).sum()
        });
        let loss = products.reduce(|sum, product| sum + product).expect("parameters");
        parameters.accumulate(&mut loss.backward());
    }

    struct Case {
        optimizer: Optimizer,
        params: AdamWParams,
        tolerance: f64,
    }

    fn case(case: &Value) -> Case {
        let number = |name: &str| case[name].as_f64().expect("a number");
        let word = |name: &str| case[name].clone();
        let kind: Kind = serde_json::from_value(word("optimizer")).expect("an optimiser");
        let adjust = serde_json::from_value(word("muon_adjust_lr_fn")).expect("a word");
        Case {
            optimizer: Optimizer::new(kind, adjust),
            params: AdamWParams {
                learning_rate: number("learning_rate"),
                weight_decay: number("weight_decay"),
                beta1: number("adam_beta1"),
                beta2: number("adam_beta2"),
                epsilon: number("adam_epsilon"),
            },
            // The reference is f64. Muon's polynomial amplifies rounding by its slope at 0, 3.4
            // an iteration.
            tolerance: if kind == Kind::Muon { 3e-6 } else { 3e-7 },
        }
    }

    #[test]
    fn every_optimiser_follows_pytorch_or_transformers_in_f64() {
        let reference = reference();
        let cases = reference["cases"].as_array().expect("cases");
        assert_eq!(cases.len(), 6);
        for expected in cases {
            let Case { mut optimizer, params, tolerance } = case(expected);
            let mut parameters = parameters(&reference);
            for step in 0..reference["gradients"].as_array().expect("gradients").len() {
                add_gradients(&reference, step, &mut parameters);
                optimizer.update(&mut parameters, &params, 1.0);
            }
            for tensor in parameters.named().expect("values") {
                let expected = expected["final"][&tensor.name].as_array().expect("values");
                assert_eq!(tensor.data.len(), expected.len(), "{}", tensor.name);
                for (value, expected) in tensor.data.iter().zip(expected) {
                    let error = (f64::from(*value) - expected.as_f64().expect("a number")).abs();
                    assert!(
                        error < tolerance,
                        "{:?}: {}: {value} is not {expected}: {error:e}",
                        optimizer.kind,
                        tensor.name
                    );
                }
            }
        }
    }

    #[test]
    fn every_optimiser_takes_a_parameters_factor_on_its_learning_rate() {
        let reference = reference();
        for expected in reference["cases"].as_array().expect("cases") {
            // Each parameter at twice the rate of half the rate is each at the rate.
            let [plain, faster] = [1.0, 2.0].map(|factor| {
                let Case { mut optimizer, params, .. } = case(expected);
                let mut parameters = parameters(&reference);
                for id in parameters.ids() {
                    parameters.set_learning_rate_factor(id, factor);
                }
                let learning_rate = params.learning_rate / factor;
                let params = AdamWParams { learning_rate, ..params };
                for step in 0..2 {
                    add_gradients(&reference, step, &mut parameters);
                    optimizer.update(&mut parameters, &params, 1.0);
                }
                parameters.named().expect("values")
            });
            assert_eq!(plain, faster, "{}", expected["optimizer"]);
        }
    }

    #[test]
    fn memory_that_was_written_down_and_read_goes_on_with_the_same_bits() {
        let reference = reference();
        for expected in reference["cases"].as_array().expect("cases") {
            let Case { mut optimizer, params, .. } = case(expected);
            let mut straight = parameters(&reference);
            let mut resumed = parameters(&reference);
            add_gradients(&reference, 0, &mut straight);
            optimizer.update(&mut straight, &params, 0.5);

            resumed.assign(straight.named().expect("values")).expect("the same names");
            let mut second = Optimizer::new(optimizer.kind, optimizer.muon_learning_rate);
            let state = optimizer.export(&straight).expect("memory");
            second.import(&resumed, state).expect("the same parameters");
            for (parameters, optimizer) in
                [(&mut straight, &mut optimizer), (&mut resumed, &mut second)]
            {
                add_gradients(&reference, 1, parameters);
                optimizer.update(parameters, &params, 0.5);
            }
            assert_eq!(straight.named().expect("values"), resumed.named().expect("values"));
            let state = optimizer.export(&straight).expect("memory");
            assert_eq!(state, second.export(&resumed).expect("memory"), "{:?}", optimizer.kind);
        }
    }

    #[test]
    fn the_memory_of_another_optimiser_is_refused_by_a_tensors_name() {
        let reference = reference();
        let mut parameters = parameters(&reference);
        let mut adafactor = Optimizer::new(Kind::Adafactor, MuonLearningRate::default());
        add_gradients(&reference, 0, &mut parameters);
        adafactor.update(&mut parameters, &AdamWParams::default(), 1.0);
        let state = adafactor.export(&parameters).expect("memory");
        let refused = Optimizer::default().import(&parameters, state);
        let message = refused.expect_err("AdamW has other tensors").to_string();
        assert!(message.contains("exp_avg.model.embed_tokens.weight is missing"), "{message}");
    }

    #[test]
    fn adafactor_remembers_a_matrix_as_one_number_a_row_and_one_a_column() {
        let reference = reference();
        let mut parameters = parameters(&reference);
        let mut adafactor = Optimizer::new(Kind::Adafactor, MuonLearningRate::default());
        add_gradients(&reference, 0, &mut parameters);
        adafactor.update(&mut parameters, &AdamWParams::default(), 1.0);
        let tensors = adafactor.export(&parameters).expect("memory").tensors;
        let numbers: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
        assert_eq!(numbers, (9 + 5) + (8 + 5) + (4 + 5) + (5 + 5) + (5 + 8) + 5);
    }
}
