//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019), as PyTorch computes it.

use burn::tensor::Tensor;

use crate::error::EngineError;
use crate::model::OptimizerState;
use crate::ops;
use crate::parameter::{NamedSource, Parameters};

/// Prefix of the first moment's name in a checkpoint; PyTorch's own key.
const FIRST_MOMENT: &str = "exp_avg.";
/// Prefix of the second moment's name in a checkpoint; PyTorch's own key.
const SECOND_MOMENT: &str = "exp_avg_sq.";

/// Settings of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWParams {
    /// Step size of this update, the schedule's factor included.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment, outside the root.
    pub epsilon: f64,
    /// Decoupled weight decay λ, on every trainable tensor: w ← w·(1 − lr·λ).
    pub weight_decay: f64,
}

impl Default for AdamWParams {
    /// PyTorch's betas and epsilon; no learning rate and no decay.
    fn default() -> Self {
        Self { learning_rate: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// First and second moment of one parameter, of its shape, without autodiff.
#[derive(Debug)]
struct Moments {
    first: Tensor<2>,
    second: Tensor<2>,
}

/// The optimiser's memory: moments of every trainable parameter, in the order of [`Parameters`].
///
/// Empty until the first update, so that evaluation and generation never pay for it.
#[derive(Debug, Default)]
pub(crate) struct AdamW {
    /// Updates done; t in the bias corrections 1 − βᵗ.
    step: u64,
    moments: Vec<Moments>,
}

impl AdamW {
    /// Updates every trainable parameter from its accumulated gradient times `gradient_scale`
    /// (the clipping factor), and clears the gradients.
    pub(crate) fn update(
        &mut self,
        parameters: &mut Parameters,
        params: &AdamWParams,
        gradient_scale: f64,
    ) {
        if self.moments.is_empty() {
            let zeros = |value: &Tensor<2>| Tensor::zeros(value.dims(), &value.device().inner());
            self.moments = parameters
                .trainable()
                .map(|entry| Moments { first: zeros(entry.value()), second: zeros(entry.value()) })
                .collect();
        }
        self.step += 1;
        let step = ops::adamw::Step::new(params, self.step, gradient_scale);
        for (parameter, moments) in parameters.trainable_mut().zip(&mut self.moments) {
            let Some(gradient) = parameter.take_gradient() else { continue };
            parameter.update(|value| {
                ops::adamw::adamw(value, gradient, &mut moments.first, &mut moments.second, &step)
            });
        }
    }

    /// Step count and moments, named after the public tensors they belong to.
    pub(crate) fn export(&self, parameters: &Parameters) -> Result<OptimizerState, EngineError> {
        let mut tensors = Vec::new();
        for (parameter, moments) in parameters.trainable().zip(&self.moments) {
            parameter.split(&moments.first, FIRST_MOMENT, &mut tensors)?;
            parameter.split(&moments.second, SECOND_MOMENT, &mut tensors)?;
        }
        Ok(OptimizerState { step: self.step, tensors })
    }

    /// The inverse of [`AdamW::export`].
    pub(crate) fn import(
        parameters: &Parameters,
        state: OptimizerState,
    ) -> Result<Self, EngineError> {
        // Before the first update there are no moments to write down.
        if state.step == 0 && state.tensors.is_empty() {
            return Ok(Self::default());
        }
        let mut source = NamedSource::new(state.tensors)?;
        let moments = parameters
            .trainable()
            .map(|parameter| {
                Ok(Moments {
                    first: parameter
                        .join(FIRST_MOMENT, &mut |name, shape| source.take(name, shape))?,
                    second: parameter
                        .join(SECOND_MOMENT, &mut |name, shape| source.take(name, shape))?,
                })
            })
            .collect::<Result<_, EngineError>>()?;
        source.finish()?;
        Ok(Self { step: state.step, moments })
    }
}
