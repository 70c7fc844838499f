//! Muon: momentum whose matrices are made orthogonal (Jordan 2024), as `torch.optim.Muon`.

use burn::tensor::Tensor;
use tunesmith_core::hyperparameters::MuonLearningRate;

use super::adamw::AdamWParams;
use super::optimizer::zeros_like;
use crate::error::EngineError;
use crate::ops;
use crate::parameter::{NamedSource, NamedTensor, Parameter};

/// Prefix of the momentum's name in a checkpoint; PyTorch's own key.
const MOMENTUM: &str = "momentum_buffer.";

/// Tensors that are matrices in shape only: their rows are vectors of single tokens, which are
/// looked up or scored one by one. Jordan leaves them to AdamW.
const TOKEN_TABLES: [&str; 2] = ["embed_tokens.weight", "lm_head.weight"];

/// Whether Muon updates this parameter; the others are AdamW's.
pub(super) fn is_hidden_matrix(parameter: &Parameter) -> bool {
    parameter.names().iter().all(|named| {
        named.shape.len() == 2 && !TOKEN_TABLES.iter().any(|table| named.name.ends_with(table))
    })
}

/// The momentum of one parameter, of its shape, without autodiff.
#[derive(Debug)]
pub(super) struct Momentum(Tensor<2>);

impl Momentum {
    pub(super) fn new(parameter: &Parameter) -> Self {
        Self(zeros_like(parameter))
    }

    pub(super) fn update(
        &mut self,
        parameter: &mut Parameter,
        gradient: Tensor<2>,
        params: &AdamWParams,
        learning_rate: MuonLearningRate,
        gradient_scale: f64,
    ) {
        let step = ops::muon::Step {
            gradient_scale,
            learning_rate: params.learning_rate,
            weight_decay: params.weight_decay,
            adjust: learning_rate,
        };
        // Each public matrix is orthogonal by itself, however many are stored as one.
        let matrices: Vec<_> = parameter.names().iter().map(|named| named.rows.clone()).collect();
        parameter.update(|value| ops::muon::muon(value, gradient, &mut self.0, &matrices, &step));
    }

    pub(super) fn export(
        &self,
        parameter: &Parameter,
        tensors: &mut Vec<NamedTensor>,
    ) -> Result<(), EngineError> {
        parameter.split(&self.0, MOMENTUM, tensors)
    }

    pub(super) fn import(
        parameter: &Parameter,
        source: &mut NamedSource,
    ) -> Result<Self, EngineError> {
        parameter.join(MOMENTUM, &mut |name, shape| source.take(name, shape)).map(Self)
    }
}
