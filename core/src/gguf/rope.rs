//! The rotary embedding of a `config.json`: its metadata, and the tables that GGUF keeps as tensors.

use std::f64::consts::TAU;

use serde_json::Value as Json;

use super::GgufError;
use super::architecture::{Architecture, Family, size};
use super::header::Value;

/// Divisors of the rotary frequencies of Llama 3, which Hugging Face keeps as parameters.
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";
/// The two tables of Phi-3's long-context models.
const LONG_FACTORS: &str = "rope_factors_long.weight";
const SHORT_FACTORS: &str = "rope_factors_short.weight";

impl Architecture<'_> {
    /// Parameters of the rotary embedding of full attention, in the spelling of transformers 5 or
    /// of 4, and θ.
    fn rope_parameters(&self) -> (&Json, Option<f64>) {
        let parameters = &self.config["rope_parameters"];
        let parameters = match &parameters["full_attention"] {
            Json::Null => parameters,
            of_type => of_type,
        };
        let scaling = match &self.config["rope_scaling"] {
            Json::Null => parameters,
            scaling => scaling,
        };
        (scaling, parameters["rope_theta"].as_f64().or(self.config["rope_theta"].as_f64()))
    }

    /// The kind of scaling; transformers takes older names for a Phi-3's.
    fn rope_kind(&self) -> &str {
        match rope_type(self.rope_parameters().0) {
            "su" | "yarn" if self.family == Family::Phi3 => "longrope",
            kind => kind,
        }
    }

    /// Puts the metadata of the rotary embedding.
    ///
    /// # Errors
    /// For what llama.cpp has no key for, or does not read in this family.
    pub(super) fn rope(&self, put: &mut impl FnMut(&str, Value)) -> Result<(), GgufError> {
        let (scaling, theta) = self.rope_parameters();
        let theta = theta.ok_or_else(|| GgufError::new("config.json has no rope_theta"))?;
        put("rope.freq_base", Value::F32(theta as f32));
        put("rope.dimension_count", (self.rotated() as u32).into());
        if self.family == Family::Gemma3 {
            let local = &self.config["rope_parameters"]["sliding_attention"];
            if rope_type(local) != "default" {
                return Err(GgufError::new(format!(
                    "rope_parameters scale the layers with a window too ({:?}), and llama.cpp only \
                     the others; download it with format=merged",
                    rope_type(local)
                )));
            }
            let local = local["rope_theta"].as_f64();
            let local = local.or(self.config["rope_local_base_freq"].as_f64()).unwrap_or(10_000.0);
            put("rope.freq_base_swa", Value::F32(local as f32));
        }
        match (self.rope_kind(), scaling["factor"].as_f64()) {
            ("default", _) => {}
            // As a table beside the weights, which llama.cpp looks for in this family.
            ("llama3", Some(_)) if self.family == Family::Llama => {}
            ("linear", Some(factor)) => {
                put("rope.scaling.type", "linear".into());
                put("rope.scaling.factor", Value::F32(factor as f32));
            }
            ("yarn", _) => self.yarn(scaling, put)?,
            ("longrope", _) if self.family == Family::Phi3 => {
                put("rope.scaling.attn_factor", Value::F32(self.long_attention_factor(scaling)?));
            }
            (other, _) => {
                return Err(GgufError::new(format!(
                    "rotary scaling {other:?} cannot be carried over; download it with \
                     format=merged"
                )));
            }
        }
        Ok(())
    }

    /// YaRN (Peng et al. 2023), with what transformers computes of fields that are not there.
    fn yarn(&self, scaling: &Json, put: &mut impl FnMut(&str, Value)) -> Result<(), GgufError> {
        for (field, usual) in [("beta_fast", 32.0), ("beta_slow", 1.0)] {
            if let Some(own) = scaling[field].as_f64().filter(|&own| own != usual) {
                return Err(GgufError::new(format!(
                    "rotary scaling has {field} {own}, where llama.cpp computes with {usual}; \
                     download it with format=merged"
                )));
            }
        }
        if scaling["truncate"] == false {
            return Err(GgufError::new(
                "rotary scaling has truncate false, and llama.cpp rounds the ends of the ramp; \
                 download it with format=merged",
            ));
        }
        let context = size(self.config, "max_position_embeddings")?;
        let given = |json: &Json| json["original_max_position_embeddings"].as_u64();
        let original = given(self.config).or(given(scaling)).unwrap_or(context as u64);
        let factor = scaling["factor"].as_f64().unwrap_or(context as f64 / original as f64);
        put("rope.scaling.type", "yarn".into());
        put("rope.scaling.factor", Value::F32(factor as f32));
        put("rope.scaling.original_context_length", (original as u32).into());
        let (usual, own) = yarn_attention_factors(scaling, factor);
        if own == usual {
            return Ok(());
        }
        if self.family == Family::Gemma3 {
            return Err(GgufError::new(format!(
                "rotary scaling has an attention_factor of its own, {own}, by which llama.cpp \
                 multiplies in the layers with a window too; download it with format=merged"
            )));
        }
        // llama.cpp multiplies the usual one by it.
        put("rope.scaling.attn_factor", Value::F32((own / usual) as f32));
        Ok(())
    }

    /// How many of a head's dimensions turn.
    fn rotated(&self) -> usize {
        let share = self.config["partial_rotary_factor"].as_f64();
        let share = share.or(self.rope_parameters().0["partial_rotary_factor"].as_f64());
        (self.head_dim as f64 * share.unwrap_or(1.0)) as usize
    }

    /// √(1 + ln(stretch) / ln(original context)), or what the file says (Ding et al. 2024).
    fn long_attention_factor(&self, scaling: &Json) -> Result<f32, GgufError> {
        if let Some(own) = scaling["attention_factor"].as_f64() {
            return Ok(own as f32);
        }
        let context = size(self.config, "max_position_embeddings")? as f64;
        let original = match scaling["original_max_position_embeddings"].as_f64() {
            Some(original) => original,
            None => size(self.config, "original_max_position_embeddings")? as f64,
        };
        let stretch = scaling["factor"].as_f64().unwrap_or(context / original);
        let factor = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / original.ln()).sqrt() };
        Ok(factor as f32)
    }

    /// Tensors that stand in `config.json` at Hugging Face: name and values.
    pub(super) fn tables(&self) -> Result<Vec<(&'static str, Vec<f32>)>, GgufError> {
        let (scaling, theta) = self.rope_parameters();
        let table = |field: &str| -> Result<Vec<f32>, GgufError> {
            let list = scaling[field].as_array().into_iter().flatten();
            let table: Vec<f32> = list.filter_map(Json::as_f64).map(|x| x as f32).collect();
            if table.len() == self.rotated() / 2 {
                return Ok(table);
            }
            Err(GgufError::new(format!(
                "{field} has {} numbers for {} pairs of dimensions",
                table.len(),
                self.rotated() / 2
            )))
        };
        match self.rope_kind() {
            "llama3" => {
                let number = |field: &str| {
                    scaling[field].as_f64().ok_or_else(|| {
                        GgufError::new(format!("the rotary scaling \"llama3\" has no {field}"))
                    })
                };
                let (factor, original) =
                    (number("factor")?, number("original_max_position_embeddings")?);
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                let theta = theta.unwrap_or(10_000.0);
                let divisors = (0..self.head_dim / 2).map(|pair| {
                    let frequency = theta.powf(-2.0 * pair as f64 / self.head_dim as f64);
                    let smooth = (original * frequency / TAU - low) / (high - low);
                    let smooth = smooth.clamp(0.0, 1.0);
                    (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                });
                Ok(vec![(ROPE_FREQUENCIES, divisors.collect())])
            }
            "longrope" => Ok(vec![
                (LONG_FACTORS, table("long_factor")?),
                (SHORT_FACTORS, table("short_factor")?),
            ]),
            _ => Ok(Vec::new()),
        }
    }
}

/// What YaRN multiplies cosines and sines by: unless the config says, and as it says.
fn yarn_attention_factors(scaling: &Json, factor: f64) -> (f64, f64) {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    // 0 counts as absent in Hugging Face's code.
    let given = |name: &str| scaling[name].as_f64().filter(|&number| number != 0.0);
    let own = scaling["attention_factor"].as_f64().unwrap_or_else(|| {
        match (given("mscale"), given("mscale_all_dim")) {
            (Some(mscale), Some(all)) => scale(mscale) / scale(all),
            _ => scale(1.0),
        }
    });
    (scale(1.0), own)
}

fn rope_type(scaling: &Json) -> &str {
    scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default")
}
