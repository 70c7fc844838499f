use super::*;
use serde_json::json;

const PATH: &str = "method.supervised.hyperparameters";

fn parse(value: &Value) -> Result<Hyperparameters, ApiError> {
    Hyperparameters::parse(value.as_object().expect("object"), PATH).map(|(parsed, _)| parsed)
}

fn resolve(value: &Value, examples: usize) -> ResolvedHyperparameters {
    parse(value).expect("valid").resolve(&DataFacts { examples, context_length: 8192 })
}

#[test]
fn a_value_out_of_range_is_refused_naming_parameter_value_and_range() {
    let error = parse(&json!({"n_epochs": 51})).expect_err("over the range");
    assert_eq!(error.code, ErrorCode::InvalidValue);
    assert_eq!(error.param.as_deref(), Some("method.supervised.hyperparameters.n_epochs"));
    assert_eq!(
        error.message,
        "Invalid value for 'n_epochs': 51. It must be \"auto\" or a whole number between 1 and 50."
    );
    for bad in [
        json!({"batch_size": 0}),
        json!({"batch_size": 1.5}),
        json!({"batch_size": "4"}),
        json!({"learning_rate": 0}),
        json!({"learning_rate": -1e-4}),
        json!({"lr_scheduler": "sawtooth"}),
        json!({"warmup_ratio": 1.1}),
        json!({"packing": 1}),
        json!({"min_lr_ratio": -0.1}),
        json!({"decay_ratio": 1.1}),
        json!({"optimizer": "sgd"}),
        json!({"neftune_noise_alpha": -1}),
        json!({"early_stopping_patience": 1.5}),
        json!({"early_stopping_threshold": -0.1}),
        json!({"load_best_model_at_end": "yes"}),
        json!({"on_divergence": "ignore"}),
        json!({"spike_factor": 0.9}),
        json!({"spike_factor": 1}),
        json!({"adam_beta1": 1}),
        json!({"adam_beta2": 1}),
        json!({"adam_epsilon": 0}),
        json!({"optimizer": "muon", "muon_adjust_lr_fn": "none", "adapter": {"type": "full"}}),
        json!({"precision": "fp16"}),
        json!({"precision": 16}),
        json!({"prompt_loss_weight": 2}),
        json!({"validation_split": 0.9}),
        json!({"adapter": "lora"}),
        json!({"adapter": {"r": 0}}),
        json!({"adapter": {"type": "prefix"}}),
        json!({"adapter": {"target_modules": []}}),
        json!({"adapter": {"target_modules": ["q_proj", "w_pack"]}}),
        json!({"adapter": {"target_modules": "some-linear"}}),
        json!({"adapter": {"rank": 8}}),
        json!({"adapter": {"loraplus_lr_ratio": 0.5}}),
        json!({"adapter": {"type": "full", "loraplus_lr_ratio": 16}}),
        json!({"adapter": {"use_dora": "yes"}}),
        json!({"adapter": {"type": "full", "use_dora": true}}),
        json!({"adapter": {"init_lora_weights": "olora"}}),
        json!({"adapter": {"init_lora_weights": "pissa", "use_dora": true}}),
        json!({"adapter": {"type": "full", "init_lora_weights": "pissa"}}),
        json!({"adapter": {"trainable_layers": -1}}),
        json!({"adapter": {"trainable_layers": 1.5}}),
        json!({"adapter": {"quantization": "int4"}}),
        json!({"adapter": {"quantization": true}}),
        json!({"adapter": {"type": "full", "quantization": "nf4"}}),
        json!({"adapter": {"init_lora_weights": "pissa", "quantization": "int8"}}),
        json!({"learning_rate": 1e-4, "learning_rate_multiplier": 2}),
    ] {
        let error = parse(&bad).expect_err(&bad.to_string());
        assert!(error.param.expect("param").starts_with(PATH), "{bad}");
    }
}

#[test]
fn a_word_that_is_none_is_refused_naming_the_words_there_are() {
    let error = parse(&json!({"lr_scheduler": "sawtooth"})).expect_err("no such word");
    assert_eq!(
        error.message,
        "Invalid value for 'lr_scheduler': \"sawtooth\". It must be \"auto\", \"constant\", \
         \"linear\", \"cosine\" or \"wsd\"."
    );
}

#[test]
fn muon_is_refused_beside_an_adapter_and_says_the_way_out() {
    let error = parse(&json!({"optimizer": "muon"})).expect_err("LoRA");
    assert_eq!(error.param.as_deref(), Some("method.supervised.hyperparameters.optimizer"));
    assert!(error.message.contains("adapter {\"type\": \"full\"}"), "{}", error.message);
    let full = resolve(&json!({"optimizer": "muon", "adapter": {"type": "full"}}), 100);
    assert_eq!(full.optimizer, Optimizer::Muon);
    assert_eq!(full.muon_adjust_lr_fn, MuonLearningRate::MatchRmsAdamw);
}

#[test]
fn what_looks_at_the_validation_loss_is_refused_without_validation_rows() {
    for name in ["early_stopping_patience", "load_best_model_at_end"] {
        let value = if name == "early_stopping_patience" { json!(2) } else { json!(true) };
        let asked = parse(&json!({ name: value })).expect("valid");
        let error = asked.check_validation_rows(false, PATH).expect_err(name);
        assert_eq!(error.param, Some(format!("{PATH}.{name}")));
        assert!(error.message.contains("validation_split"), "{}", error.message);
        asked.check_validation_rows(true, PATH).expect("a validation file");
        let split = parse(&json!({ name: value, "validation_split": 0.1 })).expect("valid");
        split.check_validation_rows(false, PATH).expect("held-out rows");
    }
    let off = parse(&json!({"early_stopping_patience": 0, "load_best_model_at_end": false}));
    off.expect("valid").check_validation_rows(false, PATH).expect("nothing is asked for");
}

#[test]
fn early_stopping_keeps_the_best_checkpoint_unless_told_otherwise() {
    assert!(!resolve(&json!({}), 100).load_best_model_at_end);
    assert!(resolve(&json!({"early_stopping_patience": 3}), 100).load_best_model_at_end);
    let last = json!({"early_stopping_patience": 3, "load_best_model_at_end": false});
    assert!(!resolve(&last, 100).load_best_model_at_end);
}

#[test]
fn an_adapters_error_names_its_whole_path() {
    let error = parse(&json!({"adapter": {"dropout": 2}})).expect_err("over the range");
    assert_eq!(error.param.as_deref(), Some("method.supervised.hyperparameters.adapter.dropout"));
}

#[test]
fn auto_precision_stays_auto_for_the_workers_device_to_decide() {
    assert_eq!(resolve(&json!({}), 100).precision, Precision::Auto);
    assert_eq!(resolve(&json!({"precision": "auto"}), 100).precision, Precision::Auto);
    assert_eq!(resolve(&json!({"precision": "bf16"}), 100).precision, Precision::Bf16);
    assert_eq!(resolve(&json!({"precision": "fp32"}), 100).precision, Precision::Fp32);
    let wire = serde_json::to_value(resolve(&json!({"precision": "bf16"}), 100)).expect("json");
    assert_eq!(wire["precision"], "bf16");
    let asked = parse(&json!({"precision": "fp32"})).expect("valid").to_wire();
    assert_eq!(asked["precision"], "fp32");
}

#[test]
fn unknown_names_are_handed_back() {
    let fields = json!({"n_epochs": 2, "n_epoch": 3});
    let (parsed, unknown) =
        Hyperparameters::parse(fields.as_object().expect("object"), PATH).expect("valid");
    assert_eq!(parsed.n_epochs, Auto::Value(2));
    assert_eq!(unknown, ["n_epoch"]);
}

#[test]
fn auto_follows_the_published_rules() {
    for (examples, epochs, batch) in
        [(10, 10, 1), (3, 25, 1), (33, 3, 1), (1000, 3, 2), (10_000, 2, 20), (200_000, 1, 256)]
    {
        let resolved = resolve(&json!({"n_epochs": "auto"}), examples);
        assert_eq!((resolved.n_epochs, resolved.batch_size), (epochs, batch), "{examples}");
    }
}

#[test]
fn the_learning_rate_follows_method_and_multiplier() {
    assert_eq!(resolve(&json!({}), 100).learning_rate, LORA_LEARNING_RATE);
    let full = resolve(&json!({"adapter": {"type": "full"}}), 100);
    assert_eq!(full.learning_rate, FULL_LEARNING_RATE);
    let doubled = resolve(&json!({"learning_rate_multiplier": 2}), 100);
    assert_eq!(doubled.learning_rate, 2.0 * LORA_LEARNING_RATE);
    let absolute = resolve(&json!({"learning_rate": 1e-4}), 100);
    assert_eq!(absolute.learning_rate_multiplier, 0.5);
}

#[test]
fn a_learning_rate_outside_the_sensible_range_warns() {
    assert!(parse(&json!({"learning_rate": 1e-3})).expect("valid").warnings().is_empty());
    assert_eq!(parse(&json!({"learning_rate": 2e-3})).expect("valid").warnings().len(), 1);
    assert_eq!(parse(&json!({"learning_rate": 1e-8})).expect("valid").warnings().len(), 1);
}

#[test]
fn a_last_shorter_step_counts_in_full() {
    let resolved = resolve(&json!({"batch_size": 4, "n_epochs": 3}), 5);
    assert_eq!(resolved.steps_per_epoch(5), 2);
    assert_eq!(resolved.total_steps(5), 6);
    let capped = resolve(&json!({"batch_size": 4, "n_epochs": 3, "max_steps": 5}), 5);
    assert_eq!(capped.total_steps(5), 5);
}

#[test]
fn a_split_leaves_a_row_on_each_side() {
    let resolved = resolve(&json!({"validation_split": 0.01}), 20);
    assert_eq!((resolved.held_out_rows(20), resolved.train_rows(20)), (1, 19));
    assert_eq!(resolve(&json!({}), 20).held_out_rows(20), 0);
}

#[test]
fn auto_checkpoints_lie_evenly_and_at_most_200_steps_apart() {
    assert_eq!(resolve(&json!({"batch_size": 4}), 48).checkpoint_steps, 12);
    assert_eq!(resolve(&json!({"batch_size": 1}), 1000).checkpoint_steps, 200);
    assert_eq!(resolve(&json!({"batch_size": 1}), 201).checkpoint_steps, 101);
}

#[test]
fn resolved_values_survive_json() {
    let resolved = resolve(&json!({"learning_rate": 0.000_123_456_789}), 77);
    let text = serde_json::to_string(&resolved).expect("json");
    assert_eq!(serde_json::from_str::<ResolvedHyperparameters>(&text).expect("back"), resolved);
}

#[test]
fn the_wire_shows_auto_until_it_is_resolved() {
    let wire = parse(&json!({"n_epochs": 2})).expect("valid").to_wire();
    assert_eq!(wire["n_epochs"], 2);
    assert_eq!(wire["batch_size"], "auto");
}

#[test]
fn a_rank_alone_brings_twice_itself_as_alpha() {
    let adapter = resolve(&json!({"adapter": {"r": 4}}), 20).adapter;
    assert_eq!((adapter.r, adapter.alpha, adapter.scale()), (4, 8.0, 2.0));
    let stabilised = resolve(&json!({"adapter": {"r": 4, "use_rslora": true}}), 20).adapter;
    assert_eq!(stabilised.scale(), 4.0);
}

#[test]
fn a_stored_job_that_is_older_than_a_field_is_read_with_its_default() {
    let resolved = resolve(&json!({"n_epochs": 7}), 100);
    let mut stored = serde_json::to_value(&resolved).expect("plain data");
    let fields = stored.as_object_mut().expect("object");
    fields.remove("packing");
    fields["adapter"].as_object_mut().expect("object").remove("use_rslora");
    let read: ResolvedHyperparameters = serde_json::from_value(stored).expect("readable");
    assert_eq!(read, resolved);
}

#[test]
fn target_modules_are_names_or_all_linear_in_one_order() {
    let modules = |value: Value| {
        resolve(&json!({"adapter": {"target_modules": value}}), 20).adapter.target_modules
    };
    assert_eq!(modules(json!("all-linear")), TARGET_MODULES);
    assert_eq!(modules(json!(["v_proj", "q_proj", "v_proj"])), ["q_proj", "v_proj"]);
}

#[test]
fn a_faster_b_is_refused_where_there_is_no_b() {
    let plus = resolve(&json!({"adapter": {"loraplus_lr_ratio": 16}}), 20).adapter;
    assert_eq!(plus.loraplus_lr_ratio, 16.0);
    let fields = json!({"adapter": {"type": "full", "loraplus_lr_ratio": 16}});
    let error = parse(&fields).expect_err("no B");
    assert_eq!(error.param, Some(format!("{PATH}.adapter.loraplus_lr_ratio")));
    assert!(error.message.contains("left out beside \"type\": \"full\""), "{}", error.message);
}

#[test]
fn a_value_that_changes_nothing_beside_the_others_is_named_in_a_warning() {
    let named = |fields: Value| -> Vec<String> {
        let warnings = parse(&fields).expect("valid").warnings();
        let name = |warning: &String| warning.split('\'').nth(1).map(str::to_owned);
        warnings.iter().filter(|warning| warning.contains("no effect")).filter_map(name).collect()
    };
    let adam = json!({"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6});
    let with = |mut fields: Value, name: &str, value: Value| {
        fields[name] = value;
        fields
    };
    let cases: [(Value, &[&str]); 7] = [
        (json!({"decay_ratio": 0.1}), &["decay_ratio"]),
        (json!({"min_lr_ratio": 0.1, "lr_scheduler": "constant"}), &["min_lr_ratio"]),
        (json!({"muon_adjust_lr_fn": "original"}), &["muon_adjust_lr_fn"]),
        (
            with(adam.clone(), "optimizer", json!("adafactor")),
            &["adam_beta1", "adam_beta2", "adam_epsilon"],
        ),
        (json!({"early_stopping_threshold": 0.1}), &["early_stopping_threshold"]),
        (
            json!({"adapter": {
                "type": "full", "r": 8, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"],
                "use_rslora": true,
            }}),
            &[
                "adapter.r",
                "adapter.alpha",
                "adapter.dropout",
                "adapter.target_modules",
                "adapter.use_rslora",
            ],
        ),
        (
            json!({"adapter": {"type": "full"}, "decay_ratio": 0.1, "optimizer": "muon"}),
            &["decay_ratio"],
        ),
    ];
    for (fields, names) in cases {
        assert_eq!(named(fields.clone()), names, "{fields}");
    }
    for fields in [
        json!({}),
        json!({"decay_ratio": 0.1, "min_lr_ratio": 0.1, "lr_scheduler": "wsd"}),
        json!({"decay_ratio": "auto", "min_lr_ratio": 0, "lr_scheduler": "constant"}),
        adam,
        json!({"early_stopping_threshold": 0.1, "early_stopping_patience": 2}),
        json!({"adapter": {"type": "full"}, "optimizer": "muon", "muon_adjust_lr_fn": "original"}),
        json!({"adapter": {"r": 8, "alpha": 8, "dropout": 0.1, "use_rslora": true}}),
    ] {
        assert_eq!(named(fields.clone()), Vec::<String>::new(), "{fields}");
    }
}

#[test]
fn only_the_layers_there_are_can_train() {
    for kind in ["lora", "full"] {
        let asked = parse(&json!({"adapter": {"type": kind, "trainable_layers": 3}}));
        let asked = asked.expect("valid");
        asked.check_layers(3, PATH).expect("all of them");
        assert_eq!(asked.adapter.first_trained_layer(12), 9);
        let error = asked.check_layers(2, PATH).expect_err("two layers");
        assert_eq!(error.param, Some(format!("{PATH}.adapter.trainable_layers")));
        assert!(error.message.contains("3. It must be 2 or less"), "{}", error.message);
    }
    let all = resolve(&json!({}), 20).adapter;
    assert_eq!((all.first_trained_layer(12), all.too_many_layers(12)), (0, None));
}

#[test]
fn a_pissa_adapter_is_exported_with_twice_the_rank_and_the_same_scale() {
    for use_rslora in [false, true] {
        let fields = json!({"r": 4, "init_lora_weights": "pissa", "use_rslora": use_rslora});
        let adapter = resolve(&json!({"adapter": fields}), 20).adapter;
        assert_eq!(adapter.init_lora_weights, InitLoraWeights::Pissa);
        let exported = adapter.exported();
        assert_eq!((exported.r, exported.init_lora_weights), (8, InitLoraWeights::Default));
        assert!((exported.scale() / adapter.scale() - 1.0).abs() < 1e-12);
    }
    let plain = AdapterConfig::default();
    assert_eq!(plain.exported(), plain);
}

#[test]
fn an_adapter_of_an_older_job_is_read_with_the_defaults_of_newer_fields() {
    let stored = json!({"type": "lora", "r": 4, "alpha": 8.0, "dropout": 0.0,
        "target_modules": ["q_proj"], "use_rslora": false});
    let read: AdapterConfig = serde_json::from_value(stored).expect("readable");
    let expected = AdapterConfig {
        r: 4,
        alpha: 8.0,
        target_modules: vec!["q_proj".to_owned()],
        ..AdapterConfig::default()
    };
    assert_eq!(read, expected);
}

fn parse_pairs(value: &Value) -> Result<Hyperparameters, ApiError> {
    let fields = value.as_object().expect("object");
    let path = "method.dpo.hyperparameters";
    Hyperparameters::parse_for(Method::Dpo, fields, path).map(|(parsed, unknown)| {
        assert!(unknown.is_empty(), "{unknown:?}");
        parsed
    })
}

fn resolve_pairs(value: &Value) -> ResolvedHyperparameters {
    let facts = DataFacts { examples: 100, context_length: 8192 };
    parse_pairs(value).expect("valid").resolve(&facts)
}

#[test]
fn preference_pairs_have_a_beta_and_a_small_learning_rate_of_their_own() {
    let dpo = resolve_pairs(&json!({"beta": "auto"}));
    assert_eq!(
        (dpo.method, dpo.preference_loss, dpo.beta),
        (Method::Dpo, PreferenceLoss::Dpo, 0.1)
    );
    assert_eq!((dpo.learning_rate, dpo.prompt_loss_weight), (LORA_PREFERENCE_LEARNING_RATE, 0.0));
    let full = resolve_pairs(&json!({"adapter": {"type": "full"}, "beta": 2}));
    assert_eq!((full.learning_rate, full.beta), (FULL_PREFERENCE_LEARNING_RATE, 2.0));
    let simpo = resolve_pairs(&json!({"preference_loss": "simpo"}));
    assert_eq!((simpo.beta, simpo.simpo_gamma), (2.0, 0.5));
    let orpo = resolve_pairs(&json!({"preference_loss": "orpo", "prompt_loss_weight": 1}));
    assert_eq!((orpo.beta, orpo.prompt_loss_weight), (0.1, 1.0));
}

#[test]
fn a_preference_hyperparameter_that_does_not_fit_is_refused_by_name() {
    for (fields, name) in [
        (json!({"beta": 0}), "beta"),
        (json!({"beta": 2.5}), "beta"),
        (json!({"beta": "strong"}), "beta"),
        (json!({"preference_loss": "ppo"}), "preference_loss"),
        (json!({"simpo_gamma": 0.3}), "simpo_gamma"),
        (json!({"preference_loss": "simpo", "simpo_gamma": -1}), "simpo_gamma"),
        (json!({"prompt_loss_weight": 0.1}), "prompt_loss_weight"),
        (json!({"preference_loss": "simpo", "prompt_loss_weight": 1}), "prompt_loss_weight"),
    ] {
        let error = parse_pairs(&fields).expect_err(name);
        assert_eq!(error.param, Some(format!("method.dpo.hyperparameters.{name}")), "{fields}");
    }
    let error = parse_pairs(&json!({"preference_loss": "ppo"})).expect_err("no such loss");
    assert!(error.message.contains("\"orpo\""), "{}", error.message);
}

#[test]
fn a_supervised_job_has_no_preference_hyperparameters() {
    let fields = json!({"beta": 7});
    let (parsed, unknown) =
        Hyperparameters::parse(fields.as_object().expect("object"), PATH).expect("ignored");
    assert_eq!(unknown, ["beta"]);
    let resolved = resolve(&json!({}), 20);
    for wire in [parsed.to_wire(), resolved.to_wire()] {
        assert!(wire.get("beta").is_none() && wire.get("preference_loss").is_none(), "{wire}");
        assert!(wire.get("method").is_none() && wire.get("n_epochs").is_some(), "{wire}");
    }
    let pairs = resolve_pairs(&json!({"preference_loss": "orpo"})).to_wire();
    assert_eq!((&pairs["beta"], &pairs["preference_loss"]), (&json!(0.1), &json!("orpo")));
    assert_eq!(parse_pairs(&json!({})).expect("valid").to_wire()["beta"], "auto");
}

#[test]
fn weights_are_quantised_when_asked_for_and_an_older_jobs_are_not() {
    for (word, quantization) in
        [("none", Quantization::None), ("int8", Quantization::Int8), ("nf4", Quantization::Nf4)]
    {
        let adapter =
            resolve(&json!({"adapter": {"quantization": word, "use_dora": true}}), 20).adapter;
        assert_eq!(adapter.quantization, quantization);
        assert_eq!(serde_json::to_value(&adapter).expect("json")["quantization"], word);
    }
    let stored = json!({"type": "lora", "r": 4, "alpha": 8.0, "dropout": 0.0,
        "target_modules": ["q_proj"], "use_rslora": false});
    let read: AdapterConfig = serde_json::from_value(stored).expect("readable");
    assert_eq!((read.r, read.quantization), (4, Quantization::None));
}
