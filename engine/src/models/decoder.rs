//! The Llama decoder: pre-norm layers of rotary grouped attention and SwiGLU (Touvron et al. 2023).

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

use super::config::ModelConfig;
use super::rope::RotaryTable;
use crate::adapters::lora::Lora;
use crate::batch::{Batch, Target};
use crate::error::EngineError;
use crate::ops::attention::{self, Heads, KeyValues};
use crate::ops::dropout::{Dropout, DropoutKey};
use crate::ops::embedding::embedding;
use crate::ops::head::{HeadLoss, head_with_loss};
use crate::ops::linear::{LowRank, LowRankPart, linear};
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::swiglu;
use crate::parameter::{ParameterId, Parameters};

/// The structure of a decoder; its tensors are in [`Parameters`].
#[derive(Debug)]
pub(crate) struct Decoder {
    config: ModelConfig,
    embedding: ParameterId,
    layers: Vec<Layer>,
    norm: ParameterId,
    /// The embedding itself when the two are tied.
    head: ParameterId,
    lora: Option<Lora>,
}

/// x ← x + output(attention(qkv(norm(x)))), then x ← x + down(swiglu(gate_up(norm(x)))).
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: ParameterId,
    /// q, k and v, one below the other.
    pub(crate) qkv: Projection,
    pub(crate) output: Projection,
    pub(crate) feed_forward_norm: ParameterId,
    /// Gate and up, one below the other.
    pub(crate) gate_up: Projection,
    pub(crate) down: Projection,
}

/// Projections of one input, stored as one matrix.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) weight: ParameterId,
    pub(crate) adapter: Option<Adapter>,
}

/// LoRA of some of a projection's modules.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// `[modules · r, in]`.
    pub(crate) a: ParameterId,
    /// `[Σ outputs, r]`.
    pub(crate) b: ParameterId,
    pub(crate) parts: Vec<AdaptedModule>,
}

/// One adapted module of a projection.
#[derive(Debug)]
pub(crate) struct AdaptedModule {
    /// Position in `TARGET_MODULES`.
    pub(crate) module: usize,
    /// Its columns of the projection's output.
    pub(crate) outputs: Range<usize>,
}

/// Keys and values of every layer for the tokens so far.
#[derive(Debug, Default)]
pub(crate) struct KeyValueCache {
    layers: Vec<Option<KeyValues>>,
    tokens: usize,
}

impl Decoder {
    pub(crate) fn new(
        config: ModelConfig,
        embedding: ParameterId,
        layers: Vec<Layer>,
        norm: ParameterId,
        head: ParameterId,
        lora: Option<Lora>,
    ) -> Self {
        Self { config, embedding, layers, norm, head, lora }
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The loss of a batch; `dropout` is None outside of training.
    pub(crate) fn loss(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        dropout: Option<DropoutKey>,
    ) -> Result<HeadLoss, EngineError> {
        let targets: Vec<Target> = batch.targets().collect();
        let hidden = self.hidden(parameters, batch, dropout, |_| {});
        head_with_loss(hidden, parameters[self.head].clone(), &targets)
    }

    /// Hidden states `[tokens, hidden_size]` after the final norm. `observe` sees the embeddings,
    /// and then the output of each layer.
    pub(crate) fn hidden(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        dropout: Option<DropoutKey>,
        mut observe: impl FnMut(&Tensor<2>),
    ) -> Tensor<2> {
        let rotary = RotaryTable::new(&self.config, 0, batch.longest_context());
        let heads = self.heads();
        let mut x = self.embed(parameters, &batch.ids);
        observe(&x);
        for (index, layer) in self.layers.iter().enumerate() {
            let dropout = dropout.map(|key| (key, index));
            x = self.layer(parameters, layer, x, dropout, |qkv| {
                attention::attention(qkv, heads, &batch.segments, &rotary)
            });
            observe(&x);
        }
        self.final_norm(parameters, x)
    }

    /// Hidden states of `ids`, which follow the tokens of `cache` and are added to it.
    pub(crate) fn extend(
        &self,
        parameters: &Parameters,
        ids: &[u32],
        cache: &mut KeyValueCache,
    ) -> Tensor<2> {
        let rotary = RotaryTable::new(&self.config, cache.tokens, ids.len());
        let heads = self.heads();
        cache.layers.resize(self.layers.len(), None);
        cache.tokens += ids.len();
        let mut x = self.embed(parameters, ids);
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            x = self.layer(parameters, layer, x, None, |qkv| {
                attention::extend(qkv, heads, &rotary, cache)
            });
        }
        self.final_norm(parameters, x)
    }

    /// Logits `[positions, vocab_size]` of some rows of `hidden`.
    pub(crate) fn logits(
        &self,
        parameters: &Parameters,
        hidden: Tensor<2>,
        positions: &[usize],
    ) -> Tensor<2> {
        let rows: Vec<i32> = positions.iter().map(|&position| position as i32).collect();
        let rows = TensorData::new(rows, [positions.len()]);
        let rows = Tensor::<1, Int>::from_data(rows, &hidden.device());
        linear(hidden.select(0, rows), parameters[self.head].clone(), None, None)
    }

    fn embed(&self, parameters: &Parameters, ids: &[u32]) -> Tensor<2> {
        embedding(parameters[self.embedding].clone(), ids, self.config.pad_token_id)
    }

    fn layer(
        &self,
        parameters: &Parameters,
        layer: &Layer,
        x: Tensor<2>,
        dropout: Option<(DropoutKey, usize)>,
        attend: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        let epsilon = self.config.rms_norm_eps;
        let project = |projection: &Projection, x, residual| {
            let low_rank = self.low_rank(parameters, projection, dropout);
            linear(x, parameters[projection.weight].clone(), residual, low_rank)
        };
        let normed = rms_norm(x.clone(), parameters[layer.attention_norm].clone(), epsilon);
        let attended = attend(project(&layer.qkv, normed, None));
        let x = project(&layer.output, attended, Some(x));
        let normed = rms_norm(x.clone(), parameters[layer.feed_forward_norm].clone(), epsilon);
        let activated = swiglu(project(&layer.gate_up, normed, None));
        project(&layer.down, activated, Some(x))
    }

    /// A projection's adapter, ready for the operation.
    fn low_rank(
        &self,
        parameters: &Parameters,
        projection: &Projection,
        dropout: Option<(DropoutKey, usize)>,
    ) -> Option<LowRank> {
        let (adapter, lora) = (projection.adapter.as_ref()?, self.lora.as_ref()?);
        let dropout = dropout.filter(|_| lora.dropout > 0.0);
        let part = |adapted: &AdaptedModule| LowRankPart {
            outputs: adapted.outputs.clone(),
            dropout: dropout
                .map(|(key, layer)| Dropout::new(lora.dropout, key.stream(layer, adapted.module))),
        };
        Some(LowRank {
            a: parameters[adapter.a].clone(),
            b: parameters[adapter.b].clone(),
            scale: lora.scale,
            parts: adapter.parts.iter().map(part).collect(),
        })
    }

    fn final_norm(&self, parameters: &Parameters, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, parameters[self.norm].clone(), self.config.rms_norm_eps)
    }

    fn heads(&self) -> Heads {
        Heads {
            query: self.config.num_attention_heads,
            key_value: self.config.num_key_value_heads,
            dim: self.config.head_dim,
        }
    }
}
