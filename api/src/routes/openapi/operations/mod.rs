//! The table of operations: every path and method that the server answers. One file a group.

mod batches;
mod checkpoint_permissions;
mod completions;
mod files;
mod graders;
mod job_parts;
mod jobs;
mod models;
mod organization;
mod server;
mod uploads;
mod webhook_endpoints;

use super::operation::Operation;
use crate::redirect;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

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
    all.extend(files::operations(generator));
    all.extend(uploads::operations(generator));
    all.extend(jobs::operations(generator));
    all.extend(job_parts::operations(generator));
    all.extend(checkpoint_permissions::operations(generator));
    all.extend(graders::operations());
    all.extend(completions::operations(generator));
    all.extend(batches::operations(generator));
    all.extend(models::operations(generator));
    all.extend(webhook_endpoints::operations(generator));
    all.extend(organization::of_projects(generator));
    all.extend(organization::of_admin_keys(generator));
    all.extend(server::operations());
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

/// What a request that is repeated is answered with.
const AS_BEFORE: &str = "gives what was made the first time";
/// The same where a secret is shown once.
const REFUSED: &str = "is refused, since the secret is shown once";

/// The schema of how long a signed address is good for.
fn expires_in() -> Value {
    json!({
        "type": "integer",
        "minimum": redirect::EXPIRES_IN.start(),
        "maximum": redirect::EXPIRES_IN.end(),
        "default": redirect::DEFAULT_EXPIRES_IN,
    })
}
