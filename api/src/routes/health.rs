//! `/healthz`, `/readyz` and `/metrics`, for whoever watches the process. None asks for a key.

use crate::failure::Failure;
use crate::server::AppState;
use crate::telemetry;
use actix_web::{HttpResponse, web};
use serde_json::json;

/// The process answers.
pub(crate) async fn live() -> HttpResponse {
    HttpResponse::Ok().json(json!({ "status": "ok" }))
}

/// The process can do its work: its database answers.
pub(crate) async fn ready(state: web::Data<AppState>) -> Result<HttpResponse, Failure> {
    state.store.ping().await.map_err(Failure::unavailable)?;
    Ok(live().await)
}

/// Figures for Prometheus.
pub(crate) async fn metrics(state: web::Data<AppState>) -> HttpResponse {
    // Without a database the process's own figures are still told.
    let unfinished = state.store.unfinished_jobs().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "the metrics are told without the jobs");
        Vec::new()
    });
    let text = state.telemetry.text(&unfinished, state.live.open_streams());
    HttpResponse::Ok().content_type(telemetry::CONTENT_TYPE).body(text)
}

#[cfg(test)]
mod tests {
    use crate::testing::TestApi;

    #[tokio::test]
    async fn the_metrics_tell_of_requests_by_route_and_of_jobs_by_status() {
        let api = TestApi::start().await.with_base_model().await;
        let job = api.start_job().await;
        for id in [job.as_str(), "ftjob-nope"] {
            api.get(&format!("/v1/fine_tuning/jobs/{id}")).await;
        }
        api.get("/v1/nope").await;
        let reply = api.client_with(None).get("/metrics").await;
        let kind = reply.header("content-type").map(str::to_owned);
        assert_eq!(kind.as_deref(), Some(crate::telemetry::CONTENT_TYPE));
        let text = String::from_utf8(reply.body).expect("text");
        let route = r#"method="GET",route="/v1/fine_tuning/jobs/{id}""#;
        for line in [
            format!("tunesmith_http_requests_total{{{route},status=\"200\"}} 1"),
            format!("tunesmith_http_requests_total{{{route},status=\"404\"}} 1"),
            format!("tunesmith_http_request_duration_seconds_count{{{route}}} 2"),
            r#"tunesmith_http_requests_total{method="GET",route="none",status="404"} 1"#.to_owned(),
            r#"tunesmith_unfinished_jobs{status="validating_files"} 1"#.to_owned(),
            r#"tunesmith_unfinished_jobs{status="running"} 0"#.to_owned(),
            "tunesmith_open_streams 0".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
        assert!(!text.contains(&job), "an id would make a line for each job");
    }
}
