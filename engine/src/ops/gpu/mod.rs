//! The form that a GPU takes of an operation, where burn's own operations would take many passes over
//! its memory or keep what can be computed again: what lies between two products is one kernel of
//! [`kernels`].
//!
//! Products multiply bf16 where the weights are that, and f32 otherwise; sums are f32 in both. What
//! becomes an operand of a bf16 product is written in that, and so is its gradient; all others are f32.

#[cfg(feature = "cuda")]
mod cublas;
mod kernels;

pub(super) mod adamw;
pub(super) mod attention;
pub(super) mod gated_activation;
pub(super) mod head;
pub(super) mod linear;
pub(crate) mod product;
pub(super) mod quantized;
pub(super) mod rms_norm;
pub(super) mod token_nll;

use burn::backend::Autodiff;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{Cube, cubecl};
use cubecl::ir::ElemType;
use cubecl::prelude::{CubeCount, CubeDim};

use kernels::UNITS;
use product::product;

/// A tensor on a GPU with its place in the autodiff graph.
type Node = FloatTensor<Autodiff<Cube>>;

/// # Panics
/// When the tensor is on the CPU: `ops` sends only a GPU's here.
fn node<const D: usize>(tensor: Tensor<D>) -> Node {
    tensor.autodiff().try_into_primitive::<Autodiff<Cube>>().expect("a tensor on a GPU")
}

/// The inverse of [`node`].
fn tensor<const D: usize>(node: Node) -> Tensor<D> {
    Tensor::from_primitive::<Autodiff<Cube>>(node)
}

/// The tensor of a primitive without autodiff.
fn plain<const D: usize>(primitive: CubeTensor) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(primitive)
}

/// The primitive of a tensor without autodiff, its values row by row.
fn contiguous<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    into_contiguous(primitive(tensor))
}

/// The primitive of a tensor without autodiff.
fn primitive<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    tensor.try_into_primitive::<Cube>().expect("a tensor on a GPU")
}

/// An operand that is not there: a constant, which takes no gradient.
fn absent(like: &Node) -> Node {
    node(plain::<1>(like_of(like.primitive(), &[1], DType::F32)))
}

/// New memory beside `tensor`, for values row by row; nothing is written to it.
fn like_of(tensor: &CubeTensor, shape: &[usize], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(
        tensor.client.clone(),
        tensor.device.clone(),
        shape.to_vec().into(),
        dtype,
    )
}

/// `x` as `dtype`; x itself when it is that already.
fn cast<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    match dtype {
        same if same == x.dtype() => x,
        DType::BF16 => x.cast(FloatDType::BF16),
        _ => x.cast(FloatDType::F32),
    }
}

/// 0 everywhere.
fn zeros<const D: usize>(dims: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    cast(Tensor::zeros(dims, device), dtype)
}

/// Some tensors one after the other along a dimension; one alone is not copied.
fn joined<const D: usize>(mut parts: Vec<Tensor<D>>, dim: usize) -> Tensor<D> {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, dim) }
}

/// What kernels are told of a tensor's type.
fn element(tensor: &CubeTensor) -> ElemType {
    burn::backend::cubecl::dtype_to_elem_type(tensor.dtype)
}

/// A block of threads for each of `rows`.
fn block_a_row(rows: usize) -> (CubeCount, CubeDim) {
    (CubeCount::Static(rows as u32, 1, 1), CubeDim::new_1d(UNITS))
}

/// A thread for each of `elements`.
fn thread_an_element(elements: usize) -> (CubeCount, CubeDim) {
    block_a_row(elements.div_ceil(UNITS as usize))
}
