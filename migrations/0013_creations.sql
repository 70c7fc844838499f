-- What requests have made, so that a request that comes again makes nothing more: for every kind of
-- thing, and by the client's key or, where it sends none, by the body. `caller` is the id of an API key
-- or of an admin key, `made` that of the thing.

CREATE TABLE creations (
    caller text NOT NULL,
    key text,
    creation text NOT NULL,
    request_sha256 bytea NOT NULL CHECK (length(request_sha256) = 32),
    made text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX creations_by_key ON creations (caller, key) WHERE key IS NOT NULL;
CREATE INDEX creations_by_body ON creations (caller, request_sha256);

INSERT INTO creations (caller, key, creation, request_sha256, made, created_at)
SELECT api_key_id, key, 'job', request_sha256, job_id, created_at
FROM idempotency_keys WHERE created_at > now() - interval '24 hours'
UNION ALL
SELECT api_key_id, NULL, 'job', request_sha256, id, created_at
FROM jobs WHERE created_at > now() - interval '1 hour'
UNION ALL
SELECT api_key_id, NULL, 'batch', request_sha256, id, created_at
FROM batches WHERE created_at > now() - interval '1 hour';

DROP TABLE idempotency_keys;
ALTER TABLE jobs DROP COLUMN request_sha256;
ALTER TABLE batches DROP COLUMN request_sha256;
