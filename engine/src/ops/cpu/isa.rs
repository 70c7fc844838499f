//! Kernels compiled once for each instruction set and chosen at run time.
//!
//! A kernel's body is plain Rust over slices. `simd_kernels!` compiles it three times, with
//! AVX-512, with AVX2 and FMA, and with what the target has anyway, and the compiler vectorises
//! each copy. The choice is an argument, so that a test can force every path of one machine.

use std::sync::OnceLock;

/// An instruction set that this CPU is known to have: one with SIMD is made only here, after the
/// CPU was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The widest instruction set of this CPU, looked up once.
    pub(crate) fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| Self::available()[0])
    }

    /// All that this CPU has, the widest first. Never empty.
    pub(crate) fn available() -> Vec<Self> {
        let mut available = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
            {
                available.push(Self(Level::Avx512));
            }
            if avx2 {
                available.push(Self(Level::Avx2));
            }
        }
        available.push(Self(Level::Portable));
        available
    }

    pub(super) fn level(self) -> Level {
        self.0
    }

    /// Whether the CPU multiplies pairs of bf16 beside AVX-512.
    pub(super) fn multiplies_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            self.0 == Level::Avx512 && is_x86_feature_detected!("avx512bf16")
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }
}

/// How a kernel multiplies and adds.
pub(super) trait MulAdd {
    /// a·b + c.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// One instruction, rounded once.
#[cfg(target_arch = "x86_64")]
pub(super) struct Fused;

#[cfg(target_arch = "x86_64")]
impl MulAdd for Fused {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

/// Two operations. Where the target may lack the fused instruction, `f32::mul_add` would be a
/// call into the C library for every element.
pub(super) struct Separate;

impl MulAdd for Separate {
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Defines kernels whose first argument is the [`Isa`] to run on. In a body, `M::mul_add` is the
/// instruction set's a·b + c; everything a body calls must be `#[inline(always)]`, or it would be
/// compiled without the wide instructions.
macro_rules! simd_kernels {
    ($(
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    )*) => {$(
        $(#[$attribute])*
        #[cfg_attr(target_arch = "x86_64", expect(
            unsafe_code,
            reason = "a function with target features may be called only where the CPU has them, \
                      which an `Isa` proves"
        ))]
        $visibility fn $name(isa: $crate::ops::cpu::isa::Isa, $($argument: $type),*) $(-> $result)? {
            use $crate::ops::cpu::isa::{Level, MulAdd, Separate};
            #[cfg(target_arch = "x86_64")]
            use $crate::ops::cpu::isa::Fused;

            #[inline(always)]
            fn body<M: MulAdd>($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                body::<Fused>($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                body::<Fused>($($argument),*)
            }

            match isa.level() {
                // SAFETY: an `Isa` of this level is made only after the CPU was asked for these
                // features.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2($($argument),*) },
                Level::Portable => body::<Separate>($($argument),*),
            }
        }
    )*};
}
pub(super) use simd_kernels;
