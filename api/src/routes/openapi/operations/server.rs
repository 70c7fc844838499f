//! The server itself, its pages and its description.

use super::super::operation::{Access, Operation};
use super::{SERVER, example};
use crate::telemetry;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;

pub(super) fn operations() -> Vec<Operation> {
    let html = |path, id, summary| {
        Operation::get(path, (SERVER, id), summary).access(Access::Anybody).content(
            200,
            "text/html; charset=utf-8",
            json!({}),
        )
    };
    let status = || {
        json!({
            "type": "object", "required": ["status"], "properties": { "status": { "const": "ok" } },
        })
    };
    vec![
        Operation::get("/healthz", (SERVER, "isAlive"), "Whether the process answers")
            .access(Access::Anybody)
            .reply(status()),
        Operation::get("/readyz", (SERVER, "isReady"), "Whether it can do its work")
            .access(Access::Anybody)
            .reply(status())
            .errors([ErrorCode::Unavailable]),
        Operation::get("/metrics", (SERVER, "measure"), "Figures for Prometheus")
            .access(Access::Anybody)
            .content(200, telemetry::CONTENT_TYPE, json!({})),
        Operation::get("/openapi.yaml", (SERVER, "describe"), "This document")
            .access(Access::Anybody)
            .content(200, "application/yaml", json!({})),
        html("/docs", "showReference", "This document as a page"),
        html("/jobs/{id}", "showJob", "The page of a job, which asks for a key itself").at(
            "id",
            example::JOB,
            "The job's id.",
        ),
        html("/playground", "showPlayground", "One prompt, two models side by side"),
        Operation::get("/assets/{name}", (SERVER, "retrieveAsset"), "A file of these pages")
            .access(Access::Anybody)
            .at("name", "app.js", "`app.js` or `app.css`.")
            .content(200, "text/javascript; charset=utf-8", json!({}))
            .content(200, "text/css; charset=utf-8", json!({}))
            .errors([ErrorCode::UnknownUrl]),
    ]
}
