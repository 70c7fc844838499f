//! The kernels: what a GPU would otherwise do in many passes over memory.
//!
//! They compute in f32 whatever the type of what they read and write. Buffers are row major and
//! without gaps. A kernel over rows gives each row a block of [`UNITS`] threads.

use burn_cubecl::cubecl;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::ops::dropout::{MIX_FIRST, MIX_INCREMENT, MIX_SECOND};
use crate::ops::gated_activation::{GELU_CUBIC, GELU_SCALE};
use crate::ops::quantized::BLOCK;

/// Threads of a block.
pub(super) const UNITS: u32 = 256;
/// The most groups of them that sum without shared memory: a GPU has 8 threads or more in one.
const MOST_PLANES: u32 = UNITS / 8;
/// Rows that a thread of [`add_low_rank`] goes through with its column of the factor.
pub(super) const LOW_RANK_ROWS: u32 = 32;

/// The sum of every thread's value, for all of them.
#[cube]
fn sum_of_block(value: f32) -> f32 {
    let mut parts = Shared::<[f32]>::new_slice(comptime!(MOST_PLANES as usize));
    let sum = plane_sum(value);
    let lane = UNIT_POS_X % PLANE_DIM;
    if lane == 0 {
        parts[(UNIT_POS_X / PLANE_DIM) as usize] = sum;
    }
    sync_cube();
    let mut total = 0.0f32;
    for i in 0..(UNITS / PLANE_DIM) as usize {
        total += parts[i];
    }
    sync_cube();
    total
}

/// The greatest of every thread's values, for all of them.
#[cube]
fn greatest_of_block(value: f32) -> f32 {
    let mut parts = Shared::<[f32]>::new_slice(comptime!(MOST_PLANES as usize));
    let most = plane_max(value);
    let lane = UNIT_POS_X % PLANE_DIM;
    if lane == 0 {
        parts[(UNIT_POS_X / PLANE_DIM) as usize] = most;
    }
    sync_cube();
    let mut total = parts[0];
    for i in 1..(UNITS / PLANE_DIM) as usize {
        total = max(total, parts[i]);
    }
    sync_cube();
    total
}

/// 1 / √x, but NaN for infinity.
#[cube]
fn inverse_root(x: f32) -> f32 {
    let mut root = x;
    if x > f32::MAX {
        root = 0.0f32 - x;
    }
    1.0f32 / root.sqrt()
}

/// y = ŵ∘x·ρ of each row. ρ is NaN where x² overflows.
#[cube(launch)]
pub(super) fn rms_norm<X: Float, Y: Float>(
    x: &[X],
    weight: &[f32],
    y: &mut [Y],
    width: u32,
    epsilon: f32,
    offset: f32,
    #[define(X, Y)] _types: [ElemType; 2],
) {
    let width = width as usize;
    let start = CUBE_POS * width;
    let mut squares = 0.0f32;
    let mut i = UNIT_POS_X as usize;
    while i < width {
        let value = f32::cast_from(x[start + i]);
        squares += value * value;
        i += UNITS as usize;
    }
    let rho = inverse_root(sum_of_block(squares) / f32::cast_from(width as u32) + epsilon);
    let mut i = UNIT_POS_X as usize;
    while i < width {
        let value = f32::cast_from(x[start + i]);
        y[start + i] = Y::cast_from(value * rho * (weight[i] + offset));
        i += UNITS as usize;
    }
}

/// dx = ρ·(ŵ∘dy − x·ρ²·⟨ŵ∘dy, x⟩ / H) of each row, and ρ.
#[cube(launch)]
pub(super) fn rms_norm_backward<X: Float, Y: Float>(
    x: &[X],
    weight: &[f32],
    dy: &[Y],
    dx: &mut [X],
    roots: &mut [f32],
    width: u32,
    epsilon: f32,
    offset: f32,
    #[define(X, Y)] _types: [ElemType; 2],
) {
    let width = width as usize;
    let start = CUBE_POS * width;
    let mut squares = 0.0f32;
    let mut product = 0.0f32;
    let mut i = UNIT_POS_X as usize;
    while i < width {
        let value = f32::cast_from(x[start + i]);
        squares += value * value;
        product += value * f32::cast_from(dy[start + i]) * (weight[i] + offset);
        i += UNITS as usize;
    }
    let size = f32::cast_from(width as u32);
    let rho = inverse_root(sum_of_block(squares) / size + epsilon);
    let share = sum_of_block(product) * rho * rho / size;
    let mut i = UNIT_POS_X as usize;
    while i < width {
        let value = f32::cast_from(x[start + i]);
        let slope = f32::cast_from(dy[start + i]) * (weight[i] + offset);
        dx[start + i] = X::cast_from(rho * (slope - value * share));
        i += UNITS as usize;
    }
    if UNIT_POS_X == 0 {
        roots[CUBE_POS] = rho;
    }
}

/// Heads of rows `[tokens, stride]`, turned by their tokens' rotations, as `[heads, tokens, dim]`; or
/// with `joins` the inverse, for gradients. A row of the tables has `pairs` entries. With `pairs` 0 the
/// heads are only moved.
#[cube(launch)]
pub(super) fn turn_heads<X: Float, Y: Float>(
    x: &[X],
    cosines: &[f32],
    sines: &[f32],
    positions: &[u32],
    y: &mut [Y],
    tokens: u32,
    stride: u32,
    first_column: u32,
    dim: u32,
    pairs: u32,
    #[comptime] joins: bool,
    #[define(X, Y)] _types: [ElemType; 2],
) {
    let of_heads = ABSOLUTE_POS;
    let count = if comptime!(joins) { x.len() } else { y.len() };
    if of_heads >= count {
        terminate!();
    }
    let dim = dim as usize;
    let pairs = pairs as usize;
    let element = of_heads % dim;
    let token = (of_heads / dim) % tokens as usize;
    let head = of_heads / dim / tokens as usize;
    let of_rows = token * stride as usize + first_column as usize + head * dim + element;
    let (from, to) = if comptime!(joins) { (of_heads, of_rows) } else { (of_rows, of_heads) };
    let mut value = f32::cast_from(x[from]);
    if element < 2 * pairs {
        let table = positions[token] as usize * pairs + element % pairs;
        let mut sine = sines[table];
        if comptime!(joins) {
            sine = 0.0f32 - sine;
        }
        if element < pairs {
            value = value * cosines[table] - f32::cast_from(x[from + pairs]) * sine;
        } else {
            value = value * cosines[table] + f32::cast_from(x[from - pairs]) * sine;
        }
    }
    y[to] = Y::cast_from(value);
}

/// λ·s, capped by `cap` unless that is 0.
#[cube]
fn scaled(score: f32, scale: f32, cap: f32) -> f32 {
    let mut value = score * scale;
    if cap > 0.0f32 {
        value = cap * (value / cap).tanh();
    }
    value
}

/// The slope of [`scaled`] by λ·s, for what it gives.
#[cube]
fn cap_slope(score: f32, cap: f32) -> f32 {
    let mut slope = 1.0f32;
    if cap > 0.0f32 {
        slope = 1.0f32 - (score / cap) * (score / cap);
    }
    slope
}

/// The first key that a query sees whose last is before `end`.
#[cube]
fn first_key(end: usize, window: u32) -> usize {
    let mut first = 0usize;
    if window > 0 && end > window as usize {
        first = end - window as usize;
    }
    first
}

/// P of each row of products q̂·k̂ᵀ. Row r holds query `r mod queries`, whose last key is
/// `earlier` keys after its number, and which sees `window` keys, or all where that is 0.
#[cube(launch)]
pub(super) fn causal_softmax<S: Float, P: Float>(
    products: &[S],
    weights: &mut [P],
    queries: u32,
    keys: u32,
    earlier: u32,
    window: u32,
    scale: f32,
    cap: f32,
    #[define(S, P)] _types: [ElemType; 2],
) {
    let row = CUBE_POS;
    let keys = keys as usize;
    let start = row * keys;
    let end = row % queries as usize + earlier as usize + 1;
    let first = first_key(end, window);
    let mut most = f32::new(-3.0e38);
    let mut i = first + UNIT_POS_X as usize;
    while i < end {
        most = max(most, scaled(f32::cast_from(products[start + i]), scale, cap));
        i += UNITS as usize;
    }
    let most = greatest_of_block(most);
    let mut sum = 0.0f32;
    let mut i = first + UNIT_POS_X as usize;
    while i < end {
        sum += (scaled(f32::cast_from(products[start + i]), scale, cap) - most).exp();
        i += UNITS as usize;
    }
    let inverse = 1.0f32 / sum_of_block(sum);
    let mut i = UNIT_POS_X as usize;
    while i < keys {
        let mut weight = 0.0f32;
        if i >= first && i < end {
            weight =
                (scaled(f32::cast_from(products[start + i]), scale, cap) - most).exp() * inverse;
        }
        weights[start + i] = P::cast_from(weight);
        i += UNITS as usize;
    }
}

/// From the products and dP of each row: P, and dS·λ, the gradient of the products.
#[cube(launch)]
pub(super) fn causal_softmax_backward<S: Float, P: Float>(
    products: &[S],
    weight_gradients: &[S],
    weights: &mut [P],
    gradients: &mut [P],
    queries: u32,
    keys: u32,
    earlier: u32,
    window: u32,
    scale: f32,
    cap: f32,
    #[define(S, P)] _types: [ElemType; 2],
) {
    let row = CUBE_POS;
    let keys = keys as usize;
    let start = row * keys;
    let end = row % queries as usize + earlier as usize + 1;
    let first = first_key(end, window);
    let mut most = f32::new(-3.0e38);
    let mut i = first + UNIT_POS_X as usize;
    while i < end {
        most = max(most, scaled(f32::cast_from(products[start + i]), scale, cap));
        i += UNITS as usize;
    }
    let most = greatest_of_block(most);
    let mut sum = 0.0f32;
    let mut product = 0.0f32;
    let mut i = first + UNIT_POS_X as usize;
    while i < end {
        let weight = (scaled(f32::cast_from(products[start + i]), scale, cap) - most).exp();
        sum += weight;
        product += weight * f32::cast_from(weight_gradients[start + i]);
        i += UNITS as usize;
    }
    let inverse = 1.0f32 / sum_of_block(sum);
    let mean = sum_of_block(product) * inverse;
    let mut i = UNIT_POS_X as usize;
    while i < keys {
        let mut weight = 0.0f32;
        let mut gradient = 0.0f32;
        if i >= first && i < end {
            let score = scaled(f32::cast_from(products[start + i]), scale, cap);
            weight = (score - most).exp() * inverse;
            gradient = weight * (f32::cast_from(weight_gradients[start + i]) - mean) * scale;
            gradient *= cap_slope(score, cap);
        }
        weights[start + i] = P::cast_from(weight);
        gradients[start + i] = P::cast_from(gradient);
        i += UNITS as usize;
    }
}

/// σ(x).
#[cube]
fn logistic(x: f32) -> f32 {
    1.0f32 / (1.0f32 + (0.0f32 - x).exp())
}

/// tanh(√(2/π)·(x + 0.044715·x³)).
#[cube]
fn gelu_tanh(x: f32) -> f32 {
    (GELU_SCALE * (x + GELU_CUBIC * x * x * x)).tanh()
}

/// a(x).
#[cube]
fn activated(x: f32, #[comptime] is_gelu: bool) -> f32 {
    if comptime!(is_gelu) { 0.5f32 * x * (1.0f32 + gelu_tanh(x)) } else { x * logistic(x) }
}

/// a′(x).
#[cube]
fn slope_of(x: f32, #[comptime] is_gelu: bool) -> f32 {
    if comptime!(is_gelu) {
        let t = gelu_tanh(x);
        let inner = GELU_SCALE * (1.0f32 + 3.0f32 * GELU_CUBIC * x * x);
        0.5f32 * (1.0f32 + t) + 0.5f32 * x * (1.0f32 - t * t) * inner
    } else {
        let s = logistic(x);
        s * (1.0f32 + x * (1.0f32 - s))
    }
}

/// y = a(g)·u, where a row holds g and then u, each `width` wide, and what is read of them again.
#[cube(launch)]
pub(super) fn gated_activation<X: Float, Y: Float>(
    gate_up: &[X],
    y: &mut [Y],
    kept: &mut [Y],
    width: u32,
    #[comptime] is_gelu: bool,
    #[define(X, Y)] _types: [ElemType; 2],
) {
    let index = ABSOLUTE_POS;
    if index >= y.len() {
        terminate!();
    }
    let width = width as usize;
    let at = index / width * 2 * width + index % width;
    let gate = f32::cast_from(gate_up[at]);
    let up = f32::cast_from(gate_up[at + width]);
    y[index] = Y::cast_from(activated(gate, is_gelu) * up);
    kept[at] = Y::cast_from(gate);
    kept[at + width] = Y::cast_from(up);
}

/// dg and du beside each other as g and u are.
#[cube(launch)]
pub(super) fn gated_activation_backward<X: Float, Y: Float>(
    kept: &[Y],
    dy: &[X],
    gradient: &mut [f32],
    width: u32,
    #[comptime] is_gelu: bool,
    #[define(X, Y)] _types: [ElemType; 2],
) {
    let index = ABSOLUTE_POS;
    if index >= dy.len() {
        terminate!();
    }
    let width = width as usize;
    let at = index / width * 2 * width + index % width;
    let gate = f32::cast_from(kept[at]);
    let up = f32::cast_from(kept[at + width]);
    let dy = f32::cast_from(dy[index]);
    let slope = slope_of(gate, is_gelu);
    let activated = activated(gate, is_gelu);
    gradient[at] = dy * up * slope;
    gradient[at + width] = dy * activated;
}

/// What [`crate::ops::dropout::Dropout::factor`] gives for element number `index`.
#[cube]
fn dropout_factor(index: usize, stream: u64, threshold: u64, keep_scale: f32) -> f32 {
    let mut z = stream + u64::cast_from(index) + MIX_INCREMENT;
    z = (z ^ (z >> 30u64)) * MIX_FIRST;
    z = (z ^ (z >> 27u64)) * MIX_SECOND;
    z = z ^ (z >> 31u64);
    let mut factor = keep_scale;
    if (z >> 32u64) < threshold {
        factor = 0.0f32;
    }
    factor
}

/// drop∘x.
#[cube(launch)]
pub(super) fn drop_elements<X: Float>(
    x: &[X],
    y: &mut [X],
    stream: u64,
    threshold: u64,
    keep_scale: f32,
    #[define(X)] _type: ElemType,
) {
    let index = ABSOLUTE_POS;
    if index >= y.len() {
        terminate!();
    }
    let factor = dropout_factor(index, stream, threshold, keep_scale);
    y[index] = X::cast_from(f32::cast_from(x[index]) * factor);
}

/// y[t, first + o] += s·Σ z[t, first_rank + k]·factor[k, o] for a range of columns. The factor is
/// `[rank, columns]`. With `drops` each element is multiplied by its factor of dropout first.
#[cube(launch)]
pub(super) fn add_low_rank<Z: Float>(
    y: &mut [f32],
    z: &[Z],
    factor: &[f32],
    rows: u32,
    width: u32,
    first_column: u32,
    columns: u32,
    z_width: u32,
    first_rank: u32,
    scale: f32,
    stream: u64,
    threshold: u64,
    keep_scale: f32,
    #[comptime] rank: usize,
    #[comptime] drops: bool,
    #[define(Z)] _type: ElemType,
) {
    let column = ABSOLUTE_POS_X as usize;
    if column >= columns as usize {
        terminate!();
    }
    let mut own = Array::<f32>::new(rank);
    for k in 0..rank {
        own[k] = factor[k * columns as usize + column] * scale;
    }
    let first = (CUBE_POS_Y * LOW_RANK_ROWS) as usize;
    let mut end = first + LOW_RANK_ROWS as usize;
    if end > rows as usize {
        end = rows as usize;
    }
    for row in first..end {
        let at = row * width as usize + first_column as usize + column;
        let start = row * z_width as usize + first_rank as usize;
        let mut sum = 0.0f32;
        for k in 0..rank {
            sum += f32::cast_from(z[start + k]) * own[k];
        }
        if comptime!(drops) {
            sum *= dropout_factor(at, stream, threshold, keep_scale);
        }
        y[at] += sum;
    }
}

/// The numbers that a matrix's codes stand for. A byte is a number of −127 to 127, or two codes of
/// `values`, the first in its upper half; each of the `blocks` of a row has a scale.
#[cube(launch)]
pub(super) fn decode_blocks<Y: Float>(
    codes: &[u32],
    scales: &[f32],
    values: &[f32],
    y: &mut [Y],
    columns: u32,
    row_bytes: u32,
    blocks: u32,
    #[comptime] is_nf4: bool,
    #[define(Y)] _type: ElemType,
) {
    let index = ABSOLUTE_POS;
    if index >= y.len() {
        terminate!();
    }
    let columns = columns as usize;
    let (row, column) = (index / columns, index % columns);
    let scale = scales[row * blocks as usize + column / BLOCK];
    let in_row = if comptime!(is_nf4) { column / 2 } else { column };
    let byte = row * row_bytes as usize + in_row;
    let code = (codes[byte / 4] >> (8 * (byte % 4) as u32)) & 255;
    if comptime!(is_nf4) {
        let shift = 4 * (1 - column % 2) as u32;
        y[index] = Y::cast_from(values[((code >> shift) & 15) as usize] * scale);
    } else {
        let mut number = f32::cast_from(code);
        if code > 127 {
            number -= 256.0f32;
        }
        y[index] = Y::cast_from(number * (scale / 127.0f32));
    }
}

/// Of each row of logits z with target y and weight w: nll, by how much the target's logit falls
/// short of the greatest, and w·dz.
#[cube(launch)]
pub(super) fn cross_entropy<Z: Float>(
    logits: &[f32],
    ids: &[u32],
    weights: &[f32],
    nll: &mut [f32],
    margins: &mut [f32],
    gradients: &mut [Z],
    width: u32,
    cap: f32,
    #[define(Z)] _type: ElemType,
) {
    let row = CUBE_POS;
    let width = width as usize;
    let start = row * width;
    let mut most = f32::new(-3.0e38);
    let mut i = UNIT_POS_X as usize;
    while i < width {
        most = max(most, scaled(logits[start + i], 1.0f32, cap));
        i += UNITS as usize;
    }
    let most = greatest_of_block(most);
    let mut sum = 0.0f32;
    let mut i = UNIT_POS_X as usize;
    while i < width {
        sum += (scaled(logits[start + i], 1.0f32, cap) - most).exp();
        i += UNITS as usize;
    }
    let sum = sum_of_block(sum);
    let id = ids[row] as usize;
    let target = scaled(logits[start + id], 1.0f32, cap);
    if UNIT_POS_X == 0 {
        nll[row] = sum.ln() + most - target;
        margins[row] = target - most;
    }
    let factor = weights[row] / sum;
    let mut i = UNIT_POS_X as usize;
    while i < width {
        let score = scaled(logits[start + i], 1.0f32, cap);
        let mut gradient = (score - most).exp() * factor;
        if i == id {
            gradient -= weights[row];
        }
        gradient *= cap_slope(score, cap);
        gradients[start + i] = Z::cast_from(gradient);
        i += UNITS as usize;
    }
}

/// One AdamW update; `steps` holds the scalars of [`crate::ops::adamw::Step`] in their order.
#[cube(launch)]
pub(super) fn adamw(
    value: &[f32],
    gradient: &[f32],
    first: &[f32],
    second: &[f32],
    new_value: &mut [f32],
    new_first: &mut [f32],
    new_second: &mut [f32],
    gradient_scale: f32,
    decay: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    inverse_root_correction: f32,
    epsilon: f32,
) {
    let i = ABSOLUTE_POS;
    if i >= value.len() {
        terminate!();
    }
    let g = gradient[i] * gradient_scale;
    let m = first[i] * beta1 + g * one_minus_beta1;
    let v = second[i] * beta2 + g * g * one_minus_beta2;
    new_first[i] = m;
    new_second[i] = v;
    new_value[i] =
        value[i] * decay - m / (v.sqrt() * inverse_root_correction + epsilon) * step_size;
}
