-- What uploaded files are found to be, before anything trains on them.

-- What a client should know of a file at a glance; none where all is well, or nothing is known yet.
ALTER TABLE files ADD COLUMN status_details text;

-- A report counts tokens, so there is one for each base model that was asked for; the model is the
-- empty word where there was none to count with. Without `report` it is still to be made.
CREATE TABLE file_reports (
    file_id text NOT NULL REFERENCES files,
    base_model_id text NOT NULL,
    report jsonb,
    tries integer NOT NULL DEFAULT 0 CHECK (tries >= 0),
    make_after timestamptz NOT NULL DEFAULT now(),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (file_id, base_model_id)
);
CREATE INDEX file_reports_to_make ON file_reports (created_at) WHERE report IS NULL;
