//! GPU form of [`crate::ops::adamw`]: one pass over memory.

use burn::tensor::{DType, Tensor};

use super::{contiguous, kernels, like_of, plain, thread_an_element};
use crate::ops::adamw::Step;

pub(in crate::ops) fn adamw(
    value: Tensor<2>,
    gradient: Tensor<2>,
    first: &mut Tensor<2>,
    second: &mut Tensor<2>,
    step: &Step,
) -> Tensor<2> {
    let dims = value.dims();
    let [value, gradient, old_first, old_second] =
        [value, gradient, first.clone(), second.clone()].map(contiguous);
    let [new_value, new_first, new_second] = [(); 3].map(|()| like_of(&value, &dims, DType::F32));
    let (count, threads) = thread_an_element(dims[0] * dims[1]);
    kernels::adamw::launch(
        &value.client,
        count,
        threads,
        value.clone().into_buffer_arg(),
        gradient.into_buffer_arg(),
        old_first.into_buffer_arg(),
        old_second.into_buffer_arg(),
        new_value.clone().into_buffer_arg(),
        new_first.clone().into_buffer_arg(),
        new_second.clone().into_buffer_arg(),
        step.gradient_scale,
        step.decay,
        step.beta1,
        step.one_minus_beta1,
        step.beta2,
        step.one_minus_beta2,
        step.step_size,
        step.inverse_root_correction,
        step.epsilon,
    );
    (*first, *second) = (plain(new_first), plain(new_second));
    plain(new_value)
}
