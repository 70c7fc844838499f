use crate::testing::{Client, Reply, TestApi};
use insta::assert_json_snapshot;
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

fn asked(bytes: u64) -> Value {
    json!({"bytes": bytes, "filename": "rows.jsonl", "mime_type": "text/jsonl",
           "purpose": "fine-tune"})
}

async fn begin(client: &Client, bytes: u64) -> String {
    let upload = client.post("/v1/uploads", &asked(bytes)).await.ok();
    upload["id"].as_str().expect("id").to_owned()
}

async fn send(client: &Client, upload: &str, form: Form) -> Reply {
    let path = format!("/v1/uploads/{upload}/parts");
    Reply::of(client.request(Method::POST, &path).multipart(form)).await
}

fn data(content: &'static [u8]) -> Form {
    Form::new().part("data", Part::bytes(content).file_name("upload"))
}

async fn part(client: &Client, upload: &str, content: &'static [u8]) -> String {
    let part = send(client, upload, data(content)).await.ok();
    part["id"].as_str().expect("id").to_owned()
}

#[tokio::test]
async fn an_upload_its_part_and_its_file_are_shown_as_the_sdks_declare_them() {
    let api = TestApi::start().await;
    let upload = api.post("/v1/uploads", &asked(4)).await.ok();
    assert_json_snapshot!(upload, {
        ".id" => "[id]", ".created_at" => "[time]", ".expires_at" => "[time]"
    }, @r#"
    {
      "id": "[id]",
      "object": "upload",
      "bytes": 4,
      "created_at": "[time]",
      "expires_at": "[time]",
      "filename": "rows.jsonl",
      "purpose": "fine-tune",
      "status": "pending",
      "file": null
    }
    "#);
    let seconds = |field: &str| upload[field].as_i64().expect("time");
    assert_eq!(seconds("expires_at") - seconds("created_at"), 3600);
    let id = upload["id"].as_str().expect("id");
    let second = part(&api, id, b"cd").await;
    let first = send(&api, id, data(b"ab")).await.ok();
    assert_json_snapshot!(first, {
        ".id" => "[id]", ".created_at" => "[time]", ".upload_id" => "[upload]"
    }, @r#"
    {
      "id": "[id]",
      "object": "upload.part",
      "created_at": "[time]",
      "upload_id": "[upload]"
    }
    "#);
    assert_eq!(first["upload_id"], id);
    let done = api
        .post(
            &format!("/v1/uploads/{id}/complete"),
            &json!({"part_ids": [first["id"], second], "md5": "e2fc714c4727ee9395f324cd2e7f331f"}),
        )
        .await
        .ok();
    assert_eq!(done["status"], "completed");
    let file = done["file"]["id"].as_str().expect("file");
    assert_eq!(api.get(&format!("/v1/files/{file}")).await.ok(), done["file"]);
    assert_eq!(api.get(&format!("/v1/files/{file}/content")).await.body, b"abcd");
}

#[tokio::test]
async fn a_wrong_request_is_refused_by_field() {
    let api = TestApi::start().await;
    for (change, param) in [
        (json!({"bytes": null}), "bytes"),
        (json!({"bytes": (8_u64 << 30) + 1}), "bytes"),
        (json!({"bytes": "7"}), "bytes"),
        (json!({"filename": ""}), "filename"),
        (json!({"mime_type": null}), "mime_type"),
        (json!({"purpose": "world-peace"}), "purpose"),
        (json!({"expires_after": {"anchor": "created_at", "seconds": 60}}), "expires_after"),
        (json!({"expires_after": {"anchor": "now", "seconds": 3600}}), "expires_after"),
    ] {
        let mut body = asked(4);
        for (name, value) in change.as_object().expect("object") {
            body[name] = value.clone();
        }
        assert_eq!(api.post("/v1/uploads", &body).await.error(400)["param"], param, "{body}");
    }
    let id = begin(&api, 4).await;
    let complete = format!("/v1/uploads/{id}/complete");
    for (body, param) in [
        (json!({}), "part_ids"),
        (json!({"part_ids": [1]}), "part_ids"),
        (json!({"part_ids": [], "md5": "xyz"}), "md5"),
        (json!({"part_ids": ["part_x"]}), "part_ids"),
        (json!({"part_ids": []}), "part_ids"),
    ] {
        assert_eq!(api.post(&complete, &body).await.error(400)["param"], param, "{body}");
    }
    let error = send(&api, &id, Form::new().text("other", "x")).await.error(400);
    assert_eq!(error["param"], "data");
    let error = api.post(&format!("/v1/uploads/{id}/parts"), &json!({})).await.error(400);
    assert_eq!(error["code"], "invalid_body");
    assert_eq!(send(&api, &id, data(b"abcde")).await.error(413)["param"], "data");
}

#[tokio::test]
async fn an_ended_upload_says_so_and_that_no_retry_helps() {
    let api = TestApi::start().await;
    let id = begin(&api, 2).await;
    let only = part(&api, &id, b"ab").await;
    let cancel = format!("/v1/uploads/{id}/cancel");
    assert_eq!(api.post(&cancel, &json!({})).await.ok()["status"], "cancelled");
    for reply in [
        send(&api, &id, data(b"ab")).await,
        api.post(&format!("/v1/uploads/{id}/complete"), &json!({"part_ids": [only]})).await,
    ] {
        assert_eq!(reply.error(400)["code"], "invalid_upload_state");
        assert_eq!(reply.header("x-should-retry"), Some("false"));
    }
}

#[tokio::test]
async fn another_projects_upload_does_not_exist() {
    let api = TestApi::start().await;
    let id = begin(&api, 2).await;
    let stranger = api.stranger().await;
    for reply in [
        send(&stranger, &id, data(b"ab")).await,
        stranger.post(&format!("/v1/uploads/{id}/complete"), &json!({"part_ids": []})).await,
        stranger.post(&format!("/v1/uploads/{id}/cancel"), &json!({})).await,
    ] {
        assert_eq!(reply.error(404)["message"], format!("No such Upload object: {id}"));
    }
}
