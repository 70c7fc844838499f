//! A model of the AVX-512 instructions, after the pseudocode of Intel's manuals, for tests on
//! machines without them.

use half::bf16;

use super::instructions::Instructions;

/// What an instruction leaves undefined holds this, so that no test passes by its use.
const UNDEFINED: u32 = 0x7fc0_dead;

/// Vectors as arrays of 16 lanes, lane 0 the lowest.
#[derive(Clone, Copy)]
pub(super) struct Model;

type V = [u32; 16];

fn words(v: V) -> [u16; 32] {
    std::array::from_fn(|i| (v[i / 2] >> (16 * (i % 2))) as u16)
}

fn from_words(words: [u16; 32]) -> V {
    std::array::from_fn(|i| u32::from(words[2 * i]) | u32::from(words[2 * i + 1]) << 16)
}

/// VCVTNE2PS2BF16 of one element: denormals count as zeros, NaN becomes quiet, and the others are
/// rounded to nearest even.
fn to_bf16(x: u32) -> u16 {
    let value = f32::from_bits(x);
    if value.is_nan() {
        (x >> 16) as u16 | 0x40
    } else if value.is_subnormal() {
        (x >> 16) as u16 & 0x8000
    } else {
        bf16::from_f32(value).to_bits()
    }
}

/// Denormals as zeros of their sign.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// Lanes in each 128 bits of two vectors, as the unpack instructions take them.
fn unpack(a: V, b: V, [first, second, third, fourth]: [(bool, usize); 4]) -> V {
    std::array::from_fn(|i| {
        let (of_b, lane) = [first, second, third, fourth][i % 4];
        if of_b { b[i / 4 * 4 + lane] } else { a[i / 4 * 4 + lane] }
    })
}

/// Quarter `q` of a vector.
fn quarter(v: V, q: usize) -> [u32; 4] {
    std::array::from_fn(|i| v[4 * q + i])
}

fn join(quarters: [[u32; 4]; 4]) -> V {
    std::array::from_fn(|i| quarters[i / 4][i % 4])
}

impl Instructions for Model {
    type V = V;

    unsafe fn setzero() -> V {
        [0; 16]
    }

    unsafe fn set1_epi32(lane: *const u32) -> V {
        // SAFETY: as the caller promises, here and below.
        [unsafe { lane.read_unaligned() }; 16]
    }

    unsafe fn loadu(bytes: *const u8) -> V {
        // SAFETY: as above.
        unsafe { bytes.cast::<V>().read_unaligned() }
    }

    unsafe fn storeu(bytes: *mut u8, v: V) {
        // SAFETY: as above.
        unsafe { bytes.cast::<V>().write_unaligned(v) }
    }

    unsafe fn maskz_loadu_epi32(mask: u16, lanes: *const u32) -> V {
        // SAFETY: as above.
        std::array::from_fn(|i| if mask >> i & 1 == 1 { unsafe { *lanes.add(i) } } else { 0 })
    }

    unsafe fn maskz_loadu_epi16(mask: u32, words: *const u16) -> V {
        // SAFETY: as above.
        let word = |i| if mask >> i & 1 == 1 { unsafe { *words.add(i) } } else { 0 };
        from_words(std::array::from_fn(word))
    }

    unsafe fn maskz_loadu_epi16_half(mask: u16, words: *const u16) -> V {
        // SAFETY: as above.
        let mut v = unsafe { Self::maskz_loadu_epi16(u32::from(mask), words) };
        v[8..].fill(UNDEFINED);
        v
    }

    unsafe fn inserti64x4_high(low: V, high: V) -> V {
        std::array::from_fn(|i| if i < 8 { low[i] } else { high[i - 8] })
    }

    unsafe fn cvtepu16_epi32(v: V) -> V {
        let words = words(v);
        std::array::from_fn(|i| u32::from(words[i]))
    }

    unsafe fn slli_epi32_16(v: V) -> V {
        v.map(|lane| lane << 16)
    }

    unsafe fn cvtne2ps_pbh(high: V, low: V) -> V {
        from_words(std::array::from_fn(|i| to_bf16(if i < 16 { low[i] } else { high[i - 16] })))
    }

    unsafe fn dpbf16_ps(sums: V, a: V, b: V) -> V {
        let (a, b) = (words(a), words(b));
        let value = |word: u16| flushed(f32::from_bits(u32::from(word) << 16));
        std::array::from_fn(|i| {
            let sum = flushed(f32::from_bits(sums[i]));
            // The higher of the pair first, each fused and rounded to nearest.
            let sum = flushed(value(a[2 * i + 1]).mul_add(value(b[2 * i + 1]), sum));
            flushed(value(a[2 * i]).mul_add(value(b[2 * i]), sum)).to_bits()
        })
    }

    unsafe fn fmadd_ps(a: V, b: V, c: V) -> V {
        let value = |v: V, i: usize| f32::from_bits(v[i]);
        std::array::from_fn(|i| value(a, i).mul_add(value(b, i), value(c, i)).to_bits())
    }

    unsafe fn mul_ps(a: V, b: V) -> V {
        std::array::from_fn(|i| (f32::from_bits(a[i]) * f32::from_bits(b[i])).to_bits())
    }

    unsafe fn permutexvar_epi16(order: V, v: V) -> V {
        let (order, v) = (words(order), words(v));
        from_words(std::array::from_fn(|i| v[usize::from(order[i]) % 32]))
    }

    unsafe fn unpacklo_epi32(a: V, b: V) -> V {
        unpack(a, b, [(false, 0), (true, 0), (false, 1), (true, 1)])
    }

    unsafe fn unpackhi_epi32(a: V, b: V) -> V {
        unpack(a, b, [(false, 2), (true, 2), (false, 3), (true, 3)])
    }

    unsafe fn unpacklo_epi64(a: V, b: V) -> V {
        unpack(a, b, [(false, 0), (false, 1), (true, 0), (true, 1)])
    }

    unsafe fn unpackhi_epi64(a: V, b: V) -> V {
        unpack(a, b, [(false, 2), (false, 3), (true, 2), (true, 3)])
    }

    unsafe fn shuffle_i32x4_even(a: V, b: V) -> V {
        join([quarter(a, 0), quarter(a, 2), quarter(b, 0), quarter(b, 2)])
    }

    unsafe fn shuffle_i32x4_odd(a: V, b: V) -> V {
        join([quarter(a, 1), quarter(a, 3), quarter(b, 1), quarter(b, 3)])
    }

    fn prefetch(_address: *const u8) {}

    fn prefetch_second_level(_address: *const u8) {}

    fn from_array(lanes: [u32; 16]) -> V {
        lanes
    }

    fn to_array(v: V) -> [u32; 16] {
        v
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::gemm::instructions::Native;

    /// Every instruction on values of all kinds, where the CPU has them.
    #[test]
    fn model_equals_the_cpu_where_it_has_the_instructions() {
        if !(is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16"))
        {
            return;
        }
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Half of them of usual size, the others any bits, denormals and NaN among them.
            if state >> 31 == 0 { state } else { (state % 2000) as f32 as u32 | 0x3f00_0000 }
        };
        for _ in 0..10_000 {
            let [a, b, c]: [V; 3] = std::array::from_fn(|_| std::array::from_fn(|_| random()));
            // SAFETY: the CPU was asked above; the arrays are whole vectors.
            unsafe { assert_equal(a, b, c) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn assert_equal(a: V, b: V, c: V) {
        let [na, nb, nc] = [a, b, c].map(Native::from_array);
        macro_rules! check {
            ($($name:ident($($x:ident $n:ident),*)),* $(,)?) => {$(
                // SAFETY: as the caller promises.
                let (model, native) =
                    unsafe { (Model::$name($($x),*), Native::to_array(Native::$name($($n),*))) };
                for (lane, (model, native)) in model.into_iter().zip(native).enumerate() {
                    let both_nan =
                        f32::from_bits(model).is_nan() && f32::from_bits(native).is_nan();
                    assert!(model == native || both_nan, "{} {lane}: {a:x?} {b:x?} {c:x?}",
                        stringify!($name));
                }
            )*};
        }
        check!(
            inserti64x4_high(a na, b nb), cvtepu16_epi32(a na), slli_epi32_16(a na),
            cvtne2ps_pbh(a na, b nb), dpbf16_ps(c nc, a na, b nb), fmadd_ps(a na, b nb, c nc),
            mul_ps(a na, b nb), permutexvar_epi16(a na, b nb), unpacklo_epi32(a na, b nb),
            unpackhi_epi32(a na, b nb), unpacklo_epi64(a na, b nb), unpackhi_epi64(a na, b nb),
            shuffle_i32x4_even(a na, b nb), shuffle_i32x4_odd(a na, b nb),
        );
    }
}
