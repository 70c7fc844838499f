//! The bias of a projection.
//!
//! ```text
//! y  = x + b for each row,  dx = dy,  db = Σ over rows of dy
//! ```

use burn::tensor::Tensor;

use super::{cpu, on_cpu};

/// Adds `bias` `[width, 1]` to each row of `x` `[tokens, width]`: a column, as biases of several
/// projections then lie one below the other like the rows of their weights.
pub(crate) fn add_bias(x: Tensor<2>, bias: Tensor<2>) -> Tensor<2> {
    if on_cpu(&x) { cpu::bias::add_bias(x, bias) } else { portable(x, bias) }
}

pub(super) fn portable(x: Tensor<2>, bias: Tensor<2>) -> Tensor<2> {
    x + bias.transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients_equal, random};

    #[test]
    fn cpu_form_equals_the_portable_form() {
        // 300 rows: more than one block of rows that threads share.
        for (tokens, width) in [(1, 8), (5, 33), (300, 20)] {
            assert_gradients_equal(
                &[random([tokens, width], 1), random([width, 1], 2)],
                |inputs| cpu::bias::add_bias(inputs[0].clone(), inputs[1].clone()),
                |inputs| portable(inputs[0].clone(), inputs[1].clone()),
            );
        }
    }
}
