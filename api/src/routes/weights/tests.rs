use crate::testing::{
    ADAPTED, BASE, FULL_WEIGHT, FakeSampler, LORA_A, LORA_B, Reply, TestApi, WEIGHT,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::Read as _;
use tunesmith_core::weights::FloatType;
use tunesmith_store::objects::ObjectPrefix;

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

/// The base model that the manifest names.
fn base_of(files: &BTreeMap<String, Vec<u8>>) -> String {
    let manifest: Value = serde_json::from_slice(&files["manifest.json"]).expect("manifest");
    manifest["base_model"].as_str().expect("a base model").to_owned()
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

/// The tensors of a safetensors file: the type and the numbers of each.
fn tensors(file: &[u8]) -> BTreeMap<String, (Dtype, Vec<f32>)> {
    let file = SafeTensors::deserialize(file).expect("safetensors");
    let numbers = |tensor: &TensorView<'_>| {
        let float = FloatType::parse(&tensor.dtype().to_string()).expect("floats");
        (tensor.dtype(), float.decode(tensor.data()))
    };
    file.tensors().into_iter().map(|(name, tensor)| (name, numbers(&tensor))).collect()
}

#[tokio::test]
async fn a_merged_model_comes_in_the_type_that_is_asked_for_and_its_config_says_so() {
    let api = TestApi::start().await.with_base_model().await;
    let path = format!("{}/weights?format=merged", tuned(&api, lora()).await);
    let auto = api.get(&path).await;
    let exact = tensors(&files(&auto)["model.safetensors"]);
    for (float, dtype) in
        [(FloatType::F32, Dtype::F32), (FloatType::F16, Dtype::F16), (FloatType::Bf16, Dtype::BF16)]
    {
        let reply = api.get(&format!("{path}&dtype={float}")).await;
        assert_ne!(reply.header("etag"), auto.header("etag"), "{float}");
        let files = files(&reply);
        let found = tensors(&files["model.safetensors"]);
        assert_eq!(found.len(), exact.len());
        for (name, (of_type, numbers)) in found {
            let rounded = float.encode(&exact[&name].1).expect("fits");
            assert_eq!((of_type, numbers), (dtype, float.decode(&rounded)), "{name}");
        }
        let config: Value = serde_json::from_slice(&files["config.json"]).expect("json");
        assert_eq!(config, json!({"model_type": "llama", "torch_dtype": float.torch_name()}));
    }
    assert_eq!(exact[ADAPTED].0, Dtype::F32, "the base model's own");
    assert_eq!(api.get(&format!("{path}&dtype=auto")).await.body, auto.body);
}

#[tokio::test]
async fn a_merged_model_is_cut_into_files_and_the_index_says_where_each_tensor_lies() {
    let api = TestApi::start().await.with_base_model().await;
    let path = format!("{}/weights?format=merged", tuned(&api, lora()).await);
    let whole = tensors(&files(&api.get(&path).await)["model.safetensors"]);
    // 18, 12 and 6 bytes, of which the last two fit together.
    let reply = api.get(&format!("{path}&dtype=bf16&max_shard_size=18")).await;
    let files = files(&reply);
    let index: Value =
        serde_json::from_slice(&files["model.safetensors.index.json"]).expect("json");
    assert_eq!(index["metadata"]["total_size"], 36);
    let map = index["weight_map"].as_object().expect("a map");
    assert_eq!(map.len(), whole.len());
    assert!(!files.contains_key("model.safetensors"));
    let mut found = BTreeMap::new();
    for (name, content) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        for (tensor, numbers) in tensors(content) {
            assert_eq!(map[&tensor], **name);
            assert_eq!(numbers.1, whole[&tensor].1, "small numbers, which bf16 holds");
            found.insert(tensor, ());
        }
    }
    assert_eq!(found.len(), whole.len());
    let count = files.keys().filter(|name| name.ends_with("-of-00002.safetensors")).count();
    assert_eq!(count, 2, "{:?}", files.keys());

    let error = api.get(&format!("{path}&max_shard_size=5TB")).await.error(400);
    assert_eq!(
        error["message"],
        "Invalid value for 'max_shard_size': 5TB. It must be a whole number of bytes, or as in \
         500MB or 5GB."
    );
}

#[tokio::test]
async fn a_number_beyond_half_precision_is_refused_before_the_first_byte_and_named() {
    let api = TestApi::start().await.with_base_model().await;
    let path = tuned(&api, lora()).await;
    let name = path.strip_prefix("/v1/models/").expect("a name");
    let model = api.store.model(&api.project, name).await.expect("model");
    let key = ObjectPrefix::BaseModel(model.base_model_id).file("model.safetensors");
    let objects = api.store.objects();
    let weights = objects.read(&key).await.expect("read");
    let tensor = SafeTensors::deserialize(&weights).expect("safetensors");
    let norm = tensor.tensor("model.norm.weight").expect("norm").data();
    let place = norm.as_ptr().addr() - weights.as_ptr().addr();
    let mut weights = weights.to_vec();
    weights[place..place + 4].copy_from_slice(&70000f32.to_le_bytes());
    objects.delete(&key).await.expect("delete");
    objects.put_bytes(&key, weights.into()).await.expect("put");

    let path = format!("{path}/weights?format=merged");
    for check in ["auto", "none"] {
        let error = api.get(&format!("{path}&dtype=f16&check={check}")).await.error(400);
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("weights_not_available"), &json!("dtype"))
        );
        let message = error["message"].as_str().expect("a message");
        for part in ["model.norm.weight", "70000 is beyond", "65504", "dtype=bf16 or dtype=f32"] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    // A sampler that compares it is sent the numbers, and so it shows there.
    let _sampler = FakeSampler::start(&api.store).await;
    let error = api.get(&format!("{path}&dtype=f16")).await.error(400);
    assert_eq!(error["code"], "weights_not_available");
    let halves = files(&api.get(&format!("{path}&dtype=bf16&check=none")).await);
    assert_eq!(tensors(&halves["model.safetensors"])["model.norm.weight"].1[0], 70144.0);
}

#[tokio::test]
async fn what_belongs_to_a_merged_model_is_refused_of_other_formats() {
    let api = TestApi::start().await.with_base_model().await;
    let path = format!("{}/weights", tuned(&api, lora()).await);
    for (query, part) in [
        ("dtype=f16", "unless format=merged is asked for"),
        ("format=adapter&dtype=auto", "unless format=merged is asked for"),
        ("format=gguf&dtype=bf16", "said by 'type'"),
        ("format=gguf&max_shard_size=1GB", "said by 'type'"),
        ("format=merged&type=f16", "chosen by 'dtype'"),
        ("format=merged&dtype=float16", "one of auto, f32, f16, bf16"),
    ] {
        let error = api.get(&format!("{path}?{query}")).await.error(400);
        assert_eq!(error["code"], "invalid_value", "{query}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(part), "{query}: {message}");
    }
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
        assert_eq!(numbers(&files(&reply)["model.safetensors"], ADAPTED), FULL_WEIGHT);
        assert_eq!(reply.header("x-tunesmith-warning").is_some(), warns, "{query}");
    }
    let files = files(&api.get(&format!("{path}/weights?format=merged&dtype=bf16")).await);
    assert_eq!(tensors(&files["model.safetensors"])[ADAPTED], (Dtype::BF16, FULL_WEIGHT.to_vec()));
    assert_eq!(files["config.json"], b"{\n  \"torch_dtype\": \"bfloat16\"\n}\n");
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

#[tokio::test]
async fn an_adapter_goes_on_a_model_that_was_tuned_in_full() {
    let api = TestApi::start().await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    let name = |job: &Value| job["fine_tuned_model"].as_str().expect("model").to_owned();
    let full = name(&api.succeeded_job(json!({"adapter": {"type": "full"}})).await);
    let lora = json!({"adapter": {"type": "lora", "r": 1, "target_modules": ["q_proj"]}});
    let file = api.upload(crate::testing::chat_rows(10)).await;
    let body = json!({"model": full, "training_file": file, "hyperparameters": lora});
    let preview = api.post("/v1/fine_tuning/jobs/preview", &body).await.ok();
    assert_eq!((&preview["would_run"], &preview["model"]), (&json!(true), &json!(full)));

    let job = api.succeeded_job_from(&full, lora.clone()).await;
    assert_eq!((&job["model"], job["method"]["type"].as_str()), (&json!(full), Some("supervised")));
    let adapter = name(&job);
    assert!(adapter.starts_with(&format!("ft:{BASE}:")), "{adapter}");
    let listed = api.get("/v1/models").await.ok();
    let names: Vec<&str> =
        listed["data"].as_array().expect("data").iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!(names, [BASE, &full, &adapter]);

    // It answers over the tuned model, and so does an adapter that trained further from there.
    let further = name(&api.succeeded_job_from(&adapter, json!({})).await);
    let mut bases = Vec::new();
    for model in [&adapter, &further, &full] {
        sampler.will_say(&["answer"], tunesmith_core::sampling::EndReason::Stop);
        let chat = json!({"model": model, "messages": [{"role": "user", "content": "question"}]});
        api.post("/v1/chat/completions", &chat).await.ok();
        let order = sampler.last_order();
        assert_eq!(order.tuned.is_some(), *model != full);
        bases.push(order.base_model);
    }
    assert!(bases.iter().all(|base| base == &bases[0]), "one model in memory serves all");
    let own = api.store.model(&api.project, &full).await.expect("model");
    assert_ne!(bases[0], own.base_model_id);
    let base = api.store.base_model_by_id(&bases[0]).await.expect("base");
    assert_eq!(base.prefix(), own.weights());

    // Each export names what it goes on, and the tuned model itself what it was tuned from.
    for (model, base) in [(&adapter, &*full), (&further, &*full), (&full, BASE)] {
        let weights = format!("/v1/models/{model}/weights?check=none");
        assert_eq!(base_of(&files(&api.get(&weights).await)), base);
    }

    // What is merged is the tuned model's weights and the adapter, also when that model is gone.
    api.delete(&format!("/v1/models/{full}")).await.ok();
    let expected: Vec<f32> = (0..6)
        .map(|index| FULL_WEIGHT[index] + 2.0 * LORA_B[index / 3] * LORA_A[index % 3])
        .collect();
    for model in [&adapter, &further] {
        let query = format!("/v1/models/{model}/weights?format=merged&check=none");
        let merged = files(&api.get(&query).await);
        assert_eq!(numbers(&merged["model.safetensors"], ADAPTED), expected);
        assert_eq!(merged["README.md"], b"the job's facts");
        assert_eq!(base_of(&merged), full);
    }
    let error = api.post("/v1/fine_tuning/jobs", &body).await.error(400);
    assert_eq!(error["code"], "model_not_found");
    // Every weight may train from there too.
    let job = api.succeeded_job_from(&adapter, json!({"adapter": {"type": "full"}})).await;
    assert!(name(&job).starts_with(&format!("ft:{BASE}:")), "{job}");
}
