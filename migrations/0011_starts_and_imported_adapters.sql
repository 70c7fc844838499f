-- Jobs that begin with the weights of a tuned model, and adapters that were made elsewhere.

-- Where these weights lie; `model` is then the tuned model's name, and the base model is its.
ALTER TABLE jobs ADD COLUMN start jsonb;
CREATE INDEX unfinished_jobs_by_start ON jobs (start)
    WHERE start IS NOT NULL AND finished_at IS NULL;

-- A tuned model that no job here has made.
CREATE TABLE imported_adapters (
    id text PRIMARY KEY,
    name text NOT NULL UNIQUE,
    project_id text NOT NULL REFERENCES projects,
    base_model_id text NOT NULL REFERENCES base_models,
    adapter jsonb NOT NULL CHECK (jsonb_typeof(adapter) = 'object'),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX imported_adapters_of_a_project ON imported_adapters (project_id, created_at);
