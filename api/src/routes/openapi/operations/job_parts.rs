//! What a job says and measures.

use super::super::operation::Operation;
use super::jobs::at_job;
use super::{JOBS, flag, of, order};
use crate::page::Page;
use crate::routes::job_parts::{self, CheckpointObject, Curve, EventObject};
use crate::routes::job_rows::{self, RowObject};
use schemars::SchemaGenerator;
use serde_json::json;
use tunesmith_core::metrics::{MAX_ROW_LOSSES, StepMetrics};

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 4] {
    const STREAM: &str = "Server-sent events: what there is, then each as it comes, until the job \
                          has ended.";
    let last = |operation: Operation| {
        operation.header(
            "Last-Event-ID",
            json!({ "type": "string" }),
            "Of a stream: where one that broke off goes on.",
        )
    };
    [
        last(
            at_job(Operation::get(
                "/v1/fine_tuning/jobs/{id}/events",
                (JOBS, "listJobEvents"),
                "List a job's events, newest first",
            ))
            .page(job_parts::DEFAULT_EVENTS, job_parts::MAX_LIST)
            .query("stream", flag(), STREAM),
        )
        .reply(of::<Page<EventObject>>(generator))
        .events(&of::<EventObject>(generator)),
        at_job(Operation::get(
            "/v1/fine_tuning/jobs/{id}/checkpoints",
            (JOBS, "listJobCheckpoints"),
            "List a job's checkpoints, newest first",
        ))
        .page(job_parts::DEFAULT_CHECKPOINTS, job_parts::MAX_LIST)
        .reply(of::<Page<CheckpointObject>>(generator)),
        at_job(Operation::get(
            "/v1/fine_tuning/jobs/{id}/rows",
            (JOBS, "listJobRows"),
            "Training rows by the loss at their last visit",
        ))
        .text("Of jobs of the method `supervised`.")
        .query("order", order("loss", "line"), "The highest loss first, or as in the file.")
        .query(
            "limit",
            json!({
                "type": "integer",
                "minimum": 1,
                "maximum": job_rows::MAX_ROWS,
                "default": job_rows::DEFAULT_ROWS,
            }),
            "How many entries a page has at most.",
        )
        .query(
            "after",
            json!({ "type": "integer", "minimum": 0, "maximum": MAX_ROW_LOSSES }),
            "The id of the row that the page follows.",
        )
        .reply(of::<Page<RowObject>>(generator)),
        last(
            at_job(Operation::get(
                "/v1/fine_tuning/jobs/{id}/metrics",
                (JOBS, "listJobMetrics"),
                "A job's loss curve",
            ))
            .query(
                "after",
                json!({ "type": "integer", "minimum": 0, "maximum": u32::MAX, "default": 0 }),
                "Only steps after this one.",
            )
            .query("stream", flag(), STREAM),
        )
        .reply(of::<Curve>(generator))
        .events(&of::<StepMetrics>(generator)),
    ]
}
