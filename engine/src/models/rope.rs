//! Rotary position embedding: frequencies, their scaling, and tables of cosines and sines.
//!
//! Pair i of a head of width D turns by `position · f(i)` with `f(i) = θ^(−2i/D)` (Su et al. 2021).
//! Angles are computed in f64 and rounded once.

use std::f64::consts::TAU;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::config::ModelConfig;
use crate::error::EngineError;

/// How the frequencies are changed for contexts longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
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
}

impl RopeScaling {
    /// Reads `rope_scaling` (or `rope_parameters`), whose kind is under `rope_type` or `type`.
    pub(crate) fn parse(json: &Map<String, Value>) -> Result<Self, EngineError> {
        let number = |name: &str| {
            json.get(name).and_then(Value::as_f64).filter(|&value| value > 0.0).ok_or_else(|| {
                EngineError::Model(format!("config.json: rope_scaling has no positive {name}"))
            })
        };
        let kind = json.get("rope_type").or_else(|| json.get("type")).and_then(Value::as_str);
        match kind {
            None | Some("default") => Ok(Self::None),
            Some("linear") => Ok(Self::Linear { factor: number("factor")? }),
            Some("llama3") => Ok(Self::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            }),
            Some(other) => Err(EngineError::Model(format!(
                "config.json: rope_scaling {other:?} is not supported: use default, linear or llama3"
            ))),
        }
    }

    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let wavelength = TAU / frequency;
                // 1 at the high end of the blend and 0 at its low end.
                let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                let smooth = smooth.clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

/// Angular frequency of each of the `head_dim / 2` pairs, in radians per position.
#[must_use]
pub fn frequencies(config: &ModelConfig) -> Vec<f64> {
    (0..config.head_dim / 2)
        .map(|pair| {
            let exponent = -2.0 * pair as f64 / config.head_dim as f64;
            config.rope_scaling.apply(config.rope_theta.powf(exponent))
        })
        .collect()
}

/// Cosines and sines for the positions `first_position..`, `[positions, head_dim / 2]` each.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    pairs: usize,
}

impl RotaryTable {
    /// The table of `positions` positions from `first_position` on.
    #[must_use]
    pub fn new(config: &ModelConfig, first_position: usize, positions: usize) -> Self {
        Self::from_frequencies(&frequencies(config), first_position, positions)
    }

    /// The table of given [`frequencies`].
    pub(crate) fn from_frequencies(
        frequencies: &[f64],
        first_position: usize,
        positions: usize,
    ) -> Self {
        let angles = (first_position..first_position + positions)
            .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        Self { cos: cos.into(), sin: sin.into(), pairs: frequencies.len() }
    }

    /// Cosines and sines of the `head_dim / 2` pairs at the table's row `index`.
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

    fn scaled(scaling: RopeScaling, theta: f64, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|pair| scaling.apply(theta.powf(-2.0 * pair as f64 / head_dim as f64)))
            .collect()
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
            let scaling = RopeScaling::parse(json.as_object().unwrap()).unwrap();
            assert_eq!(scaling, RopeScaling::Linear { factor: 2.0 });
        }
    }

    #[test]
    fn scaling_without_its_factor_is_refused() {
        let json = serde_json::json!({"rope_type": "linear"});
        let message = RopeScaling::parse(json.as_object().unwrap()).unwrap_err().to_string();
        assert!(message.contains("factor"), "{message}");
    }
}
