//! From a model directory to a decoder with its parameters.

use std::path::Path;

use burn::tensor::{DType, Tensor, TensorData};
use half::bf16;
use tunesmith_core::hyperparameters::{AdapterConfig, AdapterType, target_modules_of};

use super::config::ModelConfig;
use super::decoder::{AdaptedModule, Adapter, Decoder, HeadNorms, Layer, Projection};
use super::weights::WeightFiles;
use crate::adapters::lora::{Lora, tensor_name};
use crate::device::Device;
use crate::error::EngineError;
use crate::ops::bf16::is_bf16;
use crate::parameter::{NamedRows, ParameterId, Parameters};

/// Builds the decoder of `dir`, and what `adapter` trains of it. With `bf16`, products multiply
/// that, and frozen matrices are stored so.
pub(crate) fn load(
    dir: &Path,
    adapter: &AdapterConfig,
    seed: u64,
    device: &Device,
    bf16: bool,
) -> Result<(Decoder, Parameters), EngineError> {
    let config = ModelConfig::read(dir)?;
    let lora = match adapter.kind {
        AdapterType::Lora => Some(Lora::new(adapter, seed)?),
        AdapterType::Full => None,
    };
    let mut loader = Loader {
        weights: WeightFiles::open(dir)?,
        parameters: Parameters::new(bf16),
        lora,
        device,
        bf16,
    };
    let decoder = loader.decoder(config)?;
    loader.weights.finish()?;
    Ok((decoder, loader.parameters))
}

struct Loader<'a> {
    weights: WeightFiles,
    parameters: Parameters,
    /// None for full fine-tuning.
    lora: Option<Lora>,
    device: &'a Device,
    bf16: bool,
}

/// One projection inside a stored matrix.
struct Module {
    /// As [`target_modules_of`] knows it.
    name: &'static str,
    outputs: usize,
}

impl Loader<'_> {
    fn decoder(&mut self, config: ModelConfig) -> Result<Decoder, EngineError> {
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = self.matrix("model.embed_tokens.weight", shape)?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| self.layer(&config, layer))
            .collect::<Result<_, _>>()?;
        let norm = self.norm("model.norm.weight", config.hidden_size)?;
        let head = if config.tie_word_embeddings {
            self.check_tied_head(embedding, shape)?;
            embedding
        } else {
            self.matrix(HEAD, shape)?
        };
        Ok(Decoder::new(config, embedding, layers, norm, head, self.lora.clone()))
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
        let mut values = Vec::new();
        let mut names = Vec::new();
        let mut end = 0;
        for module in modules {
            let name = format!("{}.weight", path(module));
            let shape = [module.outputs, inputs];
            let weight = self.weights.take(&name, &shape)?;
            if values.is_empty() {
                values = weight
            } else {
                values.extend(weight)
            }
            let rows = end..end + module.outputs;
            end = rows.end;
            names.push(NamedRows { name, rows, shape: shape.to_vec() });
        }
        let weight = self.push(values, [end, inputs], self.lora.is_none(), names.clone());
        let bias = if has_bias {
            let paths = modules.iter().map(|module| (path(module), module.outputs));
            Some(self.bias(paths.collect())?)
        } else {
            None
        };

        let Some(lora) = self.lora.clone() else {
            return Ok(Projection { weight, bias, adapter: None });
        };
        let (mut a, mut a_names, mut b_names, mut parts) = (vec![], vec![], vec![], vec![]);
        let mut b_end = 0;
        for (module, stored) in modules.iter().zip(names) {
            let targets = target_modules_of(module.name);
            // The first stands for all in what is drawn by module.
            let index = targets.start;
            if !lora.adapts_all(targets, module.name)? {
                continue;
            }
            a.extend(lora.initial_a(layer, index, inputs));
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
            b_end += module.outputs;
            parts.push(AdaptedModule { module: index, outputs: stored.rows });
        }
        if parts.is_empty() {
            return Ok(Projection { weight, bias, adapter: None });
        }
        let a = self.push(a, [parts.len() * lora.rank, inputs], true, a_names);
        let b = self.push(vec![0.0; b_end * lora.rank], [b_end, lora.rank], true, b_names);
        Ok(Projection { weight, bias, adapter: Some(Adapter { a, b, parts }) })
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
        Ok(self.push(values, shape, self.lora.is_none(), names))
    }

    /// A matrix of the base model under its own name.
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<ParameterId, EngineError> {
        let values = self.weights.take(name, &shape)?;
        let names =
            vec![NamedRows { name: name.to_owned(), rows: 0..shape[0], shape: shape.to_vec() }];
        Ok(self.push(values, shape, self.lora.is_none(), names))
    }

    /// A vector of the base model, stored as one row.
    fn norm(&mut self, name: &str, width: usize) -> Result<ParameterId, EngineError> {
        let values = self.weights.take(name, &[width])?;
        let names = vec![NamedRows { name: name.to_owned(), rows: 0..1, shape: vec![width] }];
        Ok(self.push(values, [1, width], self.lora.is_none(), names))
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
        let embedding = &self.parameters[embedding];
        if is_bf16(embedding) {
            head.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
        if crate::parameter::read(embedding.clone())? == head {
            return Ok(());
        }
        Err(EngineError::Model(format!(
            "weight {HEAD} differs from the embedding, but config.json has tie_word_embeddings"
        )))
    }

    fn push(
        &mut self,
        values: Vec<f32>,
        shape: [usize; 2],
        trainable: bool,
        names: Vec<NamedRows>,
    ) -> ParameterId {
        // What trains stays f32, and so do vectors: norms are one row, biases one column.
        let value = if self.bf16 && !trainable && shape[0] > 1 && shape[1] > 1 {
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            let options = (self.device.burn(), DType::BF16);
            Tensor::from_data(TensorData::new(values, shape), options)
        } else {
            Tensor::from_data(TensorData::new(values, shape), self.device.burn())
        };
        self.parameters.push(value, trainable, names)
    }
}

const HEAD: &str = "lm_head.weight";
