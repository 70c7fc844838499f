//! The table of operations: every path and method that the server answers.

use super::completions;
use super::operation::{Access, Operation};
use super::requests::{self, deleted, reference};
use crate::exports::Wanted;
use crate::page::Page;
use crate::redirect;
use crate::routes::batches::{self, BatchObject};
use crate::routes::checkpoint_permissions::{self, PermissionObject};
use crate::routes::files::{self, FileObject};
use crate::routes::job_create::{IDEMPOTENCY_KEY, MAX_IDEMPOTENCY_KEY};
use crate::routes::job_parts::{self, CheckpointObject, Curve, EventObject};
use crate::routes::job_preview::Preview;
use crate::routes::job_rows::{self, RowObject};
use crate::routes::jobs::{self, JobObject};
use crate::routes::models::ModelObject;
use crate::routes::organization;
use crate::routes::organization::admin_keys::KeyObject as AdminKeyObject;
use crate::routes::organization::project_keys::KeyObject as ProjectKeyObject;
use crate::routes::organization::projects::ProjectObject;
use crate::routes::uploads::{PartObject, UploadObject};
use crate::routes::webhook_endpoints::{self, EndpointObject};
use crate::routes::weights::{ADAPTER, GGUF, MERGED};
use crate::serving::{ChatCompletion, ChatCompletionChunk, Completion};
use crate::telemetry;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};
use tunesmith_core::dataset::FileReport;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::gguf::StorageType;
use tunesmith_core::metrics::{MAX_ROW_LOSSES, StepMetrics};

/// Names in examples; the tests put real ones in their place.
pub(super) mod example {
    pub(crate) const MODEL: &str = "SmolLM2-135M-Instruct";
    pub(crate) const FILE: &str = "file-8xTqLw2VbN4cYs7KdR9mZf3G";
    pub(crate) const BATCH_FILE: &str = "file-4cRwZs9PqV7nXg2LtM6kBh8D";
    pub(crate) const BATCH: &str = "batch_6yNfLm3TwK8xQd5VpR2cHs7J";
    pub(crate) const WEBHOOK: &str = "whe_9dKtXv4MzQ6pLn8WcS3gRb2F";
    pub(crate) const UPLOAD: &str = "upload_5hPzQk8WnC3tXj6LvB2sRd9M";
    pub(crate) const PART: &str = "part_2mKfVx7TqJ9wHc4NzL6bSy3D";
    pub(crate) const JOB: &str = "ftjob-3vRnGx9LpT6yQc2WkD8hZs5B";
    pub(crate) const TUNED: &str = "ft:SmolLM2-135M-Instruct:tunesmith:support:Xk29aPq7";
    pub(crate) const PERMISSION: &str = "cp_6tWsJd3KxQ8nLf5RvY2zCb9H";
    pub(crate) const PROJECT: &str = "proj_4nHyTb7QwK2xVs9LcG6jRm3F";
    pub(crate) const KEY: &str = "key_9kVzPd4RtX7mWq2NsL5yHc8J";
    pub(crate) const ADMIN_KEY: &str = "admkey_7bQxNf3KvT9wLs6YdR2hGz5C";
}

const FILES: &str = "Files";
const UPLOADS: &str = "Uploads";
const JOBS: &str = "Fine-tuning jobs";
const PERMISSIONS: &str = "Checkpoint permissions";
const GRADERS: &str = "Graders";
const MODELS: &str = "Models";
const ANSWERS: &str = "Answers";
const BATCHES: &str = "Batches";
const WEBHOOKS: &str = "Webhooks";
const ORGANIZATION: &str = "Organization";
const SERVER: &str = "Server";

/// The groups in the order of the document.
pub(super) const TAGS: [(&str, &str); 11] = [
    (FILES, "What clients upload and jobs produce."),
    (UPLOADS, "Files that come in parts."),
    (JOBS, "Jobs, what they say and what they measure."),
    (PERMISSIONS, "Which other projects may use a tuned model."),
    (GRADERS, "What scores an answer."),
    (ANSWERS, "What base models and tuned ones say."),
    (BATCHES, "Files of requests."),
    (MODELS, "Base models, tuned ones and their weights."),
    (WEBHOOKS, "Who is told of the end of jobs and batches."),
    (ORGANIZATION, "Projects and keys, for whoever has an admin key."),
    (SERVER, "The server itself, its pages and its description."),
];

/// All of them.
pub(super) fn all(generator: &mut SchemaGenerator) -> Vec<Operation> {
    let mut all = Vec::new();
    all.extend(of_files(generator));
    all.extend(of_uploads(generator));
    all.extend(of_jobs(generator));
    all.extend(of_job_parts(generator));
    all.extend(of_permissions(generator));
    all.extend(of_graders());
    all.extend(of_answers(generator));
    all.extend(of_batches(generator));
    all.extend(of_models(generator));
    all.extend(of_webhooks(generator));
    all.extend(of_projects(generator));
    all.extend(of_admin_keys(generator));
    all.extend(of_the_server());
    all
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

fn order(default: &str, other: &str) -> Value {
    json!({ "type": "string", "enum": [default, other], "default": default })
}

fn flag() -> Value {
    json!({ "type": "string", "enum": ["true", "false"], "default": "false" })
}

const IDEMPOTENCY: &str = "The same key with the same body gives what was made the first time.";

fn idempotency_key() -> Value {
    json!({ "type": "string", "minLength": 1, "maxLength": MAX_IDEMPOTENCY_KEY })
}

/// A report that is made, or that could not be.
fn file_report(generator: &mut SchemaGenerator) -> Value {
    let about = |status: &str| {
        json!({
            "object": { "const": "file.report" },
            "file_id": { "type": "string" },
            "status": { "const": status },
        })
    };
    let required = ["object", "file_id", "status"];
    let mut properties = about("completed");
    properties["created_at"] = json!({ "type": "integer" });
    let mut done = json!({ "type": "object", "required": required, "properties": properties });
    let found = FileReport::json_schema(generator).to_value();
    if let (Some(all), Some(found)) =
        (done["properties"].as_object_mut(), found["properties"].as_object())
    {
        all.extend(found.clone());
    }
    if let (Some(all), Some(found)) =
        (done["required"].as_array_mut(), found["required"].as_array())
    {
        all.push(json!("created_at"));
        all.extend(found.clone());
    }
    let mut properties = about("failed");
    properties["error"] = json!({ "type": "string", "description": "What to do about it." });
    let required = ["object", "file_id", "status", "error"];
    let failed = json!({ "type": "object", "required": required, "properties": properties });
    json!({ "oneOf": [done, failed] })
}

fn of_files(generator: &mut SchemaGenerator) -> [Operation; 6] {
    const FILE: (&str, &str) = ("id", "The file's id.");
    let at = |operation: Operation| {
        operation.at(FILE.0, example::FILE, FILE.1).errors([ErrorCode::FileNotFound])
    };
    [
        Operation::get("/v1/files", (FILES, "listFiles"), "List files")
            .query("purpose", json!({ "type": "string" }), "Only files of this purpose.")
            .query("order", order("desc", "asc"), "By the time at which they were made.")
            .page(files::MAX_LIST, files::MAX_LIST)
            .reply(of::<Page<FileObject>>(generator)),
        Operation::post("/v1/files", (FILES, "createFile"), "Upload a file")
            .form(requests::file())
            .errors([ErrorCode::InsufficientQuota])
            .reply(of::<FileObject>(generator)),
        at(Operation::get("/v1/files/{id}", (FILES, "retrieveFile"), "Retrieve a file"))
            .reply(of::<FileObject>(generator)),
        at(Operation::delete("/v1/files/{id}", (FILES, "deleteFile"), "Delete a file"))
            .errors([ErrorCode::FileInUse])
            .reply(deleted("file")),
        at(Operation::get(
            "/v1/files/{id}/content",
            (FILES, "downloadFile"),
            "Download a file's content",
        ))
        .query(
            "redirect",
            flag(),
            "Whether to answer with 307 and an address at the object store, where it signs such: \
             whoever has it reads the file, until it runs out.",
        )
        .query("expires_in", expires_in(), "Seconds until the address of `redirect` runs out.")
        .errors([ErrorCode::UnsupportedParameter])
        .parts("application/octet-stream"),
        at(Operation::get(
            "/v1/files/{id}/report",
            (FILES, "reportFile"),
            "What a file to train on is found to be",
        ))
        .text("Of files of purpose `fine-tune`. A report that is not made yet is asked for.")
        .query(
            "model",
            json!({ "type": "string" }),
            "The base model that tokens are counted for; the one that was imported first where \
             none is given.",
        )
        .errors([ErrorCode::ModelNotFound])
        .reply(file_report(generator))
        .content(
            202,
            "application/json",
            json!({
                "type": "object",
                "required": ["object", "file_id", "status"],
                "properties": {
                    "object": { "const": "file.report" },
                    "file_id": { "type": "string" },
                    "status": { "const": "in_progress" },
                },
            }),
        ),
    ]
}

fn of_uploads(generator: &mut SchemaGenerator) -> [Operation; 4] {
    let at = |operation: Operation| {
        operation
            .at("id", example::UPLOAD, "The upload's id.")
            .errors([ErrorCode::UploadNotFound, ErrorCode::InvalidUploadState])
    };
    [
        Operation::post("/v1/uploads", (UPLOADS, "createUpload"), "Begin an upload")
            .text("An upload that is not completed within an hour ends by itself.")
            .body(
                requests::upload(),
                json!({
                    "bytes": 1024,
                    "filename": "rows.jsonl",
                    "mime_type": "text/jsonl",
                    "purpose": "fine-tune",
                }),
            )
            .errors([ErrorCode::InsufficientQuota])
            .reply(of::<UploadObject>(generator)),
        at(Operation::post(
            "/v1/uploads/{id}/parts",
            (UPLOADS, "addUploadPart"),
            "Add a part to an upload",
        ))
        .form(requests::part())
        .reply(of::<PartObject>(generator)),
        at(Operation::post(
            "/v1/uploads/{id}/complete",
            (UPLOADS, "completeUpload"),
            "Make a file of an upload's parts",
        ))
        .body(requests::complete(), json!({ "part_ids": [example::PART] }))
        .reply(of::<UploadObject>(generator)),
        at(Operation::post(
            "/v1/uploads/{id}/cancel",
            (UPLOADS, "cancelUpload"),
            "Cancel an upload",
        ))
        .reply(of::<UploadObject>(generator)),
    ]
}

fn at_job(operation: Operation) -> Operation {
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

fn of_jobs(generator: &mut SchemaGenerator) -> [Operation; 7] {
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
                 break a rule. What is allowed and rarely meant is named in `x-tunesmith-warning`.",
            )
            .header(IDEMPOTENCY_KEY, idempotency_key(), IDEMPOTENCY)
            .body(reference("CreateJob"), example_job())
            .errors([
                ErrorCode::ModelNotFound,
                ErrorCode::FileNotFound,
                ErrorCode::IdempotencyConflict,
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

fn of_job_parts(generator: &mut SchemaGenerator) -> [Operation; 4] {
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

fn of_permissions(generator: &mut SchemaGenerator) -> [Operation; 3] {
    const PATH: &str = "/v1/fine_tuning/checkpoints/{name}/permissions";
    let at = |operation: Operation| {
        operation
            .at("name", example::TUNED, "The name of a tuned model or of a checkpoint.")
            .access(Access::ProjectOrAdmin)
            .errors([ErrorCode::NoSuchModel])
    };
    [
        at(Operation::get(PATH, (PERMISSIONS, "listPermissions"), "Who may use a model"))
            .query("project_id", json!({ "type": "string" }), "Only this project's.")
            .query("order", order("descending", "ascending"), "By the time they were given.")
            .page(checkpoint_permissions::DEFAULT_LIST, checkpoint_permissions::MAX_LIST)
            .reply(of::<Page<PermissionObject>>(generator)),
        at(Operation::post(
            PATH,
            (PERMISSIONS, "createPermissions"),
            "Let projects of the organisation use a model",
        ))
        .body(
            requests::projects(checkpoint_permissions::MAX_PROJECTS),
            json!({ "project_ids": [example::PROJECT] }),
        )
        .reply(of::<Page<PermissionObject>>(generator)),
        at(Operation::delete(
            "/v1/fine_tuning/checkpoints/{name}/permissions/{permission}",
            (PERMISSIONS, "deletePermission"),
            "Take a permission back",
        ))
        .at("permission", example::PERMISSION, "The permission's id.")
        .errors([ErrorCode::PermissionNotFound])
        .reply(deleted("checkpoint.permission")),
    ]
}

fn of_graders() -> [Operation; 2] {
    let grader = json!({
        "type": "string_check",
        "name": "capital",
        "operation": "eq",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
    });
    [
        Operation::post(
            "/v1/fine_tuning/alpha/graders/run",
            (GRADERS, "runGrader"),
            "Try a grader on an answer",
        )
        .body(
            requests::graded(),
            json!({ "grader": grader, "model_sample": "Paris", "item": { "answer": "Paris" } }),
        )
        .errors([ErrorCode::GraderNotAvailable])
        .reply(json!({
            "type": "object",
            "required": ["reward", "metadata", "sub_rewards", "model_grader_token_usage_per_model"],
            "properties": {
                "reward": { "type": "number", "description": "0 where there is an error." },
                "metadata": {
                    "type": "object",
                    "required": ["name", "type", "errors", "execution_time", "scores"],
                    "properties": {
                        "name": { "type": "string" },
                        "type": { "type": "string" },
                        "errors": { "type": "object" },
                        "execution_time": { "type": "number", "description": "Seconds." },
                        "scores": {
                            "type": "object", "additionalProperties": { "type": "number" },
                        },
                    },
                },
                "sub_rewards": {
                    "type": "object", "additionalProperties": { "type": "number" },
                },
                "model_grader_token_usage_per_model": { "type": "object" },
            },
        })),
        Operation::post(
            "/v1/fine_tuning/alpha/graders/validate",
            (GRADERS, "validateGrader"),
            "Check a grader",
        )
        .body(requests::grader(), json!({ "grader": grader }))
        .errors([ErrorCode::GraderNotAvailable])
        .reply(requests::grader()),
    ]
}

fn of_answers(generator: &mut SchemaGenerator) -> [Operation; 2] {
    let answered = |operation: Operation| {
        operation.errors([
            ErrorCode::NoSuchModel,
            ErrorCode::ContextLengthExceeded,
            ErrorCode::UnsupportedParameter,
            ErrorCode::ModelNotServed,
            ErrorCode::SamplerFailed,
        ])
    };
    let (chunk, completion) = (of::<ChatCompletionChunk>(generator), of::<Completion>(generator));
    // What goes wrong after the first event is the last one.
    let or_error = |chunk: &Value| json!({ "anyOf": [chunk, reference("Error")] });
    [
        answered(
            Operation::post(
                "/v1/chat/completions",
                (ANSWERS, "createChatCompletion"),
                "Answer a conversation",
            )
            .text("With `stream` the answer comes as server-sent events.")
            .body(
                completions::chat(),
                json!({
                    "model": example::TUNED,
                    "messages": [{ "role": "user", "content": "Hello" }],
                    "max_completion_tokens": 16,
                }),
            )
            .reply(of::<ChatCompletion>(generator))
            .events(&or_error(&chunk)),
        ),
        answered(
            Operation::post(
                "/v1/completions",
                (ANSWERS, "createCompletion"),
                "Go on from a plain prompt",
            )
            .text("With `stream` the answer comes as server-sent events.")
            .body(
                completions::completion(),
                json!({ "model": example::TUNED, "prompt": "Hello", "max_tokens": 16 }),
            )
            .reply(completion.clone())
            .events(&or_error(&completion)),
        ),
    ]
}

fn of_batches(generator: &mut SchemaGenerator) -> [Operation; 4] {
    let at = |operation: Operation| {
        operation.at("id", example::BATCH, "The batch's id.").errors([ErrorCode::BatchNotFound])
    };
    let batch = of::<BatchObject>(generator);
    [
        Operation::get("/v1/batches", (BATCHES, "listBatches"), "List batches, newest first")
            .page(batches::DEFAULT_LIST, batches::MAX_LIST)
            .reply(of::<Page<BatchObject>>(generator)),
        Operation::post("/v1/batches", (BATCHES, "createBatch"), "Create a batch")
            .header(IDEMPOTENCY_KEY, idempotency_key(), IDEMPOTENCY)
            .body(
                requests::batch(),
                json!({
                    "input_file_id": example::BATCH_FILE,
                    "endpoint": batches::ENDPOINTS[0],
                    "completion_window": batches::WINDOW,
                }),
            )
            .errors([ErrorCode::FileNotFound, ErrorCode::IdempotencyConflict])
            .reply(batch.clone()),
        at(Operation::get("/v1/batches/{id}", (BATCHES, "retrieveBatch"), "Retrieve a batch"))
            .reply(batch.clone()),
        at(Operation::post("/v1/batches/{id}/cancel", (BATCHES, "cancelBatch"), "Cancel a batch"))
            .errors([ErrorCode::InvalidBatchState])
            .reply(batch),
    ]
}

fn of_webhooks(generator: &mut SchemaGenerator) -> [Operation; 8] {
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
            .text("The secret is shown here and never again.")
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

fn of_models(generator: &mut SchemaGenerator) -> [Operation; 5] {
    let at = |operation: Operation| {
        operation
            .at("name", example::TUNED, "The model's name, or a checkpoint's.")
            .errors([ErrorCode::NoSuchModel])
    };
    [
        Operation::get("/v1/models", (MODELS, "listModels"), "List base models and tuned ones")
            .reply(of::<Page<ModelObject>>(generator)),
        Operation::post("/v1/models", (MODELS, "importAdapter"), "Import a LoRA adapter")
            .text(
                "An adapter that PEFT or another program has saved becomes a tuned model: it answers, \
                 it can be downloaded, and jobs can start from it.",
            )
            .form(requests::adapter())
            .errors([ErrorCode::ModelNotFound, ErrorCode::InsufficientQuota])
            .reply(of::<ModelObject>(generator)),
        at(Operation::get("/v1/models/{name}", (MODELS, "retrieveModel"), "Retrieve a model"))
            .reply(of::<ModelObject>(generator)),
        at(Operation::delete("/v1/models/{name}", (MODELS, "deleteModel"), "Delete a tuned model"))
            .errors([ErrorCode::InvalidValue])
            .reply(deleted("model")),
        at(Operation::get(
            "/v1/models/{name}/weights",
            (MODELS, "downloadWeights"),
            "Download a tuned model's weights",
        ))
        .text("A tar archive with a manifest of the files' SHA-256 sums.")
        .query(
            "format",
            json!({ "type": "string", "enum": [ADAPTER, MERGED, GGUF], "default": ADAPTER }),
            "The adapter alone, or the base model with it merged in: as a Hugging Face directory, \
             or as one GGUF file for llama.cpp and Ollama.",
        )
        .query(
            "type",
            json!({
                "type": "string",
                "enum": StorageType::ALL.map(StorageType::name),
                "default": StorageType::F16.name(),
            }),
            "How the matrices of a GGUF are stored; only with `format=gguf`.",
        )
        .query(
            "check",
            json!({ "type": "string", "enum": Wanted::WORDS, "default": Wanted::WORDS[0] }),
            "Whether the export is reloaded and compared with the served model before it is given \
             out: where a sampler can do it, or not given out otherwise, or not. It is done once; \
             the manifest has the error and its bound, or why there is none.",
        )
        .query(
            "redirect",
            json!({ "type": "string" }),
            "One of the files of an adapter, or of a model that was trained in full: answers with 307 \
             and its address at the object store, where it signs such. What is made while it is sent \
             has none.",
        )
        .query("expires_in", expires_in(), "Seconds until the address of `redirect` runs out.")
        .parts("application/x-tar")
        .errors([
            ErrorCode::WeightsNotAvailable,
            ErrorCode::ExportCheckFailed,
            ErrorCode::ExportBeingChecked,
            ErrorCode::ExportNotChecked,
            ErrorCode::UnsupportedParameter,
        ]),
    ]
}

/// The schema of how long a signed address is good for.
fn expires_in() -> Value {
    json!({
        "type": "integer",
        "minimum": redirect::EXPIRES_IN.start(),
        "maximum": redirect::EXPIRES_IN.end(),
        "default": redirect::DEFAULT_EXPIRES_IN,
    })
}

fn admin(operation: Operation) -> Operation {
    operation.access(Access::Admin)
}

fn of_projects(generator: &mut SchemaGenerator) -> [Operation; 9] {
    const PROJECT: &str = "/v1/organization/projects/{project}";
    const KEY: &str = "/v1/organization/projects/{project}/api_keys/{key}";
    let at = |operation: Operation| {
        admin(operation)
            .at("project", example::PROJECT, "The project's id.")
            .errors([ErrorCode::ProjectNotFound])
    };
    let at_key = |operation: Operation| {
        at(operation).at("key", example::KEY, "The key's id.").errors([ErrorCode::ApiKeyNotFound])
    };
    let project = of::<ProjectObject>(generator);
    [
        admin(Operation::get(
            "/v1/organization/projects",
            (ORGANIZATION, "listProjects"),
            "List projects",
        ))
        .query("include_archived", flag(), "Whether archived ones are shown too.")
        .page(organization::DEFAULT_LIST, organization::MAX_LIST)
        .reply(of::<Page<ProjectObject>>(generator)),
        admin(Operation::post(
            "/v1/organization/projects",
            (ORGANIZATION, "createProject"),
            "Make a project, or give the one that has the name",
        ))
        .body(requests::name(), json!({ "name": "search" }))
        .reply(project.clone()),
        at(Operation::get(PROJECT, (ORGANIZATION, "retrieveProject"), "Retrieve a project"))
            .reply(project.clone()),
        at(Operation::post(PROJECT, (ORGANIZATION, "renameProject"), "Rename a project"))
            .body(requests::name(), json!({ "name": "search and find" }))
            .reply(project.clone()),
        at(Operation::post(
            "/v1/organization/projects/{project}/archive",
            (ORGANIZATION, "archiveProject"),
            "Archive a project",
        ))
        .text("Its keys open nothing any more.")
        .reply(project),
        at(Operation::post(
            "/v1/organization/projects/{project}/service_accounts",
            (ORGANIZATION, "createServiceAccount"),
            "Make a key to a project",
        ))
        .text("The secret is shown here and never again.")
        .body(requests::name(), json!({ "name": "ci" }))
        .reply(json!({
            "type": "object",
            "required": ["id", "object", "name", "role", "created_at", "api_key"],
            "properties": {
                "id": { "type": "string" },
                "object": { "const": "organization.project.service_account" },
                "name": { "type": "string" },
                "role": { "type": "string" },
                "created_at": { "type": "integer" },
                "api_key": {
                    "type": "object",
                    "required": ["id", "object", "name", "created_at", "value"],
                    "properties": {
                        "id": { "type": "string" },
                        "object": { "type": "string" },
                        "name": { "type": "string" },
                        "created_at": { "type": "integer" },
                        "value": { "type": "string", "description": "The secret." },
                    },
                },
            },
        })),
        at(Operation::get(
            "/v1/organization/projects/{project}/api_keys",
            (ORGANIZATION, "listProjectKeys"),
            "List a project's keys",
        ))
        .page(organization::DEFAULT_LIST, organization::MAX_LIST)
        .reply(of::<Page<ProjectKeyObject>>(generator)),
        at_key(Operation::get(KEY, (ORGANIZATION, "retrieveProjectKey"), "Retrieve a key"))
            .reply(of::<ProjectKeyObject>(generator)),
        at_key(Operation::delete(KEY, (ORGANIZATION, "deleteProjectKey"), "Revoke a key"))
            .reply(deleted("organization.project.api_key.deleted")),
    ]
}

fn of_admin_keys(generator: &mut SchemaGenerator) -> [Operation; 4] {
    const KEYS: &str = "/v1/organization/admin_api_keys";
    const KEY: &str = "/v1/organization/admin_api_keys/{key}";
    let at = |operation: Operation| {
        admin(operation)
            .at("key", example::ADMIN_KEY, "The admin key's id.")
            .errors([ErrorCode::ApiKeyNotFound])
    };
    [
        admin(Operation::get(KEYS, (ORGANIZATION, "listAdminKeys"), "List admin keys"))
            .page(organization::DEFAULT_LIST, organization::MAX_LIST)
            .reply(of::<Page<AdminKeyObject>>(generator)),
        admin(Operation::post(KEYS, (ORGANIZATION, "createAdminKey"), "Make an admin key"))
            .text("The secret is shown here and never again.")
            .body(requests::admin_key(), json!({ "name": "ops", "expires_in_seconds": 86_400 }))
            .reply(of::<AdminKeyObject>(generator)),
        at(Operation::get(KEY, (ORGANIZATION, "retrieveAdminKey"), "Retrieve an admin key"))
            .reply(of::<AdminKeyObject>(generator)),
        at(Operation::delete(KEY, (ORGANIZATION, "deleteAdminKey"), "Revoke an admin key"))
            .reply(deleted("organization.admin_api_key.deleted")),
    ]
}

fn of_the_server() -> Vec<Operation> {
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
