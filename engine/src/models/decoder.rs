//! The decoder of all families: pre-norm layers of rotary grouped attention and a gated feed-forward
//! block (Touvron et al. 2023), with what a family adds to these.

use std::collections::HashMap;
use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::config::ModelConfig;
use super::rope::RotaryTable;
use crate::adapters::lora::Lora;
use crate::batch::{Batch, Target};
use crate::error::EngineError;
use crate::ops::attention::{self, Heads, Scores};
use crate::ops::bias::add_bias;
use crate::ops::cached_attention::{Extension, KeyValues, cached_attention};
use crate::ops::dropout::{Dropout, DropoutKey};
use crate::ops::embedding::{embedding, row_embedding};
use crate::ops::gated_activation::gated_activation;
use crate::ops::head::{HeadLoss, head_with_loss, soft_capped};
use crate::ops::head_norm::head_norm;
use crate::ops::linear::{Input, LowRank, LowRankPart, linear};
use crate::ops::neftune::with_noise;
use crate::ops::rms_norm::{Norm, rms_norm};
use crate::ops::row_linear::{RowUpdate, row_linear};
use crate::ops::token_nll::{TokenNll, token_nll};
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
    /// What lies below this layer is computed without a graph, unless the embedding trains.
    first_trained_layer: usize,
    /// α of NEFTune; 0 for none.
    neftune_noise_alpha: f64,
}

/// x ← x + output(attention(qkv(norm(x)))), then x ← x + down(gated(gate_up(norm(x)))); with post
/// norms, what is added is normalised first.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: ParameterId,
    /// q, k and v, one below the other.
    pub(crate) qkv: Projection,
    pub(crate) head_norms: Option<HeadNorms>,
    pub(crate) output: Projection,
    pub(crate) post_attention_norm: Option<ParameterId>,
    pub(crate) feed_forward_norm: ParameterId,
    /// Gate and up, one below the other.
    pub(crate) gate_up: Projection,
    pub(crate) down: Projection,
    pub(crate) post_feed_forward_norm: Option<ParameterId>,
}

/// Weights that all heads share.
#[derive(Debug)]
pub(crate) struct HeadNorms {
    pub(crate) query: ParameterId,
    pub(crate) key: ParameterId,
}

/// Projections of one input, stored as one matrix.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) weight: ParameterId,
    pub(crate) bias: Option<ParameterId>,
    pub(crate) adapter: Option<Adapter>,
}

/// LoRA of some of a projection's modules.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// `[modules · r, in]`.
    pub(crate) a: ParameterId,
    /// `[Σ outputs, r]`.
    pub(crate) b: ParameterId,
    /// DoRA's lengths of the adapted rows, `[Σ outputs, 1]`.
    pub(crate) magnitude: Option<ParameterId>,
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

/// One pass over a batch: what its layers share.
pub(super) struct Pass<'a> {
    decoder: &'a Decoder,
    batch: &'a Batch,
    /// None outside of training.
    dropout: Option<DropoutKey>,
    /// By layer.
    rotary: Vec<RotaryTable>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(decoder: &'a Decoder, batch: &'a Batch, dropout: Option<DropoutKey>) -> Self {
        Self { decoder, batch, dropout, rotary: decoder.rotary(0, batch.longest_context()) }
    }

    /// The input of the first layer.
    pub(super) fn embedded(&self, parameters: &Parameters) -> Tensor<2> {
        let x = self.decoder.embed(parameters, &self.batch.ids);
        let alpha = self.decoder.neftune_noise_alpha;
        match self.dropout {
            Some(key) if alpha > 0.0 => with_noise(x, alpha, key, self.batch),
            _ => x,
        }
    }

    /// The output of layer number `index` for its input `x`.
    pub(super) fn layer(&self, parameters: &Parameters, index: usize, x: Tensor<2>) -> Tensor<2> {
        let decoder = self.decoder;
        let dropout = self.dropout.map(|key| (key, index));
        let project = |projection: &Projection, x: Input, residual| {
            let low_rank = decoder.low_rank(parameters, projection, dropout);
            linear(x, parameters.projection_weight(projection.weight), residual, low_rank)
        };
        let bf16 = parameters.bf16();
        decoder.layer(parameters, &decoder.layers[index], x, bf16, project, |qkv| {
            let (scores, rotary) = (decoder.scores(index, bf16), &self.rotary[index]);
            attention::attention(qkv, decoder.heads(), scores, &self.batch.segments, rotary)
        })
    }
}

/// Some tokens that follow those of a cache.
#[derive(Debug)]
pub(crate) struct Sequence<'a> {
    /// The new tokens, at least one.
    pub(crate) ids: &'a [u32],
    /// The tokens before them.
    pub(crate) cache: &'a mut KeyValueCache,
    /// The adapter to compute them with.
    pub(crate) adaptation: Option<&'a Adaptation>,
}

/// An adapter's part of each projection, by the projection's weight.
#[derive(Debug, Default)]
pub(crate) struct Adaptation(pub(crate) HashMap<ParameterId, RowUpdate>);

/// The rotations of the positions from 0 on.
#[derive(Debug)]
pub(crate) struct RotaryTables {
    by_layer: Vec<RotaryTable>,
    /// How many positions there are.
    pub(crate) positions: usize,
}

/// Keys and values of every layer for the tokens so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyValueCache {
    layers: Vec<Option<KeyValues>>,
    tokens: usize,
}

impl KeyValueCache {
    /// Tokens so far.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens that the memory of a cache of `tokens` would hold: room is made for some at a time.
    pub(crate) fn room_of(tokens: usize) -> usize {
        KeyValues::room_of(tokens)
    }

    #[cfg(test)]
    pub(crate) fn of_layers(layers: Vec<Option<KeyValues>>, tokens: usize) -> Self {
        Self { layers, tokens }
    }

    /// A cache of the first `tokens` tokens, where all of them are kept.
    pub(crate) fn prefix(&self, tokens: usize) -> Option<Self> {
        let prefix = |layer: &Option<KeyValues>| layer.as_ref()?.prefix(tokens).map(Some);
        let layers = self.layers.iter().map(prefix).collect::<Option<_>>()?;
        Some(Self { layers, tokens })
    }
}

/// The rows of each adaptation; neighbours that share one are one range.
fn adapted_rows<'a>(sequences: &[Sequence<'a>]) -> Vec<(Range<usize>, &'a Adaptation)> {
    let mut adapted: Vec<(Range<usize>, &Adaptation)> = Vec::new();
    let mut end = 0;
    for sequence in sequences {
        let start = end;
        end += sequence.ids.len();
        let Some(adaptation) = sequence.adaptation else { continue };
        match adapted.last_mut() {
            Some((rows, last)) if rows.end == start && std::ptr::eq(*last, adaptation) => {
                rows.end = end;
            }
            _ => adapted.push((start..end, adaptation)),
        }
    }
    adapted
}

fn indices(positions: &[usize], device: &Device) -> Tensor<1, Int> {
    let rows: Vec<i32> = positions.iter().map(|&position| position as i32).collect();
    Tensor::from_data(TensorData::new(rows, [positions.len()]), device)
}

impl Decoder {
    pub(crate) fn new(
        config: ModelConfig,
        embedding: ParameterId,
        layers: Vec<Layer>,
        norm: ParameterId,
        head: ParameterId,
        lora: Option<Lora>,
        first_trained_layer: usize,
    ) -> Self {
        let neftune_noise_alpha = 0.0;
        Self {
            config,
            embedding,
            layers,
            norm,
            head,
            lora,
            first_trained_layer,
            neftune_noise_alpha,
        }
    }

    /// Adds noise to the embeddings in training from now on; 0 for none.
    pub(crate) fn set_neftune_noise_alpha(&mut self, alpha: f64) {
        self.neftune_noise_alpha = alpha;
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
        let hidden = self.hidden(parameters, batch, dropout, |_| {});
        self.head_loss(parameters, hidden, batch)
    }

    /// The loss of a batch whose final hidden states are `hidden`.
    pub(crate) fn head_loss(
        &self,
        parameters: &Parameters,
        hidden: Tensor<2>,
        batch: &Batch,
    ) -> Result<HeadLoss, EngineError> {
        let targets: Vec<Target> = batch.targets().collect();
        let head = parameters.weight(self.head);
        head_with_loss(hidden, head, self.final_softcap(), &targets)
    }

    pub(super) fn num_layers(&self) -> usize {
        self.layers.len()
    }

    pub(super) fn first_trained_layer(&self) -> usize {
        self.first_trained_layer
    }

    /// Whether an adapter trains, and not the weights themselves.
    pub(crate) fn has_adapter(&self) -> bool {
        self.lora.is_some()
    }

    /// Whether the adapter started as the principal part of the weights.
    pub(crate) fn starts_with_pissa(&self) -> bool {
        self.lora.as_ref().is_some_and(|lora| lora.pissa)
    }

    /// −log p of each of `targets` in a batch, whose own weights count for nothing.
    pub(crate) fn token_nll(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        targets: &[Target],
        dropout: Option<DropoutKey>,
    ) -> Result<TokenNll, EngineError> {
        self.nll_of(parameters, self.hidden(parameters, batch, dropout, |_| {}), targets)
    }

    /// The same of a batch whose final hidden states are `hidden`.
    pub(crate) fn nll_of(
        &self,
        parameters: &Parameters,
        hidden: Tensor<2>,
        targets: &[Target],
    ) -> Result<TokenNll, EngineError> {
        token_nll(hidden, parameters.weight(self.head), self.final_softcap(), targets)
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
        let pass = Pass::new(self, batch, dropout);
        let mut x = pass.embedded(parameters);
        observe(&x);
        for layer in 0..self.layers.len() {
            x = pass.layer(parameters, layer, x);
            observe(&x);
        }
        self.final_norm(parameters, x)
    }

    /// Hidden states of new tokens of some sequences, one sequence after the other, and the tokens
    /// are added to their caches. `rotary` reaches at least to the last of them.
    pub(crate) fn extend(
        &self,
        parameters: &Parameters,
        sequences: &mut [Sequence<'_>],
        rotary: &RotaryTables,
    ) -> Tensor<2> {
        let ids: Vec<u32> = sequences.iter().flat_map(|sequence| sequence.ids).copied().collect();
        let adapted = adapted_rows(sequences);
        let project = |projection: &Projection, x: Input, residual| {
            let updates: Vec<(Range<usize>, &RowUpdate)> = adapted
                .iter()
                .filter_map(|(rows, adaptation)| {
                    Some((rows.clone(), adaptation.0.get(&projection.weight)?))
                })
                .collect();
            row_linear(x.x, &parameters.row_weight(projection.weight), residual, &updates)
        };
        let embedding = parameters.row_weight(self.embedding);
        let mut x = row_embedding(&embedding, &ids, self.config.embedding_scale as f32);
        for (index, layer) in self.layers.iter().enumerate() {
            x = self.layer(parameters, layer, x, false, project, |qkv| {
                let mut end = 0;
                let mut extensions: Vec<Extension<'_>> = sequences
                    .iter_mut()
                    .map(|Sequence { ids, cache, .. }| {
                        let start = end;
                        end += ids.len();
                        cache.layers.resize(self.layers.len(), None);
                        let (first_position, cache) = (cache.tokens, &mut cache.layers[index]);
                        Extension { rows: start..end, first_position, cache }
                    })
                    .collect();
                let (scores, rotary) = (self.scores(index, false), &rotary.by_layer[index]);
                cached_attention(qkv, self.heads(), scores, rotary, &mut extensions)
            });
        }
        for sequence in sequences {
            sequence.cache.tokens += sequence.ids.len();
        }
        self.final_norm(parameters, x)
    }

    /// Logits `[positions, vocab_size]` of the tokens after some rows of [`Decoder::extend`].
    pub(crate) fn next_logits(
        &self,
        parameters: &Parameters,
        hidden: Tensor<2>,
        positions: &[usize],
    ) -> Tensor<2> {
        let hidden = hidden.clone().select(0, indices(positions, &hidden.device()));
        let head = parameters.row_weight(self.head);
        soft_capped(row_linear(hidden, &head, None, &[]), self.final_softcap())
    }

    /// The rotations of positions up to `positions`.
    pub(crate) fn rotary_tables(&self, positions: usize) -> RotaryTables {
        RotaryTables { by_layer: self.rotary(0, positions), positions }
    }

    /// The adapter that the model was loaded with, as [`Decoder::extend`] takes it.
    pub(crate) fn own_adaptation(&self, parameters: &Parameters) -> Adaptation {
        let Some(lora) = &self.lora else { return Adaptation::default() };
        let updates = self.projections().filter_map(|(_, projection)| {
            let adapter = projection.adapter.as_ref()?;
            let [a, b] = [adapter.a, adapter.b].map(|id| parameters[id].clone());
            let outputs = adapter.parts.iter().map(|part| part.outputs.clone());
            let dora = adapter.magnitude.map(|magnitude| {
                [parameters[magnitude].clone(), parameters.weight(projection.weight)]
            });
            Some((projection.weight, RowUpdate::new(a, b, lora.scale, outputs, dora)))
        });
        Adaptation(updates.collect())
    }

    /// Every projection, with the number of its layer.
    pub(crate) fn projections(&self) -> impl Iterator<Item = (usize, &Projection)> {
        self.layers.iter().enumerate().flat_map(|(index, layer)| {
            [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]
                .map(|projection| (index, projection))
        })
    }

    /// Logits `[positions, vocab_size]` of some rows of `hidden`.
    pub(crate) fn logits(
        &self,
        parameters: &Parameters,
        hidden: Tensor<2>,
        positions: &[usize],
    ) -> Tensor<2> {
        let hidden = hidden.clone().select(0, indices(positions, &hidden.device()));
        let logits = linear(hidden, parameters.weight(self.head), None, None);
        soft_capped(logits, self.final_softcap())
    }

    fn embed(&self, parameters: &Parameters, ids: &[u32]) -> Tensor<2> {
        let scale = self.config.embedding_scale as f32;
        embedding(parameters[self.embedding].clone(), ids, self.config.pad_token_id, scale)
    }

    /// One layer; with `bf16`, what goes into products is that.
    fn layer(
        &self,
        parameters: &Parameters,
        layer: &Layer,
        x: Tensor<2>,
        bf16: bool,
        project: impl Fn(&Projection, Input, Option<Tensor<2>>) -> Tensor<2>,
        attend: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        let norm = |x: Tensor<2>, weight: ParameterId, bf16: bool| {
            rms_norm(x, parameters[weight].clone(), self.norm_constants(), bf16)
        };
        let project = |projection: &Projection, x: Input, residual| {
            let y = project(projection, x, residual);
            match projection.bias {
                Some(bias) => add_bias(y, parameters[bias].clone()),
                None => y,
            }
        };
        // residual + projection(x), or residual + norm(projection(x)).
        let add =
            |residual: Tensor<2>, projection: &Projection, x: Input, post_norm| match post_norm {
                None => project(projection, x, Some(residual)),
                Some(post_norm) => {
                    residual + norm(project(projection, x, None), post_norm, false).x
                }
            };
        let mut qkv = project(&layer.qkv, norm(x.clone(), layer.attention_norm, bf16), None);
        if let Some(HeadNorms { query, key }) = &layer.head_norms {
            let (query, key) = (parameters[*query].clone(), parameters[*key].clone());
            qkv = head_norm(qkv, query, key, self.heads(), self.norm_constants());
        }
        let x = add(x, &layer.output, attend(qkv).into(), layer.post_attention_norm);
        let gate_up = project(&layer.gate_up, norm(x.clone(), layer.feed_forward_norm, bf16), None);
        let activated = gated_activation(gate_up, self.config.activation, bf16);
        add(x, &layer.down, activated, layer.post_feed_forward_norm)
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
            magnitude: adapter.magnitude.map(|magnitude| parameters[magnitude].clone()),
            parts: adapter.parts.iter().map(part).collect(),
        })
    }

    pub(super) fn final_norm(&self, parameters: &Parameters, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, parameters[self.norm].clone(), self.norm_constants(), false).x
    }

    fn heads(&self) -> Heads {
        Heads {
            query: self.config.num_attention_heads,
            key_value: self.config.num_key_value_heads,
            dim: self.config.head_dim,
        }
    }

    fn scores(&self, layer: usize, bf16: bool) -> Scores {
        Scores {
            scale: self.config.attention_scale as f32,
            softcap: self.config.attn_logit_softcapping.map(|cap| cap as f32),
            window: self.config.sliding_windows[layer],
            bf16,
        }
    }

    fn final_softcap(&self) -> Option<f32> {
        self.config.final_logit_softcapping.map(|cap| cap as f32)
    }

    fn norm_constants(&self) -> Norm {
        Norm { epsilon: self.config.rms_norm_eps, unit_offset: self.config.unit_offset_norm }
    }

    /// The rotary table of each layer.
    fn rotary(&self, first_position: usize, positions: usize) -> Vec<RotaryTable> {
        let table = |rope| RotaryTable::new(rope, first_position, positions);
        let full = table(&self.config.rope);
        let sliding = self.config.sliding_rope.as_ref().map_or_else(|| full.clone(), table);
        let of_layer = |window: &Option<usize>| if window.is_some() { &sliding } else { &full };
        self.config.sliding_windows.iter().map(|window| of_layer(window).clone()).collect()
    }
}
