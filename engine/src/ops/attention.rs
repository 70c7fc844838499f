//! Rotary embedding and grouped causal self-attention, segment by segment.
//!
//! A row of the input holds the queries of H heads, then keys and values of K heads, each of width
//! D; query head h reads key head `h·K/H`. Within each segment, with R(t) the rotation of position
//! t (counted from the segment's start) that turns the pair (x[i], x[i + N/2]) of a head's first N
//! elements (all D in most models), as Hugging Face's weights expect, with λ the scale (1 / √D in
//! most models) and c the softcap:
//!
//! ```text
//! q̂ = R·q,  k̂ = R·k
//! S = λ·q̂·k̂ᵀ,  Ŝ = c·tanh(S / c), or S where there is no cap
//! P = softmax(Ŝ) over the keys that are not after the query and within its window,  o = P·v
//! dv = Pᵀ·do,  dP = do·vᵀ,  dŜ = P ∘ (dP − ⟨do, o⟩),  dS = dŜ ∘ (1 − (Ŝ / c)²)
//! dq̂ = λ·dS·k̂,  dk̂ = λ·dSᵀ·q̂,  dq = Rᵀ·dq̂,  dk = Rᵀ·dk̂
//! ```
//!
//! Segments never meet, so nothing is masked but the future and what lies before the window, and
//! no matrix spans two segments; a block of queries is multiplied by the keys of its windows only.
//! But a segment may continue an earlier one, its prefix: it then sees the prefix's k̂ and v before
//! its own, counts its positions on from there, and adds its share to the prefix's dk̂ and dv.
//! P is computed again in the backward pass from each row's log Σ exp (Dao 2023).

use std::ops::Range;

use burn::tensor::{Bool, Tensor, TensorData, activation};

#[cfg(feature = "gpu")]
use super::gpu;
use super::product::product;
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

/// How scores are made of q̂·k̂ᵀ, and which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scores {
    /// λ.
    pub(crate) scale: f32,
    /// c; None for scores without a cap.
    pub(crate) softcap: Option<f32>,
    /// A query sees itself and the `window − 1` tokens before it; None for all of them.
    pub(crate) window: Option<usize>,
    /// Whether the CPU's products multiply bf16.
    pub(crate) bf16: bool,
}

impl Scores {
    /// The first key that the query at position `query` sees.
    pub(super) fn first_key(self, query: usize) -> usize {
        self.window.map_or(0, |window| (query + 1).saturating_sub(window))
    }
}

/// `qkv` `[tokens, (H + 2K)·D]` to `[tokens, H·D]`. The segments cover the tokens in order; row t
/// of `rotary` is the rotation of position t.
pub(crate) fn attention(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    segments: &[Segment],
    rotary: &RotaryTable,
) -> Tensor<2> {
    if on_cpu(&qkv) {
        cpu::attention::attention(qkv, heads, scores, segments, rotary)
    } else {
        elsewhere(qkv, heads, scores, segments, rotary)
    }
}

/// The form of a device that is not the CPU.
fn elsewhere(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    segments: &[Segment],
    rotary: &RotaryTable,
) -> Tensor<2> {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&qkv) {
        return gpu::attention::attention(qkv, heads, scores, segments, rotary);
    }
    portable(qkv, heads, scores, segments, rotary)
}

pub(super) fn portable(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
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
            let (q, k, v) = rotated(all, heads, rotary, 0);
            let context = prefix.len() + tokens.len();
            let q = q.slice([0..heads.query, prefix.len()..context, 0..heads.dim]);
            attend(q, k, v, scores)
        })
        .collect();
    Tensor::cat(outputs, 0)
}

/// Splits rows into heads: q̂ `[H, n, D]`, k̂ and v `[K, n, D]`. The first row is at position `first`.
pub(super) fn rotated(
    qkv: Tensor<2>,
    heads: Heads,
    rotary: &RotaryTable,
    first: usize,
) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
    let tokens = qkv.dims()[0];
    let device = qkv.device();
    let by_head = |first: usize, count: usize| {
        qkv.clone()
            .slice([0..tokens, first..first + count * heads.dim])
            .reshape([tokens, count, heads.dim])
            .swap_dims(0, 1)
    };
    let half = rotary.pairs();
    let table = |values: &[f32]| {
        let values = values[first * half..(first + tokens) * half].to_vec();
        let half_table: Tensor<3> =
            Tensor::from_data(TensorData::new(values, [1, tokens, half]), &device);
        Tensor::cat(vec![half_table.clone(), half_table], 2)
    };
    let (cos, sin) = rotary.values();
    let (cos, sin) = (table(cos), table(sin));
    let rotate = |x: Tensor<3>| {
        let first = x.clone().slice_dim(2, 0..half);
        let second = x.clone().slice_dim(2, half..2 * half);
        let turned = x.clone().slice_dim(2, 0..2 * half) * cos.clone()
            + Tensor::cat(vec![second.neg(), first], 2) * sin.clone();
        if 2 * half == heads.dim {
            return turned;
        }
        Tensor::cat(vec![turned, x.slice_dim(2, 2 * half..heads.dim)], 2)
    };
    let q = by_head(0, heads.query);
    let k = by_head(heads.query_width(), heads.key_value);
    let v = by_head(heads.query_width() + heads.key_value_width(), heads.key_value);
    (rotate(q), rotate(k), v)
}

/// Queries of one product with a window; a shorter block would be all overhead.
const WINDOW_BLOCK: usize = 128;

/// Causal attention where the queries are the last of the keys: `[n, H·D]`.
pub(super) fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, scores: Scores) -> Tensor<2> {
    let (queries, keys) = (q.dims()[1], k.dims()[1]);
    let Some(window) = scores.window.filter(|&window| window < keys) else {
        return attend_block(q, k, v, Scores { window: None, ..scores });
    };
    // Blocks about as long as the window: no more than half of a product is masked.
    let block = window.max(WINDOW_BLOCK);
    let earlier = keys - queries;
    let outputs = (0..queries)
        .step_by(block)
        .map(|start| {
            let end = queries.min(start + block);
            let seen = scores.first_key(earlier + start)..earlier + end;
            let (k, v) = (k.clone().slice_dim(1, seen.clone()), v.clone().slice_dim(1, seen));
            attend_block(q.clone().slice_dim(1, start..end), k, v, scores)
        })
        .collect();
    Tensor::cat(outputs, 0)
}

/// [`attend`] as one product.
fn attend_block(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, scores: Scores) -> Tensor<2> {
    let [query_heads, queries, dim] = q.dims();
    let [key_heads, keys, _] = k.dims();
    let group = query_heads / key_heads;
    let shared = |x: Tensor<3>| {
        x.reshape([key_heads, 1, keys, dim]).repeat_dim(1, group).reshape([query_heads, keys, dim])
    };
    let diagonal = (keys - queries) as i64;
    let device = q.device();
    let mut hidden = Tensor::<2, Bool>::tril_mask([queries, keys], diagonal, &device);
    if let Some(window) = scores.window {
        let first_seen = diagonal + 1 - window as i64;
        hidden = hidden.bool_or(Tensor::<2, Bool>::triu_mask([queries, keys], first_seen, &device));
    }
    let products = product(q, shared(k).transpose());
    let capped = match scores.softcap {
        Some(cap) => products.mul_scalar(scores.scale / cap).tanh().mul_scalar(cap),
        None => products.mul_scalar(scores.scale),
    };
    let capped = capped.mask_fill(hidden.reshape([1, queries, keys]), f32::NEG_INFINITY);
    product(activation::softmax(capped, 2), shared(v))
        .swap_dims(0, 1)
        .reshape([queries, query_heads * dim])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        Place, assert_close, assert_gradients_equal, on_flex, on_test_device, random,
    };
    use crate::parameter::read;

    fn plain(heads: Heads) -> Scores {
        Scores { scale: 1.0 / (heads.dim as f32).sqrt(), softcap: None, window: None, bf16: false }
    }

    fn assert_forms_equal(heads: Heads, lengths: &[usize]) {
        assert_segments_equal(heads, &segments(lengths));
    }

    fn assert_segments_equal(heads: Heads, segments: &[Segment]) {
        assert_scores_equal(heads, plain(heads), segments, &frequencies(heads));
    }

    fn assert_scores_equal(
        heads: Heads,
        scores: Scores,
        segments: &[Segment],
        frequencies: &[f64],
    ) {
        let tokens = segments.last().unwrap().tokens.end;
        let rotary = RotaryTable::from_frequencies(frequencies, 1.0, 0, tokens);
        assert_gradients_equal(
            &[random([tokens, heads.qkv_width()], 5).mul_scalar(2.0)],
            |inputs| cpu::attention::attention(inputs[0].clone(), heads, scores, segments, &rotary),
            |inputs| elsewhere(inputs[0].clone(), heads, scores, segments, &rotary),
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
        let rotary = RotaryTable::from_frequencies(&frequencies(heads), 1.0, 0, 7);
        for window in [None, Some(3), Some(6)] {
            let scores = Scores { window, ..plain(heads) };
            let attend = |segments: &[Segment]| {
                let qkv = qkv.clone();
                read(cpu::attention::attention(qkv, heads, scores, segments, &rotary)).unwrap()
            };
            let mut parts = segments(&[3, 4]);
            parts[1].prefix = 0..3;
            assert_close("o", &attend(&parts), &attend(&segments(&[7])));
        }
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
    fn window_over_several_query_blocks_down_to_the_query_alone() {
        let heads = Heads { query: 2, key_value: 1, dim: 4 };
        for window in [1, 2, 5, 128, 130, 1000] {
            let scores = Scores { window: Some(window), ..plain(heads) };
            let mut segments = segments(&[7, 300, 1, 9]);
            segments[3].prefix = 7..307;
            assert_scores_equal(heads, scores, &segments, &frequencies(heads));
        }
    }

    #[test]
    fn positions_restart_in_each_packed_document() {
        // Rotations act on distances and would not tell. Factors that grow with the position do.
        let heads = Heads { query: 4, key_value: 2, dim: 4 };
        let table = |first: usize| {
            let factors: Vec<f32> = (0..18).map(|i| 1.0 + 0.2 * (first + i / 2) as f32).collect();
            RotaryTable::from_values(&factors, &[0.0; 18], 2)
        };
        let (lengths, scores) = ([5, 1, 9], plain(heads));
        let qkv = random([15, heads.qkv_width()], 5);
        type Form = fn(Tensor<2>, Heads, Scores, &[Segment], &RotaryTable) -> Tensor<2>;
        let forms: [(Form, Place); 2] =
            [(cpu::attention::attention, on_flex), (elsewhere, on_test_device)];
        for (form, place) in forms {
            let qkv = place(qkv.clone());
            let packed =
                read(form(qkv.clone(), heads, scores, &segments(&lengths), &table(0))).unwrap();
            let alone = |first| -> Vec<f32> {
                let documents = segments(&lengths).into_iter().map(|segment| {
                    let rows = qkv.clone().slice([segment.tokens]);
                    let whole = segments(&[rows.dims()[0]]);
                    read(form(rows, heads, scores, &whole, &table(first))).unwrap()
                });
                documents.collect::<Vec<_>>().concat()
            };
            assert_close("output", &packed, &alone(0));
            let moved = packed.iter().zip(alone(1)).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(moved > 1e-3, "the table tells where a document begins: {moved}");
        }
    }

    #[test]
    fn window_hides_exactly_what_lies_before_it() {
        // Equal keys and a scale of 0: each query takes the mean of the values that it sees.
        let heads = Heads { query: 1, key_value: 1, dim: 2 };
        let scores = Scores { scale: 0.0, softcap: None, window: Some(3), bf16: false };
        let values = (0..6).flat_map(|t| [0.0, 0.0, 0.0, 0.0, t as f32, 1.0]).collect();
        let qkv = Tensor::from_data(
            TensorData::new(values, [6, heads.qkv_width()]),
            &burn::tensor::Device::flex(),
        );
        let rotary = RotaryTable::from_frequencies(&[1.0], 1.0, 0, 6);
        let means = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0];
        let expected: Vec<f32> = means.into_iter().flat_map(|mean| [mean, 1.0]).collect();
        let output =
            cpu::attention::attention(qkv.clone(), heads, scores, &segments(&[6]), &rotary);
        assert_close("CPU form", &read(output).unwrap(), &expected);
        let output = elsewhere(qkv, heads, scores, &segments(&[6]), &rotary);
        assert_close("portable form", &read(output).unwrap(), &expected);
    }

    #[test]
    fn softcap_scale_and_window_together() {
        let heads = Heads { query: 4, key_value: 2, dim: 6 };
        for window in [None, Some(4)] {
            // Scores of up to about 30 against a cap of 2: far into the flat of tanh, and near 0.
            let scores = Scores { scale: 2.5, softcap: Some(2.0), window, bf16: false };
            let mut segments = segments(&[9, 1, 140]);
            segments[2].prefix = 0..9;
            assert_scores_equal(heads, scores, &segments, &frequencies(heads));
        }
    }

    #[test]
    fn in_bf16_output_and_gradient_are_those_of_f32_to_bf16s_precision() {
        let heads = Heads { query: 6, key_value: 2, dim: 8 };
        let mut segments = segments(&[5, 1, 9, 200]);
        segments[3].prefix = 6..15;
        let tokens = 215;
        let rotary = RotaryTable::from_frequencies(&frequencies(heads), 1.0, 0, tokens);
        let qkv = random([tokens, heads.qkv_width()], 5);
        let pass = |bf16: bool| {
            let scores = Scores { bf16, window: Some(150), softcap: Some(3.0), ..plain(heads) };
            let qkv = qkv.clone().autodiff().require_grad();
            let o = cpu::attention::attention(qkv.clone(), heads, scores, &segments, &rotary);
            let upstream = random(o.dims(), 6).autodiff();
            let gradients = (o.clone() * upstream).sum().backward();
            [o.inner(), qkv.grad(&gradients).unwrap()].map(|x| read(x).unwrap())
        };
        let length = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        for (name, exact, rounded) in ["output", "gradient"]
            .into_iter()
            .zip(pass(false))
            .zip(pass(true))
            .map(|((name, exact), rounded)| (name, exact, rounded))
        {
            let error: Vec<f32> = exact.iter().zip(&rounded).map(|(a, b)| a - b).collect();
            let error = length(&error) / length(&exact);
            // bf16 rounds by 2⁻⁹ at most; nothing changes only where nothing is rounded.
            assert!(error > 1e-4 && error < 4e-3, "{name}: {error}");
        }
    }

    #[test]
    fn only_the_first_dimensions_turn_where_fewer_frequencies_are_given() {
        let heads = Heads { query: 2, key_value: 1, dim: 8 };
        assert_scores_equal(heads, plain(heads), &segments(&[6, 3]), &[0.7, 0.2, 0.05]);
    }
}
