//! Normalisation of queries and keys, head by head, before they are rotated (Qwen3, Gemma 3).
//!
//! Each head of a query and of a key is a row of [`super::rms_norm`], all queries with one weight
//! and all keys with another; values pass as they are.

use burn::tensor::Tensor;

use super::attention::Heads;
use super::rms_norm::{self, Norm};
use super::{cpu, on_cpu};

/// Normalises the queries and keys in `qkv` `[tokens, (H + 2K)·D]`; the weights are `[1, D]`.
pub(crate) fn head_norm(
    qkv: Tensor<2>,
    query_weight: Tensor<2>,
    key_weight: Tensor<2>,
    heads: Heads,
    norm: Norm,
) -> Tensor<2> {
    if on_cpu(&qkv) {
        cpu::head_norm::head_norm(qkv, query_weight, key_weight, heads, norm)
    } else {
        portable(qkv, query_weight, key_weight, heads, norm)
    }
}

pub(super) fn portable(
    qkv: Tensor<2>,
    query_weight: Tensor<2>,
    key_weight: Tensor<2>,
    heads: Heads,
    norm: Norm,
) -> Tensor<2> {
    let [tokens, width] = qkv.dims();
    let keys = heads.query_width()..heads.query_width() + heads.key_value_width();
    let normalised = |columns: std::ops::Range<usize>, weight| {
        let count = columns.len() / heads.dim;
        let rows = qkv.clone().slice([0..tokens, columns]).reshape([tokens * count, heads.dim]);
        rms_norm::portable(rows, weight, norm).reshape([tokens, count * heads.dim])
    };
    let q = normalised(0..keys.start, query_weight);
    let k = normalised(keys.clone(), key_weight);
    Tensor::cat(vec![q, k, qkv.clone().slice([0..tokens, keys.end..width])], 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients_equal, random};

    #[test]
    fn cpu_form_equals_the_portable_form() {
        let heads = Heads { query: 6, key_value: 2, dim: 10 };
        // 150 tokens: more than one block of rows that threads share.
        for tokens in [1, 5, 150] {
            for unit_offset in [false, true] {
                let norm = Norm { epsilon: 1e-5, unit_offset };
                let call = |form: fn(_, _, _, _, _) -> Tensor<2>, inputs: &[Tensor<2>]| {
                    let [qkv, q, k] = [0, 1, 2].map(|i| inputs[i].clone());
                    form(qkv, q, k, heads, norm)
                };
                assert_gradients_equal(
                    &[
                        random([tokens, heads.qkv_width()], 1),
                        random([1, 10], 2),
                        random([1, 10], 3),
                    ],
                    |inputs| call(cpu::head_norm::head_norm, inputs),
                    |inputs| call(portable, inputs),
                );
            }
        }
    }
}
