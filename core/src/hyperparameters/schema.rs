//! The JSON Schema of what a client may ask for: names, ranges and words as the reading of a
//! request asks for them, sentences as they stand at the fields, defaults as `"auto"` resolves.

use super::method::PREFERENCE_NAMES;
use super::reader::{Notes, Range, Reader, Rule};
use super::{
    AdapterConfig, AdapterType, Auto, DataFacts, Hyperparameters, Method, PreferenceLoss,
    ResolvedHyperparameters, TARGET_MODULES,
};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

const ADAPTER: &str = "adapter";

/// The schema (JSON Schema 2020-12) of the hyperparameters of a request for `method`.
#[must_use]
pub fn request_schema(method: Method) -> Value {
    let has = |name: &str| method != Method::Supervised || !PREFERENCE_NAMES.contains(&name);
    let documented = documented::<ResolvedHyperparameters>();
    let mut properties = Map::new();
    let (own, adapter): (Vec<_>, Vec<_>) =
        rules().into_iter().partition(|(path, _, _)| path.is_empty());
    for (_, name, rule) in own.into_iter().filter(|(_, name, _)| has(name)) {
        let mut property = rule_schema(rule);
        property["description"] = json!(join(&documented, &name, &auto_sentence(method, &name)));
        property["default"] = json!("auto");
        properties.insert(name, property);
    }
    let mut shape = adapter_schema(adapter.into_iter().map(|(_, name, rule)| (name, rule)));
    shape["description"] = json!(join(&documented, ADAPTER, ""));
    properties.insert(ADAPTER.to_owned(), shape);
    json!({ "type": ["object", "null"], "properties": properties })
}

/// Every field that a request is asked for, with the path of its object.
fn rules() -> Vec<(String, String, Rule)> {
    let Value::Object(fields) = json!({ ADAPTER: {} }) else { return Vec::new() };
    let notes = Notes::default();
    // Nothing is given, so nothing is refused.
    let read = Hyperparameters::read(
        Method::Dpo,
        &Reader { fields: &fields, path: "", notes: Some(&notes) },
    );
    debug_assert!(read.is_ok(), "{read:?}");
    notes.into_inner()
}

fn rule_schema(rule: Rule) -> Value {
    let number = |kind: &str, range: Range| {
        let low = if range.above_min { "exclusiveMinimum" } else { "minimum" };
        json!({ "type": kind, low: plain(range.min), "maximum": plain(range.max) })
    };
    let mut given = match rule {
        Rule::Number(range) => number("number", range),
        Rule::Integer(range) => number("integer", range),
        Rule::Boolean => json!({ "type": "boolean" }),
        Rule::Words(words) => {
            let mut all = vec!["auto"];
            all.extend(words.iter().filter(|word| **word != "auto"));
            let all: Vec<Value> = all.into_iter().map(Value::from).chain([Value::Null]).collect();
            return json!({ "type": ["string", "null"], "enum": all });
        }
    };
    given["type"] = json!([given["type"], "null"]);
    json!({ "anyOf": [{ "const": "auto" }, given] })
}

/// A whole number without `.0`.
fn plain(number: f64) -> Value {
    if number.fract() == 0.0 { json!(number as i64) } else { json!(number) }
}

/// The adapter's fields: what is read with a range as it is read, the others as they are stored.
fn adapter_schema(ranged: impl Iterator<Item = (String, Rule)>) -> Value {
    let mut properties = documented::<AdapterConfig>();
    for (name, rule) in ranged {
        let Some(stored) = properties.get_mut(&name) else { continue };
        let mut property = rule_schema(rule);
        for kept in ["description", "default"] {
            if let Some(value) = stored.get(kept) {
                property[kept] = value.clone();
            }
        }
        *stored = property;
    }
    if let Some(modules) = properties.get_mut("target_modules") {
        let list = json!({
            "type": "array", "minItems": 1, "items": { "type": "string", "enum": TARGET_MODULES }
        });
        modules["anyOf"] = json!([{ "enum": ["all-linear", "auto", null] }, list]);
        modules["default"] = json!("all-linear");
        if let Some(fields) = modules.as_object_mut() {
            fields.retain(|key, _| ["anyOf", "description", "default"].contains(&key.as_str()));
        }
    }
    if let Some(Value::Object(alpha)) = properties.get_mut("alpha") {
        alpha.remove("default");
        let said = alpha.get("description").and_then(Value::as_str).unwrap_or_default();
        let said = format!("{said} By default twice `r`.");
        alpha.insert("description".to_owned(), said.into());
    }
    let object =
        json!({ "type": "object", "properties": properties, "additionalProperties": false });
    json!({ "anyOf": [{ "enum": ["auto", null] }, object] })
}

/// The properties of a struct as its fields document them, without references.
fn documented<T: JsonSchema>() -> Map<String, Value> {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let mut schema = settings.into_generator().into_root_schema_for::<T>();
    match schema.remove("properties") {
        Some(Value::Object(properties)) => properties,
        _ => Map::new(),
    }
}

fn join(documented: &Map<String, Value>, name: &str, more: &str) -> String {
    let said = documented.get(name).and_then(|property| property["description"].as_str());
    let said = said.unwrap_or_default().replace('\n', " ");
    format!("{said} {more}").trim().to_owned()
}

/// What `"auto"` becomes, where that depends on nothing else; a sentence that it depends, where it
/// does.
fn auto_sentence(method: Method, name: &str) -> String {
    let mut values: Vec<Value> = Vec::new();
    for kind in [AdapterType::Lora, AdapterType::Full] {
        for loss in [PreferenceLoss::Dpo, PreferenceLoss::Orpo, PreferenceLoss::Simpo] {
            for (examples, context_length) in [(10, 512), (1_000, 4_096), (100_000, 32_768)] {
                let asked = Hyperparameters {
                    method,
                    preference_loss: Auto::Value(loss),
                    adapter: AdapterConfig { kind, ..AdapterConfig::default() },
                    ..Hyperparameters::default()
                };
                let resolved = asked.resolve(&DataFacts { examples, context_length });
                let value = resolved.to_wire()[name].clone();
                if !values.contains(&value) {
                    values.push(value);
                }
            }
        }
    }
    match values.as_slice() {
        _ if name == "preference_loss" => {
            format!("`auto` is `{}`.", json!(PreferenceLoss::default()).as_str().unwrap_or("dpo"))
        }
        [value] if value == "auto" => String::new(),
        [Value::String(word)] => format!("`auto` is `{word}`."),
        [value] => format!("`auto` is {value}."),
        _ => "`auto` depends on the data and the other hyperparameters.".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hyperparameter_of_a_method_is_described_with_its_range() {
        let supervised = request_schema(Method::Supervised);
        let properties = supervised["properties"].as_object().expect("properties");
        let shown = Hyperparameters::default().to_wire();
        let names: Vec<&String> = shown.as_object().expect("object").keys().collect();
        assert_eq!(properties.keys().collect::<Vec<_>>(), names);
        for (name, property) in properties {
            assert!(property["description"].as_str().is_some_and(|d| d.len() > 10), "{name}");
        }
        assert_eq!(
            properties["warmup_ratio"],
            json!({
                "anyOf": [
                    {"const": "auto"},
                    {"type": ["number", "null"], "minimum": 0, "maximum": 1},
                ],
                "description": "Share of all steps in which the learning rate rises from 0 to its \
                                peak. `auto` is 0.03.",
                "default": "auto",
            })
        );
        assert!(properties.get("beta").is_none());
        assert!(request_schema(Method::Dpo)["properties"].get("beta").is_some());
    }

    #[test]
    fn an_adapter_is_described_with_the_fields_it_is_stored_with() {
        let schema = request_schema(Method::Supervised);
        let adapter = &schema["properties"][ADAPTER];
        let stored = json!(AdapterConfig::default());
        let names: Vec<&String> = stored.as_object().expect("object").keys().collect();
        let described = adapter["anyOf"][1]["properties"].as_object().expect("object");
        assert_eq!(described.keys().collect::<Vec<_>>(), names);
        assert_eq!(described["r"]["anyOf"][1]["maximum"], 1024);
        assert_eq!(described["r"]["default"], 16);
        assert_eq!(described["dropout"]["anyOf"][1]["maximum"], 0.9);
    }
}
