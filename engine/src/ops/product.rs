//! The product of two matrices, or of matrices pair by pair, on any device.
//!
//! f32 is multiplied as f32: burn's own product takes tf32 for it on a GPU, which keeps 10 bits of a
//! fraction, and picks a kernel by timing, so that two equal runs may part in the last bits.

use burn::tensor::Tensor;

/// a·b; f32 on a GPU, and elsewhere of the operands' type.
pub(crate) fn product<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&a) {
        return super::gpu::product::matmul(a, b);
    }
    a.matmul(b)
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;

    use super::*;
    use crate::ops::testing::{assert_close, assert_gradients_equal, on_test_device, random};
    use crate::parameter::read;

    /// Every order of rows and columns that operands come in, in f32 and in bf16.
    fn assert_product([m, n, k]: [usize; 3], rows: &[usize]) {
        for dtype in [FloatDType::F32, FloatDType::BF16] {
            // What is compared is the product and not the rounding of its operands.
            let exact =
                |shape, seed| random(shape, seed).cast(FloatDType::BF16).cast(FloatDType::F32);
            let (a, b) = (exact([m, k], 1), exact([k, n], 2));
            let (of_a, of_b) = (read(a.clone()).unwrap(), read(b.clone()).unwrap());
            let placed = |x: Tensor<2>, turned: bool| {
                let there = |x: Tensor<2>| on_test_device(x).cast(dtype);
                if turned {
                    there(Tensor::from_data(x.transpose().into_data(), &b.device())).transpose()
                } else {
                    there(x)
                }
            };
            for turned in [[false, false], [false, true], [true, false], [true, true]] {
                let [a, b] = [placed(a.clone(), turned[0]), placed(b.clone(), turned[1])];
                let y = read(product(a, b).cast(FloatDType::F32)).unwrap();
                assert_eq!(y.len(), m * n);
                for &row in rows {
                    for column in (0..n).step_by(n.div_ceil(40)) {
                        let expected: f64 = (0..k)
                            .map(|i| f64::from(of_a[row * k + i]) * f64::from(of_b[i * n + column]))
                            .sum();
                        let error = (f64::from(y[row * n + column]) - expected).abs();
                        // bf16's last place where the CPU gives that.
                        let bound =
                            (k as f64).sqrt() * if dtype == FloatDType::F32 { 2e-6 } else { 1e-2 };
                        assert!(error < bound, "{m}x{n}x{k} {turned:?} {row},{column}: {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_any_shape_and_order_are_their_sums() {
        for shape in [[1, 1, 1], [5, 7, 3], [33, 65, 17], [1, 200, 64], [64, 128, 32]] {
            assert_product(shape, &(0..shape[0]).collect::<Vec<_>>());
        }
        assert_product([300, 1000, 130], &[0, 17, 128, 255, 299]);
    }

    #[test]
    fn a_product_large_enough_for_a_library_of_its_own_is_its_sums() {
        assert_product([2048, 2048, 2048], &[0, 1023, 2047]);
    }

    #[test]
    fn products_side_by_side_are_what_each_is_alone() {
        let (a, b) = (random([4 * 256, 128], 1), random([4 * 512, 128], 2));
        let (a, b) = (on_test_device(a), on_test_device(b));
        let together: Tensor<3> =
            product(a.clone().reshape([4, 256, 128]), b.clone().reshape([4, 512, 128]).transpose());
        for i in 0..4 {
            let of =
                |x: &Tensor<2>, rows: usize| x.clone().slice([i * rows..(i + 1) * rows, 0..128]);
            let alone = product(of(&a, 256), of(&b, 512).transpose());
            let one = together.clone().slice([i..i + 1, 0..256, 0..512]).reshape([256, 512]);
            assert_close(&format!("{i}"), &read(one).unwrap(), &read(alone).unwrap());
        }
    }

    #[test]
    fn gradients_of_a_product_are_those_of_burns() {
        assert_gradients_equal(
            &[random([5, 7], 1), random([7, 3], 2)],
            |inputs| inputs[0].clone().matmul(inputs[1].clone()),
            |inputs| product(inputs[0].clone(), inputs[1].clone()),
        );
    }
}
