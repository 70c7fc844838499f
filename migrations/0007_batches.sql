-- Files of requests that are answered by files of answers.

CREATE TABLE batches (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    project_id text NOT NULL REFERENCES projects,
    api_key_id text NOT NULL REFERENCES api_keys,
    -- Finds the batch that a retried request has already made.
    request_sha256 bytea NOT NULL CHECK (length(request_sha256) = 32),
    endpoint text NOT NULL,
    input_file text NOT NULL REFERENCES files,
    metadata jsonb NOT NULL CHECK (jsonb_typeof(metadata) = 'object'),
    output_lifetime_seconds bigint CHECK (output_lifetime_seconds >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,

    status text NOT NULL DEFAULT 'validating' CHECK (status IN
        ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling',
         'cancelled')),
    -- Who works on it has it to itself until then.
    claimed_until timestamptz NOT NULL DEFAULT now(),
    in_progress_at timestamptz,
    finalizing_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    expired_at timestamptz,
    cancelling_at timestamptz,
    cancelled_at timestamptz,
    errors jsonb,
    total bigint NOT NULL DEFAULT 0 CHECK (total >= 0),
    completed bigint NOT NULL DEFAULT 0 CHECK (completed >= 0),
    failed bigint NOT NULL DEFAULT 0 CHECK (failed >= 0),
    model text,
    output_file text REFERENCES files,
    error_file text REFERENCES files,
    CONSTRAINT no_more_are_answered_than_there_are CHECK (completed + failed <= total)
);
CREATE INDEX batches_of_a_project ON batches (project_id, sequence);
CREATE INDEX batches_by_request ON batches (api_key_id, request_sha256);
CREATE INDEX batches_to_work_on ON batches (claimed_until)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE INDEX unfinished_batches_by_input_file ON batches (input_file)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

CREATE FUNCTION tell_webhooks_of_batch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM tell_webhooks(NEW.project_id, 'batch.' || NEW.status, NEW.id);
    RETURN NULL;
END
$$;

CREATE TRIGGER batch_ended AFTER UPDATE OF status ON batches FOR EACH ROW
    WHEN (OLD.status <> NEW.status AND NEW.status IN ('completed', 'failed', 'expired', 'cancelled'))
    EXECUTE FUNCTION tell_webhooks_of_batch();
