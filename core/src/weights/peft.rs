//! PEFT's `adapter_config.json`, as PEFT 0.21 writes and reads it.

use crate::hyperparameters::{
    AdapterConfig, AdapterType, TARGET_MODULES, fused_module_of, target_modules_of,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::ops::Range;

/// The file that describes an adapter.
pub const ADAPTER_CONFIG_NAME: &str = "adapter_config.json";
/// The file with its tensors.
pub const ADAPTER_WEIGHTS_NAME: &str = "adapter_model.safetensors";

const PEFT_VERSION: &str = "0.21.2";

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
    /// The decoder layers that are adapted: from the first of them to the last of the model. None
    /// for all, which is also what an adapter with `trainable_layers` 0 has.
    pub layers: Option<Range<usize>>,
}

/// Why an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// Not JSON, or a field of another type.
    #[error("{ADAPTER_CONFIG_NAME} is not in PEFT's format: {0}")]
    Format(#[from] serde_json::Error),
    /// A variant of LoRA that is not supported.
    #[error(
        "{ADAPTER_CONFIG_NAME} has {field} = {value}, but only LoRA, rsLoRA and DoRA on linear \
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
    /// A weight without tensors whose module is a target, or one with tensors whose module is not.
    #[error(
        "{ADAPTER_CONFIG_NAME} says that {weight} {is} adapted, but the adapter has {has} tensors for \
         it"
    )]
    Modules {
        /// The weight.
        weight: String,
        /// What the configuration says.
        is: &'static str,
        /// What is there.
        has: &'static str,
    },
    /// Layers that are adapted, but not the last ones.
    #[error(
        "{ADAPTER_CONFIG_NAME} has layers_to_transform = {first} to {last}, but only all layers or \
         the last ones of the model's {layers} are supported"
    )]
    Layers {
        /// The first layer that is adapted.
        first: usize,
        /// The last one.
        last: usize,
        /// The layers of the model.
        layers: usize,
    },
    /// A without B, B without A, or a DoRA module without one of its three tensors.
    #[error("the adapter has {present} but not {missing}, which belongs to it")]
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
    use_dora: bool,
    #[serde(default)]
    layers_to_transform: Option<Layers>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Layers {
    One(usize),
    List(Vec<usize>),
}

impl Layers {
    /// The layers as a range; None for all, an error for layers with gaps.
    fn range(self) -> Result<Option<Range<usize>>, PeftError> {
        let mut layers = match self {
            Self::One(layer) => vec![layer],
            Self::List(layers) => layers,
        };
        layers.sort_unstable();
        let (Some(&first), Some(&last)) = (layers.first(), layers.last()) else { return Ok(None) };
        if layers.iter().copied().eq(first..=last) {
            return Ok(Some(first..last + 1));
        }
        let value = format!("{layers:?}");
        Err(PeftError::Unsupported { field: "layers_to_transform", value })
    }
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
    layers_to_transform: Option<Vec<usize>>,
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
            layers_to_transform: self.layers.clone().map(Iterator::collect),
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
            use_dora: adapter.use_dora,
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

    /// Checks that the weights with tensors are those that the configuration names, in a base model
    /// of these weights.
    ///
    /// # Errors
    /// [`PeftError::Layers`], or [`PeftError::Modules`] naming the first weight that differs.
    pub fn check_modules<'a>(
        &self,
        weights: impl IntoIterator<Item = &'a str>,
        is_adapted: impl Fn(&str) -> bool,
    ) -> Result<(), PeftError> {
        let mut projections: Vec<(usize, Range<usize>, &str)> = weights
            .into_iter()
            .filter_map(|name| {
                let (layer, module) = layer_and_module(name)?;
                Some((layer, target_modules_of(module), name))
            })
            .filter(|(_, modules, _)| !modules.is_empty())
            .collect();
        projections.sort_unstable_by_key(|&(layer, _, name)| (layer, name));
        let layers = projections.last().map_or(0, |(layer, _, _)| layer + 1);
        let adapted = self.layers.clone().unwrap_or(0..layers);
        if adapted.end != layers {
            let last = adapted.end.saturating_sub(1);
            return Err(PeftError::Layers { first: adapted.start, last, layers });
        }
        let is_target = |module: usize| {
            self.adapter.target_modules.iter().any(|target| target == TARGET_MODULES[module])
        };
        for (layer, mut modules, name) in projections {
            let named = adapted.contains(&layer) && modules.any(is_target);
            if named != is_adapted(name) {
                let (is, has) = if named { ("is", "no") } else { ("is not", "LoRA") };
                return Err(PeftError::Modules { weight: name.to_owned(), is, has });
            }
        }
        Ok(())
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
            "loftq_config",
            "lora_bias",
            "modules_to_save",
            "monteclora_config",
            "rank_pattern",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
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
        // Words for initialisations that leave the base model as it is. With others, PiSSA among
        // them, the adapter goes on what is left of the weights, unless PEFT has converted it, and
        // then it says `true`.
        let start = read.rest.get("init_lora_weights").filter(|value| value.is_string());
        if let Some(value) = start
            .filter(|value| !["gaussian", "eva", "orthogonal"].iter().any(|word| **value == *word))
        {
            return Err(PeftError::Unsupported {
                field: "init_lora_weights",
                value: value.to_string(),
            });
        }
        let layers = read.layers_to_transform.map_or(Ok(None), Layers::range)?;
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
                use_dora: read.use_dora,
                trainable_layers: layers.as_ref().map_or(0, Range::len),
                ..AdapterConfig::default()
            },
            fused_projections,
            layers,
        })
    }
}

/// The decoder layer and the module that a weight belongs to, where it belongs to one.
fn layer_and_module(weight: &str) -> Option<(usize, &str)> {
    let (layer, path) = weight.strip_prefix("model.layers.")?.split_once('.')?;
    let module = path.strip_suffix(".weight")?.rsplit('.').next()?;
    Some((layer.parse().ok()?, module))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::projection_tensor_name;

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
            layers: None,
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
    fn the_last_layers_alone_are_written_as_pefts_layers_to_transform() {
        let adapter = AdapterConfig { trainable_layers: 2, ..config().adapter };
        let last = PeftConfig { adapter, layers: Some(10..12), ..config() };
        let text = last.to_json().expect("json");
        let written: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(written["layers_to_transform"], serde_json::json!([10, 11]));
        assert_eq!(PeftConfig::parse(text.as_bytes()).expect("parse"), last);
        let one = text
            .replace("layers_to_transform\": [\n    10,\n    11\n  ]", "layers_to_transform\": 7");
        assert_eq!(PeftConfig::parse(one.as_bytes()).expect("parse").layers, Some(7..8));
    }

    #[test]
    fn the_weights_that_have_tensors_are_those_that_the_config_names() {
        let weight = projection_tensor_name;
        let all: Vec<String> = (0..3)
            .flat_map(|layer| ["q_proj", "k_proj", "v_proj"].map(|m| weight(layer, m)))
            .collect();
        let check = |layers: Option<Range<usize>>, adapted: &[(usize, &str)]| {
            let adapted: Vec<String> = adapted.iter().map(|&(layer, m)| weight(layer, m)).collect();
            let config = PeftConfig { layers, ..config() };
            let is_adapted = |name: &str| adapted.iter().any(|adapted| adapted == name);
            config.check_modules(all.iter().map(String::as_str), is_adapted)
        };
        let last = [(2, "q_proj"), (2, "v_proj")];
        let every: Vec<_> =
            (0..3).flat_map(|layer| [(layer, "q_proj"), (layer, "v_proj")]).collect();
        check(None, &every).expect("all layers");
        check(Some(2..3), &last).expect("the last layer");
        assert!(matches!(check(Some(0..2), &every), Err(PeftError::Layers { last: 1, .. })));
        let missing = check(None, &last).expect_err("layers 0 and 1 have none").to_string();
        assert!(missing.contains("model.layers.0.self_attn.q_proj.weight is adapted"), "{missing}");
        let more = check(Some(2..3), &[last[0], last[1], (2, "k_proj")]).expect_err("k_proj");
        assert!(more.to_string().contains("k_proj.weight is not adapted"), "{more}");
    }

    #[test]
    fn a_dora_config_comes_back_as_it_was_written() {
        let adapter = AdapterConfig { use_dora: true, ..config().adapter };
        let dora = PeftConfig { adapter, ..config() };
        let text = dora.to_json().expect("json");
        assert_eq!(PeftConfig::parse(text.as_bytes()).expect("parse"), dora);
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
            ("bias", serde_json::json!("all")),
            ("rank_pattern", serde_json::json!({"q_proj": 4})),
            ("layers_to_transform", serde_json::json!([1, 3])),
            ("modules_to_save", serde_json::json!(["lm_head"])),
            ("init_lora_weights", serde_json::json!("pissa_niter_4")),
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
            layers: None,
        };
        assert!(matches!(full.to_json(), Err(PeftError::Unsupported { .. })));
    }
}
