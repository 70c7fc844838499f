//! LoRA dropout whose masks are a pure function of where they are used.
//!
//! A mask depends on the seed, the optimiser step, the micro-batch, the layer and the module, and
//! on nothing that ran before. A resumed run therefore needs no state of a random generator, and
//! the backward pass draws the mask again instead of storing it.

/// Names the dropout masks of one forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DropoutKey {
    /// The job's seed.
    pub seed: u64,
    /// The optimiser step, counted over the whole run.
    pub step: u64,
    /// The micro-batch within the step.
    pub micro_batch: u64,
}

impl DropoutKey {
    /// The mask stream of one projection: `module` is its position in `TARGET_MODULES`.
    pub(crate) fn stream(self, layer: usize, module: usize) -> u64 {
        [self.step, self.micro_batch, layer as u64, module as u64]
            .into_iter()
            .fold(mix(self.seed), |state, part| mix(state ^ mix(part)))
    }
}

/// Dropout of one projection's input: each element is zeroed with probability p, and the others
/// are multiplied by 1 / (1 − p).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Dropout {
    stream: u64,
    /// An element is dropped when its 32 random bits are below this: p·2³².
    threshold: u64,
    keep_scale: f32,
}

impl Dropout {
    /// Dropout with `probability` in `0..1` on the masks of `stream`.
    pub(crate) fn new(probability: f64, stream: u64) -> Self {
        Self {
            stream,
            threshold: (probability * 2f64.powi(32)).round() as u64,
            keep_scale: (1.0 / (1.0 - probability)) as f32,
        }
    }

    /// The stream of masks, what an element's random bits are compared with, and 1 / (1 − p): for a
    /// kernel that draws as [`Dropout::factor`] does.
    #[cfg(feature = "gpu")]
    pub(super) fn constants(self) -> (u64, u64, f32) {
        (self.stream, self.threshold, self.keep_scale)
    }

    /// What element number `index` (row major) is multiplied by: 0 or 1 / (1 − p).
    #[inline]
    pub(crate) fn factor(self, index: usize) -> f32 {
        let bits = mix(self.stream.wrapping_add(index as u64)) >> 32;
        if bits < self.threshold { 0.0 } else { self.keep_scale }
    }
}

/// SplitMix64's constants, for [`mix`] and for a kernel that does the same.
pub(super) const MIX_INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;
pub(super) const MIX_FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
pub(super) const MIX_SECOND: u64 = 0x94d0_49bb_1331_11eb;

/// SplitMix64's step and finaliser (Steele, Lea and Flood 2014): a bijection whose output bits
/// each depend on all input bits.
#[inline]
pub(super) fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(MIX_INCREMENT);
    let z = (z ^ (z >> 30)).wrapping_mul(MIX_FIRST);
    let z = (z ^ (z >> 27)).wrapping_mul(MIX_SECOND);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: DropoutKey = DropoutKey { seed: 7, step: 3, micro_batch: 1 };

    fn mask(key: DropoutKey, layer: usize, module: usize) -> Vec<f32> {
        let dropout = Dropout::new(0.25, key.stream(layer, module));
        (0..100_000).map(|index| dropout.factor(index)).collect()
    }

    #[test]
    fn same_key_gives_the_same_mask() {
        assert_eq!(mask(KEY, 5, 2), mask(KEY, 5, 2));
    }

    #[test]
    fn every_part_of_the_key_changes_the_mask() {
        let mask_here = mask(KEY, 5, 2);
        let others = [
            mask(DropoutKey { seed: 8, ..KEY }, 5, 2),
            mask(DropoutKey { step: 4, ..KEY }, 5, 2),
            mask(DropoutKey { micro_batch: 0, ..KEY }, 5, 2),
            mask(KEY, 4, 2),
            mask(KEY, 5, 3),
        ];
        for other in others {
            let equal = mask_here.iter().zip(&other).filter(|(a, b)| a == b).count();
            // Independent masks agree with probability p² + (1 − p)² = 0.625.
            assert!((equal as f64 / 100_000.0 - 0.625).abs() < 0.01, "{equal}");
        }
    }

    #[test]
    fn share_and_scale_keep_the_expected_value() {
        let mask = mask(KEY, 0, 0);
        let mean = mask.iter().map(|&factor| f64::from(factor)).sum::<f64>() / 100_000.0;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!(mask.iter().all(|&factor| factor == 0.0 || factor == 4.0 / 3.0));
    }
}
