use super::operations::example;
use super::{DOCUMENT, yaml};
use crate::testing::{
    BASE, Client, FakeSampler, Reply, TestApi, adapter_weights, chat_rows, peft_config,
};
use reqwest::{Method, multipart};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;

const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.yaml");

#[test]
fn the_committed_document_is_the_one_that_the_code_makes() {
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(COMMITTED, yaml()).expect("written");
    }
    let committed = std::fs::read_to_string(COMMITTED).unwrap_or_default();
    assert!(
        committed == yaml(),
        "docs/openapi.yaml is not what the code makes. Run `cargo run -p tunesmith -- openapi > \
         docs/openapi.yaml`, or this test with UPDATE_OPENAPI=1, and read the difference."
    );
}

/// `METHOD /path` of every operation of the document.
fn described() -> BTreeSet<String> {
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    let methods = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().expect("methods").keys();
        methods.map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    methods.collect()
}

/// The same of every route in a source text: `.service(path("…").get(…).post(…))`.
fn routes_in(source: &str) -> BTreeSet<String> {
    let project = source
        .split_once("const PROJECT: &str = \"")
        .map_or("", |(_, rest)| rest.split_once('"').expect("a whole literal").0);
    let mut found = BTreeSet::new();
    for service in source.split(".service(").skip(1) {
        // What follows the last one is no route.
        let service = service.split(';').next().unwrap_or_default();
        let Some(rest) = service.trim_start().strip_prefix("path(") else { continue };
        let (pattern, rest) = rest.split_once(')').expect("a whole call");
        let pattern = match pattern.split_once('"') {
            None if pattern == "PROJECT" => project.to_owned(),
            None => panic!("a path that this test cannot read: {pattern}"),
            Some((before, literal)) => {
                let literal = literal.split_once('"').expect("a whole literal").0;
                match before.trim() {
                    "&format!(" => {
                        literal.replace("{PROJECT}", project).replace("{{", "{").replace("}}", "}")
                    }
                    _ => literal.to_owned(),
                }
            }
        };
        let pattern = pattern.replace(":.+}", "}");
        for method in ["get", "post", "put", "patch", "delete"] {
            let is_there = [format!(".{method}("), format!("web::{method}()")];
            if is_there.iter().any(|call| rest.contains(call)) {
                found.insert(format!("{} {pattern}", method.to_uppercase()));
            }
        }
    }
    found
}

fn sources(directory: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && !path.ends_with("tests.rs")
        {
            found.push(std::fs::read_to_string(path).expect("text"));
        }
    }
}

#[test]
fn every_route_is_described_and_nothing_else() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/routes"), &mut files);
    let routes: BTreeSet<String> = files.iter().flat_map(|source| routes_in(source)).collect();
    assert!(routes.contains("DELETE /v1/organization/projects/{project}/api_keys/{key}"));
    let described = described();
    let missing: Vec<_> = routes.difference(&described).collect();
    let invented: Vec<_> = described.difference(&routes).collect();
    assert!(missing.is_empty(), "describe in routes/openapi/operations: {missing:?}");
    assert!(invented.is_empty(), "no route answers: {invented:?}");
}

/// A field that nothing reads; the reply to it says so.
const UNREAD: &str = "nobody_reads_this";

/// A server with one of everything, and what stands there for the examples' names.
struct World {
    api: TestApi,
    admin: Client,
    real: Vec<(&'static str, String)>,
    /// Where webhooks are taken.
    hook: String,
}

/// A server on this machine that answers everything with 200.
fn receiver() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/hook", listener.local_addr().expect("address"));
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.expect("a connection");
            let (mut text, mut piece) = (String::new(), [0; 4096]);
            // The bodies of webhooks end in }}, and nothing before does.
            while !text.ends_with("}}") {
                let read = connection.read(&mut piece).expect("read");
                text.push_str(std::str::from_utf8(&piece[..read]).expect("text"));
            }
            let reply = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            connection.write_all(reply.as_bytes()).expect("write");
        }
    });
    url
}

impl World {
    async fn new() -> Self {
        let range = "127.0.0.0/8".parse().expect("a range");
        let api = TestApi::with(|config| config.webhook_ranges = vec![range]).await;
        let api = api.with_base_model().await;
        FakeSampler::start(&api.store).await;
        let organization = api.store.create_organization("tunesmith").await.expect("organization");
        let admin_key = api.store.create_admin_key(&organization, "test", None).await.expect("key");
        let admin = api.client_with(Some(admin_key.secret));
        let real = vec![(example::MODEL, BASE.to_owned())];
        let mut world = Self { api, admin, real, hook: receiver() };
        world.refresh().await;
        world
    }

    fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.real.retain(|(known, _)| *known != name);
        // A longer name first: one may be a part of another.
        self.real.push((name, value.into()));
        self.real.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    }

    /// Puts a new one in the place of whatever an operation may have used up.
    async fn refresh(&mut self) {
        let job = self.api.succeeded_job(json!({"n_epochs": 1})).await;
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        self.set(example::JOB, text(&job["id"]));
        self.set(example::TUNED, text(&job["fine_tuned_model"]));
        self.set(example::FILE, self.api.upload(chat_rows(10)).await);
        let content = vec![b'x'; 1024];
        let begun = json!({"bytes": content.len(), "filename": "a", "mime_type": "text/plain",
                           "purpose": "user_data"});
        let upload = text(&self.api.post("/v1/uploads", &begun).await.ok()["id"]);
        let form = multipart::Form::new().part("data", multipart::Part::bytes(content));
        let path = format!("/v1/uploads/{upload}/parts");
        let part = Reply::of(self.api.request(Method::POST, &path).multipart(form)).await.ok();
        self.set(example::UPLOAD, upload);
        self.set(example::PART, text(&part["id"]));

        let requests = multipart::Part::bytes(b"{}\n".to_vec()).file_name("requests.jsonl");
        let form = multipart::Form::new().text("purpose", "batch").part("file", requests);
        let requests = text(&self.api.post_form(form).await.ok()["id"]);
        let asked = json!({"input_file_id": requests, "endpoint": "/v1/chat/completions",
                           "completion_window": "24h"});
        let batch = self.api.post("/v1/batches", &asked).await.ok();
        self.set(example::BATCH, text(&batch["id"]));
        self.set(example::BATCH_FILE, requests);
        let asked = json!({"name": "here", "url": self.hook,
                           "event_types": ["fine_tuning.job.failed"]});
        let hook = self.api.post("/v1/webhook_endpoints", &asked).await.ok();
        self.set(example::WEBHOOK, text(&hook["id"]));

        let projects = "/v1/organization/projects";
        let name = json!({"name": format!("project {}", text(&part["id"]))});
        let project = text(&self.admin.post(projects, &name).await.ok()["id"]);
        let accounts = format!("{projects}/{project}/service_accounts");
        let account = self.admin.post(&accounts, &json!({"name": "ci"})).await.ok();
        self.set(example::KEY, text(&account["api_key"]["id"]));
        let permissions =
            self.real(&format!("/v1/fine_tuning/checkpoints/{}/permissions", example::TUNED));
        let given = self.api.post(&permissions, &json!({"project_ids": [project]})).await.ok();
        self.set(example::PERMISSION, text(&given["data"][0]["id"]));
        self.set(example::PROJECT, project);
        let key = self.admin.post("/v1/organization/admin_api_keys", &json!({"name": "k"})).await;
        self.set(example::ADMIN_KEY, text(&key.ok()["id"]));
    }

    /// What an operation needs that the others must not find.
    async fn prepare(&mut self, operation: &str) {
        match operation {
            "cancelJob" | "pauseJob" => {
                let job = self.api.start_job().await;
                self.set(example::JOB, job);
            }
            "resumeJob" => {
                let job = self.api.start_job().await;
                let pause = format!("/v1/fine_tuning/jobs/{job}/pause");
                self.api.post(&pause, &json!({})).await.ok();
                self.set(example::JOB, job);
            }
            "addUploadPart" => {
                let begun = json!({"bytes": 4, "filename": "a", "mime_type": "text/plain",
                                   "purpose": "user_data"});
                let upload = self.api.post("/v1/uploads", &begun).await.ok();
                self.set(example::UPLOAD, upload["id"].as_str().expect("id"));
            }
            _ => {}
        }
    }

    /// Makes good what an operation has used up.
    async fn restore(&mut self, operation: &str) {
        let uses_up =
            ["delete", "archive", "cancel", "pause", "resume", "complete", "addUploadPart"];
        if uses_up.iter().any(|word| operation.starts_with(word)) {
            self.refresh().await;
        }
    }

    /// A text with the real names in the place of the examples'.
    fn real(&self, text: &str) -> String {
        self.real.iter().fold(text.to_owned(), |text, (name, real)| text.replace(name, real))
    }

    async fn send(&self, method: &str, path: &str, operation: &Value) -> Reply {
        let mut path = path.to_owned();
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            if parameter["in"] == "path" {
                let name = format!("{{{}}}", parameter["name"].as_str().expect("name"));
                path = path.replace(&name, parameter["example"].as_str().expect("example"));
            }
        }
        let needs_admin = operation["tags"][0] == "Organization";
        let client = if needs_admin { &self.admin } else { &*self.api };
        let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("method");
        let request = client.request(method, &self.real(&path));
        let content = &operation["requestBody"]["content"];
        let request = if let Some(body) = content.get("application/json") {
            let mut example = body.get("example").expect("an example").clone();
            example[UNREAD] = json!(1);
            let example = example.to_string();
            let kind = ("content-type", "application/json");
            request.header(kind.0, kind.1).body(self.real(&example))
        } else if content.get("multipart/form-data").is_some() {
            let mut form = multipart::Form::new();
            let properties = content["multipart/form-data"]["schema"]["properties"].as_object();
            for name in properties.expect("properties").keys() {
                let bytes = |bytes: Vec<u8>| multipart::Part::bytes(bytes).file_name("rows.jsonl");
                form = match name.as_str() {
                    "purpose" => form.text("purpose", "fine-tune"),
                    "model" => form.text("model", BASE),
                    "file" | "data" => form.part(name.clone(), bytes(b"{}\n".to_vec())),
                    "adapter_config" => form.text("adapter_config", peft_config(json!({}))),
                    "adapter_model" => form.part("adapter_model", bytes(adapter_weights())),
                    _ => form,
                };
            }
            request.multipart(form)
        } else {
            request
        };
        Reply::of(request).await
    }
}

/// The reply's status and type are described; its form is looked at in tests/test_openapi.py.
#[track_caller]
fn assert_described(operation: &Value, reply: &Reply) {
    let response = &operation["responses"][reply.status.as_str()];
    assert!(response.is_object(), "{} is not described", reply.status);
    let kind = reply.header("content-type").expect("a type");
    assert!(response["content"][kind]["schema"].is_object(), "{kind} is not described");
}

#[tokio::test]
async fn every_operation_answers_its_example_as_it_is_described() {
    let mut world = World::new().await;
    for (path, methods) in DOCUMENT["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            let id = operation["operationId"].as_str().expect("id");
            world.prepare(id).await;
            let reply = world.send(method, path, operation).await;
            let body = String::from_utf8_lossy(&reply.body);
            assert!(reply.status.is_success(), "{id}: {} {body}", reply.status);
            assert_described(operation, &reply);
            if operation["requestBody"]["content"].get("application/json").is_some() {
                let warning = reply.header("x-tunesmith-warning").unwrap_or_default();
                assert!(warning.contains(UNREAD), "{id}: {warning}");
            }
            world.restore(id).await;
        }
    }
}

#[tokio::test]
async fn every_path_that_has_get_answers_head_alike_and_without_content() {
    let world = World::new().await;
    // What is another each time.
    let kept = |path: &str, reply: &Reply| {
        let mut headers = reply.headers.clone();
        for name in ["date", "x-request-id"] {
            headers.remove(name);
        }
        if path == "/metrics" {
            headers.remove("content-length");
        }
        headers
    };
    for (path, methods) in DOCUMENT["paths"].as_object().expect("paths") {
        let Some(operation) = methods.get("get") else { continue };
        let asked = world.send("get", path, operation).await;
        let told_of = world.send("head", path, operation).await;
        assert_eq!(told_of.status, asked.status, "{path}");
        assert_eq!(kept(path, &told_of), kept(path, &asked), "{path}");
        assert!(told_of.body.is_empty() && !asked.body.is_empty(), "{path}");
    }
}

#[tokio::test]
async fn refusals_are_as_they_are_described() {
    let api = TestApi::start().await;
    let anybody = api.client_with(None);
    for (path, methods) in DOCUMENT["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            if operation.get("security").is_some() {
                continue;
            }
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("method");
            let reply = Reply::of(anybody.request(method, &path.replace(['{', '}'], ""))).await;
            let error = reply.error(401);
            assert_eq!(error["code"], "invalid_api_key", "{path}");
            assert_described(operation, &reply);
        }
    }
}

#[tokio::test]
async fn a_url_with_text_that_cannot_be_stored_is_refused() {
    let api = TestApi::start().await;
    for path in ["/v1/files/%00", "/v1/files?after=a%00", "/v1/models/a%2Fb%00"] {
        assert_eq!(api.get(path).await.error(400)["code"], "invalid_value", "{path}");
    }
}

#[tokio::test]
async fn the_document_and_its_page_are_served_to_anybody() {
    let api = TestApi::start().await;
    let anybody = api.client_with(None);
    let document = anybody.get("/openapi.yaml").await;
    assert_eq!(document.header("content-type"), Some("application/yaml"));
    assert_eq!(String::from_utf8(document.body).expect("text"), yaml());

    let page = anybody.get("/docs").await;
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    let html = String::from_utf8(page.body).expect("text");
    assert!(!html.contains("<script"), "nothing runs in it");
    for operation in described() {
        let (_, path) = operation.split_once(' ').expect("a path");
        assert!(html.contains(&path.replace('/', "&#x2f;")) || html.contains(path), "{path}");
    }
    for said in
        ["name=\"viewport\"", "prefers-color-scheme: dark", "validation_split", example::FILE]
    {
        assert!(html.contains(said), "{said}");
    }
}
