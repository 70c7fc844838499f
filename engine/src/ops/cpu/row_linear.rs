//! CPU form of [`crate::ops::row_linear`].
//!
//! A row's sums do not depend on how many rows there are, so that an answer has the same digits
//! whatever is answered beside it.

use burn::backend::Flex;
use burn::tensor::{FloatDType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;
use std::ops::Range;

use super::gemm::{Elements, MatMut, MatRef, Panels, Threads, product};
use super::step::{contiguous, dims, elements, filled, from_values, values};
use crate::ops::row_linear::{RowUpdate, RowWeight};

/// Rows of an adapter that a task handles.
const UPDATE_ROWS: usize = 32;

pub(in crate::ops) fn row_linear(
    x: Tensor<2>,
    weight: &RowWeight,
    residual: Option<Tensor<2>>,
    updates: &[(Range<usize>, &RowUpdate)],
) -> Tensor<2> {
    let x = on_flex(x);
    let [n, inputs] = dims(&x);
    let [outputs, _] = weight.dims();
    let x = values(&x);
    let mut y = times_transposed(MatRef::new(x, n, inputs), weight);
    let mut tasks = Vec::with_capacity(updates.len());
    let (mut rest, mut end) = (y.as_mut_slice(), 0);
    for (range, update) in updates {
        let own = rest.split_off_mut(..(range.end - end) * outputs).expect("ranges in order");
        let own = &mut own[(range.start - end) * outputs..];
        let x = &x[range.start * inputs..range.end * inputs];
        let parts = x.chunks(UPDATE_ROWS * inputs).zip(own.chunks_mut(UPDATE_ROWS * outputs));
        tasks.extend(parts.map(|(x, y)| (x, *update, y)));
        end = range.end;
    }
    let add = |(x, update, y): (&[f32], &RowUpdate, &mut [f32])| {
        add_update(x, update, y, [inputs, outputs]);
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

/// The panels of a matrix of f32 or bf16.
pub(in crate::ops) fn panels(weight: Tensor<2>) -> Panels {
    let weight = on_flex(weight);
    match elements(&weight) {
        Elements::Bf16(values) => Panels::of_bf16(values, dims(&weight)),
        _ => Panels::of_f32(values(&weight), dims(&weight)),
    }
}

/// The matrix that panels hold, in the numbers that they hold.
pub(in crate::ops) fn dense(panels: &Panels) -> Tensor<2> {
    let [outputs, inputs] = panels.dims();
    let values = filled(outputs * inputs, inputs, |output, row| panels.row(output, row));
    let weight = from_values(values, [outputs, inputs]);
    let weight: Tensor<2> = Tensor::from_primitive::<Flex>(weight).autodiff();
    if panels.is_bf16() { weight.cast(FloatDType::BF16) } else { weight }
}

/// Rows `ids` of the matrix times `scale`.
pub(in crate::ops) fn rows(panels: &Panels, ids: &[u32], scale: f32) -> Tensor<2> {
    let [_, width] = panels.dims();
    let mut y = vec![0.0; ids.len() * width];
    for (&id, y) in ids.iter().zip(y.chunks_exact_mut(width)) {
        panels.row(id as usize, y);
        y.iter_mut().for_each(|value| *value *= scale);
    }
    Tensor::from_primitive::<Flex>(from_values(y, [ids.len(), width])).autodiff()
}

/// Adds what an adapter gives for the rows `x` to their outputs `y`.
fn add_update(x: &[f32], update: &RowUpdate, y: &mut [f32], [inputs, outputs]: [usize; 2]) {
    let gain = update.gain.clone().map(on_flex);
    let n = x.len() / inputs;
    let [z_width, _] = update.a.dims();
    let z = times_transposed(MatRef::new(x, n, inputs), &update.a);
    let z = MatRef::new(&z, n, z_width);
    for (i, (part, columns)) in update.parts.iter().zip(update.columns()).enumerate() {
        let z = z.columns(i * update.rank..(i + 1) * update.rank);
        let target = MatMut::new(y, n, outputs).columns(part.outputs.clone());
        let RowWeight::Panels(b) = &part.b else { unreachable!("an adapter only answers") };
        b.add_product(target, update.scale, z);
        if let Some(gain) = &gain {
            let gain = &values(gain)[columns];
            for y in y.chunks_exact_mut(outputs) {
                y[part.outputs.clone()].iter_mut().zip(gain).for_each(|(y, gain)| *y *= gain);
            }
        }
    }
}

/// x·Wᵀ.
fn times_transposed(x: MatRef<'_>, weight: &RowWeight) -> Vec<f32> {
    let weight = match weight {
        RowWeight::Panels(panels) => return panels.product(x),
        RowWeight::Dense(weight) => on_flex(weight.as_ref().clone()),
    };
    let elements = match elements(&weight) {
        // A product over bf16 would round x as well.
        Elements::Bf16(weight) => Elements::Widened(weight),
        elements => elements,
    };
    let [outputs, inputs] = dims(&weight);
    product(1.0, x, MatRef::of(elements, outputs, inputs).t(), Threads::Shared)
}
