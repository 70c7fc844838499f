//! Rotary position embedding: frequencies, their scaling, and tables of cosines and sines.
//!
//! Of a head's N rotating dimensions, pair i turns by `position · f(i)` with `f(i) = θ^(−2i/N)`
//! (Su et al. 2021). Angles are computed in f64 and rounded once.

use std::f64::consts::TAU;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::config::ModelConfig;
use super::fields::refuse;
use crate::error::EngineError;

/// The rotary embedding of some or all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// N: how many of a head's dimensions turn, the first ones; even.
    pub dim: usize,
    /// θ, the base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How the frequencies are changed for contexts longer than those of pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency is divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// A wave longer than `original / low_freq_factor` positions is low.
        low_freq_factor: f64,
        /// A wave shorter than `original / high_freq_factor` positions is high.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al. 2023): as Llama 3.1, but blended linearly in the number of the pair, and
    /// queries and keys are multiplied by a factor.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Factor on the cosines and sines.
        attention_factor: f64,
        /// A pair that turns this often within the original context, or more often, is kept.
        beta_fast: f64,
        /// A pair that turns this often, or less often, is divided.
        beta_slow: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
        /// Whether the ends of the blend are rounded to whole pairs.
        truncate: bool,
    },
    /// LongRoPE (Ding et al. 2024) for sequences of up to the original context: beyond it the
    /// frequencies are others, so that a longer row is refused.
    LongRope {
        /// Divisor of each pair's frequency.
        short_factor: Vec<f64>,
        /// Factor on the cosines and sines.
        attention_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: usize,
    },
}

impl Rope {
    /// Angular frequency of each of the N / 2 pairs, in radians per position.
    #[must_use]
    pub fn frequencies(&self) -> Vec<f64> {
        let plain =
            (0..self.dim / 2).map(|pair| self.theta.powf(-2.0 * pair as f64 / self.dim as f64));
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => plain
                .map(|frequency| {
                    let wavelength = TAU / frequency;
                    // 1 at the high end of the blend and 0 at its low end.
                    let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    blend(frequency, factor, smooth.clamp(0.0, 1.0))
                })
                .collect(),
            &RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                truncate,
                ..
            } => {
                // The pair, not whole, that turns `rotations` times within the original context.
                let pair_of = |rotations: f64| {
                    self.dim as f64 * (original_max_position_embeddings / (rotations * TAU)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(self.dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                plain
                    .enumerate()
                    .map(|(pair, frequency)| {
                        let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        blend(frequency, factor, 1.0 - ramp)
                    })
                    .collect()
            }
            RopeScaling::LongRope { short_factor, .. } => {
                plain.zip(short_factor).map(|(frequency, factor)| frequency / factor).collect()
            }
        }
    }

    /// What cosines and sines are multiplied by.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. }
            | RopeScaling::LongRope { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Tokens of the longest sequence that has these frequencies; None for no limit.
    #[must_use]
    pub fn longest_sequence(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                Some(original_max_position_embeddings)
            }
            _ => None,
        }
    }
}

/// A frequency of which the share `kept` is kept and the rest divided.
fn blend(frequency: f64, factor: f64, kept: f64) -> f64 {
    (1.0 - kept) * frequency / factor + kept * frequency
}

impl RopeScaling {
    /// Reads `rope_scaling` (or `rope_parameters`), whose kind is under `rope_type` or `type`, for a
    /// head of which `dim` dimensions turn. `max_position_embeddings` is the model's, and `original` the length of pre-training where
    /// the config has it outside of `json`, which counts before the one inside.
    pub(crate) fn parse(
        json: &Map<String, Value>,
        dim: usize,
        max_position_embeddings: usize,
        original: Option<usize>,
    ) -> Result<Self, EngineError> {
        let given = |name: &str| json.get(name).filter(|value| !value.is_null());
        let optional = |name: &str| -> Result<Option<f64>, EngineError> {
            match given(name).map(Value::as_f64) {
                None => Ok(None),
                Some(Some(value)) if value > 0.0 => Ok(Some(value)),
                _ => refuse(format!("rope_scaling has no positive {name}")),
            }
        };
        let number = |name: &str| -> Result<f64, EngineError> {
            match optional(name)? {
                Some(value) => Ok(value),
                None => refuse(format!("rope_scaling has no positive {name}")),
            }
        };
        let original_max_position_embeddings = || -> Result<f64, EngineError> {
            match original {
                Some(original) => Ok(original as f64),
                None => Ok(optional("original_max_position_embeddings")?
                    .unwrap_or(max_position_embeddings as f64)),
            }
        };
        let kind = given("rope_type").or_else(|| given("type")).and_then(Value::as_str);
        match kind {
            None | Some("default") => Ok(Self::None),
            Some("linear") => Ok(Self::Linear { factor: number("factor")? }),
            Some("llama3") => Ok(Self::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: original_max_position_embeddings()?,
            }),
            Some("yarn") => {
                let original = original_max_position_embeddings()?;
                let factor =
                    optional("factor")?.unwrap_or(max_position_embeddings as f64 / original);
                let scale = |mscale: f64| {
                    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
                };
                // 0 counts as absent in Hugging Face's code.
                let mscale = |name: &str| given(name).and_then(Value::as_f64).filter(|&m| m != 0.0);
                let attention_factor = match optional("attention_factor")? {
                    Some(factor) => factor,
                    None => match (mscale("mscale"), mscale("mscale_all_dim")) {
                        (Some(mscale), Some(all)) => scale(mscale) / scale(all),
                        _ => scale(1.0),
                    },
                };
                Ok(Self::Yarn {
                    factor,
                    attention_factor,
                    beta_fast: optional("beta_fast")?.unwrap_or(32.0),
                    beta_slow: optional("beta_slow")?.unwrap_or(1.0),
                    original_max_position_embeddings: original,
                    truncate: given("truncate").and_then(Value::as_bool).unwrap_or(true),
                })
            }
            Some("longrope") => {
                let original = original_max_position_embeddings()?;
                let short_factor: Option<Vec<f64>> = given("short_factor")
                    .and_then(Value::as_array)
                    .and_then(|list| list.iter().map(Value::as_f64).collect());
                let short_factor = short_factor.unwrap_or_default();
                if short_factor.len() != dim / 2 || short_factor.iter().any(|&x| x <= 0.0) {
                    return refuse(format!(
                        "rope_scaling must have a short_factor of {} positive numbers",
                        dim / 2
                    ));
                }
                let factor =
                    optional("factor")?.unwrap_or(max_position_embeddings as f64 / original);
                let attention_factor = match optional("attention_factor")? {
                    Some(attention_factor) => attention_factor,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original.ln()).sqrt(),
                };
                Ok(Self::LongRope {
                    short_factor,
                    attention_factor,
                    original_max_position_embeddings: original as usize,
                })
            }
            Some("dynamic") => refuse(
                "rope_scaling \"dynamic\" is not supported, as its frequencies change with the \
                 longest row that was seen: use a model with default, linear, llama3, yarn or \
                 longrope, or remove the scaling to train within the original context",
            ),
            Some(other) => refuse(format!(
                "rope_scaling {other:?} is not supported: use default, linear, llama3, yarn or \
                 longrope"
            )),
        }
    }
}

/// [`Rope::frequencies`] of a model's layers of full attention.
#[must_use]
pub fn frequencies(config: &ModelConfig) -> Vec<f64> {
    config.rope.frequencies()
}

/// Cosines and sines for the positions `first_position..`, `[positions, N / 2]` each.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    pairs: usize,
}

impl RotaryTable {
    /// The table of `positions` positions from `first_position` on.
    #[must_use]
    pub fn new(rope: &Rope, first_position: usize, positions: usize) -> Self {
        let factor = rope.attention_factor();
        Self::from_frequencies(&rope.frequencies(), factor, first_position, positions)
    }

    /// The table of given [`frequencies`], each entry times `factor`.
    pub(crate) fn from_frequencies(
        frequencies: &[f64],
        factor: f64,
        first_position: usize,
        positions: usize,
    ) -> Self {
        let angles = (first_position..first_position + positions)
            .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles
            .map(|angle| ((factor * angle.cos()) as f32, (factor * angle.sin()) as f32))
            .unzip();
        Self { cos: cos.into(), sin: sin.into(), pairs: frequencies.len() }
    }

    /// N / 2.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// A table of any factors, row by row, also of such as no rotation has.
    #[cfg(test)]
    pub(crate) fn from_values(cos: &[f32], sin: &[f32], pairs: usize) -> Self {
        Self { cos: cos.into(), sin: sin.into(), pairs }
    }

    /// Cosines and sines of the pairs at the table's row `index`.
    #[must_use]
    pub fn row(&self, index: usize) -> (&[f32], &[f32]) {
        let range = index * self.pairs..(index + 1) * self.pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// All cosines and all sines, row by row.
    #[must_use]
    pub fn values(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled(scaling: RopeScaling, theta: f64, dim: usize) -> Vec<f64> {
        Rope { dim, theta, scaling }.frequencies()
    }

    fn parse(json: &Value) -> Result<RopeScaling, EngineError> {
        RopeScaling::parse(json.as_object().unwrap(), 8, 8192, None)
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = scaled(RopeScaling::None, 1e4, 8);
        let linear = scaled(RopeScaling::Linear { factor: 4.0 }, 1e4, 8);
        assert!(plain.iter().zip(&linear).all(|(a, b)| (a / 4.0 - b).abs() < 1e-15));
        assert!((plain[1] - 0.1).abs() < 1e-15 && (plain[2] - 0.01).abs() < 1e-15);
    }

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        // Llama 3.1 8B. Wavelengths below 8192/4 are kept, above 8192/1 divided by 8.
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let plain = scaled(RopeScaling::None, 5e5, 128);
        let llama3 = scaled(scaling, 5e5, 128);
        for (frequency, scaled) in plain.into_iter().zip(llama3) {
            let wavelength = TAU / frequency;
            let ratio = frequency / scaled;
            if wavelength < 2048.0 {
                assert!((ratio - 1.0).abs() < 1e-12);
            } else if wavelength > 8192.0 {
                assert!((ratio - 8.0).abs() < 1e-12);
            } else {
                assert!(ratio > 1.0 && ratio < 8.0);
            }
        }
    }

    #[test]
    fn scaling_is_read_under_either_name_of_its_kind() {
        for key in ["rope_type", "type"] {
            let json = serde_json::json!({key: "linear", "factor": 2.0});
            assert_eq!(parse(&json).unwrap(), RopeScaling::Linear { factor: 2.0 });
        }
    }

    #[test]
    fn scaling_without_its_factor_is_refused() {
        let json = serde_json::json!({"rope_type": "linear"});
        let message = parse(&json).unwrap_err().to_string();
        assert!(message.contains("factor"), "{message}");
    }

    #[test]
    fn yarn_keeps_fast_pairs_divides_slow_ones_and_scales_by_the_log_of_its_factor() {
        let yarn = parse(&serde_json::json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048,
        }))
        .unwrap();
        let plain = scaled(RopeScaling::None, 1e4, 64);
        let frequencies = scaled(yarn.clone(), 1e4, 64);
        let ratios: Vec<f64> = plain.iter().zip(&frequencies).map(|(a, b)| a / b).collect();
        assert!((ratios[0] - 1.0).abs() < 1e-12 && (ratios[31] - 4.0).abs() < 1e-12);
        assert!(ratios.is_sorted(), "{ratios:?}");
        let factor = Rope { dim: 64, theta: 1e4, scaling: yarn }.attention_factor();
        assert!((factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-15);
    }

    #[test]
    fn length_of_pre_training_is_the_models_where_none_is_given_and_the_configs_before_all() {
        let json = serde_json::json!({"type": "yarn", "factor": 2.0});
        let json = json.as_object().unwrap();
        for (outside, expected) in [(None, 8192.0), (Some(512), 512.0)] {
            let RopeScaling::Yarn { original_max_position_embeddings, .. } =
                RopeScaling::parse(json, 8, 8192, outside).unwrap()
            else {
                panic!("yarn");
            };
            assert_eq!(original_max_position_embeddings, expected);
        }
    }

    #[test]
    fn longrope_has_its_short_factors_and_a_longest_sequence() {
        let longrope = |short: &[f64]| {
            parse(&serde_json::json!({
                "rope_type": "longrope", "short_factor": short, "long_factor": [9.0, 9.0, 9.0, 9.0],
                "original_max_position_embeddings": 4096,
            }))
        };
        let scaling = longrope(&[1.0, 1.5, 2.0, 4.0]).unwrap();
        let plain = scaled(RopeScaling::None, 1e4, 8);
        let rope = Rope { dim: 8, theta: 1e4, scaling };
        let ratios: Vec<f64> = plain.iter().zip(rope.frequencies()).map(|(a, b)| a / b).collect();
        assert!((ratios[1] - 1.5).abs() < 1e-12 && (ratios[3] - 4.0).abs() < 1e-12);
        // 8192 / 4096 tokens.
        let expected = (1.0 + 2f64.ln() / 4096f64.ln()).sqrt();
        assert!((rope.attention_factor() - expected).abs() < 1e-12);
        assert_eq!(rope.longest_sequence(), Some(4096));
        let message = longrope(&[1.0, 1.5]).unwrap_err().to_string();
        assert!(message.contains("short_factor of 4"), "{message}");
    }

    #[test]
    fn scaling_that_depends_on_the_batch_is_refused_by_name() {
        for kind in ["dynamic", "proportional"] {
            let json = serde_json::json!({"type": kind, "factor": 2.0});
            let message = parse(&json).unwrap_err().to_string();
            assert!(message.contains(&format!("{kind:?}")), "{message}");
        }
    }
}
