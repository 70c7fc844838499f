//! Blocks of quantised numbers, with the bits that ggml's reference quantisers give them: the same
//! searches in the same order of f32 operations (`ggml-quants.c`).

use half::f16;

/// Values in a block of the k-quants.
pub(super) const SUPER: usize = 256;
/// Below this a group counts as zeros.
const GROUP_MAX_EPS: f32 = 1e-15;

/// Appends one block. Values are finite.
pub(super) type Encode = fn(&[f32], &mut Vec<u8>) -> Result<(), f32>;

/// `value` in half precision.
pub(super) fn half(value: f32) -> Result<f16, f32> {
    Some(f16::from_f32(value)).filter(|half| half.is_finite()).ok_or(value)
}

/// To the nearest whole number, ties to the even one.
fn nearest(value: f32) -> i32 {
    value.round_ties_even() as i32
}

/// d = max|x| / 127, q = round(x / d).
pub(super) fn q8_0(values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
    let greatest = values.iter().fold(0f32, |greatest, value| greatest.max(value.abs()));
    let scale = greatest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out.extend(half(scale).map_err(|_| greatest)?.to_le_bytes());
    out.extend(values.iter().map(|value| (value * inverse).round() as i8 as u8));
    Ok(())
}

/// The value of the greatest magnitude, the first of several.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |max, &value| if value.abs() > max.abs() { value } else { max })
}

/// Whole numbers of 5 bits around 0: d = −extreme / 16.
pub(super) fn q5_0(values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
    let extreme = extreme(values);
    let scale = extreme / -16.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let quants: Vec<u8> =
        values.iter().map(|value| ((value * inverse + 16.5) as i8).min(31) as u8).collect();
    out.extend(half(scale).map_err(|_| extreme)?.to_le_bytes());
    five_bits(&quants, out);
    Ok(())
}

/// Whole numbers of 5 bits above the least value.
pub(super) fn q5_1(values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
    let least = values.iter().copied().fold(f32::MAX, f32::min);
    let greatest = values.iter().copied().fold(-f32::MAX, f32::max);
    let scale = (greatest - least) / 31.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let quants: Vec<u8> =
        values.iter().map(|value| ((value - least) * inverse + 0.5) as u8).collect();
    out.extend(half(scale).map_err(|_| greatest)?.to_le_bytes());
    out.extend(half(least)?.to_le_bytes());
    five_bits(&quants, out);
    Ok(())
}

/// 32 numbers: their fifth bits, then their low halves.
fn five_bits(quants: &[u8], out: &mut Vec<u8>) {
    let high = quants.iter().zip(0..).fold(0u32, |high, (&q, bit)| high | u32::from(q >> 4) << bit);
    out.extend(high.to_le_bytes());
    out.extend((0..16).map(|i| (quants[i] & 15) | (quants[i + 16] & 15) << 4));
}

/// Eight groups of 32 with a scale and a minimum of 6 bits each, and 4 bits a value.
pub(super) fn q4_k(values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
    let (packed, quants) = groups_with_minimum(values, 15, -1.0, 20, out)?;
    out.extend(packed);
    low_halves(&quants, out);
    Ok(())
}

/// The same with 5 bits a value.
pub(super) fn q5_k(values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
    let (packed, quants) = groups_with_minimum(values, 31, -0.5, 15, out)?;
    out.extend(packed);
    out.extend(
        (0..32)
            .map(|i| (0..8).fold(0u8, |high, group| high | (quants[32 * group + i] >> 4) << group)),
    );
    low_halves(&quants, out);
    Ok(())
}

/// Two groups of 32 in 32 bytes.
fn low_halves(quants: &[u8], out: &mut Vec<u8>) {
    for pair in quants.chunks_exact(64) {
        out.extend((0..32).map(|i| (pair[i] & 15) | (pair[i + 32] & 15) << 4));
    }
}

/// Appends the block's two scales; gives the groups' scales and minima, packed, and the quants.
fn groups_with_minimum(
    values: &[f32],
    most: i32,
    first: f32,
    steps: usize,
    out: &mut Vec<u8>,
) -> Result<([u8; 12], Vec<u8>), f32> {
    let (mut scales, mut minima) = ([0f32; 8], [0f32; 8]);
    let mut quants = Vec::with_capacity(SUPER);
    for (group, values) in values.chunks_exact(32).enumerate() {
        let squares = values.iter().fold(0f32, |sum, value| sum + value * value);
        let mean = (squares / 32.0).sqrt();
        let weights: Vec<f32> = values.iter().map(|value| mean + value.abs()).collect();
        let found = search_with_minimum(values, &weights, most, first, steps);
        (scales[group], minima[group]) = (found.0, found.1);
        quants.extend(found.2);
    }
    let greatest =
        |list: &[f32]| list.iter().fold(0f32, |most, &x| if x > most { x } else { most });
    let (max_scale, max_min) = (greatest(&scales), greatest(&minima));
    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let mut packed = [0u8; 12];
    for group in 0..8 {
        let bits = |inverse: f32, value: f32| (nearest(inverse * value) as u8).min(63);
        let scale = bits(inverse(max_scale), scales[group]);
        let least = bits(inverse(max_min), minima[group]);
        if group < 4 {
            (packed[group], packed[group + 4]) = (scale, least);
        } else {
            packed[group + 4] = (scale & 15) | (least & 15) << 4;
            packed[group - 4] |= (scale >> 4) << 6;
            packed[group] |= (least >> 4) << 6;
        }
    }
    let (d, d_min) = (half(max_scale / 63.0)?, half(max_min / 63.0)?);
    out.extend(d.to_le_bytes());
    out.extend(d_min.to_le_bytes());
    for (group, (values, quants)) in
        values.chunks_exact(32).zip(quants.chunks_exact_mut(32)).enumerate()
    {
        let (scale, least) = scale_and_least(&packed, group);
        let scale = d.to_f32() * f32::from(scale);
        if scale == 0.0 {
            continue;
        }
        let least = d_min.to_f32() * f32::from(least);
        for (quant, value) in quants.iter_mut().zip(values) {
            *quant = nearest((value + least) / scale).clamp(0, most) as u8;
        }
    }
    Ok((packed, quants))
}

/// Scale and minimum of a group, of six bits each.
fn scale_and_least(packed: &[u8; 12], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (
            (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4),
            (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4),
        )
    }
}

/// Scale, minus minimum and quants in 0..=most that bring the weighted squares of the errors down:
/// the plain ones, or those of one of `steps` + 1 other widths whose scale and minimum are the
/// least-squares ones.
fn search_with_minimum(
    values: &[f32],
    weights: &[f32],
    most: i32,
    first: f32,
    steps: usize,
) -> (f32, f32, Vec<u8>) {
    let mut least = values.iter().copied().fold(values[0], |a, b| if b < a { b } else { a });
    let greatest = values.iter().copied().fold(values[0], |a, b| if b > a { b } else { a });
    let mut sums = values.iter().zip(weights);
    let (sum_w, sum_x) = match sums.next() {
        Some((x, w)) => sums.fold((*w, w * x), |(sum_w, sum_x), (x, w)| (sum_w + w, sum_x + w * x)),
        None => (0.0, 0.0),
    };
    if least > 0.0 {
        least = 0.0;
    }
    if greatest == least {
        return (0.0, -least, vec![0; values.len()]);
    }
    let quantise = |inverse: f32, least: f32| -> Vec<u8> {
        values.iter().map(|x| nearest(inverse * (x - least)).clamp(0, most) as u8).collect()
    };
    let error = |scale: f32, least: f32, quants: &[u8]| {
        values.iter().zip(weights).zip(quants).fold(0f32, |sum, ((x, w), &q)| {
            let difference = scale * f32::from(q) + least - x;
            sum + w * (difference * difference)
        })
    };
    let inverse = most as f32 / (greatest - least);
    let mut scale = 1.0 / inverse;
    let mut quants = quantise(inverse, least);
    let mut best = error(scale, least, &quants);
    for step in 0..=steps {
        // What was found before is where the next search begins.
        let width = greatest - least;
        let tried = quantise((first + 0.1 * step as f32 + most as f32) / width, least);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for ((x, w), &q) in values.iter().zip(weights).zip(&tried) {
            let l = f32::from(q);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut this_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if this_least > 0.0 {
            (this_least, this_scale) = (0.0, sum_xl / sum_l2);
        }
        let this_error = error(this_scale, this_least, &tried);
        if this_error < best {
            (best, scale, least, quants) = (this_error, this_scale, this_least, tried);
        }
    }
    (scale, -least, quants)
}

/// Sixteen groups of 16 with a scale of 8 bits each, and 6 bits a value, around 0.
pub(super) fn q6_k(values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
    let mut scales = [0f32; 16];
    let mut quants = Vec::with_capacity(SUPER);
    for (group, values) in values.chunks_exact(16).enumerate() {
        let (scale, found) = search_around_zero(values, 32);
        scales[group] = scale;
        quants.extend(found);
    }
    let max_scale = extreme(&scales);
    if max_scale.abs() < GROUP_MAX_EPS {
        out.resize(out.len() + 210, 0);
        return Ok(());
    }
    let inverse = -128.0 / max_scale;
    let d = half(1.0 / inverse)?;
    let scales = scales.map(|scale| nearest(inverse * scale).min(127) as i8);
    for (group, values) in values.chunks_exact(16).enumerate() {
        let scale = d.to_f32() * f32::from(scales[group]);
        if scale == 0.0 {
            continue;
        }
        for (quant, value) in quants[16 * group..].iter_mut().zip(values) {
            *quant = (nearest(value / scale).clamp(-32, 31) + 32) as u8;
        }
    }
    for half in quants.chunks_exact(128) {
        out.extend((0..64).map(|i| (half[i] & 15) | (half[i + 64] & 15) << 4));
    }
    for half in quants.chunks_exact(128) {
        out.extend((0..32).map(|i| {
            (0..4).fold(0u8, |high, part| high | (half[32 * part + i] >> 4) << (2 * part))
        }));
    }
    out.extend(scales.map(|scale| scale as u8));
    out.extend(d.to_le_bytes());
    Ok(())
}

/// Scale and quants, `half` added, that bring the squares of the errors down, each weighted with its
/// value's square.
fn search_around_zero(values: &[f32], half: i32) -> (f32, Vec<u8>) {
    let extreme = extreme(values);
    if extreme.abs() < GROUP_MAX_EPS {
        return (0.0, vec![0; values.len()]);
    }
    let quantise = |inverse: f32| -> (Vec<u8>, f32, f32) {
        let mut quants = Vec::with_capacity(values.len());
        let (mut sum_lx, mut sum_l2) = (0f32, 0f32);
        for &x in values {
            let l = nearest(inverse * x).clamp(-half, half - 1);
            let w = x * x;
            sum_lx += w * x * l as f32;
            sum_l2 += w * l as f32 * l as f32;
            quants.push((l + half) as u8);
        }
        (quants, sum_lx, sum_l2)
    };
    let (mut quants, sum_lx, sum_l2) = quantise(-half as f32 / extreme);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|&step| step != 0) {
        let (tried, sum_lx, sum_l2) = quantise(-(half as f32 + 0.1 * step as f32) / extreme);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            quants = tried;
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    (scale, quants)
}
