//! A weight as it lies in memory: numbers, or blocks that are decoded while a product packs them.

use std::ops::Range;
use std::sync::Arc;

use burn_flex::FlexTensor;

use super::bf16::widened_part;
use super::gemm::{Decode, Elements, MatRef};
use super::step::{Node, absent, contiguous, dims, matrix, node};
use crate::ops::linear::Weight;
use crate::ops::quantized::QuantizedMatrix;

/// A weight `[out, in]`.
#[derive(Debug, Clone)]
pub(super) enum Stored {
    Dense(FlexTensor),
    Quantized(Arc<QuantizedMatrix>),
}

impl Stored {
    /// The weight, and its node in the graph; a quantised one takes no gradient.
    pub(super) fn of(weight: Weight) -> (Self, Node) {
        match weight {
            Weight::Dense(weight) => {
                let weight = node(*weight);
                (Self::Dense(contiguous(weight.clone().into_primitive())), weight)
            }
            Weight::Quantized { matrix, .. } => (Self::Quantized(matrix), absent()),
        }
    }

    /// Rows and columns.
    pub(super) fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => dims(weight),
            Self::Quantized(weight) => weight.dims(),
        }
    }

    /// Some elements in f32; `scratch` holds them where they are not there as they are.
    pub(super) fn part<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        match self {
            Self::Dense(weight) => widened_part(weight, range, scratch),
            Self::Quantized(weight) => {
                scratch.resize(range.len(), 0.0);
                weight.decode(range.start, scratch);
                scratch
            }
        }
    }

    /// As a product takes it.
    pub(super) fn view(&self) -> MatRef<'_> {
        match self {
            Self::Dense(weight) => matrix(weight),
            Self::Quantized(weight) => {
                let [rows, columns] = weight.dims();
                MatRef::of(Elements::Encoded(weight.as_ref()), rows, columns)
            }
        }
    }
}
