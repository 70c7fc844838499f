//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019), as PyTorch computes it.

use burn::tensor::Tensor;

use super::optimizer::zeros_like;
use crate::error::EngineError;
use crate::ops;
use crate::parameter::{NamedSource, NamedTensor, Parameter};

/// Prefix of the first moment's name in a checkpoint; PyTorch's own key.
const FIRST_MOMENT: &str = "exp_avg.";
/// Prefix of the second moment's name in a checkpoint; PyTorch's own key.
const SECOND_MOMENT: &str = "exp_avg_sq.";

/// Settings of one update. Adafactor has no use for the betas and epsilon; Muon has, for the
/// parameters that it leaves to AdamW.
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
pub(super) struct Moments {
    first: Tensor<2>,
    second: Tensor<2>,
}

impl Moments {
    pub(super) fn new(parameter: &Parameter) -> Self {
        Self { first: zeros_like(parameter), second: zeros_like(parameter) }
    }

    /// Update number `t`, from 1.
    pub(super) fn update(
        &mut self,
        parameter: &mut Parameter,
        gradient: Tensor<2>,
        params: &AdamWParams,
        t: u64,
        gradient_scale: f64,
    ) {
        let step = ops::adamw::Step::new(params, t, gradient_scale);
        parameter.update(|value| {
            ops::adamw::adamw(value, gradient, &mut self.first, &mut self.second, &step)
        });
    }

    pub(super) fn export(
        &self,
        parameter: &Parameter,
        tensors: &mut Vec<NamedTensor>,
    ) -> Result<(), EngineError> {
        parameter.split(&self.first, FIRST_MOMENT, tensors)?;
        parameter.split(&self.second, SECOND_MOMENT, tensors)
    }

    pub(super) fn import(
        parameter: &Parameter,
        source: &mut NamedSource,
    ) -> Result<Self, EngineError> {
        let mut join = |prefix| parameter.join(prefix, &mut |name, shape| source.take(name, shape));
        Ok(Self { first: join(FIRST_MOMENT)?, second: join(SECOND_MOMENT)? })
    }
}
