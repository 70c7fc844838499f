use crate::testing::{BASE, TestApi};
use insta::assert_json_snapshot;
use serde_json::json;

async fn tuned(api: &TestApi) -> String {
    let job = api.succeeded_job(json!({})).await;
    job["fine_tuned_model"].as_str().expect("model").to_owned()
}

#[tokio::test]
async fn base_and_tuned_models_are_listed() {
    let api = TestApi::start().await.with_base_model().await;
    let name = tuned(&api).await;
    let list = api.get("/v1/models").await.ok();
    assert_json_snapshot!(list, {
        ".data[].created" => "[time]", ".data[1].id" => "[tuned]", ".data[1].owned_by" => "[org]",
        ".last_id" => "[tuned]",
    }, @r#"
    {
      "object": "list",
      "data": [
        {
          "id": "tiny",
          "object": "model",
          "created": "[time]",
          "owned_by": "tunesmith"
        },
        {
          "id": "[tuned]",
          "object": "model",
          "created": "[time]",
          "owned_by": "[org]"
        }
      ],
      "first_id": "tiny",
      "last_id": "[tuned]",
      "has_more": false
    }
    "#);
    assert_eq!(list["data"][1]["id"], name);
}

#[tokio::test]
async fn a_name_with_colons_is_found_written_either_way() {
    let api = TestApi::start().await.with_base_model().await;
    let name = tuned(&api).await;
    for name in [name.clone(), name.replace(':', "%3A"), format!("{name}:ckpt-step-10")] {
        let model = api.get(&format!("/v1/models/{name}")).await.ok();
        assert_eq!(model["id"], name.replace("%3A", ":"));
        assert_eq!(model["object"], "model");
    }
    assert_eq!(api.get(&format!("/v1/models/{BASE}")).await.ok()["owned_by"], "tunesmith");
}

#[tokio::test]
async fn a_model_that_is_not_there_is_a_404_also_with_a_slash_in_its_name() {
    let api = TestApi::start().await;
    for (path, name) in [("none", "none"), ("a/b", "a/b"), ("a%2Fb", "a/b")] {
        let error = api.get(&format!("/v1/models/{path}")).await.error(404);
        assert_eq!(error["message"], format!("The model '{name}' does not exist"));
        assert_eq!(error["param"], "model");
    }
}

#[tokio::test]
async fn a_deleted_model_is_gone_and_so_are_its_weights() {
    let api = TestApi::start().await.with_base_model().await;
    let name = tuned(&api).await;
    let path = format!("/v1/models/{name}");
    assert_eq!(
        api.delete(&path).await.ok(),
        json!({"id": name, "object": "model", "deleted": true})
    );
    api.get(&path).await.error(404);
    api.delete(&path).await.error(404);
    api.get(&format!("{path}/weights")).await.error(404);
    assert_eq!(api.get("/v1/models").await.ok()["data"].as_array().expect("data").len(), 1);
}

#[tokio::test]
async fn a_base_model_cannot_be_deleted() {
    let api = TestApi::start().await.with_base_model().await;
    let error = api.delete(&format!("/v1/models/{BASE}")).await.error(400);
    assert_eq!(error["param"], "model");
    api.get(&format!("/v1/models/{BASE}")).await.ok();
}

#[tokio::test]
async fn another_projects_model_does_not_exist() {
    let api = TestApi::start().await.with_base_model().await;
    let name = tuned(&api).await;
    let stranger = api.stranger().await;
    for name in [name.clone(), format!("{name}:ckpt-step-10")] {
        let path = format!("/v1/models/{name}");
        for reply in [
            stranger.get(&path).await,
            stranger.get(&format!("{path}/weights")).await,
            stranger.delete(&path).await,
        ] {
            assert_eq!(reply.error(404)["message"], format!("The model '{name}' does not exist"));
        }
    }
    assert_eq!(stranger.get("/v1/models").await.ok()["data"].as_array().expect("data").len(), 1);
    api.get(&format!("/v1/models/{name}")).await.ok();
}
