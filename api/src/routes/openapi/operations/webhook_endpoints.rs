//! Who is told of the end of jobs and batches.

use super::super::operation::Operation;
use super::super::requests::{self, deleted};
use super::{AS_BEFORE, WEBHOOKS, example, of};
use crate::page::Page;
use crate::routes::webhook_endpoints::{self, EndpointObject};
use schemars::SchemaGenerator;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 8] {
    const ENDPOINTS: &str = "/v1/webhook_endpoints";
    const ENDPOINT: &str = "/v1/webhook_endpoints/{id}";
    const EVENT: &str = "fine_tuning.job.succeeded";
    let at = |operation: Operation| {
        operation
            .at("id", example::WEBHOOK, "The endpoint's id.")
            .errors([ErrorCode::WebhookEndpointNotFound])
    };
    let endpoint = of::<EndpointObject>(generator);
    [
        Operation::get(
            "/v1/webhook_event_types",
            (WEBHOOKS, "listWebhookEventTypes"),
            "What an endpoint may be told",
        )
        .reply(requests::event_types()),
        Operation::get(ENDPOINTS, (WEBHOOKS, "listWebhookEndpoints"), "List endpoints")
            .page(webhook_endpoints::DEFAULT_LIST, webhook_endpoints::MAX_LIST)
            .reply(of::<Page<EndpointObject>>(generator)),
        Operation::post(ENDPOINTS, (WEBHOOKS, "createWebhookEndpoint"), "Make an endpoint")
            .text(
                "The secret is shown here and never again, but to this request if it is repeated.",
            )
            .once(AS_BEFORE)
            .body(
                requests::webhook_endpoint(&["name", "url", "event_types"]),
                json!({
                    "name": "the team's chat",
                    "url": "https://example.com/hook",
                    "event_types": [EVENT, "fine_tuning.job.failed"],
                }),
            )
            .reply(endpoint.clone()),
        at(Operation::get(ENDPOINT, (WEBHOOKS, "retrieveWebhookEndpoint"), "Retrieve an endpoint"))
            .reply(endpoint.clone()),
        at(Operation::post(ENDPOINT, (WEBHOOKS, "updateWebhookEndpoint"), "Change an endpoint"))
            .body(requests::webhook_endpoint(&[]), json!({ "event_types": [EVENT] }))
            .reply(endpoint.clone()),
        at(Operation::delete(ENDPOINT, (WEBHOOKS, "deleteWebhookEndpoint"), "Delete an endpoint"))
            .reply(deleted("webhook_endpoint.deleted")),
        at(Operation::post(
            "/v1/webhook_endpoints/{id}/rotate_secret",
            (WEBHOOKS, "rotateWebhookSecret"),
            "Give an endpoint another secret",
        ))
        .once(AS_BEFORE)
        .body(requests::rotation(), json!({ webhook_endpoints::KEEP: true }))
        .reply(endpoint),
        at(Operation::post(
            "/v1/webhook_endpoints/{id}/test",
            (WEBHOOKS, "testWebhookEndpoint"),
            "Send a sample to an endpoint now",
        ))
        .body(requests::webhook_test(), json!({ "event_type": EVENT }))
        .errors([ErrorCode::WebhookNotReached])
        .reply(json!({
            "type": "object",
            "required": ["object", "webhook_endpoint_id", "event_type", "status_code", "success"],
            "properties": {
                "object": { "const": "webhook_endpoint.test" },
                "webhook_endpoint_id": { "type": "string" },
                "event_type": { "type": "string" },
                "status_code": { "type": "integer" },
                "success": { "const": true },
            },
        })),
    ]
}
