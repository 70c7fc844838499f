//! Llama 3's rotary scaling from the table that llama.cpp stores of it.

use serde_json::{Value, json};

use super::model::Model;
use crate::models::config::ModelConfig;
use crate::models::rope::frequencies;

/// Parameters of the published models: context of pre-training, and the ends of the blend.
const ORIGINAL_CONTEXT: f64 = 8192.0;
const LOW_FREQUENCY_FACTOR: f64 = 1.0;
const HIGH_FREQUENCY_FACTOR: f64 = 4.0;

/// `rope_scaling` of the kind `llama3`, of which `divisors` is the table.
///
/// The formula's parameters are those of every published Llama 3 but for the factor, which the
/// table's last entry is. None for a table that the formula does not give back.
pub(super) fn llama3_scaling(model: &Model, divisors: &[f32]) -> Option<Value> {
    let scaling = json!({
        "rope_type": "llama3",
        "factor": divisors.last()?,
        "low_freq_factor": LOW_FREQUENCY_FACTOR,
        "high_freq_factor": HIGH_FREQUENCY_FACTOR,
        "original_max_position_embeddings": ORIGINAL_CONTEXT as u64,
    });
    let frequencies = |scaling: &Value| -> Option<Vec<f64>> {
        let mut config = model.config_json(&Default::default(), true);
        config["rope_scaling"] = scaling.clone();
        // Nothing but the rotation counts here.
        config["attention_bias"] = json!(false);
        config["mlp_bias"] = json!(false);
        Some(frequencies(&ModelConfig::parse(&config.to_string()).ok()?))
    };
    let (plain, scaled) = (frequencies(&Value::Null)?, frequencies(&scaling)?);
    let same = divisors.len() == plain.len()
        && plain.iter().zip(&scaled).zip(divisors).all(|((plain, scaled), &divisor)| {
            (plain / scaled - f64::from(divisor)).abs() <= 1e-3 * f64::from(divisor)
        });
    same.then_some(scaling)
}
