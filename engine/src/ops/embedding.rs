//! Token embedding: row lookup.
//!
//! ```text
//! y[t]  = s·W[ids[t]]
//! dW[v] = s·Σ over t with ids[t] = v of dy[t], but 0 for v = padding
//! ```
//!
//! The scale s is 1, or the root of the width in Gemma's models. The exception is `padding_idx` of `torch.nn.Embedding`, which Hugging Face's models set to the
//! config's `pad_token_id`. It matters where padding is also a real token, such as the end of a
//! turn: full fine-tuning would part from Hugging Face's in the first step.

use burn::tensor::{FloatDType, Int, Tensor, TensorData};

use super::row_linear::RowWeight;
use super::{cpu, on_cpu};

/// Rows `ids` of `weight` `[vocabulary, width]` times `scale`, as `[tokens, width]`; the row
/// `padding` takes no gradient from being looked up.
pub(crate) fn embedding(
    weight: Tensor<2>,
    ids: &[u32],
    padding: Option<u32>,
    scale: f32,
) -> Tensor<2> {
    if on_cpu(&weight) {
        cpu::embedding::embedding(weight, ids, padding, scale)
    } else {
        portable(weight, ids, padding, scale)
    }
}

/// The same of a matrix that only answers.
pub(crate) fn row_embedding(weight: &RowWeight, ids: &[u32], scale: f32) -> Tensor<2> {
    match weight {
        RowWeight::Dense(weight) => embedding(weight.as_ref().clone(), ids, None, scale),
        RowWeight::Panels(panels) => cpu::row_linear::rows(panels, ids, scale),
    }
}

pub(super) fn portable(
    weight: Tensor<2>,
    ids: &[u32],
    padding: Option<u32>,
    scale: f32,
) -> Tensor<2> {
    let device = weight.device();
    let rows: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [ids.len()]), &device);
    let y = weight.select(0, rows).cast(FloatDType::F32).mul_scalar(scale);
    let Some(padding) = padding.filter(|padding| ids.contains(padding)) else { return y };
    let learns: Vec<f32> = ids.iter().map(|&id| f32::from(id != padding)).collect();
    let learns: Tensor<2> = Tensor::from_data(TensorData::new(learns, [ids.len(), 1]), &device);
    let constant = y.clone().detach() * learns.clone().neg().add_scalar(1.0);
    y * learns + constant
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients_equal, random};
    use crate::parameter::read;

    fn assert_forms_equal(padding: Option<u32>) {
        let ids = [4, 0, 4, 4, 6];
        for scale in [1.0, 4.9] {
            assert_gradients_equal(
                &[random([7, 5], 1)],
                |inputs| cpu::embedding::embedding(inputs[0].clone(), &ids, padding, scale),
                |inputs| portable(inputs[0].clone(), &ids, padding, scale),
            );
        }
    }

    #[test]
    fn cpu_form_equals_the_portable_form_with_repeated_ids() {
        assert_forms_equal(None);
        assert_forms_equal(Some(5));
    }

    #[test]
    fn rows_that_are_kept_for_products_are_looked_up_as_they_were() {
        for dtype in [FloatDType::F32, FloatDType::BF16] {
            let weight = random([37, 5], 1).cast(dtype);
            let expected = cpu::embedding::embedding(weight.clone(), &[36, 0, 4], None, 4.9);
            let y = row_embedding(&RowWeight::kept(weight), &[36, 0, 4], 4.9);
            assert_eq!(read(y).unwrap(), read(expected).unwrap());
        }
    }

    #[test]
    fn padding_that_is_looked_up_takes_no_gradient() {
        assert_forms_equal(Some(4));
        let weight = random([7, 5], 1).autodiff().require_grad();
        let y = cpu::embedding::embedding(weight.clone(), &[4, 0], Some(4), 1.0);
        let gradient = read(weight.grad(&y.sum().backward()).unwrap()).unwrap();
        let expected: Vec<f32> = (0..7 * 5).map(|i| f32::from(i < 5)).collect();
        assert_eq!(gradient, expected);
    }
}
