//! From a model directory to a decoder with its parameters.

use std::path::Path;

use burn::tensor::{DType, Tensor, TensorData};
use half::bf16;
use tunesmith_core::hyperparameters::{AdapterConfig, AdapterType, Precision, target_modules_of};

use super::config::ModelConfig;
use super::decoder::{AdaptedModule, Adapter, Decoder, HeadNorms, Layer, Projection};
use super::weights::WeightFiles;
use crate::adapters::lora::{Lora, magnitude_name, row_lengths, tensor_name};
use crate::adapters::pissa::{Start, residual};
use crate::device::Device;
use crate::error::EngineError;
use crate::ops::bf16::is_bf16;
use crate::ops::quantized::{BlockFormat, QuantizedMatrix};
use crate::parameter::{NamedRows, NamedSource, ParameterId, Parameters};

/// Builds the decoder of `dir`, and what `adapter` trains of it. With `bf16`, products multiply
/// that, and frozen matrices are stored so. A run that goes on with PiSSA has in `start` the A₀ and
/// B₀ that it began with, by their names.
pub(crate) fn load(
    dir: &Path,
    adapter: &AdapterConfig,
    seed: u64,
    device: &Device,
    bf16: bool,
    start: Option<NamedSource>,
) -> Result<(Decoder, Parameters), EngineError> {
    let config = ModelConfig::read(dir)?;
    let lora = match adapter.kind {
        AdapterType::Lora => Some(Lora::new(adapter, seed)?),
        AdapterType::Full => None,
    };
    let loader = Loader {
        weights: WeightFiles::open(dir)?,
        parameters: Parameters::new(bf16),
        blocks: lora.as_ref().and_then(|_| BlockFormat::of(adapter.quantization)),
        lora,
        trained: Trained::of(adapter, config.num_hidden_layers)?,
        trains: false,
        start,
        device,
        bf16,
        bf16_where_equal: false,
        only_answers: false,
    };
    loader.finish(config)
}

/// Builds the decoder of `dir` to answer and not to learn: its matrices are kept for that. They are
/// stored in bf16 when that is asked for, and with `Auto` where it loses nothing.
pub(crate) fn load_frozen(
    dir: &Path,
    device: &Device,
    precision: Precision,
) -> Result<(Decoder, Parameters), EngineError> {
    let config = ModelConfig::read(dir)?;
    let loader = Loader {
        weights: WeightFiles::open(dir)?,
        parameters: Parameters::new(false),
        lora: None,
        blocks: None,
        trained: Trained::nothing(config.num_hidden_layers),
        trains: false,
        start: None,
        device,
        bf16: precision == Precision::Bf16,
        bf16_where_equal: precision == Precision::Auto,
        only_answers: true,
    };
    loader.finish(config)
}

struct Loader<'a> {
    weights: WeightFiles,
    parameters: Parameters,
    /// None for full fine-tuning.
    lora: Option<Lora>,
    /// What frozen projections are kept in; None for numbers.
    blocks: Option<BlockFormat>,
    trained: Trained,
    /// Whether the weights that are being read train.
    trains: bool,
    /// Where the adapter of a run that goes on started.
    start: Option<NamedSource>,
    device: &'a Device,
    bf16: bool,
    /// Whether a frozen matrix is stored in bf16 when all of its values are numbers of bf16.
    bf16_where_equal: bool,
    /// Whether matrices are kept as answers read them.
    only_answers: bool,
}

/// What trains of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Trained {
    /// The weights themselves, and not an adapter beside them.
    weights: bool,
    /// Embedding and head too.
    vocabulary: bool,
    /// The first decoder layer that trains.
    first_layer: usize,
}

impl Trained {
    fn nothing(layers: usize) -> Self {
        Self { weights: false, vocabulary: false, first_layer: layers }
    }

    fn of(adapter: &AdapterConfig, layers: usize) -> Result<Self, EngineError> {
        let last = adapter.trainable_layers;
        if let Some(rule) = adapter.too_many_layers(layers) {
            return Err(EngineError::Adapter(format!("trainable_layers is {last}: use {rule}")));
        }
        let weights = adapter.kind == AdapterType::Full;
        Ok(Self {
            weights,
            vocabulary: weights && last == 0,
            first_layer: adapter.first_trained_layer(layers),
        })
    }
}

/// One projection inside a stored matrix.
struct Module {
    /// As [`target_modules_of`] knows it.
    name: &'static str,
    outputs: usize,
}

impl Loader<'_> {
    /// Builds the model, of which nothing may be left over.
    fn finish(mut self, config: ModelConfig) -> Result<(Decoder, Parameters), EngineError> {
        let decoder = self.decoder(config)?;
        self.weights.finish()?;
        self.start.map_or(Ok(()), NamedSource::finish)?;
        Ok((decoder, self.parameters))
    }

    fn decoder(&mut self, config: ModelConfig) -> Result<Decoder, EngineError> {
        let shape = [config.vocab_size, config.hidden_size];
        let trained = self.trained;
        self.trains = trained.vocabulary;
        let embedding = self.matrix("model.embed_tokens.weight", shape)?;
        if config.tie_word_embeddings {
            self.keep_for_answers(embedding);
        }
        let layers = (0..config.num_hidden_layers)
            .map(|layer| self.layer(&config, layer))
            .collect::<Result<_, _>>()?;
        self.trains = trained.weights;
        let norm = self.norm("model.norm.weight", config.hidden_size)?;
        self.trains = trained.vocabulary;
        let head = if config.tie_word_embeddings {
            self.check_tied_head(embedding, shape)?;
            embedding
        } else {
            let head = self.matrix(HEAD, shape)?;
            self.keep_for_answers(head);
            head
        };
        let first_trained_layer = trained.first_layer;
        let lora = self.lora.clone();
        Ok(Decoder::new(config, embedding, layers, norm, head, lora, first_trained_layer))
    }

    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer, EngineError> {
        let prefix = format!("model.layers.{layer}");
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let query_width = config.num_attention_heads * config.head_dim;
        let key_value_width = config.num_key_value_heads * config.head_dim;
        let module = |name, outputs| Module { name, outputs };
        let qkv = match config.fused_projections {
            true => vec![module("qkv_proj", query_width + 2 * key_value_width)],
            false => vec![
                module("q_proj", query_width),
                module("k_proj", key_value_width),
                module("v_proj", key_value_width),
            ],
        };
        let gate_up = match config.fused_projections {
            true => vec![module("gate_up_proj", 2 * inner)],
            false => vec![module("gate_proj", inner), module("up_proj", inner)],
        };
        let (output, down) = ([module("o_proj", hidden)], [module("down_proj", hidden)]);
        let norm_name = |norm: &str| format!("{prefix}.{norm}.weight");
        // With post norms, Gemma's names for what Llama calls post_attention_layernorm.
        let (post_attention_norm, feed_forward_norm, post_feed_forward_norm) =
            match config.post_norms {
                true => (
                    Some("post_attention_layernorm"),
                    "pre_feedforward_layernorm",
                    Some("post_feedforward_layernorm"),
                ),
                false => (None, "post_attention_layernorm", None),
            };
        let post_norm = |loader: &mut Self, norm: Option<&str>| {
            norm.map(|norm| loader.norm(&norm_name(norm), hidden)).transpose()
        };
        self.trains = self.trained.weights && layer >= self.trained.first_layer;
        Ok(Layer {
            attention_norm: self.norm(&norm_name("input_layernorm"), hidden)?,
            qkv: self.projection(layer, "self_attn", hidden, &qkv, config.qkv_bias)?,
            head_norms: match config.head_norm {
                true => Some(HeadNorms {
                    query: self.norm(&norm_name("self_attn.q_norm"), config.head_dim)?,
                    key: self.norm(&norm_name("self_attn.k_norm"), config.head_dim)?,
                }),
                false => None,
            },
            output: self.projection(
                layer,
                "self_attn",
                query_width,
                &output,
                config.output_bias,
            )?,
            post_attention_norm: post_norm(self, post_attention_norm)?,
            feed_forward_norm: self.norm(&norm_name(feed_forward_norm), hidden)?,
            gate_up: self.projection(layer, "mlp", hidden, &gate_up, config.feed_forward_bias)?,
            down: self.projection(layer, "mlp", inner, &down, config.feed_forward_bias)?,
            post_feed_forward_norm: post_norm(self, post_feed_forward_norm)?,
        })
    }

    /// Projections of one input, stored as one matrix, with the adapters of those that have one.
    fn projection(
        &mut self,
        layer: usize,
        block: &str,
        inputs: usize,
        modules: &[Module],
        has_bias: bool,
    ) -> Result<Projection, EngineError> {
        let path = |module: &Module| format!("model.layers.{layer}.{block}.{}", module.name);
        let lora = self.lora.clone().filter(|_| layer >= self.trained.first_layer);
        let is_adapted = |module: &Module| match &lora {
            Some(lora) => lora.adapts_all(target_modules_of(module.name), module.name),
            None => Ok(false),
        };
        let (mut magnitudes, mut starts) = (Vec::new(), Vec::new());
        let mut quantized = self.blocks.map(|format| QuantizedMatrix::new(format, inputs));
        let mut values = Vec::new();
        let mut names = Vec::new();
        let mut end = 0;
        for module in modules {
            let name = format!("{}.weight", path(module));
            let shape = [module.outputs, inputs];
            let mut weight = self.weights.take(&name, &shape)?;
            if let Some(lora) = lora.as_ref().filter(|lora| lora.pissa)
                && is_adapted(module)?
            {
                let index = target_modules_of(module.name).start;
                let start = self.start(lora, &path(module), &weight, shape, (layer, index))?;
                weight = residual(weight, shape, &start, lora.scale, self.device.burn())?;
                starts.push(start);
            }
            let has_magnitudes = lora.as_ref().is_some_and(|lora| lora.dora) && is_adapted(module)?;
            if let Some(quantized) = &mut quantized {
                check_finite(&weight, &name)?;
                quantized.push_rows(&weight);
            }
            if has_magnitudes {
                // The lengths are those of the weight as it is stored.
                match &quantized {
                    Some(quantized) => quantized.decode_rows(end, &mut weight),
                    None if self.bf16 => round_to_bf16(&mut weight),
                    None => {}
                }
                magnitudes.extend(row_lengths(&weight, inputs, &name)?);
            }
            if quantized.is_some() {
                // The numbers are let go of, module by module.
            } else if values.is_empty() {
                values = weight
            } else {
                values.extend(weight)
            }
            let rows = end..end + module.outputs;
            end = rows.end;
            names.push(NamedRows { name, rows, shape: shape.to_vec() });
        }
        let weight = match quantized {
            Some(quantized) => self.parameters.push_blocks(quantized, self.device.burn()),
            None => self.push(values, [end, inputs], self.trains, names.clone()),
        };
        self.keep_for_answers(weight);
        let bias = if has_bias {
            let paths = modules.iter().map(|module| (path(module), module.outputs));
            Some(self.bias(paths.collect())?)
        } else {
            None
        };

        let Some(lora) = &lora else {
            return Ok(Projection { weight, bias, adapter: None });
        };
        let (mut a, mut a_names, mut b_names, mut parts) = (vec![], vec![], vec![], vec![]);
        let (mut b, mut magnitude_names) = (vec![], vec![]);
        let mut starts = starts.into_iter();
        let mut b_end = 0;
        for (module, stored) in modules.iter().zip(names) {
            // The first stands for all in what is drawn by module.
            let index = target_modules_of(module.name).start;
            if !is_adapted(module)? {
                continue;
            }
            let start = starts.next().unwrap_or_else(|| Start {
                a: lora.initial_a(layer, index, inputs),
                b: vec![0.0; module.outputs * lora.rank],
            });
            a.extend(start.a);
            b.extend(start.b);
            a_names.push(NamedRows {
                name: tensor_name(&path(module), 'A'),
                rows: a_names.len() * lora.rank..(a_names.len() + 1) * lora.rank,
                shape: vec![lora.rank, inputs],
            });
            b_names.push(NamedRows {
                name: tensor_name(&path(module), 'B'),
                rows: b_end..b_end + module.outputs,
                shape: vec![module.outputs, lora.rank],
            });
            magnitude_names.push(NamedRows {
                name: magnitude_name(&path(module)),
                rows: b_end..b_end + module.outputs,
                shape: vec![module.outputs],
            });
            b_end += module.outputs;
            parts.push(AdaptedModule { module: index, outputs: stored.rows });
        }
        if parts.is_empty() {
            return Ok(Projection { weight, bias, adapter: None });
        }
        let a = self.push(a, [parts.len() * lora.rank, inputs], true, a_names);
        let b = self.push(b, [b_end, lora.rank], true, b_names);
        self.parameters.set_learning_rate_factor(b, lora.learning_rate_ratio);
        // As in PEFT, LoRA+ speeds up magnitudes with B.
        let magnitude = lora.dora.then(|| {
            let magnitude = self.push(magnitudes, [b_end, 1], true, magnitude_names);
            self.parameters.set_learning_rate_factor(magnitude, lora.learning_rate_ratio);
            magnitude
        });
        Ok(Projection { weight, bias, adapter: Some(Adapter { a, b, magnitude, parts }) })
    }

    /// Where the adapter of the module at `path` starts with PiSSA: where the run once began, or at
    /// the principal part of its weight.
    fn start(
        &mut self,
        lora: &Lora,
        path: &str,
        weight: &[f32],
        shape: [usize; 2],
        place: (usize, usize),
    ) -> Result<Start, EngineError> {
        let [outputs, inputs] = shape;
        match &mut self.start {
            Some(known) => Ok(Start {
                a: known.take(&tensor_name(path, 'A'), &[lora.rank, inputs])?,
                b: known.take(&tensor_name(path, 'B'), &[outputs, lora.rank])?,
            }),
            None => lora.principal(weight, shape, place, self.device),
        }
    }

    /// The biases of modules, given by path and width, one below the other as one column.
    fn bias(&mut self, modules: Vec<(String, usize)>) -> Result<ParameterId, EngineError> {
        let (mut values, mut names) = (Vec::new(), Vec::new());
        for (path, width) in modules {
            let name = format!("{path}.bias");
            let rows = values.len()..values.len() + width;
            values.extend(self.weights.take(&name, &[width])?);
            names.push(NamedRows { name, rows, shape: vec![width] });
        }
        let shape = [values.len(), 1];
        Ok(self.push(values, shape, self.trains, names))
    }

    /// A matrix of the base model under its own name.
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<ParameterId, EngineError> {
        let values = self.weights.take(name, &shape)?;
        let names =
            vec![NamedRows { name: name.to_owned(), rows: 0..shape[0], shape: shape.to_vec() }];
        Ok(self.push(values, shape, self.trains, names))
    }

    /// A vector of the base model, stored as one row.
    fn norm(&mut self, name: &str, width: usize) -> Result<ParameterId, EngineError> {
        let values = self.weights.take(name, &[width])?;
        let names = vec![NamedRows { name: name.to_owned(), rows: 0..1, shape: vec![width] }];
        Ok(self.push(values, [1, width], self.trains, names))
    }

    /// A tied checkpoint may store the head as well; then it must be the embedding.
    fn check_tied_head(
        &mut self,
        embedding: ParameterId,
        shape: [usize; 2],
    ) -> Result<(), EngineError> {
        if !self.weights.contains(HEAD) {
            return Ok(());
        }
        let mut head = self.weights.take(HEAD, &shape)?;
        let embedding = self.parameters.stored(embedding);
        if is_bf16(&embedding) {
            round_to_bf16(&mut head);
        }
        if crate::parameter::read(embedding)? == head {
            return Ok(());
        }
        Err(EngineError::Model(format!(
            "weight {HEAD} differs from the embedding, but config.json has tie_word_embeddings"
        )))
    }

    /// Keeps a matrix that rows are multiplied by as that is done, where nothing else is.
    fn keep_for_answers(&mut self, weight: ParameterId) {
        if self.only_answers {
            self.parameters.keep_for_rows(weight);
        }
    }

    fn push(
        &mut self,
        values: Vec<f32>,
        shape: [usize; 2],
        trainable: bool,
        names: Vec<NamedRows>,
    ) -> ParameterId {
        // What trains stays f32, and so do vectors: norms are one row, biases one column. So does
        // what is frozen beside weights that train: it is exported with them, as it was.
        let is_kept = trainable || self.trained.weights;
        let in_bf16 = !is_kept
            && shape[0] > 1
            && shape[1] > 1
            && (self.bf16 || self.bf16_where_equal && values.iter().all(is_number_of_bf16));
        let value = if in_bf16 {
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            let options = (self.device.burn(), DType::BF16);
            Tensor::from_data(TensorData::new(values, shape), options)
        } else {
            Tensor::from_data(TensorData::new(values, shape), self.device.burn())
        };
        self.parameters.push(value, trainable, names)
    }
}

fn is_number_of_bf16(value: &f32) -> bool {
    bf16::from_f32(*value).to_f32().to_bits() == value.to_bits()
}

fn round_to_bf16(values: &mut [f32]) {
    values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
}

/// A block that holds a number that is none would lose all its others.
fn check_finite(weight: &[f32], name: &str) -> Result<(), EngineError> {
    match weight.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(EngineError::Model(format!(
            "weight {name} holds {value}, which cannot be quantized: fetch the model again"
        ))),
        None => Ok(()),
    }
}

const HEAD: &str = "lm_head.weight";

#[cfg(test)]
mod tests {
    use tunesmith_core::hyperparameters::Quantization;

    use super::*;
    use crate::batch::Batch;
    use crate::ops::dropout::DropoutKey;

    #[test]
    fn nothing_below_the_first_trained_layer_is_in_the_graph_or_gets_a_gradient() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/adapters/model");
        let full = AdapterConfig { trainable_layers: 1, ..AdapterConfig::full() };
        let lora = AdapterConfig { trainable_layers: 1, r: 3, ..AdapterConfig::default() };
        // Two norms, four stored matrices and the final norm; A and B beside the four.
        for (adapter, count) in [(full, 7), (lora, 8)] {
            let (decoder, mut parameters) =
                load(&dir, &adapter, 0, &Device::cpu(), false, None).unwrap();
            let batch = Batch::single(&[5, 6, 7, 8]);
            let mut tracked = Vec::new();
            let observe = |state: &Tensor<2>| tracked.push(state.is_tracked());
            decoder.hidden(&parameters, &batch, Some(DropoutKey::default()), observe);
            assert_eq!(tracked, [false, false, false, true], "embedding and three layers");

            let loss = decoder.loss(&parameters, &batch, None).unwrap().loss;
            parameters.accumulate(&mut loss.backward());
            let with_gradient = parameters.trainable().filter(|p| p.gradient().is_some()).count();
            assert_eq!((with_gradient, parameters.trainable().count()), (count, count));
        }
    }

    #[test]
    fn quantised_projections_are_nowhere_kept_as_numbers() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/families/llama");
        let elements = |quantization| {
            let adapter = AdapterConfig { quantization, r: 3, ..AdapterConfig::default() };
            load(&dir, &adapter, 0, &Device::cpu(), false, None).unwrap().1.elements()
        };
        // q, k, v and o: (40 + 20 + 20)·24 + 24·40; gate, up and down: 3·24·40.
        let projections = 3 * (80 * 24 + 24 * 40 + 3 * 24 * 40);
        for quantization in [Quantization::Int8, Quantization::Nf4] {
            assert_eq!(elements(Quantization::None) - elements(quantization), projections);
        }
    }
}
