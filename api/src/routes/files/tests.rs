use crate::testing::{Reply, TestApi};
use insta::assert_json_snapshot;
use reqwest::Method;
use reqwest::header::RANGE;
use reqwest::multipart::{Form, Part};
use serde_json::json;

fn file(content: &'static [u8]) -> Part {
    Part::bytes(content).file_name("rows.jsonl")
}

fn form() -> Form {
    Form::new().text("purpose", "fine-tune").part("file", file(b"0123456789"))
}

#[tokio::test]
async fn a_file_is_shown_as_the_sdks_declare_it() {
    let api = TestApi::start().await;
    let made = api.post_form(form()).await.ok();
    assert_json_snapshot!(made, {".id" => "[id]", ".created_at" => "[time]"}, @r#"
    {
      "id": "[id]",
      "object": "file",
      "bytes": 10,
      "created_at": "[time]",
      "filename": "rows.jsonl",
      "purpose": "fine-tune",
      "status": "processed",
      "expires_at": null,
      "status_details": null
    }
    "#);
    let id = made["id"].as_str().expect("id");
    assert_eq!(api.get(&format!("/v1/files/{id}")).await.ok(), made);
    let content = api.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!((content.status.as_u16(), content.body.as_slice()), (200, &b"0123456789"[..]));
    assert_eq!(content.header("content-length"), Some("10"));
}

#[tokio::test]
async fn fields_come_in_any_order_and_raw_bytes_without_a_name() {
    let api = TestApi::start().await;
    let form = Form::new()
        .text("expires_after[seconds]", "3600")
        .part("file", Part::bytes(&b"abc"[..]).file_name("upload"))
        .text("expires_after[anchor]", "created_at")
        .text("purpose", "user_data");
    let made = api.post_form(form).await.ok();
    assert_eq!((&made["filename"], &made["purpose"]), (&json!("upload"), &json!("user_data")));
    let lifetime =
        made["expires_at"].as_i64().expect("time") - made["created_at"].as_i64().expect("time");
    assert_eq!(lifetime, 3600);
}

#[tokio::test]
async fn a_path_in_a_name_is_left_out() {
    let api = TestApi::start().await;
    let part = Part::bytes(&b"abc"[..]).file_name("C:\\data\\../rows.jsonl");
    let form = Form::new().text("purpose", "batch").part("file", part);
    assert_eq!(api.post_form(form).await.ok()["filename"], "rows.jsonl");
}

#[tokio::test]
async fn a_wrong_form_is_refused_by_field_and_leaves_no_file() {
    let api = TestApi::start().await;
    let with = |name: &'static str, value: &'static str| form().text(name, value);
    let only_file = || Form::new().part("file", file(b"a"));
    for (form, param, code) in [
        (Form::new().text("purpose", "fine-tune"), "file", "missing_required_parameter"),
        (only_file(), "purpose", "missing_required_parameter"),
        (only_file().text("purpose", "fine-tune-results"), "purpose", "invalid_value"),
        (with("purpose", "world-peace"), "purpose", "invalid_value"),
        (with("expires_after[seconds]", "60"), "expires_after[seconds]", "invalid_value"),
        (with("expires_after[anchor]", "now"), "expires_after[anchor]", "invalid_value"),
        (form().part("file", file(b"b")), "file", "invalid_value"),
    ] {
        let error = api.post_form(form).await.error(400);
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{error}");
    }
    assert_eq!(api.get("/v1/files").await.ok()["data"], json!([]));
}

#[tokio::test]
async fn a_body_that_is_no_form_is_refused() {
    let api = TestApi::start().await;
    let error = api.post("/v1/files", &json!({"purpose": "fine-tune"})).await.error(400);
    assert_eq!(error["code"], "invalid_body");
    let torn = api
        .request(Method::POST, "/v1/files")
        .header("content-type", "multipart/form-data; boundary=x")
        .body("--x\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\nabc");
    assert_eq!(Reply::of(torn).await.error(400)["code"], "invalid_body");
    assert_eq!(api.get("/v1/files").await.ok()["data"], json!([]));
}

#[tokio::test]
async fn unknown_fields_are_named_in_a_warning() {
    let api = TestApi::start().await;
    let reply = api.post_form(form().text("colour", "green")).await;
    assert_eq!(reply.header("x-tunesmith-warning"), Some("Unknown fields were ignored: colour."));
}

#[tokio::test]
async fn a_file_over_the_cap_is_a_413_and_leaves_no_file() {
    let api = TestApi::with_max_file_bytes(9).await;
    let error = api.post_form(form()).await.error(413);
    assert_eq!(error["code"], "payload_too_large");
    assert_eq!(error["message"], "The file is over the 9 bytes that this server accepts.");
    // One that is still being sent when the cap is passed gets its reply too.
    let long = Form::new().part("file", Part::bytes(vec![7; 3 << 20])).text("purpose", "batch");
    api.post_form(long).await.error(413);
    assert_eq!(api.get("/v1/files").await.ok()["data"], json!([]));
}

#[tokio::test]
async fn a_range_is_a_206_with_its_place() {
    let api = TestApi::start().await;
    let id = api.upload("0123456789").await;
    let path = format!("/v1/files/{id}/content");
    let part = Reply::of(api.request(Method::GET, &path).header(RANGE, "bytes=2-4")).await;
    assert_eq!((part.status.as_u16(), part.body.as_slice()), (206, &b"234"[..]));
    assert_eq!(part.header("content-range"), Some("bytes 2-4/10"));
    assert_eq!(part.header("content-length"), Some("3"));
    let past = Reply::of(api.request(Method::GET, &path).header(RANGE, "bytes=10-")).await;
    assert_eq!(past.error(416)["code"], "range_not_satisfiable");
}

#[tokio::test]
async fn an_empty_file_has_empty_content() {
    let api = TestApi::start().await;
    let id = api.upload("").await;
    let content = api.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!((content.status.as_u16(), content.body.len()), (200, 0));
}

#[tokio::test]
async fn pages_go_on_after_the_last_id_in_either_order() {
    let api = TestApi::start().await;
    let mut ids = Vec::new();
    for number in 0..5 {
        ids.push(api.upload(number.to_string()).await);
    }
    let newest: Vec<&String> = ids.iter().rev().collect();
    let mut seen = Vec::new();
    let mut after = String::new();
    loop {
        let page = api.get(&format!("/v1/files?limit=2{after}")).await.ok();
        let data = page["data"].as_array().expect("data");
        seen.extend(data.iter().map(|file| file["id"].as_str().expect("id").to_owned()));
        assert_eq!(page["first_id"], data[0]["id"]);
        after = format!("&after={}", page["last_id"].as_str().expect("id"));
        if page["has_more"] == false {
            break;
        }
    }
    assert_eq!(seen.iter().collect::<Vec<_>>(), newest);
    let oldest = api.get("/v1/files?order=asc&limit=1").await.ok();
    assert_eq!((&oldest["data"][0]["id"], &oldest["has_more"]), (&json!(ids[0]), &json!(true)));
    let nothing = api.get("/v1/files?limit=0").await.ok();
    assert_eq!((&nothing["data"], &nothing["has_more"]), (&json!([]), &json!(true)));
    for (query, param) in [
        ("limit=-1", "limit"),
        ("limit=10001", "limit"),
        ("order=up", "order"),
        ("after=file-x", "after"),
    ] {
        let error = api.get(&format!("/v1/files?{query}")).await.error(400);
        assert_eq!(error["param"], param);
    }
}

#[tokio::test]
async fn a_list_can_be_of_one_purpose() {
    let api = TestApi::start().await;
    api.upload("a").await;
    let count = async |purpose: &str| {
        let page = api.get(&format!("/v1/files?purpose={purpose}")).await.ok();
        page["data"].as_array().expect("data").len()
    };
    assert_eq!((count("fine-tune").await, count("batch").await, count("no-such").await), (1, 0, 0));
}

#[tokio::test]
async fn a_deleted_file_is_gone_like_one_that_never_was() {
    let api = TestApi::start().await;
    let id = api.upload("a").await;
    let path = format!("/v1/files/{id}");
    assert_eq!(api.delete(&path).await.ok(), json!({"id": id, "object": "file", "deleted": true}));
    for reply in
        [api.get(&path).await, api.get(&format!("{path}/content")).await, api.delete(&path).await]
    {
        let error = reply.error(404);
        assert_eq!(error["message"], format!("No such File object: {id}"));
        assert_eq!(error["param"], "id");
    }
}

#[tokio::test]
async fn a_file_that_a_job_still_reads_stays() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.start_job().await;
    let file = api.job(&job).await.training_file;
    let reply = api.delete(&format!("/v1/files/{file}")).await;
    assert_eq!(reply.error(400)["code"], "file_in_use");
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    api.post(&format!("/v1/fine_tuning/jobs/{job}/cancel"), &json!({})).await.ok();
    api.delete(&format!("/v1/files/{file}")).await.ok();
}

#[tokio::test]
async fn another_projects_file_does_not_exist() {
    let api = TestApi::start().await;
    let id = api.upload("secret").await;
    let stranger = api.stranger().await;
    let path = format!("/v1/files/{id}");
    for reply in [
        stranger.get(&path).await,
        stranger.get(&format!("{path}/content")).await,
        stranger.delete(&path).await,
    ] {
        assert_eq!(reply.error(404)["message"], format!("No such File object: {id}"));
    }
    assert_eq!(stranger.get("/v1/files").await.ok()["data"], json!([]));
    assert_eq!(stranger.get(&format!("/v1/files?after={id}")).await.error(400)["param"], "after");
    api.get(&path).await.ok();
}
