-- Who is told of the end of jobs, and what is still to be told.

-- The secret is kept as it is: each delivery is signed with it.
CREATE TABLE webhook_endpoints (
    id text PRIMARY KEY,
    sequence bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    project_id text NOT NULL REFERENCES projects,
    name text NOT NULL,
    url text NOT NULL,
    event_types text[] NOT NULL,
    secret text NOT NULL,
    -- The secret before the last change, for as long as deliveries carry its signature too.
    old_secret text,
    old_secret_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX webhook_endpoints_of_a_project ON webhook_endpoints (project_id, sequence);

-- A delivery is due at `next_attempt_at` until it has arrived or is given up; both set it to null.
CREATE TABLE webhook_deliveries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    endpoint_id text NOT NULL REFERENCES webhook_endpoints ON DELETE CASCADE,
    event_id text NOT NULL,
    event_type text NOT NULL,
    body text NOT NULL,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    next_attempt_at timestamptz DEFAULT now(),
    delivered_at timestamptz,
    last_status integer,
    last_error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT delivered_means_done CHECK (delivered_at IS NULL OR next_attempt_at IS NULL)
);
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (next_attempt_at)
    WHERE next_attempt_at IS NOT NULL;
CREATE INDEX webhook_deliveries_of_an_endpoint ON webhook_deliveries (endpoint_id);

-- Notes what a project's endpoints are to be told, in the transaction that makes it true: nothing
-- that ends an object can forget it.
CREATE FUNCTION tell_webhooks(project text, event text, object_id text) RETURNS void
LANGUAGE sql AS $$
    WITH event AS (
        SELECT 'evt_' || replace(gen_random_uuid()::text, '-', '') AS id
    ), noted AS (
        INSERT INTO webhook_deliveries (endpoint_id, event_id, event_type, body)
        SELECT endpoint.id, event.id, tell_webhooks.event,
            json_build_object('id', event.id, 'object', 'event',
                'created_at', extract(epoch FROM now())::bigint, 'type', tell_webhooks.event,
                'data', json_build_object('id', object_id))::text
        FROM event, webhook_endpoints AS endpoint
        WHERE endpoint.project_id = project AND tell_webhooks.event = ANY (endpoint.event_types)
        RETURNING 1
    )
    SELECT pg_notify('tunesmith_webhooks', '') WHERE EXISTS (SELECT 1 FROM noted)
$$;

CREATE FUNCTION tell_webhooks_of_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM tell_webhooks(NEW.project_id, 'fine_tuning.job.' || NEW.status, NEW.id);
    RETURN NULL;
END
$$;

CREATE TRIGGER job_ended AFTER UPDATE OF status ON jobs FOR EACH ROW
    WHEN (OLD.status <> NEW.status AND NEW.status IN ('succeeded', 'failed', 'cancelled'))
    EXECUTE FUNCTION tell_webhooks_of_job();
