use crate::testing::{ADAPTED, BASE, LORA_A, LORA_B, Reply, TestApi, WEIGHT};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::Read as _;

/// The files of a reply that must be an archive, after a look at its sums.
fn files(reply: &Reply) -> BTreeMap<String, Vec<u8>> {
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    assert_eq!(reply.header("content-type"), Some("application/x-tar"));
    assert_eq!(reply.header("content-length"), Some(&*reply.body.len().to_string()));
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(reply.body.as_slice()).entries().expect("entries") {
        let mut entry = entry.expect("entry");
        let mut content = Vec::new();
        entry.read_to_end(&mut content).expect("content");
        files.insert(entry.path().expect("path").display().to_string(), content);
    }
    let manifest: Value = serde_json::from_slice(&files["manifest.json"]).expect("manifest");
    let listed = manifest["files"].as_array().expect("files");
    assert_eq!(listed.len(), files.len() - 1);
    for file in listed {
        let content = &files[file["name"].as_str().expect("name")];
        assert_eq!(file["bytes"], content.len());
        assert_eq!(file["sha256"], hex::encode(Sha256::digest(content)));
    }
    files
}

fn numbers(file: &[u8], tensor: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(file).expect("safetensors");
    let bytes = file.tensor(tensor).expect("the tensor").data().to_vec();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect()
}

async fn tuned(api: &TestApi, hyperparameters: Value) -> String {
    let job = api.succeeded_job(hyperparameters).await;
    let name = job["fine_tuned_model"].as_str().expect("model");
    format!("/v1/models/{name}")
}

fn lora() -> Value {
    json!({"adapter": {"r": 1, "target_modules": ["q_proj"]}})
}

#[tokio::test]
async fn an_adapter_comes_as_it_was_stored() {
    let api = TestApi::start().await.with_base_model().await;
    let path = tuned(&api, lora()).await;
    for query in ["", "?format=adapter"] {
        let reply = api.get(&format!("{path}/weights{query}")).await;
        let files = files(&reply);
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]
        );
        let config: Value = serde_json::from_slice(&files["adapter_config.json"]).expect("json");
        assert_eq!(config["peft_type"], "LORA");
        let a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        assert_eq!(numbers(&files["adapter_model.safetensors"], a), LORA_A);
        let name = reply.header("content-disposition").expect("a name");
        assert!(name.contains("ft-tiny-") && !name.contains(':'), "{name}");
    }
}

#[tokio::test]
async fn a_merged_model_has_the_adapter_in_its_weights_and_all_else_of_the_base() {
    let api = TestApi::start().await.with_base_model().await;
    let path = tuned(&api, lora()).await;
    let files = files(&api.get(&format!("{path}/weights?format=merged")).await);
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "README.md",
            "config.json",
            "manifest.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert_eq!(files["README.md"], b"the job's facts");
    // W + 2·B·A, row by row.
    let expected: Vec<f32> =
        (0..6).map(|index| WEIGHT[index] + 2.0 * LORA_B[index / 3] * LORA_A[index % 3]).collect();
    let model = &files["model.safetensors"];
    assert_eq!(numbers(model, ADAPTED), expected);
    assert_eq!(numbers(model, "model.embed_tokens.weight"), [0.5; 9]);
    assert_eq!(numbers(model, "model.norm.weight"), [1.0; 3]);
}

#[tokio::test]
async fn a_checkpoint_downloads_by_its_name() {
    let api = TestApi::start().await.with_base_model().await;
    let path = tuned(&api, lora()).await;
    let final_weights = api.get(&format!("{path}/weights")).await;
    let checkpoint = api.get(&format!("{path}%3Ackpt-step-10/weights")).await;
    assert_eq!(
        files(&checkpoint)["adapter_model.safetensors"],
        files(&final_weights)["adapter_model.safetensors"]
    );
    files(&api.get(&format!("{path}:ckpt-step-10/weights?format=merged")).await);
}

#[tokio::test]
async fn a_model_that_was_trained_in_full_comes_whole_in_either_format() {
    let api = TestApi::start().await.with_base_model().await;
    let path = tuned(&api, json!({"adapter": {"type": "full"}})).await;
    for (query, warns) in [("", false), ("?format=merged", false), ("?format=adapter", true)] {
        let reply = api.get(&format!("{path}/weights{query}")).await;
        assert_eq!(numbers(&files(&reply)["model.safetensors"], ADAPTED), WEIGHT);
        assert_eq!(reply.header("x-tunesmith-warning").is_some(), warns, "{query}");
    }
}

#[tokio::test]
async fn an_adapter_that_fits_no_weight_of_the_base_is_refused_before_the_first_byte() {
    let api = TestApi::start().await.with_base_model().await;
    // The stored adapter is of rank 1 and scale 2; the job says rank 4, so its matrices do not fit.
    let path = tuned(&api, json!({"adapter": {"r": 4, "target_modules": ["q_proj"]}})).await;
    api.get(&format!("{path}/weights?format=merged")).await.error(500);
}

#[tokio::test]
async fn a_model_that_gguf_cannot_hold_is_refused_before_the_first_byte() {
    let api = TestApi::start().await.with_base_model().await;
    let path = tuned(&api, lora()).await;
    let error = api.get(&format!("{path}/weights?format=gguf")).await.error(400);
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("weights_not_available"), &json!("format"))
    );
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("config.json has no whole number"), "{message}");

    let error = api.get(&format!("{path}/weights?format=merged&type=q8_0")).await.error(400);
    assert_eq!(error["param"], "type");
    let error = api.get(&format!("{path}/weights?format=gguf&type=q3")).await.error(400);
    assert_eq!(
        error["message"],
        "Invalid value for 'type': q3. It must be one of f16, q8_0, q4_k_m."
    );
}

#[tokio::test]
async fn what_has_no_weights_says_so() {
    let api = TestApi::start().await.with_base_model().await;
    let error = api.get(&format!("/v1/models/{BASE}/weights")).await.error(400);
    assert_eq!(error["code"], "weights_not_available");
    let error = api.get("/v1/models/ft:none/weights").await.error(404);
    assert_eq!(error["message"], "The model 'ft:none' does not exist");
    let error = api.get("/v1/models/ft:none/weights?format=zip").await.error(400);
    assert_eq!(
        error["message"],
        "Invalid value for 'format': zip. It must be one of adapter, merged, gguf."
    );
}

#[tokio::test]
async fn a_download_that_broke_off_goes_on_where_it_was() {
    let api = TestApi::start().await.with_base_model().await;
    let path = format!("{}/weights?format=merged", tuned(&api, lora()).await);
    let whole = api.get(&path).await;
    let tag = whole.header("etag").expect("a tag").to_owned();
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    let ask = async |range: &str, tag: &str| {
        let request = api.request(reqwest::Method::GET, &path);
        Reply::of(request.header("range", range).header("if-range", tag)).await
    };
    let size = whole.body.len();
    for (range, bytes) in [
        ("bytes=700-", 700..size),
        ("bytes=0-0", 0..1),
        ("bytes=511-1600", 511..1601),
        ("bytes=-5", size - 5..size),
    ] {
        let reply = ask(range, &tag).await;
        assert_eq!(reply.status, 206);
        let place = format!("bytes {}-{}/{size}", bytes.start, bytes.end - 1);
        assert_eq!(reply.header("content-range"), Some(&*place));
        assert!(reply.body == whole.body[bytes], "{range}");
    }
    assert_eq!(ask(&format!("bytes={size}-"), &tag).await.status, 416);
    // A part of something else is of no use.
    let other = api.get(&path.replace("merged", "adapter")).await;
    assert_ne!(other.header("etag"), Some(&*tag));
    let reply = ask("bytes=700-", other.header("etag").expect("a tag")).await;
    assert_eq!((reply.status.as_u16(), reply.body.len()), (200, size));
}
