//! The objects that the official SDK's own tests ask for, by the ids that those tests use.
//!
//! Nothing but the program that runs these tests sees this: it empties the database.

use crate::objects::{ObjectKey, ObjectPrefix};
use crate::{Store, StoreError};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use sqlx::PgConnection;
use sqlx::types::Json;
use tunesmith_core::hyperparameters::{DataFacts, Hyperparameters};
use tunesmith_core::ids::{FileId, UploadId};
use tunesmith_core::weights::Manifest;

/// The keys that the tests send.
const API_KEY: &str = "My API Key";
const ADMIN_KEY: &str = "My Admin API Key";
/// The job that the tests look at, pause, resume and cancel.
const JOB: &str = "ft-AF1WoRqd3aJAHsqc9NY7iL8F";
/// Lists are asked for what comes after the entry with this id.
const AFTER: &str = "after";
/// Base models by the names that the tests use; nobody asks what they say.
const BASE_MODELS: [&str; 2] = ["gpt-4o-mini", "gpt-4o-mini-2024-07-18"];
/// Tuned models: one to delete, one to share, one whose sharing is looked at.
const TUNED_MODELS: [&str; 3] =
    ["ft:gpt-4o-mini:acemeco:suffix:abc123", "ft:gpt-4o-mini-2024-07-18:org:weather:B7R9VjQd", JOB];
const FILES: [&str; 4] = ["file-abc123", "file_id", "input_file_id", AFTER];
const CONTENT: &[u8] = b"Example data";
const UPLOAD: &str = "upload_abc123";
const PART: &str = "string";

impl Store {
    /// Empties the database and puts the objects there anew. Base models that were imported stay.
    ///
    /// # Errors
    /// Those of the database and the object store.
    pub async fn seed_fixtures(&self) -> Result<(), StoreError> {
        let content = || Bytes::from_static(CONTENT);
        for file in FILES {
            self.objects
                .put_bytes(&ObjectKey::File(FileId::from(file.to_owned())), content())
                .await?;
        }
        let part = ObjectPrefix::UploadParts(UploadId::from(UPLOAD.to_owned())).file(PART);
        self.objects.put_bytes(&part, content()).await?;

        let mut transaction = self.pool.begin().await?;
        let connection = &mut *transaction;
        // Whatever hangs on an organisation goes with it.
        sqlx::query("TRUNCATE organizations CASCADE").execute(&mut *connection).await?;
        sqlx::query("DELETE FROM base_models WHERE name = ANY($1)")
            .bind(BASE_MODELS)
            .execute(&mut *connection)
            .await?;
        tenant(connection).await?;
        files(connection).await?;
        jobs(connection).await?;
        batches(connection).await?;
        transaction.commit().await?;
        Ok(())
    }
}

async fn tenant(connection: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO organizations (id, name) VALUES ('org', 'org')")
        .execute(&mut *connection)
        .await?;
    for project in ["project_id", "string"] {
        sqlx::query("INSERT INTO projects (id, organization_id, name) VALUES ($1, 'org', $1)")
            .bind(project)
            .execute(&mut *connection)
            .await?;
    }
    sqlx::query(
        "INSERT INTO api_keys (id, project_id, name, secret_sha256)
         VALUES ('key', 'project_id', 'key', $1)",
    )
    .bind(Sha256::digest(API_KEY).to_vec())
    .execute(&mut *connection)
    .await?;
    sqlx::query(
        "INSERT INTO admin_keys (id, organization_id, name, secret_sha256, redacted)
         VALUES ('admin', 'org', 'admin', $1, 'sk-admin-...')",
    )
    .bind(Sha256::digest(ADMIN_KEY).to_vec())
    .execute(&mut *connection)
    .await?;
    for name in BASE_MODELS {
        sqlx::query(
            "INSERT INTO base_models (id, name, context_length, config, manifest)
             VALUES ($1, $1, 2048, '{}', $2)",
        )
        .bind(name)
        .bind(Json(Manifest { files: Vec::new() }))
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

async fn files(connection: &mut PgConnection) -> Result<(), StoreError> {
    for file in FILES {
        sqlx::query(
            "INSERT INTO files (id, project_id, status, filename, purpose, bytes, sha256)
             VALUES ($1, 'project_id', 'processed', $1, 'fine-tune', $2, $3)",
        )
        .bind(file)
        .bind(CONTENT.len() as i64)
        .bind(hex::encode(Sha256::digest(CONTENT)))
        .execute(&mut *connection)
        .await?;
    }
    sqlx::query(
        "INSERT INTO uploads (id, project_id, filename, purpose, mime_type, bytes, expires_at)
         VALUES ($1, 'project_id', 'file', 'fine-tune', 'text/plain', $2, now() + interval '1 hour')",
    )
    .bind(UPLOAD)
    .bind(CONTENT.len() as i64)
    .execute(&mut *connection)
    .await?;
    sqlx::query("INSERT INTO upload_parts (id, upload_id, bytes) VALUES ($1, $2, $3)")
        .bind(PART)
        .bind(UPLOAD)
        .bind(CONTENT.len() as i64)
        .execute(&mut *connection)
        .await?;
    Ok(())
}

async fn jobs(connection: &mut PgConnection) -> Result<(), StoreError> {
    let resolved =
        Hyperparameters::default().resolve(&DataFacts { examples: 10, context_length: 64 });
    let owners = TUNED_MODELS.map(|model| (format!("job of {model}"), model.to_owned()));
    let queued = [JOB, AFTER].map(|job| (job.to_owned(), format!("model of {job}")));
    for (job, model) in owners.iter().chain(&queued) {
        sqlx::query(
            "INSERT INTO jobs (id, project_id, api_key_id, model, base_model_id, training_file, seed,
                 metadata, hyperparameters, model_name, status, resolved)
             VALUES ($1, 'project_id', 'key', $2, $2, $3, 0, $4, '{}', $5, 'queued', $6)",
        )
        .bind(job)
        .bind(BASE_MODELS[0])
        .bind(FILES[0])
        .bind(Json(json!({"foo": "string"})))
        .bind(model)
        .bind(Json(&resolved))
        .execute(&mut *connection)
        .await?;
    }
    for (job, model) in &owners {
        sqlx::query(
            "INSERT INTO models (name, project_id, job_id, attempt, step)
             VALUES ($1, 'project_id', $2, 1, 1)",
        )
        .bind(model)
        .bind(job)
        .execute(&mut *connection)
        .await?;
    }
    for (step, id) in [(1, AFTER), (2, "checkpoint")] {
        sqlx::query(
            "INSERT INTO checkpoints (id, job_id, attempt, step, name) VALUES ($1, $2, 1, $3, $1)",
        )
        .bind(id)
        .bind(JOB)
        .bind(step)
        .execute(&mut *connection)
        .await?;
        sqlx::query(
            "INSERT INTO job_events (id, job_id, level, type, message)
             VALUES ($1, $2, 'info', 'message', 'The job was created')",
        )
        .bind(id)
        .bind(JOB)
        .execute(&mut *connection)
        .await?;
    }
    for (model, id, project) in [
        (TUNED_MODELS[1], "cp_zc4Q7MP6XxulcVzj4MZdwsAB", "project_id"),
        (TUNED_MODELS[2], AFTER, "project_id"),
        (TUNED_MODELS[2], "permission", "string"),
    ] {
        sqlx::query(
            "INSERT INTO checkpoint_permissions (id, model_name, project_id) VALUES ($1, $2, $3)",
        )
        .bind(id)
        .bind(model)
        .bind(project)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// Nobody works on them: they are claimed for longer than any test runs.
async fn batches(connection: &mut PgConnection) -> Result<(), StoreError> {
    for batch in ["batch_id", AFTER] {
        sqlx::query(
            "INSERT INTO batches (id, project_id, api_key_id, endpoint, input_file, metadata, expires_at,
                 status, claimed_until)
             VALUES ($1, 'project_id', 'key', '/v1/chat/completions', 'input_file_id', '{}',
                 now() + interval '1 day', 'in_progress', now() + interval '1 day')",
        )
        .bind(batch)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}
