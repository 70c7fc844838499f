//! The names of the tensors in PEFT's `adapter_model.safetensors`, and the weights they belong to.

use super::PeftError;
use std::collections::BTreeMap;

/// PEFT wraps the model twice before its own parameters are named.
const PREFIX: &str = "base_model.model.";

/// Which of an adapter's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraMatrix {
    /// `[rank, inputs]`.
    A,
    /// `[outputs, rank]`.
    B,
    /// DoRA's magnitudes, `[outputs]`.
    Magnitude,
}

impl LoraMatrix {
    const fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
            Self::Magnitude => ".lora_magnitude_vector",
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

/// PEFT's name of the tensor that adapts the weight `base_tensor`, e.g.
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
    [LoraMatrix::A, LoraMatrix::B, LoraMatrix::Magnitude].into_iter().find_map(|matrix| {
        let module = name.strip_suffix(matrix.suffix())?;
        Some((format!("{module}.weight"), matrix))
    })
}

/// The names of the tensors that adapt one weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraPair {
    /// A's name.
    pub a: String,
    /// B's name.
    pub b: String,
    /// The name of DoRA's magnitudes.
    pub magnitude: Option<String>,
}

/// Finds for each adapted weight of the base model its tensors of the adapter: A and B, and with
/// `use_dora` the magnitudes.
///
/// # Errors
/// When a tensor goes to no weight, stands without another that belongs to it, or there is none
/// at all.
pub fn pair_lora_tensors<'a>(
    adapter_tensors: impl IntoIterator<Item = &'a str>,
    base_has: impl Fn(&str) -> bool,
    use_dora: bool,
) -> Result<BTreeMap<String, LoraPair>, PeftError> {
    let mut found: BTreeMap<String, Vec<LoraMatrix>> = BTreeMap::new();
    for tensor in adapter_tensors {
        let (base, matrix) = base_tensor_name(tensor)
            .filter(|(base, matrix)| {
                base_has(base) && (use_dora || *matrix != LoraMatrix::Magnitude)
            })
            .ok_or_else(|| PeftError::Unmatched { tensor: tensor.to_owned() })?;
        found.entry(base).or_default().push(matrix);
    }
    if found.is_empty() {
        return Err(PeftError::NoModule);
    }
    let needed: &[LoraMatrix] = if use_dora {
        &[LoraMatrix::A, LoraMatrix::B, LoraMatrix::Magnitude]
    } else {
        &[LoraMatrix::A, LoraMatrix::B]
    };
    found
        .into_iter()
        .map(|(base, found)| {
            let name = |matrix| lora_tensor_name(&base, matrix);
            if let Some(&missing) = needed.iter().find(|matrix| !found.contains(matrix)) {
                return Err(PeftError::Half { present: name(found[0]), missing: name(missing) });
            }
            let pair = LoraPair {
                a: name(LoraMatrix::A),
                b: name(LoraMatrix::B),
                magnitude: use_dora.then(|| name(LoraMatrix::Magnitude)),
            };
            Ok((base, pair))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let pairs = pair_lora_tensors([a.as_str(), &b], |name| name == base, false).expect("pair");
        let pair = LoraPair { a: a.clone(), b: b.clone(), magnitude: None };
        assert_eq!(pairs[&base], pair);
        assert!(matches!(pair_lora_tensors([], |_| true, false), Err(PeftError::NoModule)));
        assert!(matches!(
            pair_lora_tensors([a.as_str(), &b], |_| false, false),
            Err(PeftError::Unmatched { tensor }) if tensor == a
        ));
        assert!(matches!(
            pair_lora_tensors([b.as_str()], |_| true, false),
            Err(PeftError::Half { missing, .. }) if missing == a
        ));
    }

    #[test]
    fn dora_has_magnitudes_for_every_module_and_lora_for_none() {
        let base = projection_tensor_name(0, "v_proj");
        let [a, b, m] = [LoraMatrix::A, LoraMatrix::B, LoraMatrix::Magnitude]
            .map(|matrix| lora_tensor_name(&base, matrix));
        assert_eq!(m, "base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector");
        let tensors = [m.as_str(), &b, &a];
        let pairs = pair_lora_tensors(tensors, |name| name == base, true).expect("pair");
        let pair = LoraPair { a: a.clone(), b: b.clone(), magnitude: Some(m.clone()) };
        assert_eq!(pairs[&base], pair);
        assert!(matches!(
            pair_lora_tensors([tensors[2], tensors[1]], |_| true, true),
            Err(PeftError::Half { missing, .. }) if missing == m
        ));
        assert!(matches!(
            pair_lora_tensors(tensors, |_| true, false),
            Err(PeftError::Unmatched { tensor }) if tensor == m
        ));
    }
}
