-- Jobs that learn from pairs of a preferred and a less preferred answer.

ALTER TABLE jobs ADD COLUMN method text NOT NULL DEFAULT 'supervised'
    CHECK (method IN ('supervised', 'dpo'));

ALTER TABLE job_metrics
    ADD COLUMN train_reward_accuracy double precision,
    ADD COLUMN train_reward_margin double precision,
    ADD COLUMN valid_reward_accuracy double precision,
    ADD COLUMN valid_reward_margin double precision;
