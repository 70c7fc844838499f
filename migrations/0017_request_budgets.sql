-- How many requests each project may still send, over all front-ends: a bucket that refills evenly, kept
-- as the time at which it will be full again. What it holds is worth a minute at most, and nothing after
-- a crash, so nobody waits for the disk on its behalf.

CREATE UNLOGGED TABLE request_budgets (
    project_id text PRIMARY KEY REFERENCES projects,
    -- What the last front-end that asked was given.
    granted integer NOT NULL,
    full_at timestamptz NOT NULL
);
