use crate::testing::{FakeSampler, Reply, TestApi};
use bytes::Bytes;
use reqwest::Method;
use serde_json::{Value, json};
use std::io::Read as _;
use tunesmith_core::export_check::{CheckReply, Comparison, ExportForm, MergedForm};
use tunesmith_core::weights::FloatType;
use tunesmith_store::objects::ObjectPrefix;

/// The path of a tuned model's weights.
async fn weights_of(api: &TestApi) -> (String, String) {
    let adapter = json!({"adapter": {"r": 1, "target_modules": ["q_proj"]}});
    let job = api.succeeded_job(adapter).await;
    let name = job["fine_tuned_model"].as_str().expect("model").to_owned();
    (format!("/v1/models/{name}/weights"), name)
}

fn manifest(reply: &Reply) -> Value {
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    for entry in tar::Archive::new(reply.body.as_slice()).entries().expect("entries") {
        let mut entry = entry.expect("entry");
        if entry.path().expect("path").ends_with("manifest.json") {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).expect("content");
            return serde_json::from_slice(&content).expect("json");
        }
    }
    panic!("no manifest");
}

/// One position at which the greatest logit is off by this.
fn off_by(max_abs_error: f64) -> CheckReply {
    CheckReply::Compared(Comparison {
        texts: 1,
        positions: 1,
        max_abs_error,
        relative_error: max_abs_error / 2f64.sqrt(),
        argmax_agreement: 1.0,
        mean_kl: 0.0,
        numbers: Some(FloatType::F32),
    })
}

#[tokio::test]
async fn an_export_without_a_sampler_says_that_it_is_unchecked_and_is_refused_where_that_is_wanted()
{
    let api = TestApi::start().await.with_base_model().await;
    let (path, _) = weights_of(&api).await;
    for format in ["adapter", "merged"] {
        let query = format!("{path}?format={format}");
        let check = manifest(&api.get(&query).await)["check"].clone();
        assert_eq!(check, json!({"checked": false, "reason": "No sampler is running."}));
        let error = api.get(&format!("{query}&check=required")).await.error(503);
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("export_not_checked"), &json!("check"))
        );
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains("No sampler is running."), "{message}");
    }
    let error = api.get(&format!("{path}?check=maybe")).await.error(400);
    assert_eq!(
        error["message"],
        "Invalid value for 'check': maybe. It must be one of auto, required, none."
    );
}

#[tokio::test]
async fn an_export_is_checked_once_and_its_manifest_has_the_error_and_the_bound() {
    let api = TestApi::start().await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    let (path, name) = weights_of(&api).await;
    let path = format!("{path}?format=merged");
    let unchecked = api.get(&format!("{path}&check=none")).await;
    assert_eq!(manifest(&unchecked)["check"]["reason"], "The download asked for no check.");

    sampler.will_find(off_by(2.5e-4));
    let first = api.get(&path).await;
    let check = manifest(&first)["check"].clone();
    assert_eq!((&check["checked"], &check["positions"]), (&json!(true), &json!(1)));
    assert_eq!(check["max_abs_error"], 2.5e-4);
    assert_eq!(check["bound"], json!({"max_abs_error": 1e-3}));
    assert!(check["checked_at"].as_i64().expect("a time") > 1_700_000_000);
    assert_ne!(first.header("etag"), unchecked.header("etag"), "another manifest");

    let second = api.get(&format!("{path}&check=required")).await;
    assert!(second.body == first.body, "the same archive, byte by byte");
    assert_eq!(second.header("etag"), first.header("etag"));
    let [(order, archive)] = &sampler.checks()[..] else { panic!("checked once") };
    let merged = ExportForm::Merged(MergedForm::default());
    assert_eq!((order.form, order.base_model.as_str().is_empty()), (merged, false));
    assert!(order.prompts.iter().all(|ids| !ids.is_empty()) && !order.prompts.is_empty());
    let sent = |body: &Bytes| {
        let mut files = Vec::new();
        for entry in tar::Archive::new(body.as_ref()).entries().expect("entries") {
            let mut entry = entry.expect("entry");
            let name = entry.path().expect("path").display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).expect("content");
            files.push((name, content));
        }
        files.pop_if(|(name, _)| name == "manifest.json").expect("a manifest");
        files
    };
    assert_eq!(
        sent(archive),
        sent(&Bytes::from(first.body.to_vec())),
        "what is given out is checked"
    );
    assert_eq!(api.get(&format!("/v1/models/{name}")).await.status, 200);
}

#[tokio::test]
async fn an_export_beyond_its_bound_is_refused_with_the_numbers_and_looked_at_again() {
    let api = TestApi::start().await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    let (path, name) = weights_of(&api).await;
    let path = format!("{path}?format=merged");
    sampler.will_find(off_by(0.25));
    let error = api.get(&path).await.error(400);
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("export_check_failed"), &json!("format"))
    );
    let message = error["message"].as_str().expect("a message");
    for part in [&*name, "up to 2.500e-1, and 1e-3 is allowed", "at 1 positions", "check=none"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let check = manifest(&api.get(&format!("{path}&check=none")).await)["check"].clone();
    assert_eq!(check["checked"], false);

    sampler.will_find(CheckReply::Unfit { reason: "it has no config.json".to_owned() });
    let error = api.get(&path).await.error(400);
    assert!(error["message"].as_str().expect("text").contains(": it has no config.json."));
    sampler.will_find(off_by(0.0));
    assert_eq!(manifest(&api.get(&path).await)["check"]["checked"], true);
}

#[tokio::test]
async fn a_check_that_could_not_be_made_does_not_stop_a_download_and_is_not_made_for_each() {
    let api = TestApi::start().await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    let (path, _) = weights_of(&api).await;
    sampler.will_find(CheckReply::NotMade { reason: "it has no memory left".to_owned() });
    let first = api.get(&path).await;
    let check = manifest(&first)["check"].clone();
    let reason = "The check could not be made: it has no memory left.";
    assert_eq!(check, json!({"checked": false, "reason": reason}));
    assert_eq!(api.get(&path).await.header("etag"), first.header("etag"));
    assert_eq!(sampler.checks().len(), 1, "not again for some minutes");
    // Who needs it has it tried.
    sampler.will_find(off_by(0.0));
    let checked = api.get(&format!("{path}?check=required")).await;
    assert_eq!(manifest(&checked)["check"]["checked"], true);
    assert!(api.get(&path).await.body == checked.body);
}

#[tokio::test]
async fn a_download_that_is_not_what_was_checked_breaks_off_and_is_checked_anew() {
    let api = TestApi::start().await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    let (path, name) = weights_of(&api).await;
    let path = format!("{path}?format=merged");
    sampler.will_find(off_by(0.0));
    assert_eq!(api.get(&path).await.status, 200);

    // A bit of a weight of the base model flips in the object store.
    let model = api.store.model(&api.project, &name).await.expect("model");
    let key = ObjectPrefix::BaseModel(model.base_model_id).file("model.safetensors");
    let objects = api.store.objects();
    let mut weights = objects.read(&key).await.expect("read").to_vec();
    *weights.last_mut().expect("bytes") ^= 1;
    objects.delete(&key).await.expect("delete");
    objects.put_bytes(&key, weights.into()).await.expect("put");
    // So short a reply may break off before its status is on its way.
    let whole = match api.request(Method::GET, &path).send().await {
        Ok(reply) => reply.bytes().await,
        Err(error) => Err(error),
    };
    assert!(whole.is_err(), "it breaks off");
    // The very next request is not held to the sums of the old check.
    sampler.will_find(off_by(0.5));
    assert_eq!(api.get(&path).await.error(400)["code"], "export_check_failed");
}

#[tokio::test]
async fn a_store_that_signs_nothing_says_so_and_what_is_made_on_the_way_has_no_address() {
    let api = TestApi::start().await.with_base_model().await;
    let (path, _) = weights_of(&api).await;
    let file = api.upload("text").await;
    for path in [
        format!("/v1/files/{file}/content?redirect=true"),
        format!("{path}?redirect=adapter_model.safetensors"),
    ] {
        let error = api.get(&path).await.error(400);
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("unsupported_parameter"), &json!("redirect"))
        );
        let error = api.get(&format!("{path}&expires_in=5")).await.error(400);
        assert_eq!(error["param"], "expires_in");
    }
    let error =
        api.get(&format!("{path}?format=merged&redirect=model.safetensors")).await.error(400);
    assert_eq!(error["code"], "weights_not_available");
    let error = api.get(&format!("{path}?redirect=../secret")).await.error(400);
    assert_eq!(
        error["message"],
        "Invalid value for 'redirect': ../secret. It must be one of README.md, \
         adapter_config.json, adapter_model.safetensors."
    );
    let error = api.get(&format!("{path}?expires_in=60")).await.error(400);
    assert_eq!(error["param"], "expires_in");
}
