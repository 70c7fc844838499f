//! Answers that are held to a JSON schema are JSON that it allows, whatever the model would say.

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::sampling::{EndReason, FromSampler, SampleRequest, Sampling};
use tunesmith_engine::serve::{Batcher, ServedModel};

use crate::device::test_device;
use crate::support::write_model;

/// The id of `<|im_end|>`.
const END: u32 = 2;
/// The ids of the bytes begin here.
const BYTES: u32 = 3;
/// The id of `ha`, behind them.
const MERGED: u32 = BYTES + 256;

/// How each answer to `requests` ended, and its text, in their order; or what was wrong.
fn answers(requests: Vec<SampleRequest>) -> Vec<Result<(String, EndReason), String>> {
    let dir = tempfile::tempdir().expect("temp dir");
    write_model(dir.path());
    let model = ServedModel::load(dir.path(), &test_device(), Precision::Auto).expect("a model");
    let mut batcher = Batcher::new(model, 8, 64 << 20);
    let count = requests.len();
    let mut texts = vec![Vec::new(); count];
    let mut ends: Vec<Option<Result<EndReason, String>>> = vec![None; count];
    let mut hear = |message| match message {
        FromSampler::Token { id, token, .. } => match token.id {
            MERGED => texts[id as usize].extend(b"ha"),
            token if token >= BYTES => texts[id as usize].push((token - BYTES) as u8),
            _ => {}
        },
        FromSampler::End { id, reason, .. } => ends[id as usize] = Some(Ok(reason)),
        FromSampler::Failed { id, message, .. } => ends[id as usize] = Some(Err(message)),
        other => panic!("{other:?}"),
    };
    for request in requests {
        batcher.submit(request, &mut hear);
    }
    while !batcher.is_idle() {
        batcher.step(&mut hear).expect("a step");
    }
    let texts = texts.iter().map(|text| String::from_utf8_lossy(text).into_owned());
    texts.zip(ends).map(|(text, end)| Ok((text, end.expect("an end")?))).collect()
}

fn request(id: u64, schema: &Value, sampling: Sampling) -> SampleRequest {
    let sampling = Sampling { stop_ids: vec![END], json_schema: Some(schema.clone()), ..sampling };
    SampleRequest { id, adapter: None, prompt: vec![5, 6], n: 1, sampling, low_priority: false }
}

#[test]
fn every_answer_is_json_of_its_own_schema() {
    let person = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "tags"],
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 4},
            "age": {"type": "integer", "minimum": 3, "maximum": 120},
            "tags": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"enum": ["ha", "ho"]}},
        },
    });
    let yes_or_no = json!({"anyOf": [{"$ref": "#/$defs/word"}, {"type": "boolean"}],
                           "$defs": {"word": {"const": "yes"}}});
    let mut requests = Vec::new();
    for id in 0..24 {
        let temperature = if id < 2 { 0.0 } else { 1.5 };
        let sampling = Sampling { temperature, seed: id, ..Sampling::greedy(250) };
        requests.push(request(id, if id % 2 == 0 { &person } else { &yes_or_no }, sampling));
    }
    for (id, answer) in answers(requests).into_iter().enumerate() {
        let (text, reason) = answer.expect("an answer");
        assert_eq!(reason, EndReason::Stop, "{text}");
        assert!(!text.contains(char::REPLACEMENT_CHARACTER), "{text}");
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        if id % 2 == 1 {
            assert!(value == "yes" || value.is_boolean(), "{text}");
            continue;
        }
        let names: Vec<&str> =
            value.as_object().expect("object").keys().map(String::as_str).collect();
        assert_eq!(names, ["name", "age", "tags"], "{text}");
        let letters = value["name"].as_str().expect("a string").chars().count();
        assert!((1..=4).contains(&letters), "{text}");
        assert!(value["age"].as_u64().is_some_and(|age| (3..=120).contains(&age)), "{text}");
        let tags = value["tags"].as_array().expect("a list");
        assert!((1..=2).contains(&tags.len()), "{text}");
        assert!(tags.iter().all(|tag| tag == "ha" || tag == "ho"), "{text}");
    }
}

#[test]
fn an_answer_beside_it_is_free_and_one_that_is_cut_says_so() {
    let long = json!({"type": "string", "minLength": 40});
    let free = SampleRequest {
        sampling: Sampling { temperature: 1.5, seed: 3, ..Sampling::greedy(12) },
        ..request(1, &long, Sampling::greedy(12))
    };
    let alone = answers(vec![SampleRequest { id: 0, ..free.clone() }]).remove(0).expect("free");
    let held = request(0, &long, Sampling { temperature: 1.5, ..Sampling::greedy(12) });
    let mut both = answers(vec![held, free]).into_iter();
    let (text, reason) = both.next().expect("two").expect("held");
    assert!(text.starts_with('"') && reason == EndReason::Length, "{text}");
    assert_eq!(both.next().expect("two").expect("free"), alone);
}

#[test]
fn a_schema_that_cannot_be_computed_is_refused_with_the_reason() {
    for (schema, word) in [
        (json!({"type": "colour"}), "colour"),
        (json!({"$ref": "https://example.com/other"}), "example.com"),
        (json!({"allOf": [{"type": "string"}, {"type": "number"}]}), "nsatisfiable"),
    ] {
        let error = answers(vec![request(0, &schema, Sampling::greedy(5))]).remove(0);
        let error = error.expect_err("refused");
        assert!(error.contains("JSON schema") && error.contains(word), "{error}");
    }
    let endless = SampleRequest {
        sampling: Sampling { json_schema: Some(json!({})), ..Sampling::greedy(5) },
        ..request(0, &json!({}), Sampling::greedy(5))
    };
    let error = answers(vec![endless]).remove(0).expect_err("no token ends an answer");
    assert!(error.contains("ends an answer"), "{error}");
}
