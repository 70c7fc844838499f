//! Attention of new tokens to those before them, whose keys and values are kept: for generation.
//!
//! The mathematics is that of [`attention`](super::attention), of its last rows alone, without
//! gradients. Each sequence has a cache of its own, and a pass may extend several.

use std::ops::Range;

use burn::tensor::Tensor;

use super::attention::{Heads, Scores, attend, rotated};
use super::{cpu, on_cpu};
use crate::models::rope::RotaryTable;

/// k̂ and v of a sequence's tokens so far, in one layer.
#[derive(Debug, Clone)]
pub(crate) enum KeyValues {
    /// Of the CPU form.
    Rows(cpu::attention::cached::KeyValues),
    /// Of the portable form.
    Tensors(Box<HeadTensors>),
}

/// `[K, tokens, D]` each. What no later window reaches is dropped.
#[derive(Debug, Clone)]
pub(crate) struct HeadTensors {
    keys: Tensor<3>,
    values: Tensor<3>,
}

impl KeyValues {
    /// Tokens that the memory would hold which those of `tokens` take at most.
    pub(crate) fn room_of(tokens: usize) -> usize {
        tokens.next_multiple_of(cpu::gemm::PAGE_TOKENS)
    }

    /// Those of the first `tokens` tokens, where they are all kept.
    pub(crate) fn prefix(&self, tokens: usize) -> Option<Self> {
        match self {
            Self::Rows(rows) => Some(Self::Rows(rows.prefix(tokens))),
            Self::Tensors(_) => None,
        }
    }
}

/// The new tokens of one sequence.
#[derive(Debug)]
pub(crate) struct Extension<'a> {
    /// Rows of the input. Those of all sequences cover it in order.
    pub(crate) rows: Range<usize>,
    /// The first one's position in its sequence.
    pub(crate) first_position: usize,
    /// Grows by the new tokens; None before the first.
    pub(crate) cache: &'a mut Option<KeyValues>,
}

/// `qkv` `[n, (H + 2K)·D]` to `[n, H·D]`; row t of `rotary` is the rotation of position t.
pub(crate) fn cached_attention(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    rotary: &RotaryTable,
    extensions: &mut [Extension<'_>],
) -> Tensor<2> {
    if on_cpu(&qkv) {
        cpu::attention::cached::cached_attention(qkv, heads, scores, rotary, extensions)
    } else {
        portable(qkv, heads, scores, rotary, extensions)
    }
}

fn portable(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    rotary: &RotaryTable,
    extensions: &mut [Extension<'_>],
) -> Tensor<2> {
    let outputs = extensions
        .iter_mut()
        .map(|extension| {
            let rows = qkv.clone().slice([extension.rows.clone(), 0..heads.qkv_width()]);
            extend(rows, heads, scores, rotary, extension)
        })
        .collect();
    Tensor::cat(outputs, 0)
}

fn extend(
    rows: Tensor<2>,
    heads: Heads,
    scores: Scores,
    rotary: &RotaryTable,
    extension: &mut Extension<'_>,
) -> Tensor<2> {
    let (q, mut keys, mut values) = rotated(rows, heads, rotary, extension.first_position);
    match extension.cache.take() {
        None => {}
        Some(KeyValues::Tensors(earlier)) => {
            keys = Tensor::cat(vec![earlier.keys, keys], 1);
            values = Tensor::cat(vec![earlier.values, values], 1);
        }
        Some(KeyValues::Rows(_)) => unreachable!("a cache stays with its form"),
    }
    let tokens = keys.dims()[1];
    // One is kept even where a window of 1 asks for none: a tensor has no empty dimension.
    let kept = scores.window.map_or(tokens, |window| tokens.min(window.saturating_sub(1).max(1)));
    let recent = |x: &Tensor<3>| x.clone().slice_dim(1, tokens - kept..tokens);
    let kept = HeadTensors { keys: recent(&keys), values: recent(&values) };
    *extension.cache = Some(KeyValues::Tensors(Box::new(kept)));
    attend(q, keys, values, scores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Segment;
    use crate::ops::attention;
    use crate::ops::testing::{Place, assert_close, on_flex, on_test_device, random};
    use crate::parameter::read;

    type Form = fn(Tensor<2>, Heads, Scores, &RotaryTable, &mut [Extension<'_>]) -> Tensor<2>;

    const FORMS: [(&str, Form, Place); 2] = [
        ("CPU form", cpu::attention::cached::cached_attention, on_flex),
        ("portable form", portable, on_test_device),
    ];

    fn frequencies(heads: Heads) -> Vec<f64> {
        // The last dimensions of a head do not turn.
        (0..heads.dim / 2 - 1).map(|pair| 0.5f64.powi(pair as i32)).collect()
    }

    /// Feeds sequences in the given portions, side by side, and compares each with the whole.
    fn assert_portions_equal_the_whole(heads: Heads, scores: Scores, portions: &[&[usize]]) {
        let passes = portions.iter().map(|lengths| lengths.len()).max().unwrap();
        let longest = portions.iter().map(|lengths| lengths.iter().sum()).max().unwrap();
        let rotary = RotaryTable::from_frequencies(&frequencies(heads), 1.0, 0, longest);
        let sequences: Vec<Tensor<2>> = portions
            .iter()
            .enumerate()
            .map(|(i, lengths)| {
                random([lengths.iter().sum(), heads.qkv_width()], 8 + i as u64).mul_scalar(2.0)
            })
            .collect();
        for (name, form, place) in FORMS {
            let mut caches = vec![None; sequences.len()];
            let mut outputs = vec![Vec::new(); sequences.len()];
            for pass in 0..passes {
                let (mut inputs, mut extensions, mut who) = (Vec::new(), Vec::new(), Vec::new());
                let mut end = 0;
                for (i, cache) in caches.iter_mut().enumerate() {
                    let Some(&length) = portions[i].get(pass) else { continue };
                    let first_position: usize = portions[i][..pass].iter().sum();
                    let part = first_position..first_position + length;
                    inputs.push(place(sequences[i].clone().slice([part])));
                    extensions.push(Extension { rows: end..end + length, first_position, cache });
                    who.push(i);
                    end += length;
                }
                let output = form(Tensor::cat(inputs, 0), heads, scores, &rotary, &mut extensions);
                let output = read(output).unwrap();
                let width = heads.query_width();
                for (extension, i) in extensions.iter().zip(who) {
                    let rows = extension.rows.start * width..extension.rows.end * width;
                    outputs[i].extend_from_slice(&output[rows]);
                }
            }
            for (sequence, output) in sequences.iter().zip(outputs) {
                let whole = [Segment::whole(0..sequence.dims()[0])];
                let expected =
                    attention::portable(sequence.clone(), heads, scores, &whole, &rotary);
                assert_close(&format!("{name}, {scores:?}"), &output, &read(expected).unwrap());
            }
        }
    }

    #[test]
    fn tokens_added_in_portions_see_what_a_whole_sequence_sees() {
        let heads = Heads { query: 4, key_value: 2, dim: 6 };
        for softcap in [None, Some(3.0)] {
            for window in [None, Some(1), Some(2), Some(3), Some(150)] {
                let scores = Scores { scale: 0.4, softcap, window, bf16: false };
                let portions: [&[usize]; 4] = [&[3, 1, 2], &[1, 1, 1, 1, 1], &[200, 1], &[2, 130]];
                assert_portions_equal_the_whole(heads, scores, &portions);
            }
        }
    }

    #[test]
    fn tokens_have_the_same_bits_read_whole_and_in_portions() {
        let heads = Heads { query: 6, key_value: 2, dim: 20 };
        let tokens = 150;
        let qkv = random([tokens, heads.qkv_width()], 4).mul_scalar(2.0);
        let rotary = RotaryTable::from_frequencies(&frequencies(heads), 1.0, 0, tokens);
        for (softcap, window) in [(None, None), (Some(3.0), Some(70)), (None, Some(1))] {
            let scores = Scores { scale: 0.4, softcap, window, bf16: false };
            let outputs = [vec![tokens], vec![1; tokens], vec![40, 1, 109]].map(|portions| {
                let (mut cache, mut first_position, mut output) = (None, 0, Vec::new());
                for length in portions {
                    let input = qkv.clone().slice_dim(0, first_position..first_position + length);
                    let cache = &mut cache;
                    let extension = Extension { rows: 0..length, first_position, cache };
                    let form = cpu::attention::cached::cached_attention;
                    let part = form(on_flex(input), heads, scores, &rotary, &mut [extension]);
                    output.extend(read(part).unwrap());
                    first_position += length;
                }
                output
            });
            assert_eq!(outputs[0], outputs[1]);
            assert_eq!(outputs[0], outputs[2]);
        }
    }

    #[test]
    fn cache_cut_to_a_prefix_goes_on_as_if_nothing_had_followed() {
        let heads = Heads { query: 2, key_value: 1, dim: 4 };
        let scores = Scores { scale: 0.5, softcap: None, window: Some(3), bf16: false };
        let rotary = RotaryTable::from_frequencies(&frequencies(heads), 1.0, 0, 9);
        let qkv = random([9, heads.qkv_width()], 4);
        let extend = |rows: Range<usize>, cache: &mut Option<KeyValues>| {
            let input = qkv.clone().slice([rows.clone()]);
            let extension = Extension { rows: 0..rows.len(), first_position: rows.start, cache };
            let form = cpu::attention::cached::cached_attention;
            read(form(input, heads, scores, &rotary, &mut [extension])).unwrap()
        };
        let mut whole = None;
        let expected = extend(0..9, &mut whole);
        let mut cut = whole.unwrap().prefix(5);
        let width = heads.query_width();
        assert_close("from token 5 on", &extend(5..9, &mut cut), &expected[5 * width..]);
    }
}
