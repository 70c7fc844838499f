//! Tensors of a GGUF → `model.safetensors` in Hugging Face's names and layout, as f32.

use std::path::Path;

use super::file::{GgufFile, TensorInfo};
use super::metadata::Metadata;
use super::model::{Family, LONG_FACTORS, Model, ROPE_FREQUENCIES, SHORT_FACTORS};
use crate::error::EngineError;
use crate::export::safetensors::{TensorShape, write_pieces};

/// The untied output head.
const HEAD: &str = "output.weight";

/// Values that are dequantised at a time, but for a head of q or k, which is never cut.
const PIECE: usize = 1 << 20;

/// What a converter did to a tensor, and has to be undone.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    None,
    /// The rows were permuted among this many heads, for llama.cpp's rotary embedding.
    Permuted {
        heads: usize,
    },
    /// 1 was added.
    PlusOne,
}

/// One tensor's way.
struct Move {
    from: String,
    to: TensorShape,
    change: Change,
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
        model: &Model,
        file: &GgufFile,
    ) -> Result<Self, EngineError> {
        let (hidden, inner) = (model.hidden, model.intermediate);
        let queries = model.heads * model.head_dim;
        let keys = model.key_value_heads * model.head_dim;
        let norm =
            if model.family.norms_are_stored_plus_one() { Change::PlusOne } else { Change::None };
        let permuted = |heads| match model.family {
            Family::Llama => Change::Permuted { heads },
            _ => Change::None,
        };

        let mut layer = vec![("attn_norm.weight", "input_layernorm.weight", vec![hidden], norm)];
        if model.family == Family::Phi3 {
            layer.extend([
                (
                    "attn_qkv.weight",
                    "self_attn.qkv_proj.weight",
                    vec![queries + 2 * keys, hidden],
                    Change::None,
                ),
                ("ffn_up.weight", "mlp.gate_up_proj.weight", vec![2 * inner, hidden], Change::None),
            ]);
        } else {
            let (q, k) = (permuted(model.heads), permuted(model.key_value_heads));
            layer.extend([
                ("attn_q.weight", "self_attn.q_proj.weight", vec![queries, hidden], q),
                ("attn_k.weight", "self_attn.k_proj.weight", vec![keys, hidden], k),
                ("attn_v.weight", "self_attn.v_proj.weight", vec![keys, hidden], Change::None),
                ("ffn_gate.weight", "mlp.gate_proj.weight", vec![inner, hidden], Change::None),
                ("ffn_up.weight", "mlp.up_proj.weight", vec![inner, hidden], Change::None),
            ]);
            if model.attention_bias || model.family == Family::Qwen2 {
                layer.extend([
                    ("attn_q.bias", "self_attn.q_proj.bias", vec![queries], q),
                    ("attn_k.bias", "self_attn.k_proj.bias", vec![keys], k),
                    ("attn_v.bias", "self_attn.v_proj.bias", vec![keys], Change::None),
                ]);
            }
        }
        layer.extend([
            ("attn_output.weight", "self_attn.o_proj.weight", vec![hidden, queries], Change::None),
            ("ffn_down.weight", "mlp.down_proj.weight", vec![hidden, inner], Change::None),
        ]);
        if model.attention_bias {
            layer.push(("attn_output.bias", "self_attn.o_proj.bias", vec![hidden], Change::None));
        }
        if model.mlp_bias {
            layer.extend([
                ("ffn_gate.bias", "mlp.gate_proj.bias", vec![inner], Change::None),
                ("ffn_up.bias", "mlp.up_proj.bias", vec![inner], Change::None),
                ("ffn_down.bias", "mlp.down_proj.bias", vec![hidden], Change::None),
            ]);
        }
        if matches!(model.family, Family::Qwen3 | Family::Gemma3) {
            let width = vec![model.head_dim];
            layer.extend([
                ("attn_q_norm.weight", "self_attn.q_norm.weight", width.clone(), norm),
                ("attn_k_norm.weight", "self_attn.k_norm.weight", width, norm),
            ]);
        }
        // Gemma has a norm on either side of each block, the others one before it.
        let norms: &[(&str, &str)] = if model.family.is_gemma() {
            &[
                ("post_attention_norm.weight", "post_attention_layernorm.weight"),
                ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
                ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
            ]
        } else {
            &[("ffn_norm.weight", "post_attention_layernorm.weight")]
        };
        layer.extend(norms.iter().map(|&(from, to)| (from, to, vec![hidden], norm)));

        let mut moves = Vec::new();
        let mut add = |from: String, to: String, shape: &[usize], change| {
            moves.push(Move { from, to: TensorShape { name: to, shape: shape.to_vec() }, change });
        };
        let embedding = [model.vocabulary, hidden];
        add(
            "token_embd.weight".into(),
            "model.embed_tokens.weight".into(),
            &embedding,
            Change::None,
        );
        for number in 0..model.layers {
            for (from, to, shape, change) in &layer {
                add(
                    format!("blk.{number}.{from}"),
                    format!("model.layers.{number}.{to}"),
                    shape,
                    *change,
                );
            }
        }
        add("output_norm.weight".into(), "model.norm.weight".into(), &[hidden], norm);
        if file.tensors.contains_key(HEAD) {
            add(HEAD.into(), "lm_head.weight".into(), &embedding, Change::None);
        }
        let plan = Self { moves };
        plan.check(metadata, file)?;
        Ok(plan)
    }

    fn check(&self, metadata: &Metadata, file: &GgufFile) -> Result<(), EngineError> {
        for Move { from, to, .. } in &self.moves {
            let Some(info) = file.tensors.get(from) else {
                return Err(metadata.error(format_args!("there is no tensor {from}")));
            };
            if info.shape != to.shape {
                return Err(metadata.error(format_args!(
                    "tensor {from} has the shape {:?} where the metadata says {:?}",
                    info.shape, to.shape
                )));
            }
        }
        // The rotary tables have become a part of the config.
        let known = |name: &str| {
            [ROPE_FREQUENCIES, LONG_FACTORS, SHORT_FACTORS].contains(&name)
                || self.moves.iter().any(|tensor| tensor.from == name)
        };
        match file.tensors.keys().find(|name| !known(name)) {
            Some(name) => Err(metadata.error(format_args!(
                "tensor {name} has no place in the architecture as this engine computes it"
            ))),
            None => Ok(()),
        }
    }

    /// Whether the embedding is the output head too.
    pub(super) fn tied_head(&self) -> bool {
        !self.moves.iter().any(|tensor| tensor.from == HEAD)
    }

    /// Dequantises piece by piece into the file `path`.
    pub(super) fn write(&self, file: &GgufFile, path: &Path) -> Result<(), EngineError> {
        let shapes: Vec<TensorShape> = self.moves.iter().map(|tensor| tensor.to.clone()).collect();
        write_pieces(path, &shapes, |index, write| {
            let Move { from, change, .. } = &self.moves[index];
            let info = &file.tensors[from];
            let unit = unit(info, *change);
            let piece = (PIECE / unit).max(1) * unit;
            let mut values = vec![0.0; piece.min(info.elements())];
            for first in (0..info.elements()).step_by(piece) {
                let length = piece.min(info.elements() - first);
                let values = &mut values[..length];
                file.read(info, first, values)?;
                match change {
                    Change::None => write(values)?,
                    Change::PlusOne => {
                        values.iter_mut().for_each(|value| *value -= 1.0);
                        write(values)?;
                    }
                    Change::Permuted { heads } => {
                        write(&unpermute(values, info.shape[0] / heads, columns(info)))?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// Values in a row; 1 for a bias, whose every value belongs to a row of its weight.
fn columns(info: &TensorInfo) -> usize {
    info.shape.get(1).copied().unwrap_or(1)
}

/// Values that have to be read together: a block, or a head.
fn unit(info: &TensorInfo, change: Change) -> usize {
    match change {
        Change::Permuted { heads } => info.shape[0] / heads * columns(info),
        Change::None | Change::PlusOne => info.kind.block().values,
    }
}

/// Undoes the permutation of the rows of q and k that llama.cpp needs for its rotary embedding,
/// in whole heads.
///
/// Inside each head, llama.cpp lays the two halves that rotate together side by side: its row
/// `2j + k` is Hugging Face's row `k·head_dim/2 + j`.
fn unpermute(values: &[f32], head_dim: usize, columns: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let mut rows = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for (k, j) in (0..2).flat_map(|k| (0..half).map(move |j| (k, j))) {
            let row = 2 * j + k;
            rows.extend_from_slice(&head[row * columns..(row + 1) * columns]);
        }
    }
    rows
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
            assert_eq!(unpermute(&permuted, head_dim, columns), values);
            assert!(head_dim == 2 || permuted != values);
        }
    }
}
