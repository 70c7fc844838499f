//! What the tests of this crate share: a server on a socket, over a real PostgreSQL and object
//! store, and a client that speaks to it.

mod fake_sampler;
mod fixtures;

pub(crate) use fake_sampler::{FakeSampler, announce as announce_sampler, words_of};
pub(crate) use fixtures::{
    ADAPTED, BASE, FULL_WEIGHT, LORA_A, LORA_B, WEIGHT, adapter_weights, chat_rows, lora_name,
    peft_config, safetensors, tokenizer,
};

use crate::server::{ApiConfig, ApiServer};
use reqwest::{Method, RequestBuilder, Response, StatusCode, multipart};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::oneshot;
use tunesmith_core::ids::ProjectId;
use tunesmith_store::Store;
use tunesmith_store::test_db::TestDb;

/// A free port.
const LISTEN: &str = "127.0.0.1:0";

/// A server and a client with the key of one project.
pub(crate) struct TestApi {
    pub(crate) store: Store,
    pub(crate) project: ProjectId,
    url: String,
    client: Client,
    // The servers stop when this is dropped, before the database.
    running: Vec<oneshot::Sender<()>>,
    _db: TestDb,
}

/// A client with a key of its own, or none.
#[derive(Clone)]
pub(crate) struct Client {
    url: String,
    key: Option<String>,
    http: reqwest::Client,
}

impl std::ops::Deref for TestApi {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl TestApi {
    /// A server without a validator: jobs stay as the requests left them.
    pub(crate) async fn start() -> Self {
        Self::build(ApiConfig::new(LISTEN), false).await
    }

    /// The same with another cap on files.
    pub(crate) async fn with_max_file_bytes(max_file_bytes: u64) -> Self {
        Self::build(ApiConfig { max_file_bytes, ..ApiConfig::new(LISTEN) }, false).await
    }

    /// The whole server, which validates.
    pub(crate) async fn with_validator() -> Self {
        Self::build(ApiConfig::new(LISTEN), true).await
    }

    /// The whole server, which sends webhooks to this range too.
    pub(crate) async fn with_webhooks_to(range: &str) -> Self {
        let webhook_ranges = vec![range.parse().expect("a range")];
        Self::build(ApiConfig { webhook_ranges, ..ApiConfig::new(LISTEN) }, true).await
    }

    /// A server of this making, without the tasks beside it.
    pub(crate) async fn with(change: impl FnOnce(&mut ApiConfig)) -> Self {
        let mut config = ApiConfig::new(LISTEN);
        change(&mut config);
        Self::build(config, false).await
    }

    async fn build(config: ApiConfig, runs_tasks: bool) -> Self {
        let db = TestDb::new().await;
        let store = db.store().clone();
        let project = store.ensure_default_project().await.expect("project");
        let (url, running) = serve(&config, &store, runs_tasks);
        let key = store.create_api_key(&project, "test").await.expect("key").secret;
        let client = Client { url: url.clone(), key: Some(key), http: reqwest::Client::new() };
        Self { store, project, url, client, running: vec![running], _db: db }
    }

    /// A client with the same key of another server beside this one, over the same database.
    pub(crate) fn beside(&mut self, config: &ApiConfig) -> Client {
        let (url, running) = serve(config, &self.store, false);
        self.running.push(running);
        Client { url, ..self.client.clone() }
    }

    /// Tells the server to stop.
    pub(crate) fn stop(&mut self) {
        self.running.clear();
    }

    /// A client with the key of another project.
    pub(crate) async fn stranger(&self) -> Client {
        let project = self.store.create_project("other", "other").await.expect("project");
        let key = self.store.create_api_key(&project, "test").await.expect("key").secret;
        self.client_with(Some(key))
    }

    /// A client with this key.
    pub(crate) fn client_with(&self, key: Option<String>) -> Client {
        Client { url: self.url.clone(), key, http: self.client.http.clone() }
    }
}

/// A server on an address, until what is beside it is dropped.
fn serve(config: &ApiConfig, store: &Store, runs_tasks: bool) -> (String, oneshot::Sender<()>) {
    let server = ApiServer::bind(config, store.clone()).expect("a free port");
    let url = format!("http://{}", server.local_addr());
    let (running, stopped) = oneshot::channel::<()>();
    let stopped = async {
        let _ = stopped.await;
    };
    tokio::spawn(async move {
        if runs_tasks { server.run(stopped).await } else { server.serve(stopped).await }
    });
    (url, running)
}

impl Client {
    /// A request to a path.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.url));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::GET, path)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::DELETE, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        Reply::of(self.request(Method::POST, path).json(body)).await
    }

    /// Posts a form to `/v1/files`.
    pub(crate) async fn post_form(&self, form: multipart::Form) -> Reply {
        self.post_form_to("/v1/files", form).await
    }

    pub(crate) async fn post_form_to(&self, path: &str, form: multipart::Form) -> Reply {
        Reply::of(self.request(Method::POST, path).multipart(form)).await
    }

    /// Uploads content to train on; gives the file's id.
    pub(crate) async fn upload(&self, content: impl Into<Vec<u8>>) -> String {
        let file = multipart::Part::bytes(content.into()).file_name("rows.jsonl");
        let form = multipart::Form::new().text("purpose", "fine-tune").part("file", file);
        self.post_form(form).await.ok()["id"].as_str().expect("id").to_owned()
    }

    /// Starts a job on ten rows; gives its id.
    pub(crate) async fn start_job(&self) -> String {
        let file = self.upload(chat_rows(10)).await;
        let body = json!({ "model": BASE, "training_file": file });
        let job = self.post("/v1/fine_tuning/jobs", &body).await.ok();
        job["id"].as_str().expect("id").to_owned()
    }

    /// Reads a job until it has left `validating_files`.
    pub(crate) async fn validated(&self, job: &str) -> Value {
        for _ in 0..600 {
            let body = self.get(&format!("/v1/fine_tuning/jobs/{job}")).await.ok();
            if body["status"] != "validating_files" {
                return body;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("job {job} is still being validated");
    }
}

/// A reply that has come whole.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) async fn of(request: RequestBuilder) -> Self {
        let response: Response = request.send().await.expect("a reply");
        let (status, headers) = (response.status(), response.headers().clone());
        let body = response.bytes().await.expect("a whole body").to_vec();
        Self { status, headers, body }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("no JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The body of a reply that must be a 200.
    pub(crate) fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The `error` of a reply that must have this status, after a look at what every error has.
    pub(crate) fn error(&self, status: u16) -> Value {
        let body = self.json();
        assert_eq!(self.status, status, "{body}");
        assert!(self.headers.contains_key("x-request-id"), "{:?}", self.headers);
        let error = &body["error"];
        let keys: Vec<&str> =
            error.as_object().expect("error").keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        error.clone()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("text"))
    }
}
