use crate::testing::{
    BASE, LORA_A, LORA_B, Reply, TestApi, adapter_weights, lora_name, peft_config, safetensors,
};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::json;
use tunesmith_store::objects::ObjectPrefix;

fn form(model: &str, config: String, weights: Vec<u8>) -> Form {
    // In an order in which nothing can be checked before the end.
    Form::new()
        .part("adapter_model", Part::bytes(weights).file_name("adapter_model.safetensors"))
        .part("adapter_config", Part::text(config).file_name("adapter_config.json"))
        .text("model", model.to_owned())
}

#[tokio::test]
async fn an_adapter_that_comes_again_with_its_key_is_imported_once_and_leaves_nothing() {
    let api = TestApi::start().await.with_base_model().await;
    let send = async |suffix: &'static str| {
        let form = form(BASE, peft_config(json!({})), adapter_weights()).text("suffix", suffix);
        let request = api.request(Method::POST, "/v1/models").header("Idempotency-Key", "mine");
        Reply::of(request.multipart(form)).await
    };
    let model = send("one").await.ok();
    let all = ObjectPrefix::ImportedAdapter("".into());
    let stored = api.store.objects().list(&all).await.expect("list");
    assert_eq!(send("one").await.ok(), model);
    assert_eq!(send("two").await.error(400)["code"], "idempotency_conflict");
    assert_eq!(api.store.objects().list(&all).await.expect("list").len(), stored.len());
    let path = format!("/v1/models/{}/weights", model["id"].as_str().expect("id"));
    assert_eq!(api.get(&path).await.status, 200);
}

async fn import(api: &TestApi, form: Form) -> Reply {
    api.post_form_to("/v1/models", form).await
}

/// Nothing of a refused adapter stays.
async fn assert_no_litter(api: &TestApi) {
    let all = ObjectPrefix::ImportedAdapter("".into());
    let left = api.store.objects().list(&all).await.expect("list");
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn an_imported_adapter_is_a_tuned_model() {
    let api = TestApi::start().await.with_base_model().await;
    let form = form(BASE, peft_config(json!({})), adapter_weights())
        .text("suffix", "mine")
        .text("colour", "red");
    let reply = import(&api, form).await;
    let warning = reply.header("x-tunesmith-warning").map(str::to_owned);
    assert!(warning.as_ref().is_some_and(|text| text.contains("colour")), "{warning:?}");
    let name = reply.ok()["id"].as_str().expect("id").to_owned();
    assert!(name.starts_with("ft:tiny:") && name.contains(":mine:"), "{name}");
    let model = api.get(&format!("/v1/models/{name}")).await.ok();
    assert_eq!((&model["object"], &model["id"]), (&json!("model"), &json!(name)));
    let listed = api.get("/v1/models").await.ok();
    assert_eq!(listed["data"][1], model);

    // It merges into what the same adapter of a job merges into.
    let lora = json!({"adapter": {"r": 1, "alpha": 2, "target_modules": ["q_proj"]}});
    let made = api.succeeded_job(lora).await;
    let made = made["fine_tuned_model"].as_str().expect("model");
    let mut merged = Vec::new();
    for name in [name.as_str(), made] {
        let reply = api.get(&format!("/v1/models/{name}/weights?format=merged")).await;
        assert_eq!(reply.status, 200);
        let mut archive = tar::Archive::new(reply.body.as_slice());
        let entries = archive.entries().expect("entries").map(|entry| entry.expect("entry"));
        let mut file = entries
            .filter(|entry| entry.path().expect("path").ends_with("model.safetensors"))
            .collect::<Vec<_>>();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut file[0], &mut content).expect("content");
        merged.push(content);
    }
    assert_eq!(merged[0], merged[1]);

    // It trains further, in its own shape.
    let file = api.upload(crate::testing::chat_rows(10)).await;
    let body = json!({"model": name, "training_file": file});
    let job = api.post("/v1/fine_tuning/jobs", &body).await.ok();
    assert_eq!(job["model"], name);
    let adapter = &job["method"]["supervised"]["hyperparameters"]["adapter"];
    assert_eq!((&adapter["r"], &adapter["target_modules"]), (&json!(1), &json!(["q_proj"])));
    let other = json!({"model": name, "training_file": file,
                       "hyperparameters": {"adapter": {"r": 8}}});
    let error = api.post("/v1/fine_tuning/jobs", &other).await.error(400);
    assert_eq!(error["param"], "hyperparameters.adapter.r");

    api.delete(&format!("/v1/models/{name}")).await.ok();
    assert_eq!(api.get(&format!("/v1/models/{name}")).await.status, 404);
    let error = api.post("/v1/fine_tuning/jobs", &body).await.error(400);
    assert_eq!(error["code"], "model_not_found");
}

#[tokio::test]
async fn an_adapter_that_cannot_be_computed_is_refused_and_leaves_nothing() {
    let api = TestApi::start().await.with_base_model().await;
    let wide = || {
        safetensors(&[(&lora_name("A"), &[1, 2], &[1.0; 2]), (&lora_name("B"), &[2, 1], &LORA_B)])
    };
    let elsewhere = || {
        let name = |matrix: &str| lora_name(matrix).replace("layers.0", "layers.9");
        safetensors(&[(&name("A"), &[1, 3], &LORA_A), (&name("B"), &[2, 1], &LORA_B)])
    };
    let cases = [
        (peft_config(json!({"peft_type": "LOHA"})), adapter_weights(), "adapter_config", "LOHA"),
        (
            peft_config(json!({"init_lora_weights": "pissa"})),
            adapter_weights(),
            "adapter_config",
            "pissa",
        ),
        ("{".to_owned(), adapter_weights(), "adapter_config", "PEFT's format"),
        (
            peft_config(json!({})),
            b"PK pickled".to_vec(),
            "adapter_model",
            "adapter_model.safetensors",
        ),
        (peft_config(json!({"r": 2})), adapter_weights(), "adapter_model", "[2, 3]"),
        (peft_config(json!({})), wide(), "adapter_model", "[1, 2]"),
        (peft_config(json!({})), elsewhere(), "adapter_model", "no weight of the base model"),
        (
            peft_config(json!({"use_dora": true})),
            adapter_weights(),
            "adapter_model",
            "lora_magnitude_vector",
        ),
        (
            peft_config(json!({"target_modules": ["v_proj"]})),
            adapter_weights(),
            "adapter_model",
            "not adapted",
        ),
        (
            peft_config(json!({"layers_to_transform": [3]})),
            adapter_weights(),
            "adapter_model",
            "last ones",
        ),
    ];
    for (config, weights, param, word) in cases {
        let error = import(&api, form(BASE, config, weights)).await.error(400);
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().expect("text").contains(word), "{error}");
        assert_no_litter(&api).await;
    }
    let error =
        import(&api, form("none", peft_config(json!({})), adapter_weights())).await.error(400);
    assert_eq!(error["code"], "model_not_found");
    let suffixed = form(BASE, peft_config(json!({})), adapter_weights()).text("suffix", "a:b");
    assert_eq!(import(&api, suffixed).await.error(400)["param"], "suffix");
    assert_no_litter(&api).await;
    assert_eq!(api.get("/v1/models").await.ok()["data"].as_array().expect("data").len(), 1);
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let api = TestApi::start().await.with_base_model().await;
    for field in ["model", "adapter_config", "adapter_model"] {
        let mut form = Form::new();
        for (name, content) in [
            ("model", BASE.as_bytes().to_vec()),
            ("adapter_config", peft_config(json!({})).into_bytes()),
            ("adapter_model", adapter_weights()),
        ] {
            if name != field {
                form = form.part(name, Part::bytes(content));
            }
        }
        let error = import(&api, form).await.error(400);
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("missing_required_parameter"), &json!(field))
        );
    }
    assert_no_litter(&api).await;
    let error = api.post("/v1/models", &json!({"model": BASE})).await.error(400);
    assert_eq!(error["code"], "invalid_body");
}

#[tokio::test]
async fn an_adapter_may_be_made_for_a_model_that_was_tuned_in_full() {
    let api = TestApi::start().await.with_base_model().await;
    let full = api.succeeded_job(json!({"adapter": {"type": "full"}})).await;
    let full = full["fine_tuned_model"].as_str().expect("model");
    let reply = import(&api, form(full, peft_config(json!({})), adapter_weights())).await;
    let name = reply.ok()["id"].as_str().expect("id").to_owned();
    assert!(name.starts_with("ft:tiny:"), "{name}");
    let own = api.store.model(&api.project, &name).await.expect("model");
    let base = api.store.base_model_by_id(&own.base_model_id).await.expect("base");
    assert_eq!(base.name, full);
    let config = api.store.objects().read(&own.weights().file("adapter_config.json")).await;
    let config: serde_json::Value = serde_json::from_slice(&config.expect("read")).expect("json");
    assert_eq!(config["base_model_name_or_path"], full);

    let error =
        import(&api, form(&name, peft_config(json!({})), adapter_weights())).await.error(400);
    assert_eq!(error["param"], "model");
    assert!(error["message"].as_str().expect("text").contains("no other adapter"), "{error}");
}

#[tokio::test]
async fn what_a_client_leaves_that_goes_away_in_the_middle_is_cleared_away() {
    let api = TestApi::start().await.with_base_model().await;
    // The weights are there whole; then nothing more comes.
    let (sender, rest) =
        futures::channel::mpsc::unbounded::<Result<bytes::Bytes, std::io::Error>>();
    let part = "--x\r\ncontent-disposition: form-data; name=\"adapter_model\"\r\n\r\n";
    let sent = [part.as_bytes(), &adapter_weights(), b"\r\n--x\r\n"].concat();
    sender.unbounded_send(Ok(sent.into())).expect("sent");
    let request = api
        .request(reqwest::Method::POST, "/v1/models")
        .header("content-type", "multipart/form-data; boundary=x")
        .body(reqwest::Body::wrap_stream(rest));
    let client = tokio::spawn(request.send());
    let all = ObjectPrefix::ImportedAdapter("".into());
    let left = async || api.store.objects().list(&all).await.expect("list").len();
    while left().await == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    client.abort();
    let _ = client.await;
    drop(sender);
    let hour = tunesmith_store::imports::IMPORT_SILENCE;
    assert_eq!(api.store.purge_imports(hour).await.expect("purged"), 0, "it may be alive");
    api.store.purge_imports(std::time::Duration::ZERO).await.expect("purged");
    assert_no_litter(&api).await;
}
