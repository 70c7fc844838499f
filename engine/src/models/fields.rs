//! The fields of a `config.json`, read one by one with messages that name them.

use serde_json::{Map, Value};

use super::config::Activation;
use super::families::{self, Family, Windows};
use super::rope::{Rope, RopeScaling};
use crate::error::EngineError;

/// The error that says `what` is wrong with the file.
pub(super) fn refuse<T>(what: impl std::fmt::Display) -> Result<T, EngineError> {
    Err(EngineError::Model(format!("config.json: {what}")))
}

/// The fields of the file.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    /// A field that is there and not null.
    fn given(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn optional_size(&self, name: &str) -> Result<Option<usize>, EngineError> {
        match self.given(name) {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(0) => refuse(format!("{name} is 0")),
                Some(size) => Ok(Some(size)),
                None => refuse(format!("{name} is {value} and not a whole number")),
            },
        }
    }

    pub(super) fn size(&self, name: &str) -> Result<usize, EngineError> {
        match self.optional_size(name)? {
            Some(size) => Ok(size),
            None => refuse(format!("missing field `{name}`")),
        }
    }

    /// A positive number.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, EngineError> {
        match self.given(name) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|&number| number > 0.0) {
                Some(number) => Ok(Some(number)),
                None => refuse(format!("{name} is {value} and not a positive number")),
            },
        }
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool, EngineError> {
        match self.given(name) {
            None => Ok(default),
            Some(value) => match value.as_bool() {
                Some(flag) => Ok(flag),
                None => refuse(format!("{name} is {value} and neither true nor false")),
            },
        }
    }

    /// Looked at before all else: another family's file may lack fields that this one has, and "no
    /// such family" is the message that helps.
    pub(super) fn family(&self) -> Result<Family, EngineError> {
        match self.given("model_type").map(|model_type| (model_type, model_type.as_str())) {
            None => refuse("there is no model_type"),
            Some((_, Some("gemma3"))) => refuse(
                "model_type \"gemma3\" is a model of images and text: use its text part, saved \
                 with model_type gemma3_text (Gemma3ForCausalLM of transformers writes it)",
            ),
            Some((given, name)) => match name.and_then(families::find) {
                Some(family) => Ok(family),
                None => refuse(format!(
                    "model_type {given} is not supported: use one of {}",
                    families::names()
                )),
            },
        }
    }

    /// Refuses what changes the numbers and is not computed.
    pub(super) fn refuse_unsupported(&self, family: &Family) -> Result<(), EngineError> {
        if self.given("quantization_config").is_some() {
            return refuse(
                "quantized weights (quantization_config) are not supported: \
                 use the f32, bf16 or f16 model",
            );
        }
        if self.flag("use_bidirectional_attention", false)? {
            return refuse(
                "use_bidirectional_attention is not supported: a model that sees what follows \
                 cannot be trained to predict it",
            );
        }
        // transformers reads the field of a Gemma 3, and then does not use it.
        let ignores_cap = family.gemma.is_some_and(|gemma| gemma.attn_logit_softcapping.is_none());
        if ignores_cap && self.given("attn_logit_softcapping").is_some() {
            return refuse("attn_logit_softcapping is not supported in this model_type");
        }
        for name in ["attention_dropout", "resid_pdrop", "embd_pdrop"] {
            if let Some(dropout) = self.given(name).filter(|value| value.as_f64() != Some(0.0)) {
                return refuse(format!(
                    "{name} {dropout} is not supported: set it to 0 to train without it"
                ));
            }
        }
        Ok(())
    }

    pub(super) fn head_dim(
        &self,
        family: &Family,
        hidden_size: usize,
        heads: usize,
    ) -> Result<usize, EngineError> {
        let head_dim = match self.optional_size("head_dim")?.or(family.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return refuse(format!(
                    "without head_dim, hidden_size {hidden_size} must be a multiple of \
                     num_attention_heads {heads}"
                ));
            }
        };
        if head_dim.is_multiple_of(2) {
            Ok(head_dim)
        } else {
            refuse(format!("head_dim {head_dim} is not even, as rotary embedding needs"))
        }
    }

    pub(super) fn activation(&self, family: &Family) -> Result<Activation, EngineError> {
        let (field, default) = family.activation;
        match self.given(field) {
            None => Ok(default),
            Some(name) => match name.as_str() {
                Some("silu") => Ok(Activation::Silu),
                Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
                _ => refuse(format!(
                    "{field} {name} is not supported: use silu or gelu_pytorch_tanh"
                )),
            },
        }
    }

    /// The rotary embedding of full attention, and that of the layers with a window where it is
    /// another.
    pub(super) fn ropes(
        &self,
        family: &Family,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<(Rope, Option<Rope>), EngineError> {
        let object = |name: &str| -> Result<Option<&Map<String, Value>>, EngineError> {
            match self.given(name) {
                None => Ok(None),
                Some(Value::Object(object)) => Ok(Some(object).filter(|object| !object.is_empty())),
                Some(other) => refuse(format!("{name} is {other} and not an object")),
            }
        };
        let (scaling, parameters) = (object("rope_scaling")?, object("rope_parameters")?);
        let empty = Map::new();
        let rope = |json: &Map<String, Value>,
                    theta: Option<f64>,
                    default_theta: f64|
         -> Result<Rope, EngineError> {
            let partial = Fields(json).number("partial_rotary_factor")?;
            let partial = partial.or(self.number("partial_rotary_factor")?).unwrap_or(1.0);
            if partial != 1.0 && !family.phi3_rope {
                return refuse(format!("partial_rotary_factor {partial} is not supported"));
            }
            let dim = (head_dim as f64 * partial) as usize;
            if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
                return refuse(format!(
                    "partial_rotary_factor {partial} of head_dim {head_dim} is no even number of \
                     dimensions"
                ));
            }
            let mut original = self.optional_size("original_max_position_embeddings")?;
            let mut json = json.clone();
            if family.phi3_rope {
                original = original.or(Some(4096));
                for key in ["rope_type", "type"] {
                    match json.get_mut(key) {
                        Some(kind) if kind == "su" || kind == "yarn" => *kind = "longrope".into(),
                        _ => {}
                    }
                }
            }
            Ok(Rope {
                dim,
                theta: Fields(&json).number("rope_theta")?.or(theta).unwrap_or(default_theta),
                scaling: RopeScaling::parse(&json, dim, max_position_embeddings, original)?,
            })
        };
        let theta = self.number("rope_theta")?;
        if !family.sliding_rope {
            // The order of transformers, where a file has both.
            let json = scaling.or(parameters).unwrap_or(&empty);
            if json.values().any(Value::is_object) {
                return refuse(format!(
                    "rope_parameters by layer type are not supported in model_type {}",
                    family.model_type
                ));
            }
            return Ok((rope(json, theta, 10_000.0)?, None));
        }
        // transformers 5 has one entry a layer type, where 4 had rope_theta and rope_scaling for
        // full attention, and rope_local_base_freq beside them.
        let of_type = |layer_type: &str| -> Result<&Map<String, Value>, EngineError> {
            match parameters.map(|by_type| by_type.get(layer_type)) {
                None | Some(None | Some(Value::Null)) => Ok(&empty),
                Some(Some(Value::Object(json))) => Ok(json),
                Some(Some(other)) => refuse(format!("rope_parameters has {other}")),
            }
        };
        if let Some(parameters) = parameters
            && !parameters.values().any(Value::is_object)
        {
            return refuse(
                "rope_parameters of a model with two rotary embeddings has neither \
                 full_attention nor sliding_attention",
            );
        }
        let mut full = of_type("full_attention")?.clone();
        full.extend(scaling.cloned().unwrap_or_default());
        let local = self.number("rope_local_base_freq")?;
        let sliding = rope(of_type("sliding_attention")?, local, 10_000.0)?;
        Ok((rope(&full, theta, 1_000_000.0)?, Some(sliding)))
    }

    pub(super) fn sliding_windows(
        &self,
        family: &Family,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, EngineError> {
        let window = match self.0.get("sliding_window") {
            None => family.sliding_window,
            Some(_) => self.optional_size("sliding_window")?,
        };
        let by_number = |is_sliding: &dyn Fn(usize) -> bool| -> Vec<Option<usize>> {
            (0..layers).map(|layer| window.filter(|_| is_sliding(layer))).collect()
        };
        match family.windows {
            Windows::Never => Ok(vec![None; layers]),
            Windows::AllLayers if self.given("layer_types").is_some() => {
                refuse("layer_types are not supported in this model_type: all layers are equal")
            }
            Windows::AllLayers => Ok(by_number(&|_| true)),
            Windows::UpperLayers { max_window_layers } => {
                if !self.flag("use_sliding_window", false)? {
                    return self.windows_by_type(layers, None, vec![None; layers]);
                }
                let first = match self.given("max_window_layers") {
                    None => max_window_layers as u64,
                    Some(value) => match value.as_u64() {
                        Some(first) => first,
                        None => return refuse(format!("max_window_layers is {value}")),
                    },
                };
                self.windows_by_type(layers, window, by_number(&|layer| layer as u64 >= first))
            }
            Windows::Pattern { sliding_window_pattern, is_field } => {
                if window.is_none() {
                    return refuse(format!(
                        "sliding_window is null, but layers of a {} have one",
                        family.model_type
                    ));
                }
                let pattern = match is_field {
                    true => self.optional_size("sliding_window_pattern")?,
                    false => None,
                };
                let pattern = pattern.unwrap_or(sliding_window_pattern);
                let otherwise = by_number(&|layer| !(layer + 1).is_multiple_of(pattern));
                self.windows_by_type(layers, window, otherwise)
            }
        }
    }

    /// The windows that `layer_types` asks for, or `otherwise` without that field.
    fn windows_by_type(
        &self,
        layers: usize,
        window: Option<usize>,
        otherwise: Vec<Option<usize>>,
    ) -> Result<Vec<Option<usize>>, EngineError> {
        let Some(types) = self.given("layer_types") else { return Ok(otherwise) };
        let types = types.as_array().map(Vec::as_slice).unwrap_or_default();
        if types.len() != layers {
            return refuse(format!(
                "layer_types has {} entries for num_hidden_layers {layers}",
                types.len()
            ));
        }
        let window_of = |layer_type: &Value| match (layer_type.as_str(), window) {
            (Some("full_attention"), _) => Ok(None),
            (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
            (Some("sliding_attention"), None) => {
                refuse("layer_types has sliding_attention, but there is no sliding_window in use")
            }
            _ => refuse(format!(
                "layer_types has {layer_type}, which is not supported: use full_attention or \
                 sliding_attention"
            )),
        };
        types.iter().map(window_of).collect()
    }
}
