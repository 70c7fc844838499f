//! CPU form of [`crate::ops::row_linear`].
//!
//! A product of few rows reads W once from memory and computes each output as inner products of
//! its row with all rows of x; meanwhile the adapters are fetched. A row's sums do not depend on how
//! many rows there are, so that an answer has the same digits whatever is answered beside it.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod inner_products;

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;
use std::ops::Range;

use super::gemm::{Elements, MatMut, MatRef, Threads, gemm_add, product};
use super::isa::{Isa, simd_kernels};
use super::memory::Ahead;
use super::step::{contiguous, dims, elements, from_values, values};
use crate::ops::row_linear::{RowUpdate, Rows};
use inner_products::Element;

/// Bytes of W that a task handles: these and the next ones lie in a second-level cache.
const BLOCK_BYTES: usize = 128 << 10;
/// Rows of W that a task handles are a multiple of this, so that whole tiles are.
const BLOCK_ROWS: usize = 12;
/// Below this many multiply-adds, handing work to other threads costs more than it saves.
const PARALLEL_MIN_MULTIPLY_ADDS: usize = 1 << 16;

pub(in crate::ops) fn row_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    residual: Option<Tensor<2>>,
    rows: Rows,
    updates: &[(Range<usize>, &RowUpdate)],
) -> Tensor<2> {
    let (x, weight) = (on_flex(x), on_flex(weight));
    let ([n, inputs], [outputs, _]) = (dims(&x), dims(&weight));
    let x = values(&x);
    let adapters: Vec<[FlexTensor; 2]> = updates
        .iter()
        .map(|(_, update)| [&update.a, &update.b].map(|x| on_flex(x.clone())))
        .collect();
    let ahead: Vec<&[f32]> = adapters.iter().flatten().map(values).collect();
    let shape = [n, inputs, outputs];
    let mut y = times_transposed(x, elements(&weight), shape, rows, &ahead);
    let mut tasks = Vec::with_capacity(updates.len());
    let (mut rest, mut end) = (y.as_mut_slice(), 0);
    for ((range, update), adapter) in updates.iter().zip(&adapters) {
        let own = rest.split_off_mut(..(range.end - end) * outputs).expect("ranges in order");
        let own = &mut own[(range.start - end) * outputs..];
        tasks.push((&x[range.start * inputs..range.end * inputs], *update, adapter, own));
        end = range.end;
    }
    let add = |(x, update, adapter, y): (&[f32], &RowUpdate, &[FlexTensor; 2], &mut [f32])| {
        add_update(x, update, adapter, rows, y, [x.len() / inputs, inputs, outputs]);
    };
    match tasks.len() {
        0 | 1 => tasks.into_iter().for_each(add),
        _ => tasks.into_par_iter().for_each(add),
    }
    if let Some(residual) = residual {
        let residual = on_flex(residual);
        y.iter_mut().zip(values(&residual)).for_each(|(y, residual)| *y += residual);
    }
    Tensor::from_primitive::<Flex>(from_values(y, [n, outputs])).autodiff()
}

/// A tensor's values in order. There are no gradients here.
fn on_flex(x: Tensor<2>) -> FlexTensor {
    contiguous(x.inner().try_into_primitive::<Flex>().expect("a tensor on the CPU"))
}

/// The same tensor with its values in order in memory.
pub(in crate::ops) fn in_order(x: Tensor<2>) -> Tensor<2> {
    Tensor::from_primitive::<Flex>(on_flex(x)).autodiff()
}

/// Adds what an adapter, whose A and Bᵀ are here, gives for the rows `x` to their outputs `y`.
fn add_update(
    x: &[f32],
    update: &RowUpdate,
    [a, b]: &[FlexTensor; 2],
    rows: Rows,
    y: &mut [f32],
    [n, inputs, outputs]: [usize; 3],
) {
    let isa = Isa::detect();
    let gain = update.gain.clone().map(on_flex);
    let ([z_width, _], [rank, b_width]) = (dims(a), dims(b));
    let z = times_transposed(x, elements(a), [n, inputs, z_width], rows, &[]);
    for (z_columns, b_columns, part) in update.parts() {
        let gain = gain.as_ref().map(|gain| &values(gain)[b_columns.clone()]);
        match rows {
            Rows::Few => {
                let b: Vec<&[f32]> =
                    values(b).chunks_exact(b_width).map(|b| &b[b_columns.clone()]).collect();
                for (z, y) in z.chunks_exact(z_width).zip(y.chunks_exact_mut(outputs)) {
                    let z = &z[z_columns.clone()];
                    add_sum_of_rows(isa, update.scale, z, &b, gain, &mut y[part.clone()]);
                }
            }
            Rows::Many => {
                let z = MatRef::new(&z, n, z_width).columns(z_columns);
                let b = MatRef::new(values(b), rank, b_width).columns(b_columns);
                let parts = MatMut::new(y, n, outputs).columns(part.clone());
                gemm_add(parts, update.scale, z, b, Threads::Shared);
                if let Some(gain) = gain {
                    let rows = y
                        .chunks_exact_mut(outputs)
                        .flat_map(|y| y[part.clone()].iter_mut().zip(gain));
                    rows.for_each(|(y, gain)| *y *= gain);
                }
            }
        }
    }
}

simd_kernels! {
    /// y ← g ∘ (y + s·Σᵢ zᵢ·bᵢ), in the order of i.
    fn add_sum_of_rows(scale: f32, z: &[f32], b: &[&[f32]], gain: Option<&[f32]>, y: &mut [f32]) {
        // So many sums stay in registers while all rows are read.
        const WIDTH: usize = 64;
        for start in (0..y.len()).step_by(WIDTH) {
            let columns = start..y.len().min(start + WIDTH);
            let mut sums = [0f32; WIDTH];
            for (z, b) in z.iter().zip(b) {
                let b = &b[columns.clone()];
                if let Some(b) = b.first_chunk::<WIDTH>() {
                    for i in 0..WIDTH {
                        sums[i] = M::mul_add(*z, b[i], sums[i]);
                    }
                } else {
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = M::mul_add(*z, *b, *sum);
                    }
                }
            }
            let y = &mut y[columns.clone()];
            for (y, sum) in y.iter_mut().zip(&sums) {
                *y += scale * sum;
            }
            if let Some(gain) = gain {
                y.iter_mut().zip(&gain[columns]).for_each(|(y, gain)| *y *= gain);
            }
        }
    }
}

/// x·Wᵀ, of `n` rows, `inputs` and `outputs`, before `ahead` is read.
fn times_transposed(
    x: &[f32],
    weight: Elements<'_>,
    [n, inputs, outputs]: [usize; 3],
    rows: Rows,
    ahead: &[&[f32]],
) -> Vec<f32> {
    match (rows, weight) {
        (Rows::Few, Elements::F32(weight)) => few_rows(x, weight, [n, inputs, outputs], ahead),
        (Rows::Few, Elements::Bf16(weight)) => few_rows(x, weight, [n, inputs, outputs], ahead),
        // A product over bf16 would round x as well.
        (Rows::Many, Elements::Bf16(weight)) => {
            many_rows(x, Elements::Widened(weight), [n, inputs, outputs])
        }
        (_, weight) => many_rows(x, weight, [n, inputs, outputs]),
    }
}

fn many_rows(x: &[f32], weight: Elements<'_>, [n, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    let weight = MatRef::of(weight, outputs, inputs);
    product(1.0, MatRef::new(x, n, inputs), weight.t(), Threads::Shared)
}

/// Rows of W, of `inputs` elements, that a task handles.
fn block_rows<W>(inputs: usize) -> usize {
    let rows = BLOCK_BYTES / (inputs * size_of::<W>()).max(1);
    (rows / BLOCK_ROWS).clamp(1, 64) * BLOCK_ROWS
}

fn few_rows<W: Element>(
    x: &[f32],
    weight: &[W],
    [n, inputs, outputs]: [usize; 3],
    ahead: &[&[f32]],
) -> Vec<f32> {
    let isa = Isa::detect();
    let mut y = vec![0.0; n * outputs];
    let block = block_rows::<W>(inputs);
    // Block by block, what of each row of y it gives.
    let mut rest: Vec<&mut [f32]> = y.chunks_exact_mut(outputs).collect();
    let mut parts = Vec::with_capacity(outputs.div_ceil(block) * n);
    for start in (0..outputs).step_by(block) {
        let width = block.min(outputs - start);
        parts.extend(rest.iter_mut().map(|row| row.split_off_mut(..width).expect("its outputs")));
    }
    let count = outputs.div_ceil(block);
    let task = |(index, (y, weight)): (usize, (&mut [&mut [f32]], &[W]))| {
        let ahead = Ahead::behind(weight, ahead, [index, count]);
        W::inner_products(isa, x, weight, inputs, y, ahead);
    };
    if n * inputs * outputs < PARALLEL_MIN_MULTIPLY_ADDS {
        parts.chunks_mut(n).zip(weight.chunks(block * inputs)).enumerate().for_each(task);
    } else {
        let blocks = parts.par_chunks_mut(n).zip(weight.par_chunks(block * inputs));
        blocks.enumerate().for_each(task);
    }
    y
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin()).collect()
    }

    fn inner_products<W: Element>(isa: Isa, x: &[f32], weight: &[W], inputs: usize) -> Vec<f32> {
        let outputs = weight.len() / inputs;
        let mut y = vec![0.0; x.len() / inputs * outputs];
        let mut rows: Vec<&mut [f32]> = y.chunks_mut(outputs).collect();
        let ahead = Ahead::behind(weight, &[], [0, 1]);
        W::inner_products(isa, x, weight, inputs, &mut rows, ahead);
        y
    }

    #[test]
    fn products_of_few_rows_have_the_values_of_f64_on_every_path() {
        for inputs in [1, 7, 8, 15, 16, 31, 33, 50, 65, 100] {
            let (n, outputs) = (7, 11);
            let (x, weight) = (wave(n * inputs, 0.7), wave(outputs * inputs, 0.4));
            let halves: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
            for isa in Isa::available() {
                let y = inner_products(isa, &x, &weight, inputs);
                let y_of_halves = inner_products(isa, &x, &halves, inputs);
                for (index, (y, of_halves)) in y.iter().zip(&y_of_halves).enumerate() {
                    let (row, output) = (index / outputs, index % outputs);
                    let x = &x[row * inputs..(row + 1) * inputs];
                    let exact = |weight: &dyn Fn(usize) -> f32| -> f64 {
                        let weights = (output * inputs..(output + 1) * inputs).map(weight);
                        x.iter().zip(weights).map(|(&x, w)| f64::from(x) * f64::from(w)).sum()
                    };
                    assert!((f64::from(*y) - exact(&|i| weight[i])).abs() < 1e-5, "{isa:?}");
                    let expected = exact(&|i| halves[i].to_f32());
                    assert!((f64::from(*of_halves) - expected).abs() < 1e-5, "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn row_has_the_same_bits_alone_and_among_others_on_every_path() {
        fn check<W: Element>(isa: Isa, x: &[f32], weight: &[W], inputs: usize) {
            let outputs = weight.len() / inputs;
            let together = inner_products(isa, x, weight, inputs);
            for rows in 1..x.len() / inputs {
                let alone = inner_products(isa, &x[..rows * inputs], weight, inputs);
                assert_eq!(alone, together[..rows * outputs], "{isa:?}, {rows} rows");
            }
        }
        let (n, inputs, outputs) = (11, 300, 40);
        let (x, weight) = (wave(n * inputs, 0.7), wave(outputs * inputs, 0.4));
        let halves: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
        for isa in Isa::available() {
            check(isa, &x, &weight, inputs);
            check(isa, &x, &halves, inputs);
        }
    }

    #[test]
    fn rows_shared_by_threads_have_the_same_bits_alone_and_among_others() {
        let (n, inputs, outputs) = (11, 300, 400);
        let (x, weight) = (wave(n * inputs, 0.7), wave(outputs * inputs, 0.4));
        let together = few_rows(&x, &weight, [n, inputs, outputs], &[]);
        for row in 0..n {
            let alone = few_rows(&x[row * inputs..][..inputs], &weight, [1, inputs, outputs], &[]);
            assert_eq!(alone, together[row * outputs..][..outputs], "row {row}");
        }
    }
}
