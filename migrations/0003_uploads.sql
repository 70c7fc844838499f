-- Files that come in parts, in any order, and are put together when the client says in which.

CREATE TABLE uploads (
    id text PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects,
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'completed', 'cancelled', 'expired')),
    filename text NOT NULL,
    purpose text NOT NULL,
    mime_type text NOT NULL,
    bytes bigint NOT NULL CHECK (bytes >= 0),
    file_lifetime_seconds bigint CHECK (file_lifetime_seconds >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    -- Of a completed one: what it was made of, so that a complete that is sent again is known.
    part_ids text[],
    file_id text REFERENCES files,
    -- Whether the parts' objects are gone, once none can come any more.
    cleared boolean NOT NULL DEFAULT false,
    CONSTRAINT completed_means_file
        CHECK ((status = 'completed') = (file_id IS NOT NULL AND part_ids IS NOT NULL)),
    CONSTRAINT only_ended_uploads_are_cleared CHECK (NOT cleared OR status <> 'pending')
);
CREATE INDEX uploads_to_look_after ON uploads (expires_at) WHERE NOT cleared;

CREATE TABLE upload_parts (
    id text PRIMARY KEY,
    upload_id text NOT NULL REFERENCES uploads ON DELETE CASCADE,
    bytes bigint NOT NULL CHECK (bytes >= 0),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX parts_of_an_upload ON upload_parts (upload_id);
