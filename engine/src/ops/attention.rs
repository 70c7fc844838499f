//! Rotary embedding and grouped causal self-attention, segment by segment.
//!
//! A row of the input holds the queries of H heads, then keys and values of K heads, each of width
//! D; query head h reads key head `h·K/H`. Within each segment, with R(t) the rotation of position
//! t (counted from the segment's start) that turns the pair (x[i], x[i + D/2]), as Hugging Face's
//! weights expect:
//!
//! ```text
//! q̂ = R·q,  k̂ = R·k
//! S = q̂·k̂ᵀ / √D, for keys not after the query,  P = softmax(S),  o = P·v
//! dv = Pᵀ·do,  dP = do·vᵀ,  dS = P ∘ (dP − ⟨do, o⟩) / √D
//! dq̂ = dS·k̂,  dk̂ = dSᵀ·q̂,  dq = Rᵀ·dq̂,  dk = Rᵀ·dk̂
//! ```
//!
//! Segments never meet, so nothing is masked but the future, and no matrix spans two segments. But
//! a segment may continue an earlier one, its prefix: it then sees the prefix's k̂ and v before its
//! own, counts its positions on from there, and adds its share to the prefix's dk̂ and dv.
//! P is computed again in the backward pass from each row's log Σ exp (Dao 2023).

use std::ops::Range;

use burn::tensor::{Bool, Tensor, TensorData, activation};

use super::{cpu, on_cpu};
use crate::batch::Segment;
use crate::models::rope::RotaryTable;

/// How many heads there are, and how wide each is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    /// H.
    pub(crate) query: usize,
    /// K, a divisor of H.
    pub(crate) key_value: usize,
    /// D, even.
    pub(crate) dim: usize,
}

impl Heads {
    /// Width of all queries, and of the output.
    pub(crate) fn query_width(self) -> usize {
        self.query * self.dim
    }

    /// Width of all keys, and of all values.
    pub(crate) fn key_value_width(self) -> usize {
        self.key_value * self.dim
    }

    /// Width of an input row.
    pub(crate) fn qkv_width(self) -> usize {
        self.query_width() + 2 * self.key_value_width()
    }

    /// How many query heads read one key head.
    pub(super) fn group(self) -> usize {
        self.query / self.key_value
    }
}

/// `qkv` `[tokens, (H + 2K)·D]` to `[tokens, H·D]`. The segments cover the tokens in order; row t
/// of `rotary` is the rotation of position t.
pub(crate) fn attention(
    qkv: Tensor<2>,
    heads: Heads,
    segments: &[Segment],
    rotary: &RotaryTable,
) -> Tensor<2> {
    if on_cpu(&qkv) {
        cpu::attention::attention(qkv, heads, segments, rotary)
    } else {
        portable(qkv, heads, segments, rotary)
    }
}

pub(super) fn portable(
    qkv: Tensor<2>,
    heads: Heads,
    segments: &[Segment],
    rotary: &RotaryTable,
) -> Tensor<2> {
    let rows = |tokens: Range<usize>| qkv.clone().slice([tokens, 0..heads.qkv_width()]);
    let outputs = segments
        .iter()
        .map(|Segment { tokens, prefix }| {
            let mut all = rows(tokens.clone());
            if !prefix.is_empty() {
                all = Tensor::cat(vec![rows(prefix.clone()), all], 0);
            }
            let (q, k, v) = rotated(all, heads, rotary);
            let context = prefix.len() + tokens.len();
            let q = q.slice([0..heads.query, prefix.len()..context, 0..heads.dim]);
            attend(q, k, v)
        })
        .collect();
    Tensor::cat(outputs, 0)
}

/// Keys and values of the tokens so far, `[K, tokens, D]`.
#[derive(Debug, Clone)]
pub(crate) struct KeyValues {
    keys: Tensor<3>,
    values: Tensor<3>,
}

/// Attention of new tokens to themselves and to those of `cache`, which grows by them. The rows of
/// `rotary` are the new tokens'. For generation: no gradients, one segment.
pub(crate) fn extend(
    qkv: Tensor<2>,
    heads: Heads,
    rotary: &RotaryTable,
    cache: &mut Option<KeyValues>,
) -> Tensor<2> {
    let (q, mut keys, mut values) = rotated(qkv, heads, rotary);
    if let Some(earlier) = cache.take() {
        keys = Tensor::cat(vec![earlier.keys, keys], 1);
        values = Tensor::cat(vec![earlier.values, values], 1);
    }
    *cache = Some(KeyValues { keys: keys.clone(), values: values.clone() });
    attend(q, keys, values)
}

/// Splits rows into heads: q̂ `[H, n, D]`, k̂ and v `[K, n, D]`.
fn rotated(
    qkv: Tensor<2>,
    heads: Heads,
    rotary: &RotaryTable,
) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
    let tokens = qkv.dims()[0];
    let device = qkv.device();
    let by_head = |first: usize, count: usize| {
        qkv.clone()
            .slice([0..tokens, first..first + count * heads.dim])
            .reshape([tokens, count, heads.dim])
            .swap_dims(0, 1)
    };
    let half = heads.dim / 2;
    let table = |values: &[f32]| {
        let values = values[..tokens * half].to_vec();
        let half_table: Tensor<3> =
            Tensor::from_data(TensorData::new(values, [1, tokens, half]), &device);
        Tensor::cat(vec![half_table.clone(), half_table], 2)
    };
    let (cos, sin) = rotary.values();
    let (cos, sin) = (table(cos), table(sin));
    let rotate = |x: Tensor<3>| {
        let [count, ..] = x.dims();
        let first = x.clone().slice([0..count, 0..tokens, 0..half]);
        let second = x.clone().slice([0..count, 0..tokens, half..heads.dim]);
        x * cos.clone() + Tensor::cat(vec![second.neg(), first], 2) * sin.clone()
    };
    let q = by_head(0, heads.query);
    let k = by_head(heads.query_width(), heads.key_value);
    let v = by_head(heads.query_width() + heads.key_value_width(), heads.key_value);
    (rotate(q), rotate(k), v)
}

/// Causal attention where the queries are the last of the keys: `[n, H·D]`.
fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> Tensor<2> {
    let [query_heads, queries, dim] = q.dims();
    let [key_heads, keys, _] = k.dims();
    let group = query_heads / key_heads;
    let shared = |x: Tensor<3>| {
        x.reshape([key_heads, 1, keys, dim]).repeat_dim(1, group).reshape([query_heads, keys, dim])
    };
    let future =
        Tensor::<2, Bool>::tril_mask([queries, keys], (keys - queries) as i64, &q.device());
    let scores = q
        .matmul(shared(k).transpose())
        .mul_scalar(1.0 / (dim as f64).sqrt())
        .mask_fill(future.reshape([1, queries, keys]), f32::NEG_INFINITY);
    activation::softmax(scores, 2)
        .matmul(shared(v))
        .swap_dims(0, 1)
        .reshape([queries, query_heads * dim])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_gradients_equal, random};
    use crate::parameter::read;

    fn assert_forms_equal(heads: Heads, lengths: &[usize]) {
        assert_segments_equal(heads, &segments(lengths));
    }

    fn assert_segments_equal(heads: Heads, segments: &[Segment]) {
        let tokens = segments.last().unwrap().tokens.end;
        let rotary = RotaryTable::from_frequencies(&frequencies(heads), 0, tokens);
        assert_gradients_equal(
            &[random([tokens, heads.qkv_width()], 5).mul_scalar(2.0)],
            |inputs| cpu::attention::attention(inputs[0].clone(), heads, segments, &rotary),
            |inputs| portable(inputs[0].clone(), heads, segments, &rotary),
        );
    }

    fn segments(lengths: &[usize]) -> Vec<Segment> {
        let mut end = 0;
        lengths
            .iter()
            .map(|length| {
                end += length;
                Segment::whole(end - length..end)
            })
            .collect()
    }

    fn frequencies(heads: Heads) -> Vec<f64> {
        (0..heads.dim / 2).map(|pair| 0.5f64.powi(pair as i32)).collect()
    }

    #[test]
    fn grouped_heads_over_segments_down_to_one_token() {
        assert_forms_equal(Heads { query: 6, key_value: 2, dim: 8 }, &[5, 1, 9]);
    }

    #[test]
    fn segments_that_continue_an_earlier_one() {
        let heads = Heads { query: 6, key_value: 2, dim: 8 };
        let mut segments = segments(&[4, 5, 1, 3, 2, 200]);
        segments[2].prefix = 4..9;
        segments[3].prefix = 4..9;
        segments[5].prefix = 0..4;
        assert_segments_equal(heads, &segments);
    }

    #[test]
    fn a_segment_after_its_prefix_sees_what_the_whole_row_shows() {
        let heads = Heads { query: 4, key_value: 2, dim: 4 };
        let qkv = random([7, heads.qkv_width()], 9);
        let rotary = RotaryTable::from_frequencies(&frequencies(heads), 0, 7);
        let whole = cpu::attention::attention(qkv.clone(), heads, &segments(&[7]), &rotary);
        let mut parts = segments(&[3, 4]);
        parts[1].prefix = 0..3;
        let parts = cpu::attention::attention(qkv, heads, &parts, &rotary);
        assert_close("o", &read(parts).unwrap(), &read(whole).unwrap());
    }

    #[test]
    fn one_head_of_the_least_width() {
        assert_forms_equal(Heads { query: 1, key_value: 1, dim: 2 }, &[1]);
        assert_forms_equal(Heads { query: 1, key_value: 1, dim: 2 }, &[3]);
    }

    #[test]
    fn segment_of_several_query_blocks() {
        assert_forms_equal(Heads { query: 3, key_value: 1, dim: 6 }, &[7, 300]);
    }

    #[test]
    fn tokens_added_one_by_one_see_what_a_whole_sequence_sees() {
        let heads = Heads { query: 4, key_value: 2, dim: 4 };
        let qkv = random([6, heads.qkv_width()], 8);
        let frequencies = frequencies(heads);
        let whole = RotaryTable::from_frequencies(&frequencies, 0, 6);
        let expected = portable(qkv.clone(), heads, &segments(&[6]), &whole);
        let mut cache = None;
        let mut outputs = Vec::new();
        for rows in [0..3, 3..4, 4..6] {
            let rotary = RotaryTable::from_frequencies(&frequencies, rows.start, rows.len());
            outputs.push(extend(qkv.clone().slice([rows]), heads, &rotary, &mut cache));
        }
        let output = read(Tensor::cat(outputs, 0)).unwrap();
        assert_close("output", &output, &read(expected).unwrap());
    }
}
