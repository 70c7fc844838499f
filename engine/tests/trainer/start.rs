//! A run that begins with the weights of a tuned model begins where these ended.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::{AdapterConfig, DataFacts, Hyperparameters, Method};
use tunesmith_core::protocol::TrainRequest;
use tunesmith_engine::EngineError;
use tunesmith_engine::train::{Outcome, TrainOptions};

use crate::preference;
use crate::resume::{check_equal, resumed, ten_steps};
use crate::support::{Bench, CONTEXT, Transcript, finish, run};

const PATH: &str = "hyperparameters";

fn weights(transcript: &Transcript, step: u64) -> PathBuf {
    transcript.checkpoint(step).join("weights")
}

/// `fields` as a request has them that names the model with this adapter to start from.
fn from(adapter: &AdapterConfig, fields: &Value, method: Method) -> Value {
    let mut fields = fields.as_object().expect("an object").clone();
    let (asked, _) = Hyperparameters::parse_for(method, &fields, PATH).expect("valid");
    asked.start_from(adapter, &mut fields, PATH).expect("it fits");
    fields.into()
}

/// The same run, from the weights in `dir`.
fn started(request: TrainRequest, dir: &Path) -> TrainRequest {
    let mut request = request;
    request.spec.start_from = Some("ft:tiny".to_owned());
    if dir.join("adapter_config.json").exists() {
        request.start_from = Some(dir.to_owned());
    } else {
        request.base_model_dir = dir.to_owned();
    }
    request
}

/// A tuned model, and the run that goes on with it.
fn two_runs(bench: &Bench, adapter: Value) -> (Transcript, Transcript) {
    let request = bench.request("first", &ten_steps(adapter));
    let first = finish(&request);
    let fields =
        from(&request.spec.hyperparameters.adapter, &ten_steps(json!({})), Method::Supervised);
    let second = started(bench.request("second", &fields), &weights(&first, 10));
    (first, finish(&second))
}

#[test]
fn a_run_from_a_tuned_model_begins_with_the_loss_that_it_had() {
    for adapter in [
        json!({"r": 3, "target_modules": ["q_proj", "down_proj"]}),
        json!({"r": 3, "alpha": 5, "use_dora": true}),
        json!({"r": 3, "trainable_layers": 1}),
        json!({"r": 3, "quantization": "nf4"}),
        json!({"type": "full"}),
        json!({"type": "full", "trainable_layers": 1}),
    ] {
        let bench = Bench::new(13);
        let (first, second) = two_runs(&bench, adapter.clone());
        let ended = first.steps.last().expect("steps").full_valid_loss.expect("validation rows");
        assert_eq!(second.started().initial_valid_loss, Some(ended), "{adapter}");
        assert_ne!(first.started().initial_valid_loss, Some(ended), "{adapter}");
        let last = second.steps.last().expect("steps");
        assert!(last.train_loss < first.steps[0].train_loss, "{adapter}");
        let readme = std::fs::read_to_string(weights(&second, 10).join("README.md"));
        assert!(readme.expect("README").contains("| started from | ft:tiny |"));
    }
}

#[test]
fn an_adapter_on_a_model_that_was_tuned_in_full_begins_with_the_loss_that_it_had() {
    let bench = Bench::new(13);
    let full = AdapterConfig::full();
    let tuned = finish(&bench.request("tuned", &ten_steps(json!({"type": "full"}))));
    let ended = tuned.steps.last().expect("steps").full_valid_loss.expect("validation rows");
    for (name, adapter) in [
        ("plain", json!({"type": "lora", "r": 3})),
        ("dora", json!({"type": "lora", "r": 3, "use_dora": true, "trainable_layers": 1})),
    ] {
        let fields = from(&full, &ten_steps(adapter.clone()), Method::Supervised);
        let mut request = bench.request(name, &fields);
        request.base_model_dir = weights(&tuned, 10);
        request.spec.model = "ft:tiny:acme::8chars".to_owned();
        request.spec.base_is_tuned = true;
        let run = finish(&request);
        let begun = run.started().initial_valid_loss.expect("validation rows");
        assert!((begun - ended).abs() < 1e-5, "{adapter}: {begun} {ended}");
        let last = run.steps.last().expect("steps").full_valid_loss.expect("validation rows");
        assert!(last < ended, "{last} {ended}");
        let read = |name: &str| std::fs::read_to_string(weights(&run, 10).join(name)).expect(name);
        let config: Value = serde_json::from_str(&read("adapter_config.json")).expect("json");
        assert_eq!(config["base_model_name_or_path"], "ft:tiny:acme::8chars");
        let readme = read("README.md");
        assert!(
            readme.contains("`tunesmith models weights ft:tiny:acme::8chars --format merged`"),
            "{readme}"
        );
    }
    let fields = json!({"batch_size": 5, "n_epochs": 1, "adapter": {"type": "lora", "r": 3}});
    let fields = from(&full, &fields, Method::Dpo);
    let mut request = preference::request(&bench, "dpo", 10, &fields);
    request.base_model_dir = weights(&tuned, 10);
    // It is compared with the tuned model, which it is before its first step.
    let first = finish(&request).steps[0].train_loss;
    assert!((first - std::f64::consts::LN_2).abs() < 1e-5, "{first}");
}

#[test]
fn an_adapter_that_began_with_pissa_goes_on_on_the_original_weights() {
    let bench = Bench::new(13);
    let (first, second) = two_runs(&bench, json!({"r": 3, "init_lora_weights": "pissa"}));
    let ended = first.steps.last().expect("steps").full_valid_loss.expect("validation rows");
    let begun = second.started().initial_valid_loss.expect("validation rows");
    // The weights were parted in two, and are added in another order.
    assert!((begun - ended).abs() < 1e-5, "{begun} {ended}");
}

#[test]
fn every_weight_trains_from_where_an_adapter_ended_and_goes_on_bit_equal() {
    for (adapter, full) in [
        (json!({"r": 3}), json!({"type": "full"})),
        (json!({"r": 3, "use_dora": true}), json!({"type": "full", "trainable_layers": 1})),
    ] {
        let bench = Bench::new(13);
        let request = bench.request("tuned", &ten_steps(adapter));
        let tuned = finish(&request);
        let dir = weights(&tuned, 10);
        let fields =
            from(&request.spec.hyperparameters.adapter, &ten_steps(full), Method::Supervised);
        let straight = finish(&started(bench.request("straight", &fields), &dir));
        let ended = tuned.steps.last().expect("steps").full_valid_loss.expect("validation rows");
        let begun = straight.started().initial_valid_loss.expect("validation rows");
        // W·x + B·(A·x) and (W + B·A)·x add in another order.
        assert!((begun - ended).abs() < 1e-5, "{begun} {ended}");
        assert_ne!(tuned.started().initial_valid_loss, Some(ended));
        let last = straight.steps.last().expect("steps").full_valid_loss.expect("validation rows");
        assert!(last < ended, "{last} {ended}");
        // A model of its own comes out, and nothing stays of what it was made from.
        assert!(weights(&straight, 10).join("model.safetensors").exists());
        let output = straight.checkpoint(10).parent().expect("the output directory");
        assert!(!output.join("merged").exists());

        let request = started(bench.request("first", &fields), &dir);
        let (first, outcome) = run(&request, &TrainOptions::default(), Some(5));
        assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
        let request = started(resumed(&bench, "second", &fields, first.checkpoint(4)), &dir);
        check_equal(&straight, &first, &finish(&request), 4);
    }
}

#[test]
fn a_run_from_a_tuned_model_goes_on_bit_equal() {
    let bench = Bench::new(13);
    let request = bench.request("tuned", &ten_steps(json!({"r": 3})));
    let tuned = weights(&finish(&request), 10);
    let fields =
        from(&request.spec.hyperparameters.adapter, &ten_steps(json!({})), Method::Supervised);
    let straight = finish(&started(bench.request("straight", &fields), &tuned));
    let request = started(bench.request("first", &fields), &tuned);
    let (first, outcome) = run(&request, &TrainOptions::default(), Some(5));
    assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
    let mut request = started(resumed(&bench, "second", &fields, first.checkpoint(4)), &tuned);
    // Its checkpoint has the adapter.
    request.start_from = None;
    check_equal(&straight, &first, &finish(&request), 4);
    request.spec.start_from = None;
    let (_, outcome) = run(&request, &TrainOptions::default(), None);
    let error = outcome.expect_err("a checkpoint of a run that began elsewhere");
    assert!(matches!(error, EngineError::Checkpoint(_)), "{error}");
}

#[test]
fn preference_pairs_are_compared_with_the_tuned_model_that_the_run_begins_with() {
    let bench = Bench::new(10);
    let request = bench.request("tuned", &ten_steps(json!({"r": 3})));
    let tuned = weights(&finish(&request), 10);
    let fields = json!({"batch_size": 5, "n_epochs": 4, "learning_rate": 5e-3});
    let fields = from(&request.spec.hyperparameters.adapter, &fields, Method::Dpo);
    let first = finish(&started(preference::request(&bench, "dpo", 10, &fields), &tuned));
    // Before its first step the model is its own reference.
    assert!(
        (first.steps[0].train_loss - std::f64::consts::LN_2).abs() < 1e-5,
        "{:?}",
        first.steps[0]
    );
}

#[test]
fn an_adapter_of_another_shape_is_refused_by_the_tensor_that_does_not_fit() {
    let bench = Bench::new(10);
    let fields = json!({"n_epochs": 1, "adapter": {"r": 3}});
    let tuned = finish(&bench.request("tuned", &fields));
    let last = tuned.checkpoints.last().expect("a checkpoint").step;
    let facts = DataFacts { examples: 10, context_length: CONTEXT };
    for adapter in [json!({"r": 2}), json!({"r": 3, "target_modules": ["v_proj"]})] {
        let asked = json!({"n_epochs": 1, "adapter": adapter});
        let (asked, _) =
            Hyperparameters::parse(asked.as_object().expect("object"), PATH).expect("valid");
        let mut request = started(bench.request("other", &fields), &weights(&tuned, last));
        request.spec.hyperparameters = asked.resolve(&facts);
        let (_, outcome) = run(&request, &TrainOptions::default(), None);
        let error = outcome.expect_err("another shape").to_string();
        assert!(error.contains("lora_"), "{error}");
    }
}
