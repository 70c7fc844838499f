//! The adapter of a job that begins with the weights of a tuned model.

use super::Hyperparameters;
use super::adapter::{AdapterConfig, AdapterType};
use super::reader::{ADAPTER_FIELDS, Reader};
use crate::errors::ApiError;
use serde_json::{Map, Value, json};

/// What the request calls the adapter.
const ADAPTER: &str = "adapter";
/// Means the same as a value that is left out.
const AUTO: &str = "auto";
/// What says whether there is one.
const TYPE: &str = "type";
/// What means something where every weight trains, too.
const NOT_ADAPTER_ALONE: [&str; 2] = [TYPE, "trainable_layers"];

impl Hyperparameters {
    /// Makes `asked`, the hyperparameters of a job as the client gave them and that were read as
    /// `self`, those of a job that goes on with weights that `start` describes: the same adapter
    /// trains further, so what gives its shape is taken over, and the way in which the frozen
    /// weights are kept where the client said nothing of it.
    ///
    /// A job that trains every weight may begin with an adapter: that is merged into the weights, so
    /// nothing of its shape is left. A model that was trained in full goes on so, or is the base model
    /// of a new adapter where the client says that it wants one.
    ///
    /// # Errors
    /// `invalid_value` for a shape that is not that of `start`. `path` is where the hyperparameters
    /// stand in the request.
    pub fn start_from(
        &self,
        start: &AdapterConfig,
        asked: &mut Map<String, Value>,
        path: &str,
    ) -> Result<(), ApiError> {
        let start = start.exported();
        let given = asked.get(ADAPTER).and_then(Value::as_object).cloned().unwrap_or_default();
        let is_left_out = |value: &Value| value.is_null() || value == AUTO;
        let said = |name: &str| given.get(name).filter(|value| !is_left_out(value));
        let path = format!("{path}.{ADAPTER}");
        let reader = Reader { fields: &given, path: &path, notes: None };
        let mut adapter = given.clone();
        if start.kind == AdapterType::Full {
            if said(TYPE).is_none() {
                let adapter_alone =
                    ADAPTER_FIELDS.iter().filter(|name| !NOT_ADAPTER_ALONE.contains(name));
                if let Some((name, value)) =
                    adapter_alone.copied().find_map(|name| Some((name, said(name)?)))
                {
                    let rule = "left out, or beside \"type\": \"lora\": every weight of the model to \
                                start from was trained, and they all train further unless an adapter \
                                beside them is asked for";
                    return Err(reader.invalid(name, value, rule));
                }
                adapter.insert(TYPE.to_owned(), json!(start.kind));
            }
            asked.insert(ADAPTER.to_owned(), Value::Object(adapter));
            return Ok(());
        }
        if self.adapter.kind == AdapterType::Full {
            return Ok(());
        }
        for (name, wanted, theirs) in shape(&self.adapter, &start) {
            match said(name) {
                Some(value) if wanted != theirs => {
                    let rule = format!(
                        "{theirs} or left out: the adapter of the model to start from trains \
                         further, and that is its shape"
                    );
                    return Err(reader.invalid(name, value, rule));
                }
                _ => {
                    adapter.insert(name.to_owned(), theirs);
                }
            }
        }
        if said("quantization").is_none() {
            adapter.insert("quantization".to_owned(), json!(start.quantization));
        }
        asked.insert(ADAPTER.to_owned(), Value::Object(adapter));
        Ok(())
    }
}

/// What an adapter's tensors depend on: names and values, as asked for and as they are.
fn shape(
    asked: &AdapterConfig,
    start: &AdapterConfig,
) -> impl Iterator<Item = (&'static str, Value, Value)> {
    let (asked, start) = (json!(asked), json!(start));
    const NAMES: [&str; 8] = [
        TYPE,
        "r",
        "alpha",
        "target_modules",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "trainable_layers",
    ];
    NAMES.into_iter().map(move |name| (name, asked[name].clone(), start[name].clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hyperparameters::{InitLoraWeights, Quantization};

    fn started(start: &AdapterConfig, asked: &Value) -> Result<AdapterConfig, ApiError> {
        let mut fields = asked.as_object().expect("object").clone();
        let (parsed, _) = Hyperparameters::parse(&fields, "hyperparameters")?;
        parsed.start_from(start, &mut fields, "hyperparameters")?;
        Ok(Hyperparameters::parse(&fields, "hyperparameters")?.0.adapter)
    }

    fn tuned() -> AdapterConfig {
        AdapterConfig {
            r: 4,
            alpha: 12.0,
            dropout: 0.1,
            target_modules: vec!["q_proj".to_owned()],
            use_dora: true,
            trainable_layers: 3,
            quantization: Quantization::Nf4,
            ..AdapterConfig::default()
        }
    }

    #[test]
    fn the_shape_is_taken_over_and_the_way_of_learning_is_not() {
        let adapter = started(&tuned(), &json!({})).expect("valid");
        assert_eq!(adapter, AdapterConfig { dropout: 0.0, ..tuned() });
        let asked = json!({"adapter": {"r": 4, "dropout": 0.2, "quantization": "none",
            "target_modules": null}});
        let adapter = started(&tuned(), &asked).expect("valid");
        let expected = AdapterConfig { dropout: 0.2, quantization: Quantization::None, ..tuned() };
        assert_eq!(adapter, expected);
    }

    #[test]
    fn another_shape_is_refused_with_the_one_there_is() {
        let asked = [
            json!({"alpha": 12, "r": 8}),
            json!({"r": 4, "alpha": 13}),
            json!({"target_modules": "all-linear"}),
            json!({"use_dora": false}),
            json!({"use_rslora": true}),
            json!({"trainable_layers": 0}),
            json!({"init_lora_weights": "pissa"}),
        ];
        let start = AdapterConfig { quantization: Quantization::None, ..tuned() };
        for adapter in asked {
            // PiSSA beside DoRA is refused before.
            let start =
                AdapterConfig { use_dora: adapter["init_lora_weights"].is_null(), ..start.clone() };
            let name = adapter.as_object().expect("object").keys().next_back().expect("a name");
            let error = started(&start, &json!({"adapter": adapter})).expect_err(name);
            assert_eq!(error.param, Some(format!("hyperparameters.adapter.{name}")));
            assert!(error.message.contains("or left out"), "{}", error.message);
        }
    }

    #[test]
    fn a_full_model_goes_on_as_a_full_model_unless_an_adapter_is_asked_for() {
        let full = AdapterConfig { trainable_layers: 2, ..AdapterConfig::full() };
        for (asked, expected) in [
            (json!({}), AdapterConfig::full()),
            (json!({"type": "full", "r": "auto"}), AdapterConfig::full()),
            (
                json!({"trainable_layers": 1, "r": null}),
                AdapterConfig { trainable_layers: 1, ..AdapterConfig::full() },
            ),
            (json!({"type": "lora"}), AdapterConfig::default()),
            (
                json!({"type": "lora", "r": 4, "use_dora": true, "quantization": "nf4"}),
                AdapterConfig {
                    r: 4,
                    alpha: 8.0,
                    use_dora: true,
                    quantization: Quantization::Nf4,
                    ..AdapterConfig::default()
                },
            ),
        ] {
            let adapter = started(&full, &json!({"adapter": asked})).expect("valid");
            assert_eq!(adapter, expected, "{asked}");
        }
    }

    #[test]
    fn what_only_an_adapter_has_asks_for_the_word_beside_a_full_model() {
        for (name, value) in [
            ("r", json!(8)),
            ("alpha", json!(8)),
            ("dropout", json!(0.1)),
            ("target_modules", json!("all-linear")),
            ("use_rslora", json!(true)),
            ("use_dora", json!(true)),
            ("init_lora_weights", json!("pissa")),
            ("loraplus_lr_ratio", json!(4)),
            ("quantization", json!("int8")),
        ] {
            assert!(ADAPTER_FIELDS.contains(&name) && !NOT_ADAPTER_ALONE.contains(&name));
            let asked = json!({"adapter": { name: value }});
            let error = started(&AdapterConfig::full(), &asked).expect_err(name);
            assert_eq!(error.param, Some(format!("hyperparameters.adapter.{name}")));
            assert!(error.message.contains("\"type\": \"lora\""), "{}", error.message);
        }
    }

    #[test]
    fn every_weight_may_train_from_an_adapter_and_nothing_of_its_shape_is_left() {
        assert_eq!(started(&tuned(), &json!({})).expect("valid").kind, AdapterType::Lora);
        for (asked, layers) in
            [(json!({"type": "full"}), 0), (json!({"type": "full", "trainable_layers": 1}), 1)]
        {
            let adapter = started(&tuned(), &json!({"adapter": asked})).expect("valid");
            let expected = AdapterConfig { trainable_layers: layers, ..AdapterConfig::full() };
            assert_eq!(adapter, expected);
        }
    }

    #[test]
    fn an_adapter_that_began_with_pissa_goes_on_as_the_plain_one_that_it_was_given_out_as() {
        let start = AdapterConfig {
            use_dora: false,
            init_lora_weights: InitLoraWeights::Pissa,
            quantization: Quantization::None,
            ..tuned()
        };
        let adapter = started(&start, &json!({})).expect("valid");
        assert_eq!((adapter.r, adapter.alpha), (8, 24.0));
        assert_eq!(adapter.init_lora_weights, InitLoraWeights::Default);
    }
}
