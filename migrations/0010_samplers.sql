-- Processes that answer with models. Front-ends find them here and send orders to their addresses.

CREATE TABLE samplers (
    id text PRIMARY KEY,
    url text NOT NULL,
    -- What a front-end shows; made anew by each process, so it opens nothing when that is gone.
    token text NOT NULL,
    -- The models in its memory: front-ends prefer a sampler that need not load one.
    models text[] NOT NULL,
    -- A row that was not renewed for a while belongs to a process that is gone.
    seen_at timestamptz NOT NULL DEFAULT now()
);
