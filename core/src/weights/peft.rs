//! PEFT's adapter format, as PEFT 0.21 writes and reads it: `adapter_config.json` and the names
//! of the tensors in `adapter_model.safetensors`.

use crate::hyperparameters::{
    AdapterConfig, AdapterType, TARGET_MODULES, fused_module_of, target_modules_of,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// The file that describes an adapter.
pub const ADAPTER_CONFIG_NAME: &str = "adapter_config.json";
/// The file with its tensors.
pub const ADAPTER_WEIGHTS_NAME: &str = "adapter_model.safetensors";

const PEFT_VERSION: &str = "0.21.2";
/// PEFT wraps the model twice before its own parameters are named.
const PREFIX: &str = "base_model.model.";

/// The fields of `adapter_config.json` that say something about a LoRA adapter; everything else
/// that PEFT knows is written as the plain LoRA that it is.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftConfig {
    /// The base model, by a name or path that `from_pretrained` takes.
    pub base_model: Option<String>,
    /// Shape and scale of the adapter.
    pub adapter: AdapterConfig,
    /// Whether the base model stores q, k and v as one `qkv_proj`, and gate and up as one
    /// `gate_up_proj`, as Phi-3 does: these are then the modules that PEFT knows.
    pub fused_projections: bool,
}

/// Why an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// Not JSON, or a field of another type.
    #[error("{ADAPTER_CONFIG_NAME} is not in PEFT's format: {0}")]
    Format(#[from] serde_json::Error),
    /// A variant of LoRA that is not supported.
    #[error(
        "{ADAPTER_CONFIG_NAME} has {field} = {value}, but only plain LoRA and rsLoRA on linear \
         layers are supported"
    )]
    Unsupported {
        /// The field.
        field: &'static str,
        /// What it says.
        value: String,
    },
    /// Not one module of the model would be adapted.
    #[error("the adapter has no LoRA tensors, so it would change nothing")]
    NoModule,
    /// A tensor that goes nowhere.
    #[error(
        "the adapter's tensor {tensor} belongs to no weight of the base model: it was made for \
         another model"
    )]
    Unmatched {
        /// Its name.
        tensor: String,
    },
    /// A without B, or B without A.
    #[error("the adapter has {present} but not its other half {missing}")]
    Half {
        /// The tensor that is there.
        present: String,
        /// The one that is not.
        missing: String,
    },
}

#[derive(Deserialize)]
struct Read {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Targets,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Targets {
    List(Vec<String>),
    Word(String),
}

#[derive(Serialize)]
struct Written<'a> {
    alora_invocation_tokens: (),
    alpha_pattern: Map<String, Value>,
    auto_mapping: (),
    base_model_name_or_path: Option<&'a str>,
    bias: &'static str,
    exclude_modules: (),
    fan_in_fan_out: bool,
    inference_mode: bool,
    init_lora_weights: bool,
    layer_replication: (),
    layers_pattern: (),
    layers_to_transform: (),
    loftq_config: Map<String, Value>,
    lora_alpha: Value,
    lora_bias: bool,
    lora_dropout: f64,
    megatron_config: (),
    megatron_core: &'static str,
    modules_to_save: (),
    peft_type: &'static str,
    peft_version: &'static str,
    r: usize,
    rank_pattern: Map<String, Value>,
    revision: (),
    target_modules: Vec<&'a str>,
    target_parameters: (),
    task_type: &'static str,
    trainable_token_indices: (),
    use_dora: bool,
    use_qalora: bool,
    use_rslora: bool,
}

impl PeftConfig {
    /// The text of `adapter_config.json`.
    ///
    /// # Errors
    /// [`PeftError::Unsupported`] for full fine-tuning, which leaves no adapter.
    pub fn to_json(&self) -> Result<String, PeftError> {
        let adapter = &self.adapter;
        if adapter.kind != AdapterType::Lora {
            return Err(PeftError::Unsupported { field: "peft_type", value: "full".to_owned() });
        }
        Ok(serde_json::to_string_pretty(&Written {
            alora_invocation_tokens: (),
            alpha_pattern: Map::new(),
            auto_mapping: (),
            base_model_name_or_path: self.base_model.as_deref(),
            bias: "none",
            exclude_modules: (),
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true,
            layer_replication: (),
            layers_pattern: (),
            layers_to_transform: (),
            loftq_config: Map::new(),
            lora_alpha: whole_if_possible(adapter.alpha),
            lora_bias: false,
            lora_dropout: adapter.dropout,
            megatron_config: (),
            megatron_core: "megatron.core",
            modules_to_save: (),
            peft_type: "LORA",
            peft_version: PEFT_VERSION,
            r: adapter.r,
            rank_pattern: Map::new(),
            revision: (),
            target_modules: self.modules(),
            target_parameters: (),
            task_type: "CAUSAL_LM",
            trainable_token_indices: (),
            use_dora: false,
            use_qalora: false,
            use_rslora: adapter.use_rslora,
        })?)
    }

    /// The names of the adapted modules in the base model.
    fn modules(&self) -> Vec<&str> {
        let mut modules: Vec<&str> = Vec::new();
        for target in &self.adapter.target_modules {
            let holder = Some(target.as_str())
                .filter(|_| self.fused_projections)
                .and_then(fused_module_of)
                .unwrap_or(target);
            if !modules.contains(&holder) {
                modules.push(holder);
            }
        }
        modules
    }

    /// Reads the text of `adapter_config.json`.
    ///
    /// # Errors
    /// When it is not PEFT's format, or describes more than LoRA on linear layers.
    pub fn parse(text: &[u8]) -> Result<Self, PeftError> {
        let read: Read = serde_json::from_slice(text)?;
        if read.peft_type != "LORA" {
            return Err(PeftError::Unsupported { field: "peft_type", value: read.peft_type });
        }
        for field in [
            "alora_invocation_tokens",
            "alpha_pattern",
            "arrow_config",
            "fan_in_fan_out",
            "kasa_config",
            "layer_replication",
            "layers_to_transform",
            "loftq_config",
            "lora_bias",
            "modules_to_save",
            "monteclora_config",
            "rank_pattern",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_dora",
            "use_qalora",
            "velora_config",
        ] {
            if let Some(value) = read.rest.get(field).filter(|value| !says_nothing(value)) {
                return Err(PeftError::Unsupported { field, value: value.to_string() });
            }
        }
        if let Some(bias) = read.rest.get("bias").filter(|bias| *bias != "none") {
            return Err(PeftError::Unsupported { field: "bias", value: bias.to_string() });
        }
        let mut fused_projections = false;
        let target_modules = match read.target_modules {
            Targets::Word(word) if word == "all-linear" => {
                TARGET_MODULES.map(str::to_owned).to_vec()
            }
            Targets::Word(value) => {
                return Err(PeftError::Unsupported { field: "target_modules", value });
            }
            Targets::List(list) => {
                // PEFT keeps a set, so its files have any order.
                let mut targets = BTreeSet::new();
                for value in list {
                    let modules = target_modules_of(&value);
                    if modules.is_empty() {
                        return Err(PeftError::Unsupported { field: "target_modules", value });
                    }
                    fused_projections |= modules.len() > 1;
                    targets.extend(modules);
                }
                targets.into_iter().map(|target| TARGET_MODULES[target].to_owned()).collect()
            }
        };
        Ok(Self {
            base_model: read.base_model_name_or_path,
            adapter: AdapterConfig {
                kind: AdapterType::Lora,
                r: read.r,
                alpha: read.lora_alpha,
                dropout: read.lora_dropout,
                target_modules,
                use_rslora: read.use_rslora,
            },
            fused_projections,
        })
    }
}

/// PEFT annotates `lora_alpha` as an integer; a fraction is written as the number it is.
fn whole_if_possible(alpha: f64) -> Value {
    if alpha.fract() == 0.0 && alpha.abs() < 1e15 {
        Value::from(alpha as i64)
    } else {
        Value::from(alpha)
    }
}

/// Whether a field of a variant is at the value that switches the variant off.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// Which of an adapter's two matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraMatrix {
    /// `[rank, inputs]`.
    A,
    /// `[outputs, rank]`.
    B,
}

impl LoraMatrix {
    const fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
        }
    }
}

/// The Hugging Face name of a projection's weight, e.g. `model.layers.0.self_attn.q_proj.weight`.
#[must_use]
pub fn projection_tensor_name(layer: usize, module: &str) -> String {
    let block = match module {
        "gate_proj" | "up_proj" | "down_proj" => "mlp",
        _ => "self_attn",
    };
    format!("model.layers.{layer}.{block}.{module}.weight")
}

/// PEFT's name of the matrix that adapts the weight `base_tensor`, e.g.
/// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
#[must_use]
pub fn lora_tensor_name(base_tensor: &str, matrix: LoraMatrix) -> String {
    let module = base_tensor.strip_suffix(".weight").unwrap_or(base_tensor);
    format!("{PREFIX}{module}{}", matrix.suffix())
}

/// The other way: which weight a tensor of an adapter belongs to, and as which matrix.
#[must_use]
pub fn base_tensor_name(lora_tensor: &str) -> Option<(String, LoraMatrix)> {
    let name = lora_tensor.strip_prefix(PREFIX)?;
    [LoraMatrix::A, LoraMatrix::B].into_iter().find_map(|matrix| {
        let module = name.strip_suffix(matrix.suffix())?;
        Some((format!("{module}.weight"), matrix))
    })
}

/// The names of the two tensors that adapt one weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraPair {
    /// A's name.
    pub a: String,
    /// B's name.
    pub b: String,
}

/// Finds for each adapted weight of the base model its two tensors of the adapter.
///
/// # Errors
/// When a tensor goes to no weight, stands without its other half, or there is none at all.
pub fn pair_lora_tensors<'a>(
    adapter_tensors: impl IntoIterator<Item = &'a str>,
    base_has: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, LoraPair>, PeftError> {
    let mut halves: BTreeMap<String, [bool; 2]> = BTreeMap::new();
    for tensor in adapter_tensors {
        let (base, matrix) = base_tensor_name(tensor)
            .filter(|(base, _)| base_has(base))
            .ok_or_else(|| PeftError::Unmatched { tensor: tensor.to_owned() })?;
        halves.entry(base).or_default()[usize::from(matrix == LoraMatrix::B)] = true;
    }
    if halves.is_empty() {
        return Err(PeftError::NoModule);
    }
    halves
        .into_iter()
        .map(|(base, found)| {
            let a = lora_tensor_name(&base, LoraMatrix::A);
            let b = lora_tensor_name(&base, LoraMatrix::B);
            match found {
                [true, true] => Ok((base, LoraPair { a, b })),
                [true, false] => Err(PeftError::Half { present: a, missing: b }),
                _ => Err(PeftError::Half { present: b, missing: a }),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PeftConfig {
        PeftConfig {
            base_model: Some("SmolLM2-135M-Instruct".to_owned()),
            adapter: AdapterConfig {
                r: 8,
                alpha: 16.0,
                dropout: 0.05,
                target_modules: vec!["q_proj".to_owned(), "v_proj".to_owned()],
                use_rslora: true,
                ..AdapterConfig::default()
            },
            fused_projections: false,
        }
    }

    #[test]
    fn a_config_comes_back_as_it_was_written() {
        let text = config().to_json().expect("json");
        assert_eq!(PeftConfig::parse(text.as_bytes()).expect("parse"), config());
    }

    #[test]
    fn a_model_of_fused_projections_is_adapted_in_the_modules_that_it_has() {
        let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"];
        let adapter = AdapterConfig {
            target_modules: targets.map(str::to_owned).to_vec(),
            ..config().adapter
        };
        let fused = PeftConfig { adapter, fused_projections: true, ..config() };
        let text = fused.to_json().expect("json");
        let written: Value = serde_json::from_str(&text).expect("JSON");
        let modules = serde_json::json!(["qkv_proj", "o_proj", "gate_up_proj"]);
        assert_eq!(written["target_modules"], modules);
        assert_eq!(PeftConfig::parse(text.as_bytes()).expect("parse"), fused);
    }

    #[test]
    fn the_written_config_is_that_of_peft_0_21() {
        let written: Map<String, Value> =
            serde_json::from_str(&config().to_json().expect("json")).expect("object");
        let peft: Map<String, Value> =
            serde_json::from_str(include_str!("../../tests/reference/peft_adapter_config.json"))
                .expect("object");
        let ours = ["base_model_name_or_path", "lora_dropout", "use_rslora"];
        for (field, value) in &written {
            if !ours.contains(&field.as_str()) {
                assert_eq!(peft.get(field), Some(value), "{field}");
            }
        }
        assert_eq!(written["lora_alpha"].as_u64(), Some(16));
    }

    #[test]
    fn a_config_that_peft_wrote_is_read() {
        let read =
            PeftConfig::parse(include_bytes!("../../tests/reference/peft_adapter_config.json"))
                .expect("parse");
        assert_eq!(read.adapter.target_modules, ["q_proj", "v_proj"]);
        assert_eq!((read.adapter.r, read.adapter.scale()), (8, 2.0));
    }

    #[test]
    fn a_variant_that_we_cannot_compute_is_refused_by_its_field() {
        for (field, value) in [
            ("peft_type", serde_json::json!("LOHA")),
            ("use_dora", serde_json::json!(true)),
            ("bias", serde_json::json!("all")),
            ("rank_pattern", serde_json::json!({"q_proj": 4})),
            ("modules_to_save", serde_json::json!(["lm_head"])),
            ("target_modules", serde_json::json!(".*_proj")),
            ("target_modules", serde_json::json!(["c_attn"])),
        ] {
            let mut fields: Map<String, Value> =
                serde_json::from_str(&config().to_json().expect("json")).expect("object");
            fields.insert(field.to_owned(), value);
            let text = serde_json::to_vec(&fields).expect("json");
            match PeftConfig::parse(&text) {
                Err(PeftError::Unsupported { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn full_fine_tuning_has_no_adapter_config() {
        let full = PeftConfig {
            base_model: None,
            adapter: AdapterConfig::full(),
            fused_projections: false,
        };
        assert!(matches!(full.to_json(), Err(PeftError::Unsupported { .. })));
    }

    #[test]
    fn tensor_names_go_both_ways() {
        let base = projection_tensor_name(3, "q_proj");
        assert_eq!(base, "model.layers.3.self_attn.q_proj.weight");
        assert_eq!(projection_tensor_name(0, "down_proj"), "model.layers.0.mlp.down_proj.weight");
        let name = lora_tensor_name(&base, LoraMatrix::A);
        assert_eq!(name, "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight");
        assert_eq!(base_tensor_name(&name), Some((base, LoraMatrix::A)));
        assert_eq!(base_tensor_name("model.norm.weight"), None);
    }

    #[test]
    fn an_adapter_that_matches_no_module_or_half_of_one_is_refused() {
        let base = projection_tensor_name(0, "v_proj");
        let (a, b) =
            (lora_tensor_name(&base, LoraMatrix::A), lora_tensor_name(&base, LoraMatrix::B));
        let pairs = pair_lora_tensors([a.as_str(), &b], |name| name == base).expect("pair");
        assert_eq!(pairs[&base], LoraPair { a: a.clone(), b: b.clone() });
        assert!(matches!(pair_lora_tensors([], |_| true), Err(PeftError::NoModule)));
        assert!(matches!(
            pair_lora_tensors([a.as_str(), &b], |_| false),
            Err(PeftError::Unmatched { tensor }) if tensor == a
        ));
        assert!(matches!(
            pair_lora_tensors([b.as_str()], |_| true),
            Err(PeftError::Half { missing, .. }) if missing == a
        ));
    }
}
