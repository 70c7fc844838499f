//! GPU form of [`crate::ops::linear`], without DoRA.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};

use super::kernels::{LOW_RANK_ROWS, UNITS};
use super::quantized::decoded;
use super::{
    absent, cast, contiguous, element, kernels, like_of, node, plain, primitive, product, tensor,
    thread_an_element, zeros,
};
use crate::ops::dropout::Dropout;
use crate::ops::linear::{LowRank, LowRankPart, Weight};
use crate::ops::quantized::QuantizedMatrix;

pub(in crate::ops) fn linear(
    x: Tensor<2>,
    weight: Weight,
    residual: Option<Tensor<2>>,
    low_rank: Option<LowRank>,
) -> Tensor<2> {
    let x = node(x);
    let (weight, blocks) = match weight {
        Weight::Dense(weight) => (node(*weight), None),
        Weight::Quantized { matrix, bf16 } => (absent(&x), Some((matrix, bf16))),
    };
    let (residual, is_residual) = match residual {
        Some(residual) => (node(residual), true),
        None => (absent(&x), false),
    };
    let (a, b, branch) = match low_rank {
        Some(LowRank { a, b, scale, magnitude: None, parts }) => {
            let rank = b.dims()[1];
            (node(a), node(b), Some(Branch { scale, rank, parts }))
        }
        Some(_) => unreachable!("DoRA takes the portable form"),
        None => (absent(&x), absent(&x), None),
    };
    let step = Linear
        .prepare::<NoCheckpointing>([&x, &weight, &residual, &a, &b].map(|operand| operand.node()))
        .compute_bound();
    let [x, weight, residual, a, b]: [Tensor<2>; 5] =
        [x, weight, residual, a, b].map(|operand| plain(operand.into_primitive()));
    let weight = match blocks {
        None => Matrix::Dense(Box::new(weight)),
        Some((matrix, bf16)) => {
            let dtype = if bf16 { DType::BF16 } else { DType::F32 };
            Matrix::Blocks { matrix, dtype, device: x.device() }
        }
    };
    let x_dtype = x.dtype();
    let x = cast(x, weight.dtype());
    let mut y = product(x.clone(), weight.numbers().transpose(), DType::F32);
    if is_residual {
        y = y + cast(residual, DType::F32);
    }
    let mut kept = None;
    if let Some(branch) = branch {
        let z = branch.low_rank_inputs(&x, &a);
        for (i, (part, rows)) in branch.parts.iter().zip(LowRank::b_rows(&branch.parts)).enumerate()
        {
            let factor = b.clone().slice([rows, 0..branch.rank]).transpose();
            let ranks = i * branch.rank..(i + 1) * branch.rank;
            y = add_low_rank(y, part.outputs.clone(), &z, ranks, factor, branch.scale, None);
        }
        kept = Some(Kept { a, b, z, branch });
    }
    let y = primitive(y);
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish(Saved { x, x_dtype, weight, kept }, y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

/// drop∘x.
fn dropped(x: &Tensor<2>, dropout: Dropout) -> Tensor<2> {
    let dims = x.dims();
    let x = contiguous(x.clone());
    let y = like_of(&x, &dims, x.dtype);
    let (stream, threshold, keep_scale) = dropout.constants();
    let (count, threads) = thread_an_element(dims[0] * dims[1]);
    kernels::drop_elements::launch(
        &x.client,
        count,
        threads,
        x.clone().into_buffer_arg(),
        y.clone().into_buffer_arg(),
        stream,
        threshold,
        keep_scale,
        element(&x),
    );
    plain(y)
}

/// y, with s·z·factor added to some of its columns; `z` takes part with some of its own. With
/// `dropout`, which is of elements of y, what is added is dropped or scaled up.
fn add_low_rank(
    y: Tensor<2>,
    outputs: Range<usize>,
    z: &Tensor<2>,
    ranks: Range<usize>,
    factor: Tensor<2>,
    scale: f32,
    dropout: Option<Dropout>,
) -> Tensor<2> {
    let [rows, width] = y.dims();
    let (stream, threshold, keep_scale) = dropout.map_or((0, 0, 1.0), Dropout::constants);
    let z_width = z.dims()[1];
    let (y, z, factor) = (contiguous(y), contiguous(z.clone()), contiguous(factor));
    let count = CubeCount::Static(
        outputs.len().div_ceil(UNITS as usize) as u32,
        rows.div_ceil(LOW_RANK_ROWS as usize) as u32,
        1,
    );
    kernels::add_low_rank::launch(
        &y.client,
        count,
        CubeDim::new_1d(UNITS),
        y.clone().into_buffer_arg(),
        z.clone().into_buffer_arg(),
        factor.into_buffer_arg(),
        rows as u32,
        width as u32,
        outputs.start as u32,
        outputs.len() as u32,
        z_width as u32,
        ranks.start as u32,
        scale,
        stream,
        threshold,
        keep_scale,
        ranks.len(),
        dropout.is_some(),
        element(&z),
    );
    plain(y)
}

#[derive(Debug)]
struct Linear;

/// W.
#[derive(Debug, Clone)]
enum Matrix {
    Dense(Box<Tensor<2>>),
    /// As `dtype` on `device`, once decoded.
    Blocks {
        matrix: Arc<QuantizedMatrix>,
        dtype: DType,
        device: Device,
    },
}

impl Matrix {
    fn dtype(&self) -> DType {
        match self {
            Self::Dense(weight) => weight.dtype(),
            Self::Blocks { dtype, .. } => *dtype,
        }
    }

    /// Rows of W.
    fn outputs(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.dims()[0],
            Self::Blocks { matrix, .. } => matrix.dims()[0],
        }
    }

    /// W as products take it.
    fn numbers(&self) -> Tensor<2> {
        match self {
            Self::Dense(weight) => (**weight).clone(),
            Self::Blocks { matrix, dtype, device } => decoded(matrix, *dtype, device),
        }
    }
}

#[derive(Debug, Clone)]
struct Branch {
    scale: f32,
    rank: usize,
    parts: Arc<[LowRankPart]>,
}

impl Branch {
    fn drops(&self) -> bool {
        self.parts.iter().any(|part| part.dropout.is_some())
    }

    /// Of each part: its rows of A, and its input.
    fn inputs(&self, x: &Tensor<2>) -> Vec<(Range<usize>, Tensor<2>)> {
        let part = |(i, part): (usize, &LowRankPart)| {
            let x = part.dropout.map_or_else(|| x.clone(), |dropout| dropped(x, dropout));
            (i * self.rank..(i + 1) * self.rank, x)
        };
        self.parts.iter().enumerate().map(part).collect()
    }

    /// The zᵢ beside each other, for the Aᵢ below each other.
    fn low_rank_inputs(&self, x: &Tensor<2>, a: &Tensor<2>) -> Tensor<2> {
        let a = cast(a.clone(), x.dtype());
        if !self.drops() {
            return product(x.clone(), a.transpose(), DType::F32);
        }
        let z = self
            .inputs(x)
            .into_iter()
            .map(|(rows, x)| product(x, a.clone().slice_dim(0, rows).transpose(), DType::F32));
        Tensor::cat(z.collect(), 1)
    }

    /// The dAᵢ below each other.
    fn gradient_of_a(&self, x: &Tensor<2>, dz: Tensor<2>) -> Tensor<2> {
        let dz = cast(dz, x.dtype());
        if !self.drops() {
            return product(dz.transpose(), x.clone(), DType::F32);
        }
        let da = self
            .inputs(x)
            .into_iter()
            .map(|(rows, x)| product(dz.clone().slice_dim(1, rows).transpose(), x, DType::F32));
        Tensor::cat(da.collect(), 0)
    }

    /// dx, with what the parts give added.
    fn add_to_dx(&self, mut dx: Tensor<2>, dz: &Tensor<2>, a: &Tensor<2>) -> Tensor<2> {
        let [ranks, width] = a.dims();
        if !self.drops() {
            return add_low_rank(dx, 0..width, dz, 0..ranks, a.clone(), 1.0, None);
        }
        for (i, part) in self.parts.iter().enumerate() {
            let ranks = i * self.rank..(i + 1) * self.rank;
            let a = a.clone().slice_dim(0, ranks.clone());
            dx = add_low_rank(dx, 0..width, dz, ranks, a, 1.0, part.dropout);
        }
        dx
    }
}

#[derive(Debug, Clone)]
struct Saved {
    /// As it is multiplied.
    x: Tensor<2>,
    /// As it came.
    x_dtype: DType,
    weight: Matrix,
    kept: Option<Kept>,
}

#[derive(Debug, Clone)]
struct Kept {
    a: Tensor<2>,
    b: Tensor<2>,
    /// The zᵢ beside each other.
    z: Tensor<2>,
    branch: Branch,
}

impl Kept {
    /// The Bᵢ in a matrix `[out, parts · r]`, each in its rows and columns, the rest 0.
    fn spread(&self, outputs: usize, dtype: DType) -> Tensor<2> {
        let Branch { rank, parts, .. } = &self.branch;
        let b = cast(self.b.clone(), dtype);
        if let [part] = &**parts
            && part.outputs == (0..outputs)
        {
            return b;
        }
        let mut spread = zeros([outputs, parts.len() * rank], dtype, &b.device());
        for (i, (part, rows)) in parts.iter().zip(LowRank::b_rows(parts)).enumerate() {
            let place = [part.outputs.clone(), i * rank..(i + 1) * rank];
            spread = spread.slice_assign(place, b.clone().slice([rows, 0..*rank]));
        }
        spread
    }
}

impl Backward<Cube, 5> for Linear {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy: Tensor<2> = plain(gradients.consume::<Cube>(&ops.node));
        let Saved { x, x_dtype, weight, kept } = ops.state;
        let [of_x, of_weight, of_residual, of_a, of_b] = ops.parents;
        let [of_x, of_weight, of_residual, of_a, of_b] =
            [of_x, of_weight, of_residual, of_a, of_b].map(|parent| parent.map(|node| node.id));
        let mut register = |parent: Option<NodeId>, gradient: &dyn Fn() -> Tensor<2>| {
            if let Some(parent) = parent {
                gradients.register::<Cube>(parent, primitive(gradient()));
            }
        };
        register(of_residual, &|| cast(dy.clone(), DType::F32));
        let dtype = weight.dtype();
        let dy = cast(dy, dtype);
        let outputs = weight.outputs();
        let dz = kept.as_ref().filter(|_| of_x.is_some() || of_a.is_some()).map(|kept| {
            let spread = kept.spread(outputs, dtype);
            product(dy.clone(), spread, DType::F32).mul_scalar(kept.branch.scale)
        });
        register(of_x, &|| {
            let mut dx = product(dy.clone(), weight.numbers(), DType::F32);
            if let (Some(kept), Some(dz)) = (&kept, &dz) {
                dx = kept.branch.add_to_dx(dx, dz, &kept.a);
            }
            cast(dx, x_dtype)
        });
        register(of_weight, &|| product(dy.clone().transpose(), x.clone(), DType::F32));
        let Some(kept) = &kept else { return };
        let rank = kept.branch.rank;
        register(of_a, &|| kept.branch.gradient_of_a(&x, dz.clone().expect("made for it")));
        register(of_b, &|| {
            let z = cast(kept.z.clone(), dtype);
            let all = product(dy.clone().transpose(), z, DType::F32).mul_scalar(kept.branch.scale);
            let parts = kept.branch.parts.iter().enumerate().map(|(i, part)| {
                all.clone().slice([part.outputs.clone(), i * rank..(i + 1) * rank])
            });
            Tensor::cat(parts.collect(), 0)
        });
    }
}
