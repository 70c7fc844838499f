//! `/v1/fine_tuning/alpha/graders`: a grader checked, and tried on one answer.

use crate::auth::Authenticated;
use crate::body::read_json;
use crate::failure::{Failure, missing};
use crate::fields::given;
use actix_web::{HttpResponse, web};
use serde_json::{Map, Value, json};
use std::time::Instant;
use tunesmith_core::errors::ApiError;
use tunesmith_core::graders::{Grade, GradeError, Grader};

/// `POST /v1/fine_tuning/alpha/graders/validate`: the grader as it was read.
pub(crate) async fn validate(
    _: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    grader(&body.fields)?;
    Ok(body.reply(&["grader"]).json(json!({ "grader": body.fields["grader"] })))
}

/// `POST /v1/fine_tuning/alpha/graders/run`: what the grader says of `model_sample`.
pub(crate) async fn run(_: Authenticated, payload: web::Payload) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let grader = grader(&body.fields)?;
    let sample = match body.fields.get("model_sample") {
        Some(Value::String(sample)) => sample.clone(),
        None | Some(Value::Null) => return Err(missing("model_sample").into()),
        Some(other) => {
            return Err(crate::failure::invalid_value("model_sample", other, "a string").into());
        }
    };
    let item = given(&body.fields, "item").cloned().unwrap_or_else(|| json!({}));
    let begun = Instant::now();
    // A similarity of long texts takes its time, which the requests of others need not wait for.
    let graded = web::block(move || {
        let grade = grader.grade(&sample, &item);
        (grader, grade)
    });
    let (grader, grade) = graded.await.map_err(Failure::internal)?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(body.reply(&["grader", "model_sample", "item"]).json(shown(&grader, &grade, seconds)))
}

fn grader(fields: &Map<String, Value>) -> Result<Grader, ApiError> {
    Grader::parse(given(fields, "grader").ok_or_else(|| missing("grader"))?, "grader")
}

fn shown(grader: &Grader, grade: &Grade, seconds: f64) -> Value {
    let is = |error: GradeError| grade.error == Some(error);
    let scores = if grade.sub_rewards.is_empty() {
        json!({ grader.name.as_str(): grade.reward })
    } else {
        json!(grade.sub_rewards)
    };
    json!({
        "reward": grade.reward,
        "metadata": {
            "name": grader.name,
            "type": grader.kind(),
            "errors": {
                "formula_parse_error": false,
                "sample_parse_error": is(GradeError::SampleIsNotJson),
                "truncated_observation_error": is(GradeError::TooLong),
                "unresponsive_reward_error": false,
                "invalid_variable_error": is(GradeError::UnknownVariable),
                "other_error": is(GradeError::NotFinite),
                "python_grader_server_error": false,
                "python_grader_server_error_type": null,
                "python_grader_runtime_error": false,
                "python_grader_runtime_error_details": null,
                "model_grader_server_error": false,
                "model_grader_refusal_error": false,
                "model_grader_parse_error": false,
                "model_grader_server_error_details": null,
            },
            "execution_time": seconds,
            "scores": scores,
            "token_usage": null,
            "sampled_model_name": null,
        },
        "sub_rewards": grade.sub_rewards,
        "model_grader_token_usage_per_model": {},
    })
}

#[cfg(test)]
mod tests {
    use crate::testing::TestApi;
    use insta::assert_json_snapshot;
    use serde_json::json;

    #[tokio::test]
    async fn a_run_is_shown_as_the_sdks_declare_it() {
        let api = TestApi::start().await;
        let body = json!({
            "grader": {"type": "string_check", "name": "capital", "operation": "eq",
                       "input": "{{sample.output_text}}", "reference": "{{item.answer}}"},
            "model_sample": "Paris",
            "item": {"answer": "Paris"},
        });
        let reply = api.post("/v1/fine_tuning/alpha/graders/run", &body).await.ok();
        assert_json_snapshot!(reply, {".metadata.execution_time" => "[time]"}, @r#"
        {
          "reward": 1.0,
          "metadata": {
            "name": "capital",
            "type": "string_check",
            "errors": {
              "formula_parse_error": false,
              "sample_parse_error": false,
              "truncated_observation_error": false,
              "unresponsive_reward_error": false,
              "invalid_variable_error": false,
              "other_error": false,
              "python_grader_server_error": false,
              "python_grader_server_error_type": null,
              "python_grader_runtime_error": false,
              "python_grader_runtime_error_details": null,
              "model_grader_server_error": false,
              "model_grader_refusal_error": false,
              "model_grader_parse_error": false,
              "model_grader_server_error_details": null
            },
            "execution_time": "[time]",
            "scores": {
              "capital": 1.0
            },
            "token_usage": null,
            "sampled_model_name": null
          },
          "sub_rewards": {},
          "model_grader_token_usage_per_model": {}
        }
        "#);
        let valid = api
            .post("/v1/fine_tuning/alpha/graders/validate", &json!({"grader": body["grader"]}))
            .await
            .ok();
        assert_eq!(valid, json!({"grader": body["grader"]}));
    }

    #[tokio::test]
    async fn an_answer_that_cannot_be_graded_says_why_and_a_wrong_grader_is_refused() {
        let api = TestApi::start().await;
        let mut body = json!({
            "grader": {"type": "string_check", "name": "n", "operation": "eq",
                       "input": "{{item.nothing}}", "reference": "x"},
            "model_sample": "x",
        });
        let path = "/v1/fine_tuning/alpha/graders/run";
        let reply = api.post(path, &body).await.ok();
        assert_eq!(reply["metadata"]["errors"]["invalid_variable_error"], true);
        assert_eq!(reply["reward"], 0.0);
        body["grader"]["operation"] = json!("is");
        assert_eq!(api.post(path, &body).await.error(400)["param"], "grader.operation");
        body["grader"] = json!({"type": "python", "name": "n", "source": "x"});
        for path in [path, "/v1/fine_tuning/alpha/graders/validate"] {
            assert_eq!(api.post(path, &body).await.error(400)["code"], "grader_not_available");
        }
        for (body, param) in [(json!({}), "grader"), (json!({"grader": null}), "grader")] {
            assert_eq!(api.post(path, &body).await.error(400)["param"], param);
        }
        api.client_with(None).post(path, &body).await.error(401);
    }
}
