-- Who may use a checkpoint beside its own project; and who looks after projects and keys.

CREATE TABLE checkpoint_permissions (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    -- The name of a tuned model or of a checkpoint: random, so never used again.
    model_name text NOT NULL,
    project_id text NOT NULL REFERENCES projects,
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (model_name, project_id)
);

ALTER TABLE projects
    ADD COLUMN sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    ADD COLUMN archived_at timestamptz;

-- `redacted` is enough of the secret to tell a key from another, too little to use it. A revoked key
-- keeps its row, which jobs name.
ALTER TABLE api_keys
    ADD COLUMN sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    ADD COLUMN redacted text NOT NULL DEFAULT 'sk-...',
    ADD COLUMN revoked_at timestamptz;

-- Keys to an organisation's projects and keys, and to nothing inside a project.
CREATE TABLE admin_keys (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    organization_id text NOT NULL REFERENCES organizations,
    name text NOT NULL,
    secret_sha256 bytea NOT NULL UNIQUE CHECK (length(secret_sha256) = 32),
    redacted text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);
