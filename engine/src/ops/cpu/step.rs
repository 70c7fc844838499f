//! The way between device-erased tensors and slices of f32 on the Flex backend, and new memory that
//! threads fill.

#![expect(
    unsafe_code,
    reason = "a vector gets its length after its memory was filled, block by block"
)]

use std::mem::MaybeUninit;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Flex};
use burn::tensor::{Bytes, DType, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};
use half::bf16;
use rayon::prelude::*;

use super::gemm::{Elements, MatRef};

/// A tensor on the CPU with its place in the autodiff graph.
pub(super) type Node = FloatTensor<Autodiff<Flex>>;

/// # Panics
/// When the tensor is on another device: `ops` sends only Flex's here.
pub(super) fn node<const D: usize>(tensor: Tensor<D>) -> Node {
    tensor.autodiff().try_into_primitive::<Autodiff<Flex>>().expect("a tensor on the CPU")
}

/// The inverse of [`node`].
pub(super) fn tensor<const D: usize>(node: Node) -> Tensor<D> {
    Tensor::from_primitive::<Autodiff<Flex>>(node)
}

/// An operand that is not there: a constant, which takes no gradient.
pub(super) fn absent() -> Node {
    node(Tensor::<1>::zeros([1], &burn::tensor::Device::flex()))
}

/// The tensor's values, row by row; copied only when it is a view with strides.
pub(super) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The values of a tensor that went through [`contiguous`].
pub(super) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("a contiguous f32 tensor")
}

/// The elements of a contiguous tensor of f32 or bf16, for a product.
pub(super) fn elements(tensor: &FlexTensor) -> Elements<'_> {
    if tensor.dtype() == DType::BF16 {
        Elements::Bf16(tensor.as_slice().expect("a contiguous bf16 tensor"))
    } else {
        Elements::F32(values(tensor))
    }
}

/// A contiguous matrix of f32 or bf16 as a view.
pub(super) fn matrix(tensor: &FlexTensor) -> MatRef<'_> {
    let [rows, columns] = dims(tensor);
    MatRef::of(elements(tensor), rows, columns)
}

/// Rows and columns of a matrix.
pub(super) fn dims(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    assert_eq!(shape.len(), 2, "a matrix");
    [shape[0], shape[1]]
}

/// `length` values that threads fill block by block: `fill` gets the number of a block, and its
/// values, which are 0. So each block is zeroed by the thread that fills it, when it is in its cache
/// anyway; `vec![0.0; length]` would zero them all beforehand, on one thread.
pub(super) fn filled<T: Copy + Default + Send>(
    length: usize,
    block: usize,
    fill: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut values = Vec::with_capacity(length);
    let parts = values.spare_capacity_mut()[..length].par_chunks_mut(block);
    parts.enumerate().for_each(|(number, part)| fill(number, zeroed(part)));
    // SAFETY: the blocks cover the vector, and `zeroed` has written every element.
    unsafe { values.set_len(length) };
    values
}

/// The same for two vectors of as many blocks.
pub(super) fn both_filled<T: Copy + Default + Send>(
    lengths: [usize; 2],
    blocks: [usize; 2],
    fill: impl Fn(usize, &mut [T], &mut [T]) + Sync,
) -> [Vec<T>; 2] {
    let mut vectors = lengths.map(Vec::with_capacity);
    let [first, second] = &mut vectors;
    let first = first.spare_capacity_mut()[..lengths[0]].par_chunks_mut(blocks[0]);
    let second = second.spare_capacity_mut()[..lengths[1]].par_chunks_mut(blocks[1]);
    assert_eq!(first.len(), second.len(), "blocks of both vectors");
    first
        .zip(second)
        .enumerate()
        .for_each(|(number, (first, second))| fill(number, zeroed(first), zeroed(second)));
    for (vector, length) in vectors.iter_mut().zip(lengths) {
        // SAFETY: as in `filled`.
        unsafe { vector.set_len(length) };
    }
    vectors
}

fn zeroed<T: Copy + Default>(values: &mut [MaybeUninit<T>]) -> &mut [T] {
    for value in values.iter_mut() {
        value.write(T::default());
    }
    // SAFETY: all of them were written just now.
    unsafe { values.assume_init_mut() }
}

/// A tensor of bf16 that takes over `values`.
pub(super) fn from_bf16<const D: usize>(values: Vec<bf16>, shape: [usize; D]) -> FlexTensor {
    let shape = Shape::from(shape);
    assert_eq!(values.len(), shape.num_elements(), "values of a tensor");
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::BF16)
}

/// A tensor that takes over `values`.
pub(super) fn from_values<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    let shape = Shape::from(shape);
    assert_eq!(values.len(), shape.num_elements(), "values of a tensor");
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}
