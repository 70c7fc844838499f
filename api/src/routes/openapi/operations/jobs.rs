//! Jobs.

use super::super::operation::Operation;
use super::super::requests::reference;
use super::{AS_BEFORE, JOBS, example, of};
use crate::page::Page;
use crate::routes::job_preview::Preview;
use crate::routes::jobs::{self, JobObject};
use schemars::SchemaGenerator;
use serde_json::{Value, json};
use tunesmith_core::errors::ErrorCode;

pub(super) fn at_job(operation: Operation) -> Operation {
    operation.at("id", example::JOB, "The job's id.").errors([ErrorCode::FineTuneNotFound])
}

/// The body of a request for a job.
fn example_job() -> Value {
    json!({
        "model": example::MODEL,
        "training_file": example::FILE,
        "suffix": "support",
        "seed": 42,
        "metadata": { "team": "support" },
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 3,
                    "learning_rate": 0.0002,
                    "validation_split": 0.1,
                    "adapter": { "type": "lora", "r": 16 },
                },
            },
        },
    })
}

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 7] {
    let notes = json!({ "type": "object", "additionalProperties": { "type": "string" } });
    let job = of::<JobObject>(generator);
    [
        Operation::get("/v1/fine_tuning/jobs", (JOBS, "listJobs"), "List jobs, newest first")
            .page(jobs::DEFAULT_LIST, jobs::MAX_LIST)
            .deep(
                "metadata",
                notes,
                "Only jobs whose notes hold these pairs; `metadata=null` for jobs without any.",
            )
            .reply(of::<Page<JobObject>>(generator)),
        Operation::post("/v1/fine_tuning/jobs", (JOBS, "createJob"), "Create a job")
            .text(
                "The reply comes before the files are read: the job ends as `failed` when they \
                 break a rule. What is allowed and rarely meant, or changes nothing, is named in \
                 `x-tunesmith-warning`.",
            )
            .once(AS_BEFORE)
            .body(reference("CreateJob"), example_job())
            .errors([
                ErrorCode::ModelNotFound,
                ErrorCode::FileNotFound,
                ErrorCode::InsufficientQuota,
            ])
            .reply(job.clone()),
        Operation::post(
            "/v1/fine_tuning/jobs/preview",
            (JOBS, "previewJob"),
            "What a job would be, without making it",
        )
        .text(
            "Reads the files as the job would. What would stop the job is no error here: every \
             mistake is in `refusals`.",
        )
        .body(reference("CreateJob"), example_job())
        .reply(of::<Preview>(generator)),
        at_job(Operation::get(
            "/v1/fine_tuning/jobs/{id}",
            (JOBS, "retrieveJob"),
            "Retrieve a job",
        ))
        .reply(job.clone()),
        at_job(Operation::post(
            "/v1/fine_tuning/jobs/{id}/cancel",
            (JOBS, "cancelJob"),
            "Cancel a job",
        ))
        .errors([ErrorCode::InvalidJobState])
        .reply(job.clone()),
        at_job(Operation::post(
            "/v1/fine_tuning/jobs/{id}/pause",
            (JOBS, "pauseJob"),
            "Pause a job",
        ))
        .text("It writes a checkpoint first and keeps its place.")
        .errors([ErrorCode::InvalidJobState])
        .reply(job.clone()),
        at_job(Operation::post(
            "/v1/fine_tuning/jobs/{id}/resume",
            (JOBS, "resumeJob"),
            "Let a paused job go on",
        ))
        .errors([ErrorCode::InvalidJobState])
        .reply(job),
    ]
}
