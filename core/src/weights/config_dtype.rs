//! What a Hugging Face model's `config.json` says of the type of its numbers.

use super::FloatType;
use serde_json::{Value, json};

/// The names that it has had, the older one first.
const KEYS: [&str; 2] = ["torch_dtype", "dtype"];

/// Has `config` say that the weights are stored as `dtype`; whether it did not say so before.
pub fn set_dtype(config: &mut Value, dtype: FloatType) -> bool {
    let Some(fields) = config.as_object_mut() else { return false };
    let name = json!(dtype.torch_name());
    let mut is_changed = false;
    for key in KEYS {
        if let Some(said) = fields.get_mut(key).filter(|said| **said != name) {
            *said = name.clone();
            is_changed = true;
        }
    }
    if !KEYS.iter().any(|key| fields.contains_key(*key)) {
        // All versions of transformers read the older name.
        fields.insert(KEYS[0].to_owned(), name);
        is_changed = true;
    }
    is_changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_says_the_type_of_the_numbers_under_whichever_name_it_has() {
        for (before, after) in [
            (json!({"a": 1}), json!({"a": 1, "torch_dtype": "float16"})),
            (json!({"torch_dtype": "bfloat16"}), json!({"torch_dtype": "float16"})),
            (json!({"dtype": "float32", "b": 2}), json!({"dtype": "float16", "b": 2})),
        ] {
            let mut config = before;
            assert!(set_dtype(&mut config, FloatType::F16), "{config}");
            assert_eq!(config, after);
            assert!(!set_dtype(&mut config, FloatType::F16), "{config}");
        }
    }
}
