//! Products of matrices.
//!
//! burn's own product picks a kernel by timing the ones there are, so that two equal runs may take
//! different ones and part in the last bits; and it takes tf32, with 10 bits of a fraction, for f32.
//! Here equal shapes always take the same kernel, and f32 is multiplied as f32.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::cubecl::dtype_to_storage_type;
use burn::tensor::{DType, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::kernel::matmul::init_matmul_output;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems, MatmulSetupError};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::TileSizeSelection;
use cubek::matmul::multi_level::routines::batch::double_unit::DoubleUnitSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple::SimpleArgs;
use cubek::matmul::multi_level::routines::batch::simple_unit::SimpleUnitSelectionArgs;
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::std::InputBinding;

#[cfg(feature = "cuda")]
use super::cublas;
use super::{cast, node, plain, primitive, tensor};

/// a·b, without autodiff, as `out`.
///
/// # Panics
/// When no kernel takes the shapes: the last one takes any.
pub(super) fn product<const D: usize>(a: Tensor<D>, b: Tensor<D>, out: DType) -> Tensor<D> {
    let (a, b) = (primitive(a), primitive(b));
    let y = init_matmul_output(&a, &b, out);
    #[cfg(feature = "cuda")]
    if cublas::multiply(&a, &b, &y) {
        return plain(y);
    }
    let mut failures = Vec::new();
    for strategy in kernels(a.dtype) {
        match launch(&strategy, a.clone(), b.clone(), y.clone()) {
            Ok(()) => return plain(y),
            Err(error) => failures.push(format!("{strategy}: {error:?}")),
        }
    }
    panic!("no kernel multiplies {:?} by {:?}: {failures:?}", a.meta.shape(), b.meta.shape());
}

/// The kernels for operands of a type, the one to try first first.
fn kernels(dtype: DType) -> Vec<Strategy> {
    let tile_size = TileSizeSelection::MaxTileSize;
    let simple = SimpleArgs { multi_rows: false, tile_matmul: TileMatmulKind::Cmma };
    // On tensor cores: the fastest there is where the copy engine takes the operands, and one that
    // takes them as they are. For f32 they would mean tf32.
    let accelerated = [
        Strategy::SpecializedTmaMma(Inferred(().into())),
        Strategy::SimpleCyclicCmma(Inferred(simple)),
    ];
    let any = [
        Strategy::DoubleUnit(Inferred(DoubleUnitSelectionArgs { tile_size })),
        Strategy::SimpleUnit(Inferred(SimpleUnitSelectionArgs { tile_size })),
        Strategy::Naive,
    ];
    let accelerated = accelerated.into_iter().filter(|_| dtype == DType::BF16);
    accelerated.chain(any).collect()
}

fn launch(
    strategy: &Strategy,
    a: CubeTensor,
    b: CubeTensor,
    y: CubeTensor,
) -> Result<(), MatmulSetupError> {
    let [lhs, rhs, out] = [&a, &b, &y].map(|x| dtype_to_storage_type(x.dtype));
    let mut elements = MatmulElems::from_globals(&MatmulGlobalElems { lhs, rhs, out });
    let client = y.client.clone();
    let (a, b) = (InputBinding::new(a.binding(), lhs), InputBinding::new(b.binding(), rhs));
    launch_ref(&strategy.clone().into(), &client, a, b, y.binding(), &mut elements)
}

/// a·b with its place in the autodiff graph, in f32.
pub(in crate::ops) fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    let (a, b) = (node(a), node(b));
    let step = Product::<D>.prepare::<NoCheckpointing>([a.node(), b.node()]).compute_bound();
    let [a, b]: [Tensor<D>; 2] = [a, b].map(|operand| plain(operand.into_primitive()));
    let y = primitive(product(a.clone(), b.clone(), DType::F32));
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish([a, b], y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

#[derive(Debug)]
struct Product<const D: usize>;

impl<const D: usize> Backward<Cube, 2> for Product<D> {
    type State = [Tensor<D>; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy: Tensor<D> = plain(gradients.consume::<Cube>(&ops.node));
        let [a, b] = ops.state;
        let [of_a, of_b] = ops.parents;
        let dy = cast(dy, a.dtype());
        if let Some(parent) = of_a {
            let da = product(dy.clone(), b.clone().transpose(), DType::F32);
            gradients.register::<Cube>(parent.id, primitive(cast(da, a.dtype())));
        }
        if let Some(parent) = of_b {
            let db = product(a.transpose(), dy, DType::F32);
            gradients.register::<Cube>(parent.id, primitive(cast(db, b.dtype())));
        }
    }
}
