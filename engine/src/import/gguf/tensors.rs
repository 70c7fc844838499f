//! Tensors of a GGUF → `model.safetensors` in Hugging Face's names and layout, as f32.

use std::io::{Read, Seek};
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use serde_json::{Value, json};

use super::metadata::Metadata;
use super::model::Llama;
use crate::error::EngineError;
use crate::export::safetensors::{TensorShape, write_streamed};
use crate::models::config::ModelConfig;
use crate::models::rope;

/// Divisors of the rotary frequencies, which Hugging Face keeps as parameters of a formula.
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";
/// The untied output head.
const HEAD: &str = "output.weight";

/// One tensor's way.
struct Move {
    from: String,
    to: TensorShape,
    /// Heads among which the rows were permuted, for q and k.
    permuted_heads: Option<usize>,
}

/// Which tensor becomes which; made before anything is written.
pub(super) struct Plan {
    moves: Vec<Move>,
}

impl Plan {
    /// Lists every tensor of the architecture, each of which must be there in its shape, and
    /// refuses a file that holds others: a weight left out would be a wrong model.
    pub(super) fn new(
        metadata: &Metadata,
        model: &Llama,
        content: &Content,
    ) -> Result<Self, EngineError> {
        let mut moves = Vec::new();
        let mut add = |from: String, to: String, shape: &[usize], permuted_heads| {
            let to = TensorShape { name: to, shape: shape.to_vec() };
            moves.push(Move { from, to, permuted_heads });
        };
        let (hidden, inner) = (model.hidden, model.intermediate);
        let queries = model.heads * model.head_dim;
        let keys = model.key_value_heads * model.head_dim;
        let embedding = [model.vocabulary, hidden];
        add("token_embd.weight".into(), "model.embed_tokens.weight".into(), &embedding, None);
        for layer in 0..model.layers {
            for (from, to, shape, permuted_heads) in [
                ("attn_norm", "input_layernorm", &[hidden][..], None),
                ("attn_q", "self_attn.q_proj", &[queries, hidden], Some(model.heads)),
                ("attn_k", "self_attn.k_proj", &[keys, hidden], Some(model.key_value_heads)),
                ("attn_v", "self_attn.v_proj", &[keys, hidden], None),
                ("attn_output", "self_attn.o_proj", &[hidden, queries], None),
                ("ffn_norm", "post_attention_layernorm", &[hidden], None),
                ("ffn_gate", "mlp.gate_proj", &[inner, hidden], None),
                ("ffn_up", "mlp.up_proj", &[inner, hidden], None),
                ("ffn_down", "mlp.down_proj", &[hidden, inner], None),
            ] {
                let from = format!("blk.{layer}.{from}.weight");
                add(from, format!("model.layers.{layer}.{to}.weight"), shape, permuted_heads);
            }
        }
        add("output_norm.weight".into(), "model.norm.weight".into(), &[hidden], None);
        if content.tensor_infos.contains_key(HEAD) {
            add(HEAD.into(), "lm_head.weight".into(), &embedding, None);
        }
        let plan = Self { moves };
        plan.check(metadata, content)?;
        Ok(plan)
    }

    fn check(&self, metadata: &Metadata, content: &Content) -> Result<(), EngineError> {
        for Move { from, to, .. } in &self.moves {
            let Some(info) = content.tensor_infos.get(from) else {
                return Err(metadata.error(format_args!("there is no tensor {from}")));
            };
            if info.shape.dims() != to.shape {
                return Err(metadata.error(format_args!(
                    "tensor {from} has the shape {:?} where the metadata says {:?}",
                    info.shape.dims(),
                    to.shape
                )));
            }
        }
        let known = |name: &str| {
            name == ROPE_FREQUENCIES || self.moves.iter().any(|tensor| tensor.from == name)
        };
        match content.tensor_infos.keys().filter(|name| !known(name)).min() {
            Some(name) => Err(metadata.error(format_args!(
                "tensor {name} has no place in the Llama architecture as this engine computes it"
            ))),
            None => Ok(()),
        }
    }

    /// Whether the embedding is the output head too.
    pub(super) fn tied_head(&self) -> bool {
        !self.moves.iter().any(|tensor| tensor.from == HEAD)
    }

    /// Dequantises tensor by tensor into the file `path`.
    pub(super) fn write(
        &self,
        metadata: &Metadata,
        content: &Content,
        reader: &mut (impl Read + Seek),
        path: &Path,
    ) -> Result<(), EngineError> {
        let shapes: Vec<TensorShape> = self.moves.iter().map(|tensor| tensor.to.clone()).collect();
        write_streamed(path, &shapes, |index| {
            let Move { from, to, permuted_heads } = &self.moves[index];
            let values = dequantise(content, reader, from)
                .map_err(|error| metadata.error(format_args!("tensor {from}: {error}")))?;
            Ok(match permuted_heads {
                Some(heads) => unpermute(&values, *heads, to.shape[0] / heads),
                None => values,
            })
        })
    }
}

fn dequantise(
    content: &Content,
    reader: &mut (impl Read + Seek),
    name: &str,
) -> Result<Vec<f32>, candle_core::Error> {
    let cpu = candle_core::Device::Cpu;
    content.tensor(reader, name, &cpu)?.dequantize(&cpu)?.flatten_all()?.to_vec1()
}

/// Undoes the permutation of q and k rows that llama.cpp needs for its rotary embedding.
///
/// Inside each head, llama.cpp lays the two halves that rotate together side by side: its row
/// `2j + k` is Hugging Face's row `k·head_dim/2 + j`.
fn unpermute(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let columns = values.len() / (heads * head_dim);
    let half = head_dim / 2;
    let mut rows = Vec::with_capacity(values.len());
    for head in 0..heads {
        for (k, j) in (0..2).flat_map(|k| (0..half).map(move |j| (k, j))) {
            let row = head * head_dim + 2 * j + k;
            rows.extend_from_slice(&values[row * columns..(row + 1) * columns]);
        }
    }
    rows
}

/// `rope_scaling` for `config.json`: null, linear, or llama3.
///
/// llama.cpp stores llama3's scaling as a table of divisors. The formula's parameters are those of
/// every published Llama 3 but for the factor, which the table's last entry is; a table that the
/// formula does not give back is refused.
pub(super) fn rope_scaling(
    metadata: &Metadata,
    model: &Llama,
    content: &Content,
    reader: &mut (impl Read + Seek),
) -> Result<Value, EngineError> {
    let kind = metadata.find_text("llama.rope.scaling.type")?.unwrap_or("none");
    let factor = match metadata.find_real("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => metadata.find_real("llama.rope.scale_linear")?,
    };
    let has_table = content.tensor_infos.contains_key(ROPE_FREQUENCIES);
    match (kind, factor) {
        ("none", _) if has_table => {
            let divisors = dequantise(content, reader, ROPE_FREQUENCIES)
                .map_err(|error| metadata.error(format_args!("{ROPE_FREQUENCIES}: {error}")))?;
            llama3_scaling(model, &divisors).ok_or_else(|| {
                metadata.error(format_args!(
                    "{ROPE_FREQUENCIES} is not the table of Llama 3's rotary scaling: import the \
                     model from its Hugging Face directory"
                ))
            })
        }
        ("none", _) => Ok(Value::Null),
        ("linear", Some(factor)) if !has_table => {
            Ok(json!({"rope_type": "linear", "factor": factor}))
        }
        _ => Err(metadata.error(format_args!(
            "rotary scaling {kind:?} (llama.rope.scaling.type) cannot be carried over: import the \
             model from its Hugging Face directory"
        ))),
    }
}

fn llama3_scaling(model: &Llama, divisors: &[f32]) -> Option<Value> {
    let scaling = json!({
        "rope_type": "llama3",
        "factor": divisors.last()?,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let frequencies = |scaling: &Value| -> Option<Vec<f64>> {
        let config = model.config_json(&Default::default(), true, scaling).to_string();
        Some(rope::frequencies(&ModelConfig::parse(&config).ok()?))
    };
    let (plain, scaled) = (frequencies(&Value::Null)?, frequencies(&scaling)?);
    let same = divisors.len() == plain.len()
        && plain.iter().zip(&scaled).zip(divisors).all(|((plain, scaled), &divisor)| {
            (plain / scaled - f64::from(divisor)).abs() <= 1e-3 * f64::from(divisor)
        });
    same.then_some(scaling)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What llama.cpp's converter does: `[heads, 2, half, columns]` with the middle two swapped.
    fn permute(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
        let columns = values.len() / (heads * head_dim);
        let half = head_dim / 2;
        let mut permuted = vec![0.0; values.len()];
        for (index, &value) in values.iter().enumerate() {
            let (row, column) = (index / columns, index % columns);
            let (head, k, j) = (row / head_dim, row % head_dim / half, row % half);
            permuted[(head * head_dim + 2 * j + k) * columns + column] = value;
        }
        permuted
    }

    #[test]
    fn unpermuting_undoes_the_permutation_with_fewer_kv_heads_than_heads_too() {
        for (heads, head_dim, columns) in [(4, 6, 5), (2, 6, 5), (1, 2, 1)] {
            let values: Vec<f32> = (0..heads * head_dim * columns).map(|v| v as f32).collect();
            let permuted = permute(&values, heads, head_dim);
            assert_eq!(unpermute(&permuted, heads, head_dim), values);
            assert!(head_dim == 2 || permuted != values);
        }
    }
}
