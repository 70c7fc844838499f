use crate::testing::TestApi;
use insta::assert_json_snapshot;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::mpsc;

const ENDPOINTS: &str = "/v1/webhook_endpoints";

fn asked(url: &str) -> Value {
    json!({"name": "mine", "url": url, "event_types": ["fine_tuning.job.cancelled"]})
}

/// A receiver on this machine that gives these answers, one a connection, and the requests it got.
fn receiver(answers: Vec<&'static str>) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/hook", listener.local_addr().expect("address"));
    let (sender, requests) = mpsc::channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut connection, _) = listener.accept().expect("a connection");
            let mut text = String::new();
            let mut piece = [0; 4096];
            // Head and body of these small requests come with a body that ends in }}.
            while !text.ends_with("}}") {
                let read = connection.read(&mut piece).expect("read");
                text.push_str(std::str::from_utf8(&piece[..read]).expect("text"));
            }
            let reply =
                format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            connection.write_all(reply.as_bytes()).expect("write");
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    (url, requests)
}

#[tokio::test]
async fn an_endpoint_is_shown_as_the_sdks_declare_it_and_its_secret_once() {
    let api = TestApi::start().await;
    let made = api.post(ENDPOINTS, &asked("https://example.com/hook")).await.ok();
    assert_json_snapshot!(made, {
        ".id" => "[id]", ".created_at" => "[time]", ".updated_at" => "[time]",
        ".signing_secret" => "[secret]", ".signing_secret_hint" => "[hint]"
    }, @r#"
    {
      "id": "[id]",
      "object": "webhook_endpoint",
      "name": "mine",
      "url": "https://example.com/hook",
      "event_types": [
        "fine_tuning.job.cancelled"
      ],
      "created_at": "[time]",
      "updated_at": "[time]",
      "signing_secret_hint": "[hint]",
      "signing_secret": "[secret]"
    }
    "#);
    let secret = made["signing_secret"].as_str().expect("secret");
    let path = format!("{ENDPOINTS}/{}", made["id"].as_str().expect("id"));
    let read = api.get(&path).await.ok();
    assert_eq!(read.get("signing_secret"), None);
    assert_eq!(read["signing_secret_hint"], format!("whsec_...{}", &secret[secret.len() - 4..]));
    assert_eq!(api.get(ENDPOINTS).await.ok()["data"], json!([read]));
    let rotated = api.post(&format!("{path}/rotate_secret"), &json!({})).await.ok();
    assert_ne!(rotated["signing_secret"], made["signing_secret"]);
    let changed = api.post(&path, &json!({"event_types": ["batch.completed"]})).await.ok();
    assert_eq!(
        (&changed["name"], &changed["event_types"]),
        (&json!("mine"), &json!(["batch.completed"]))
    );
    let gone = api.delete(&path).await.ok();
    assert_eq!(
        gone,
        json!({"id": made["id"], "object": "webhook_endpoint.deleted", "deleted": true})
    );
    assert_eq!(api.get(&path).await.error(404)["code"], "webhook_endpoint_not_found");
}

#[tokio::test]
async fn a_wrong_endpoint_is_refused_by_field_and_none_leads_inside() {
    let api = TestApi::start().await;
    for (change, param) in [
        (json!({"name": null}), "name"),
        (json!({"event_types": []}), "event_types"),
        (json!({"event_types": ["video.completed"]}), "event_types"),
        (json!({"url": null}), "url"),
        (json!({"url": "http://example.com/"}), "url"),
        (json!({"url": "https://127.0.0.1/"}), "url"),
        (json!({"url": "https://169.254.169.254/"}), "url"),
        (json!({"url": "https://[::1]/"}), "url"),
    ] {
        let mut body = asked("https://example.com/");
        for (name, value) in change.as_object().expect("object") {
            body[name] = value.clone();
        }
        assert_eq!(api.post(ENDPOINTS, &body).await.error(400)["param"], param, "{body}");
    }
    // A name is found out when something is sent to it.
    let made = api.post(ENDPOINTS, &asked("https://localhost/")).await.ok();
    let path = format!("{ENDPOINTS}/{}/test", made["id"].as_str().expect("id"));
    let test = json!({"event_type": "fine_tuning.job.succeeded"});
    assert_eq!(api.post(&path, &test).await.error(400)["code"], "webhook_not_reached");
    assert_eq!(
        api.post(&path, &json!({"event_type": "x"})).await.error(400)["param"],
        "event_type"
    );
}

#[tokio::test]
async fn a_test_says_what_was_answered_and_follows_no_redirect() {
    let api = TestApi::with_webhooks_to("127.0.0.0/8").await;
    let (url, requests) =
        receiver(vec!["302 Found\r\nlocation: http://127.0.0.1:1/", "204 No Content"]);
    let made = api.post(ENDPOINTS, &asked(&url)).await.ok();
    let path = format!("{ENDPOINTS}/{}/test", made["id"].as_str().expect("id"));
    let test = json!({"event_type": "fine_tuning.job.succeeded"});
    assert_eq!(api.post(&path, &test).await.ok()["status_code"], 302);
    let answered = api.post(&path, &test).await.ok();
    assert_eq!(
        answered,
        json!({
            "object": "webhook_endpoint.test", "webhook_endpoint_id": made["id"],
            "event_type": "fine_tuning.job.succeeded", "status_code": 204, "success": true,
        })
    );
    let request = requests.recv().expect("a request");
    assert!(request.starts_with("POST /hook HTTP/1.1"), "{request}");
    for header in ["webhook-id: evt_", "webhook-timestamp: ", "webhook-signature: v1,"] {
        assert!(request.contains(header), "{header}: {request}");
    }
}

#[tokio::test]
async fn a_delivery_that_was_not_taken_comes_again_with_the_same_id() {
    let api = TestApi::with_webhooks_to("127.0.0.0/8").await.with_base_model().await;
    let (url, requests) = receiver(vec!["503 Service Unavailable", "200 OK"]);
    api.post(ENDPOINTS, &asked(&url)).await.ok();
    let job = api.start_job().await;
    api.post(&format!("/v1/fine_tuning/jobs/{job}/cancel"), &json!({})).await.ok();
    let (first, second) = tokio::task::spawn_blocking(move || {
        (requests.recv().expect("a request"), requests.recv().expect("another"))
    })
    .await
    .expect("received");
    let id = |request: &str| {
        let line = request.lines().find(|line| line.starts_with("webhook-id: "));
        line.expect("the header").to_owned()
    };
    assert_eq!(id(&first), id(&second));
    assert!(first.contains("fine_tuning.job.cancelled") && first.contains(&job), "{first}");
}

#[tokio::test]
async fn another_projects_endpoint_does_not_exist() {
    let api = TestApi::start().await;
    let made = api.post(ENDPOINTS, &asked("https://example.com/")).await.ok();
    let path = format!("{ENDPOINTS}/{}", made["id"].as_str().expect("id"));
    let stranger = api.stranger().await;
    let test = json!({"event_type": "batch.failed"});
    for reply in [
        stranger.get(&path).await,
        stranger.delete(&path).await,
        stranger.post(&path, &json!({"name": "x"})).await,
        stranger.post(&format!("{path}/rotate_secret"), &json!({})).await,
        stranger.post(&format!("{path}/test"), &test).await,
    ] {
        assert_eq!(reply.error(404)["code"], "webhook_endpoint_not_found");
    }
    assert_eq!(stranger.get(ENDPOINTS).await.ok()["data"], json!([]));
}
