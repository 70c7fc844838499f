-- Tenants, files, base models, jobs and what they leave behind.
--
-- Times are the database's. `sequence` orders rows by their insertion, which a timestamp cannot
-- when two fall into one microsecond; lists page by it. Words in CHECK constraints are those of
-- tunesmith-core; a test compares the two.

CREATE TABLE organizations (
    id text PRIMARY KEY,
    name text NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE projects (
    id text PRIMARY KEY,
    organization_id text NOT NULL REFERENCES organizations,
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (organization_id, name)
);

-- The secret itself is nowhere: 48 random characters need no slow hash.
CREATE TABLE api_keys (
    id text PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects,
    name text NOT NULL,
    secret_sha256 bytea NOT NULL UNIQUE CHECK (length(secret_sha256) = 32),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- What a file is called and is for may come after its content, so a file that is still coming has
-- neither. A deleted file keeps its row, so that a client that deletes while it pages does not lose
-- its place.
CREATE TABLE files (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    project_id text NOT NULL REFERENCES projects,
    status text NOT NULL CHECK (status IN ('uploading', 'processed')),
    filename text,
    purpose text,
    bytes bigint CHECK (bytes >= 0),
    sha256 text CHECK (length(sha256) = 64),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    deleted_at timestamptz,
    CONSTRAINT processed_files_are_whole CHECK (
        num_nulls(filename, purpose, bytes, sha256) = CASE status WHEN 'processed' THEN 0 ELSE 4 END)
);
CREATE INDEX files_of_a_project ON files (project_id, sequence) WHERE deleted_at IS NULL;

CREATE TABLE base_models (
    id text PRIMARY KEY,
    name text NOT NULL UNIQUE,
    context_length bigint NOT NULL CHECK (context_length > 0),
    config jsonb NOT NULL,
    manifest jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE jobs (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    project_id text NOT NULL REFERENCES projects,
    api_key_id text NOT NULL REFERENCES api_keys,
    -- Finds the job that a retried request has already made.
    request_sha256 bytea NOT NULL CHECK (length(request_sha256) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),

    -- What was asked for.
    model text NOT NULL,
    base_model_id text NOT NULL REFERENCES base_models,
    training_file text NOT NULL REFERENCES files,
    validation_file text REFERENCES files,
    suffix text,
    seed bigint NOT NULL CHECK (seed >= 0),
    metadata jsonb NOT NULL CHECK (jsonb_typeof(metadata) = 'object'),
    hyperparameters jsonb NOT NULL CHECK (jsonb_typeof(hyperparameters) = 'object'),
    -- The tuned model's name, settled when the job is made so that checkpoints can carry it.
    model_name text NOT NULL UNIQUE,

    -- Where it stands.
    status text NOT NULL CHECK (status IN
        ('validating_files', 'queued', 'running', 'succeeded', 'failed', 'cancelled')),
    paused boolean NOT NULL DEFAULT false,
    cancel_requested boolean NOT NULL DEFAULT false,
    validate_after timestamptz NOT NULL DEFAULT now(),
    resolved jsonb,
    started_at timestamptz,
    finished_at timestamptz,
    error jsonb,

    -- The lease. `attempt` is the fencing token and only ever grows; `tries` counts the attempts
    -- since the last progress.
    attempt integer NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    tries integer NOT NULL DEFAULT 0 CHECK (tries >= 0),
    worker_id text,
    lease_expires_at timestamptz,

    -- What the run has shown so far.
    run jsonb,
    last_step bigint NOT NULL DEFAULT 0 CHECK (last_step >= 0),
    resume_attempt integer,
    resume_step bigint,
    resume_is_private boolean,
    trained_tokens bigint CHECK (trained_tokens >= 0),
    result_file text REFERENCES files,

    CONSTRAINT running_means_leased
        CHECK ((status = 'running') = (worker_id IS NOT NULL)
           AND (worker_id IS NULL) = (lease_expires_at IS NULL)),
    CONSTRAINT terminal_means_finished
        CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CONSTRAINT failed_means_error CHECK ((status = 'failed') = (error IS NOT NULL)),
    CONSTRAINT past_validation_means_resolved
        CHECK (status NOT IN ('queued', 'running', 'succeeded') OR resolved IS NOT NULL),
    CONSTRAINT succeeded_means_results
        CHECK ((status = 'succeeded') = (trained_tokens IS NOT NULL AND result_file IS NOT NULL)),
    CONSTRAINT only_running_jobs_wait_for_cancel CHECK (NOT cancel_requested OR status = 'running'),
    CONSTRAINT resume_point_is_whole
        CHECK ((resume_attempt IS NULL) = (resume_step IS NULL)
           AND (resume_step IS NULL) = (resume_is_private IS NULL))
);
CREATE INDEX jobs_of_a_project ON jobs (project_id, sequence);
CREATE INDEX jobs_by_request ON jobs (api_key_id, request_sha256);
CREATE INDEX unfinished_jobs ON jobs (status, sequence) WHERE finished_at IS NULL;
CREATE INDEX unfinished_jobs_by_training_file ON jobs (training_file) WHERE finished_at IS NULL;
CREATE INDEX unfinished_jobs_by_validation_file ON jobs (validation_file) WHERE finished_at IS NULL;

CREATE TABLE idempotency_keys (
    api_key_id text NOT NULL REFERENCES api_keys,
    key text NOT NULL,
    request_sha256 bytea NOT NULL,
    job_id text NOT NULL REFERENCES jobs,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (api_key_id, key)
);

-- `dedupe_key` lets a resumed run say again what the lost one said, and each be seen once.
CREATE TABLE job_events (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    job_id text NOT NULL REFERENCES jobs,
    created_at timestamptz NOT NULL DEFAULT now(),
    level text NOT NULL CHECK (level IN ('info', 'warn', 'error')),
    type text NOT NULL CHECK (type IN ('message', 'metrics')),
    message text NOT NULL,
    data jsonb,
    dedupe_key text,
    UNIQUE (job_id, dedupe_key)
);
CREATE INDEX events_of_a_job ON job_events (job_id, sequence);

CREATE TABLE job_metrics (
    job_id text NOT NULL REFERENCES jobs,
    step bigint NOT NULL CHECK (step > 0),
    epoch double precision NOT NULL,
    train_loss double precision NOT NULL,
    train_mean_token_accuracy double precision NOT NULL,
    valid_loss double precision,
    valid_mean_token_accuracy double precision,
    full_valid_loss double precision,
    full_valid_mean_token_accuracy double precision,
    learning_rate double precision NOT NULL,
    grad_norm double precision NOT NULL,
    tokens bigint NOT NULL,
    tokens_per_second double precision NOT NULL,
    elapsed_seconds double precision NOT NULL,
    PRIMARY KEY (job_id, step)
);

-- The weights of a row lie under the job's attempt and step; `attempt` is the one that wrote them.
-- A row whose weights are deleted stays, as the history of the job.
CREATE TABLE checkpoints (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    job_id text NOT NULL REFERENCES jobs,
    attempt integer NOT NULL,
    step bigint NOT NULL CHECK (step > 0),
    name text NOT NULL UNIQUE,
    metrics jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    UNIQUE (job_id, step)
);

CREATE TABLE models (
    name text PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects,
    job_id text NOT NULL UNIQUE REFERENCES jobs,
    attempt integer NOT NULL,
    step bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX models_of_a_project ON models (project_id, created_at);
